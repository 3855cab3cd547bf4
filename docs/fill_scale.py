"""Fill the tables of docs/scale.md from `hf_lingudistill.labs.memory` and from the benchmark's results.

    python docs/fill_scale.py            # rewrite them
    python docs/fill_scale.py --check    # exit 1 if one is stale (the tests do the same)

Blocks look like `<!-- plan:NAME -->` ... `<!-- /plan -->`; NAME is a function below.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_lingudistill.labs.memory import (
    BUILT_IN_PAIRS,
    GIB,
    QUANTIZATIONS,
    ModelFacts,
    Plan,
    Setup,
    read_pair,
    smallest_plan,
)

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/scale.md"
RESULTS = ROOT / "benchmarks/results/plan_check.json"
METHODS = {
    "full": Setup(),
    "LoRA 16, bf16 weights": Setup(lora_rank=16, dtype="bfloat16"),
}
CARDS = (24, 48, 80, 141)


def _pairs() -> dict[str, tuple[ModelFacts, ModelFacts]]:
    return {student.split("/")[1]: read_pair(student, None) for student in BUILT_IN_PAIRS}


def _smallest(pair: tuple[ModelFacts, ModelFacts], setup: Setup, memory: float) -> Plan | None:
    return smallest_plan(*pair, replace(setup, gpu_memory=memory))


def _where(plan: Plan) -> str:
    setup = plan.setup
    teacher = "" if setup.teacher_quantization == "nf4" else ", teacher unquantised and sharded"
    return f"{setup.gpus} x {setup.engine}{teacher}" if setup.gpus > 1 else "1"


def smallest() -> str:
    """Devices and engine by card."""
    lines = [
        f"| student | training | {' | '.join(f'{card} GiB' for card in CARDS)} |",
        "|---|---|" + "---|" * len(CARDS),
    ]
    for name, pair in _pairs().items():
        for method, setup in METHODS.items():
            plans = [_smallest(pair, setup, card) for card in CARDS]
            cells = [f"{_where(plan)} ({plan.needed / GIB:.0f} GiB)" if plan else "more than 64" for plan in plans]
            lines.append(f"| {name} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lines() -> str:
    """Where the memory of a device goes, on the smallest set-up of 80 GiB cards."""
    columns = ("weights", "gradients", "optimizer states", "activations", "recorded KV", "logits and loss")
    others = ("autocast copies", "engine buffers")
    head = ["student", "training", "set-up", "peak at", *columns, "other", "teacher", "needed", "step over SFT"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, pair in _pairs().items():
        for method, setup in METHODS.items():
            plan = _smallest(pair, setup, 80)
            if plan is None:
                continue
            gib = [plan.lines.get(column, 0) / GIB for column in columns]
            cells = [name, method, _where(plan), plan.moment, *(f"{size:.1f}" for size in gib)]
            cells += [f"{sum(plan.lines.get(other, 0) for other in others) / GIB:.1f}"]
            cells += [f"{plan.lines['teacher'] / GIB:.1f}", f"{plan.needed / GIB:.1f}", f"{plan.cost:.3f}"]
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def teachers() -> str:
    """The whole teacher, and one copy of K/V."""
    rows = ["| student | teacher | nf4 | int8 | none (bf16) | recorded K/V |", "|---|---|---|---|---|---|"]
    for name, pair in _pairs().items():
        plan = _smallest(pair, Setup(), 10**6)
        assert plan is not None
        sizes = " | ".join(f"{plan.teacher[q] / GIB:.2f}" for q in QUANTIZATIONS)
        rows.append(f"| {name} | {plan.teacher_name.split('/')[1]} | {sizes} | {plan.recorded_kv / GIB:.2f} |")
    return "\n".join(rows)


def _results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def peaks() -> str:
    """Planned and measured peaks."""
    memory = _results()["memory"]
    rows = ["| shape | parameters | planned | measured | error |", "|---|---|---|---|---|"]
    for name, row in memory.items():
        rows.append(
            f"| {name} | {row['parameters'] / 1e6:.0f}M | {row['planned_mib']:.0f} MiB | {row['peak_mib']:.0f} MiB "
            f"| {row['error']:+.1%} |"
        )
    machine = _results()["machine"]
    worst = max((abs(row["error"]), name) for name, row in memory.items())
    rows += [
        "",
        f"{len(memory)} shapes; worst {worst[0]:.1%} ({worst[1]}). {machine['device']}, torch {machine['torch']}.",
    ]
    return "\n".join(rows)


def moments() -> str:
    """How far each moment of the step is off."""
    memory = _results()["memory"]
    names = list(next(iter(memory.values()))["planned_moments_mib"])
    rows = ["| moment | error, least to most | shape of the largest |", "|---|---|---|"]
    for moment in names:
        errors = {
            name: row["planned_moments_mib"][moment] / row["moments_mib"][moment] - 1 for name, row in memory.items()
        }
        worst = max(errors, key=lambda name: abs(errors[name]))
        rows.append(f"| {moment} | {min(errors.values()):+.1%} to {max(errors.values()):+.1%} | {worst} |")
    return "\n".join(rows)


def cost() -> str:
    """Planned and measured cost of a step."""
    rows = ["| `kv_sharing` | planned | measured, median (min - max) |", "|---|---|---|"]
    for arm, row in _results()["cost"].items():
        rows.append(
            f"| `{arm}` | {row['planned']:.3f} | {row['ratio']:.3f} ({row['ratio_min']:.3f} - {row['ratio_max']:.3f}) |"
        )
    return "\n".join(rows)


def filled(text: str) -> str:
    """The page with every block made anew."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- plan:{match[1]} -->\n{globals()[match[1]]()}\n<!-- /plan -->"

    return re.sub(r"<!-- plan:(\w+) -->\n.*?<!-- /plan -->", block, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is stale")
    args = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    new = filled(text)
    if args.check:
        if new != text:
            print("docs/scale.md is stale: run `python docs/fill_scale.py`.", file=sys.stderr)
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What fits on which card."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_lingudistill.labs.plan import (
    GIB,
    QUANTIZATIONS,
    ModelFacts,
    Plan,
    Setup,
    read_pair,
    smallest_plan,
)
from hf_lingudistill.labs.plan.known_models import BUILT_IN_PAIRS

from .files import GPU_COSTS, PLAN_CHECK, gpu_cases, read

METHODS = {
    "full": Setup(),
    "LoRA 16, bf16 weights": Setup(lora_rank=16, dtype="bfloat16"),
}
CARDS = (24, 48, 80, 141)


# --------------------------------------------------------------------------------------------------------------------
# What a set-up needs
# --------------------------------------------------------------------------------------------------------------------
def _pairs() -> dict[str, tuple[ModelFacts, ModelFacts]]:
    return {student.split("/")[1]: read_pair(student, None) for student in BUILT_IN_PAIRS}


def _smallest(pair: tuple[ModelFacts, ModelFacts], setup: Setup, memory: float) -> Plan | None:
    return smallest_plan(*pair, replace(setup, gpu_memory=memory))


def _where(plan: Plan) -> str:
    setup = plan.setup
    teacher = "" if setup.teacher_quantization == "nf4" else ", teacher unquantised and sharded"
    return f"{setup.gpus} x {setup.engine}{teacher}" if setup.gpus > 1 else "1"


def plan_smallest() -> str:
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


def plan_lines() -> str:
    """Where the memory of a device goes, on the smallest set-up of 80 GiB cards."""
    columns = ("weights", "gradients", "optimizer states", "activations", "recorded KV", "logits")
    others = ("autocast copies", "engine buffers", "VLM before")
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


def plan_teachers() -> str:
    """The whole teacher, and one copy of K/V."""
    rows = ["| student | teacher | nf4 | int8 | none (bf16) | recorded K/V |", "|---|---|---|---|---|---|"]
    for name, pair in _pairs().items():
        plan = _smallest(pair, Setup(), 10**6)
        assert plan is not None
        sizes = " | ".join(f"{plan.teacher[q] / GIB:.2f}" for q in QUANTIZATIONS)
        rows.append(f"| {name} | {plan.teacher_name.split('/')[1]} | {sizes} | {plan.recorded_kv / GIB:.2f} |")
    return "\n".join(rows)


def _plan_check() -> dict[str, Any]:
    return read(PLAN_CHECK)


def plan_peaks() -> str:
    """Planned and measured peaks."""
    memory = _plan_check()["memory"]
    rows = ["| shape | parameters | planned | measured | error |", "|---|---|---|---|---|"]
    for name, row in memory.items():
        rows.append(
            f"| {name} | {row['parameters'] / 1e6:.0f}M | {row['planned_mib']:.0f} MiB | {row['peak_mib']:.0f} MiB "
            f"| {row['error']:+.1%} |"
        )
    machine = _plan_check()["machine"]
    worst = max((abs(row["error"]), name) for name, row in memory.items())
    rows += [
        "",
        f"{len(memory)} shapes; worst {worst[0]:.1%} ({worst[1]}). {machine['device']}, torch {machine['torch']}.",
    ]
    return "\n".join(rows)


ARMS = {
    "vision_before": "`vision`, `kv_source=before`",
    "vision_before_twice": "the same, `blind_weight` .5",
}


def plan_gpu() -> str:
    """Planned and measured peaks of the GPU's cases."""
    rows = ["| GPU | student | batch | `kv_sharing` | planned | measured | error |", "|---|---|---|---|---|---|---|"]
    errors = []
    for gpu, case in gpu_cases():
        for arm, row in case["arms"].items():
            if "planned_mb" in row and (gpu, arm) != ("H100", "vision_before"):  # over whole rows
                errors.append(row["planned_mb"] / row["peak_mb"] - 1)
                title = ARMS.get(arm, f"`{arm}`")
                rows.append(
                    f"| {gpu} | {case['shape']} | {case['batch']} | {title} | {row['planned_mb'] / 1024:.1f} GiB | {row['peak_mb'] / 1024:.1f} GiB | "
                    f"{errors[-1]:+.1%} |"
                )
    rows += ["", f"torch {read(GPU_COSTS[0])['torch']}: {min(errors):+.1%} to {max(errors):+.1%}."]
    return "\n".join(rows)


def plan_gpu_cost() -> str:
    """Planned and measured cost of a step on the GPU."""
    rows = [
        "| GPU | student | batch | `kv_sharing` | planned | measured, median (min - max) | seconds planned | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpu, case in gpu_cases():
        for arm, row in case["arms"].items():
            if "planned_ratio" in row and (gpu, arm) != ("H100", "vision_before"):  # over whole rows
                rows.append(
                    f"| {gpu} | {case['shape']} | {case['batch']} | {ARMS.get(arm, f'`{arm}`')} | {row['planned_ratio']:.3f} | {row['ratio']:.3f} ({row['ratio_min']:.3f} - "
                    f"{row['ratio_max']:.3f}) | {row['planned_seconds']:.2f} | {row['seconds']:.2f} |"
                )
    return "\n".join(rows)


def plan_moments() -> str:
    """How far each moment of the step is off."""
    memory = _plan_check()["memory"]
    names = list(next(iter(memory.values()))["planned_moments_mib"])
    rows = ["| moment | error, least to most | shape of the largest |", "|---|---|---|"]
    for moment in names:
        errors = {
            name: row["planned_moments_mib"][moment] / row["moments_mib"][moment] - 1 for name, row in memory.items()
        }
        worst = max(errors, key=lambda name: abs(errors[name]))
        rows.append(f"| {moment} | {min(errors.values()):+.1%} to {max(errors.values()):+.1%} | {worst} |")
    return "\n".join(rows)


def plan_cost() -> str:
    """Planned and measured cost of a step."""
    rows = ["| `kv_sharing` | planned | measured, median (min - max) |", "|---|---|---|"]
    for arm, row in _plan_check()["cost"].items():
        rows.append(
            f"| `{arm}` | {row['planned']:.3f} | {row['ratio']:.3f} ({row['ratio_min']:.3f} - {row['ratio_max']:.3f}) |"
        )
    return "\n".join(rows)

"""Fill the README's figures from result files, so that no number is typed: `make results`.

    python docs/fill_readme.py            # rewrite README.md
    python docs/fill_readme.py --check    # exit 1 if README.md is stale (used by the tests)

Blocks look like `<!-- results:NAME -->` ... `<!-- /results -->`; NAME is a function below.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from hf_lingudistill.report import prompts_text, table

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "docs/results/demo/report.json"
DEMO_REAL = ROOT / "docs/results/demo_real/report.json"
STEP_COST = ROOT / "benchmarks/results/step_cost.json"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _demo(path: Path) -> str:
    report = _read(path)
    language, vision, config = report["language"], report["vision"], report["config"]
    share = language["recovered"]
    low, high = language["interval95"]["after"]
    machine = report["machine"]
    text = [
        table(report),
        "",
        f"{share:.0%} of the lost log-perplexity came back (CE only: {language['recovered_ce_only']:.0%}); vision moved by "
        f"{100 * (vision['after'] - vision['before']):+.1f} points. One run: seed {config['seed']}, "
        f"{language['n_texts']} texts / {language['n_tokens']:,} tokens of {language['metric'].split(' on ')[1]}, "
        f"{vision['n']} questions; 95 % bootstrap interval of the perplexity after: {low:.1f} to {high:.1f}; "
        f"{report['seconds']['total']:.0f} s in all on {machine['threads']} CPU threads "
        f"({'bf16' if config['bf16'] else 'fp32'}), teacher in {config['teacher_quantization']} "
        f"({config['teacher_mib']:.1f} MiB).",
    ]
    return "\n".join(text)


def demo() -> str:
    """The embedded demo's table."""
    return _demo(DEMO)


def demo_prompts() -> str:
    """The embedded demo's prompts, before and after."""
    return "```\n" + prompts_text(_read(DEMO)["prompts"]) + "\n```"


def demo_real() -> str:
    """The table and the prompts of the demo with real weights."""
    if not DEMO_REAL.is_file():
        return "_Written, not measured yet: run `make demo-real`._"
    return _demo(DEMO_REAL) + "\n\n```\n" + prompts_text(_read(DEMO_REAL)["prompts"]) + "\n```"


def step_cost() -> str:
    """Time and memory of one step."""
    if not STEP_COST.is_file():
        return "_Not measured yet: run `python benchmarks/step_cost.py --json benchmarks/results/step_cost.json`._"
    result = _read(STEP_COST)
    arms, shape, machine = result["arms"], result["shape"], result["machine"]
    base = arms["sft"].get("peak_mb")
    lines = ["| arm | step | time over SFT (min - max) | peak memory over SFT |", "|---|---|---|---|"]
    for arm, row in arms.items():
        memory = f"{row['peak_mb'] - base:+.0f} MiB" if base and "peak_mb" in row else "not measured"
        lines.append(
            f"| `{arm}` | {row['seconds']:.2f} s | {row['ratio']:.3f} ({row['ratio_min']:.3f} - {row['ratio_max']:.3f}) "
            f"| {memory} |"
        )
    lines += [
        "",
        f"Medians of {result['rounds']} interleaved rounds; {shape['length']} tokens, {shape['image_tokens']} of them image, "
        f"{shape['response_tokens']} response; LM of {shape['lm_parameters'] / 1e6:.0f}M parameters, teacher in "
        f"{shape['teacher_quantization']}, one copy of K/V is {shape['kv_mb']:.0f} MiB; {machine['device']}, "
        f"{machine['dtype']}, load {machine['load_before']} to {machine['load_after']}.",
    ]
    return "\n".join(lines)


BLOCKS = {"demo": demo, "demo_prompts": demo_prompts, "demo_real": demo_real, "step_cost": step_cost}


def fill(text: str) -> str:
    """README text with every block rendered anew.

    Raises:
        KeyError: if a block's name has no function here.
    """
    pattern = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + BLOCKS[match[2]]() + "\n" + match[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    filled = fill(text)
    if args.check:
        if filled != text:
            print("README.md is stale: run `make results`.", file=sys.stderr)
        return int(filled != text)
    readme.write_text(filled, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

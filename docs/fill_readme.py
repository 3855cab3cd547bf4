"""Fill the figures of the README and of the recipe's README from result files, so that no number is typed: `make results`.

    python docs/fill_readme.py            # rewrite both
    python docs/fill_readme.py --check    # exit 1 if one is stale (used by the tests)

Blocks look like `<!-- results:NAME -->` ... `<!-- /results -->`; NAME is a function below.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from hf_lingudistill.labs.demo_report import prompts_text, table, verdict

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "docs/results/demo/report.json"
STEP_COST = ROOT / "benchmarks/results/step_cost.json"
RECIPE = ROOT / "examples/recipes/five_artists"
SUMMARY = RECIPE / "results/summary.json"
NOT_YET = "Not measured yet: `make reproduce`."
MAIN_ARMS = [
    "original",
    "before",
    "default",
    "ce",
    "none",
    "vision",
    "prompt",
    "full",
    "caption",
    "interpolate_05",
    "ce_tenth",
]
ARM_TITLES = {
    "original": "original LM",
    "before": "VLM before",
    "default": "**default**",
    "ce": "CE on the same rows",
    "ce_tenth": "CE at a tenth of the learning rate",
    "caption": "KL to the original told the caption (upper bound)",
    "interpolate_05": "interpolation .5, no training",
}
# (title, metric, digits)
ARM_COLUMNS = [
    ("text KL", "text_kl", 3),
    ("top-1", "text_top1", 3),
    ("image KL", "image_kl", 3),
    ("dependent", "image_kl_dependent", 3),
    ("rest", "image_kl_rest", 3),
    ("bits/byte", "bits_per_byte", 3),
    ("IFEval strict", "ifeval_strict", 3),
    ("naming, seen artists", "naming_seen", 3),
    ("naming, new artist", "naming_new", 3),
    ("recovered", "recovered_text_kl", 3),
]
FILLED = (ROOT / "README.md", RECIPE / "README.md")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def demo() -> str:
    """The embedded demo's table."""
    report = _read(DEMO)
    return f"{table(report)}\n\n{' '.join(verdict(report).split())}"


def demo_prompts() -> str:
    """The embedded demo's prompts, before and after."""
    return "```\n" + prompts_text(_read(DEMO)["prompts"]) + "\n```"


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


# --------------------------------------------------------------------------------------------------------------------
# The recipe
# --------------------------------------------------------------------------------------------------------------------
RECIPE_ARMS = {
    "original": "original LM",
    "before": "VLM before",
    "vision_only": "image questions only, CE",
    "ce": "CE on the mix (text replay)",
    "kl_text": "KL on text rows only, nothing shared",
    "adapt_lora": "LoRA adaptation in place of full",
    "interpolate_03": "interpolation, .3 VLM + .7 LM",
    "interpolate_05": "interpolation, .5 VLM + .5 LM",
    "interpolate_07": "interpolation, .7 VLM + .3 LM",
    "prompt_interpolate_07": "LinguDistill `prompt`, then interpolation .7",
    "prompt": "**LinguDistill `prompt`** (default)",
    "full": "LinguDistill `full`",
    "vision": "LinguDistill `vision`",
    "none": "LinguDistill `none`",
    "prompt_all": "`prompt`, KL on all tokens",
    "full_all": "`full`, KL on all tokens",
    "vision_all": "`vision`, KL on all tokens",
    "none_all": "`none`, KL on all tokens",
    "prompt_kl": "`prompt`, KL without CE, confident tokens",
    "prompt_all_kl": "`prompt`, KL without CE, all tokens",
    "prompt_unselected": "`prompt`, KL on all rows and tokens",
    "prompt_int8": "`prompt`, int8 teacher",
    "prompt_fp32": "`prompt`, unquantised teacher",
    "none_kl": "`none`, KL without CE, confident tokens",
    "prompt_kl_half": "`prompt`, KL without CE, `distill_weight` .5",
    "prompt_kl_reverse": "`prompt`, KL without CE, `beta` 1 (reverse)",
    "prompt_kl_warm": "`prompt`, KL without CE, `temperature` 2",
}
# The arm whose settings are the package's defaults
DEFAULT = "prompt"


def _summary() -> dict[str, Any]:
    return _read(SUMMARY) if SUMMARY.is_file() else {}


def _spread(found: dict[str, Any] | None, digits: int, sign: str = "") -> str:
    """`mean ± half`, or the mean alone of a single seed."""
    if found is None:
        return "-"
    mean = f"{found['mean']:{sign}.{digits}f}"
    return mean if found.get("half") is None else f"{mean} ± {found['half']:.{digits}f}"


def _arms_table(arms: dict[str, Any], order: list[str]) -> str:
    lines = ["| " + " | ".join(["arm", *(title for title, _, _ in ARM_COLUMNS)]) + " |"]
    lines.append("|" + "---|" * (len(ARM_COLUMNS) + 1))
    for arm in order:
        if arm in arms:
            cells = [_spread(arms[arm].get(metric), digits) for _, metric, digits in ARM_COLUMNS]
            lines.append("| " + " | ".join([ARM_TITLES.get(arm, f"`{arm}`"), *cells]) + " |")
    return "\n".join(lines)


def _of(regime: str, drift: str, tower: str | None = None) -> dict[str, Any]:
    summary = _summary()
    regimes = summary.get("regimes", {}) if tower is None else summary.get("towers", {}).get(tower, {})
    found: dict[str, Any] = regimes.get(regime, {}).get(drift, {})
    return found


def five_artists() -> str:
    """The arms of regime P at severe drift that a reader would ask about first."""
    arms = _of("P", "severe")
    return _arms_table(arms, MAIN_ARMS) if arms else NOT_YET


def _whole(regime: str, drift: str, tower: str | None = None) -> str:
    arms = _of(regime, drift, tower)
    order = sorted(
        (arm for arm in arms if arm != "default"), key=lambda arm: arms[arm].get("text_kl", {}).get("mean", 0.0)
    )
    return _arms_table(arms, order) if arms else NOT_YET


def five_artists_severe() -> str:
    return _whole("P", "severe")


def five_artists_mild() -> str:
    return _whole("P", "mild")


def five_artists_replay() -> str:
    return _whole("M", "severe")


def five_artists_joint() -> str:
    return _whole("P", "severe", "joint")


def five_artists_polished() -> str:
    return _whole("P", "severe", "polished")


BLOCKS = {
    "demo": demo,
    "demo_prompts": demo_prompts,
    "step_cost": step_cost,
    "five_artists": five_artists,
    "five_artists_severe": five_artists_severe,
    "five_artists_mild": five_artists_mild,
    "five_artists_replay": five_artists_replay,
    "five_artists_joint": five_artists_joint,
    "five_artists_polished": five_artists_polished,
}


def fill(text: str) -> str:
    """A text with every block rendered anew.

    Raises:
        KeyError: if a block's name has no function here.
    """
    pattern = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + BLOCKS[match[2]]() + "\n" + match[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = 0
    for path in FILLED:
        text = path.read_text(encoding="utf-8")
        filled = fill(text)
        if args.check and filled != text:
            print(f"{path.relative_to(ROOT)} is stale: run `make results`.", file=sys.stderr)
            stale = 1
        elif not args.check:
            path.write_text(filled, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())

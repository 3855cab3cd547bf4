"""Fill the figures of the README and of the recipe's README from result files, so that no number is typed: `make results`.

    python docs/fill_readme.py            # rewrite both
    python docs/fill_readme.py --check    # exit 1 if one is stale (used by the tests)

Blocks look like `<!-- results:NAME -->` ... `<!-- /results -->`; NAME is a function below.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from hf_lingudistill.labs.demo_report import prompts_text, table

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "docs/results/demo/report.json"
DEMO_REAL = ROOT / "docs/results/demo_real/report.json"
STEP_COST = ROOT / "benchmarks/results/step_cost.json"
RECIPE = ROOT / "examples/recipes/smollm2_135m"
FILLED = (ROOT / "README.md", RECIPE / "README.md")


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


def _recipe_reports() -> dict[str, dict[str, Any]]:
    """{"severe-0": report} of every drift and seed that has results."""
    return {path.parent.name: _read(path) for path in sorted((RECIPE / "results").glob("*-*/report.json"))}


def _task(report: dict[str, Any], metric: str, group: str | None = None) -> dict[str, Any]:
    return next(t for t in report["tasks"] if t["metric"] == metric and (group is None or t["group"] == group))


def _difference(task: dict[str, Any], of: str, minus: str) -> dict[str, Any] | None:
    return next((d for d in task["differences"] if d["of"] == of and d["minus"] == minus), None)


def _excess(report: dict[str, Any], arm: str) -> tuple[float, float, float] | None:
    """(mean, smallest, largest) share recovered over the unseen texts, or None where nothing was lost or measured."""
    shares = [task["recovered"].get(arm) for task in report["tasks"] if task["metric"] == "bits_per_byte"]
    values = [share["value"] for share in shares if share and share["value"] is not None]
    return (sum(values) / len(values), min(values), max(values)) if values else None


def _recipe_row(report: dict[str, Any], arm: str) -> str:
    texts = [t for t in report["tasks"] if t["metric"] == "bits_per_byte"]
    bits = sum(t["scores"][arm]["value"] for t in texts) / len(texts)
    cells = [RECIPE_ARMS[arm], f"{bits:.3f}"]
    share = _excess(report, arm)
    cells.append(f"{share[0]:.0%} ({share[1]:.0%} to {share[2]:.0%})" if share else "-")
    for metric, digits in (("exact_match", 3), ("image_accuracy", 3), ("image_nll", 2), ("rest_nll", 2)):
        task = _task(report, metric)
        score = task["scores"].get(arm)
        if score is None:
            cells.append("-")
            continue
        text = f"{score['value']:.{digits}f}"
        if metric in ("exact_match", "image_accuracy"):
            text += f" ({task['controls']['shuffled'][arm]['value']:.2f})"
        cells.append(text)
    return "| " + " | ".join(cells) + " |"


def recipe_screen() -> str:
    """Every arm at one drift and one seed."""
    report = _recipe_reports().get("severe-0")
    if report is None:
        return "_Not measured yet: run `make reproduce`._"
    arms = [arm for arm in RECIPE_ARMS if arm in report["models"]]
    head = (
        "arm",
        "bits/byte, unseen texts",
        "recovered (worst to best source)",
        "image questions (shuffled)",
        "image tokens right (shuffled)",
        "image tokens, nats",
        "other tokens, nats",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *(_recipe_row(report, arm) for arm in arms)]
    vision, answers = _task(report, "exact_match"), _task(report, "image_nll")
    texts = [t for t in report["tasks"] if t["metric"] == "bits_per_byte"]
    half = [(s["high"] - s["low"]) / 2 for s in vision["scores"].values()]
    missing = [name for name in report["recipe"]["arms"] if name not in report["models"]]
    machine = report["machine"]
    lines += [
        "",
        f"Severe drift, seed 0, one run an arm. {len(texts)} text tasks of {texts[0]['n']} texts, {vision['n']} image questions "
        f"(95 % interval about +-{max(half):.3f}), {answers['n']} long answers, {answers['notes']['image_token_share']:.0%} of "
        f"whose {answers['notes']['tokens']} tokens depend on the image. CPU, fp32, torch {machine['torch']}."
        + (f" Not run yet: {', '.join(missing)}." if missing else ""),
    ]
    return "\n".join(lines)


def recipe_targets() -> str:
    """What was to be reached, and by how much each run of the default missed it."""
    reports = {name: report for name, report in _recipe_reports().items() if DEFAULT in report["models"]}
    if not reports:
        return "_Not measured yet: run `make reproduce`._"
    head = (
        "run",
        "recovered on the worst source (90 %)",
        "image questions lost (1 point)",
        "image tokens, nats: CE minus default (> 0)",
        "image tokens, nats: interpolation minus default (> 0)",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, report in reports.items():
        share, seeing = _excess(report, DEFAULT), _task(report, "exact_match")["scores"]
        lost = 100 * (seeing["before"]["value"] - seeing[DEFAULT]["value"])
        cells = [name, "nothing was lost" if share is None else f"{share[1]:.0%}{_mark(share[1] >= 0.9)}"]
        cells.append(f"{lost:.1f}{_mark(lost <= 1.0)}")
        for rival in ("ce", "interpolate_05"):
            if rival not in report["models"]:
                cells.append("-")
                continue
            value, low, high = _paired(_task(report, "image_nll"), DEFAULT, rival)
            cells.append(f"{-value:+.3f} [{-high:+.3f}, {-low:+.3f}]{_mark(high < 0)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mark(reached: bool) -> str:
    return " reached" if reached else " missed"


# What each setting is compared with: two arms that differ in it alone
SETTINGS = {
    "`kv_sharing`: `prompt` against `full`": ("prompt", "full"),
    "`kv_sharing`: `prompt` against `vision`": ("prompt", "vision"),
    "`kv_sharing`: `prompt` against `none`": ("prompt", "none"),
    "the same without CE": ("prompt_kl", "none_kl"),
    "`distill_tokens`: `confident` against `all`": ("prompt", "prompt_all"),
    "the same without CE ": ("prompt_kl", "prompt_all_kl"),
    "`ce_weight`: 0 against .5": ("prompt_kl", "prompt"),
    "`distill_weight`: 1 against .5 (without CE)": ("prompt_kl", "prompt_kl_half"),
    "`beta`: 0 against 1 (without CE)": ("prompt_kl", "prompt_kl_reverse"),
    "`temperature`: 1 against 2 (without CE)": ("prompt_kl", "prompt_kl_warm"),
    "rows: marked ones against all (and all tokens)": ("prompt", "prompt_unselected"),
    "`teacher_quantization`: `nf4` against `int8`": ("prompt", "prompt_int8"),
    "`teacher_quantization`: `nf4` against `none`": ("prompt", "prompt_fp32"),
}


def recipe_settings() -> str:
    """The first arm minus the second, which differ in one setting, on the same items."""
    report = _recipe_reports().get("severe-0")
    known = {} if report is None else {title: pair for title, pair in SETTINGS.items() if _compared(report, *pair)}
    if report is None or not known:
        return "_Not measured yet: run `make reproduce`._"
    head = ("setting", "bits/byte, unseen texts", "image questions", "image tokens, nats", "other tokens, nats")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        "| " + " | ".join([title.strip(), *_paired_cells(report, *pair)]) + " |" for title, pair in known.items()
    ]
    return "\n".join(lines)


def _paired_cells(report: dict[str, Any], arm: str, rival: str) -> list[str]:
    """An arm minus a rival: bits/byte over all texts, image questions, nats of the image's and of other tokens."""
    found = [_paired(t, arm, rival) for t in report["tasks"] if t["metric"] == "bits_per_byte"]
    mean = sum(f[0] for f in found) / len(found)
    # other items in every task: the intervals' halves add in squares
    half = sum(((f[2] - f[1]) / 2) ** 2 for f in found) ** 0.5 / len(found)
    cells = [f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"]
    for metric in ("exact_match", "image_nll", "rest_nll"):
        value, low, high = _paired(_task(report, metric), arm, rival)
        cells.append(f"{value:+.3f} [{low:+.3f}, {high:+.3f}]")
    return cells


def recipe_against() -> str:
    """The default against its rivals, paired, for every drift and seed."""
    reports = {name: report for name, report in _recipe_reports().items() if DEFAULT in report["models"]}
    if not reports:
        return "_Not measured yet: run `make reproduce`._"
    head = ("run", "against", "bits/byte, unseen texts", "image questions", "image tokens, nats", "other tokens, nats")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, report in reports.items():
        for rival in ("before", "ce", "interpolate_05"):
            if rival not in report["models"]:
                continue
            cells = [name, rival, *_paired_cells(report, DEFAULT, rival)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _compared(report: dict[str, Any], arm: str, rival: str) -> bool:
    """Whether a report has both arms, and their difference."""
    task = _task(report, "exact_match")
    return _difference(task, arm, rival) is not None or _difference(task, rival, arm) is not None


def _paired(task: dict[str, Any], arm: str, rival: str) -> tuple[float, float, float]:
    """An arm minus a rival."""
    found = _difference(task, arm, rival)
    if found is not None:
        return found["value"], found["low"], found["high"]
    found = _difference(task, rival, arm)
    assert found is not None
    return -found["value"], -found["high"], -found["low"]


SEEN = (("bits_per_byte", 3), ("recovered_worst", None), ("questions", 3), ("image_accuracy", 3), ("image_nll", 2), ("rest_nll", 2))  # fmt: skip


def _over_seeds() -> dict[str, Any]:
    path = RECIPE / "results/seeds.json"
    found = _read(path) if path.is_file() else {}
    return {drift: part for drift, part in found.items() if len(part["arms"]) > 2}


def _spread(found: dict[str, Any] | None, digits: int | None, sign: str = "") -> str:
    if found is None:
        return "-"
    form = f"{sign}.0%" if digits is None else f"{sign}.{digits}f"
    half = "" if found["half"] is None else f" ± {found['half']:{form.lstrip('+')}}"
    return f"{found['mean']:{form}}{half}"


def recipe_seeds() -> str:
    """The decisive arms over seeds, a table for each drift."""
    found = _over_seeds()
    if not found:
        return "_Not measured yet: run `make reproduce`._"
    head = ("drift", "arm", "seeds", "bits/byte, unseen texts", "recovered, worst source", "image questions")
    head += ("image tokens right", "image tokens, nats", "other tokens, nats")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for drift, part in found.items():
        for arm, measures in part["arms"].items():
            seeds = ", ".join(measures["bits_per_byte"]["values"])
            cells = [drift, RECIPE_ARMS[arm], seeds, *(_spread(measures.get(m), digits) for m, digits in SEEN)]
            lines.append("| " + " | ".join(cells) + " |")
    stages = [stage for report in _recipe_reports().values() for stage in report["stages"].values()]
    seconds = [stage["cpu_seconds"] for stage in stages if "distilled_tokens" in stage.get("last_log", {})]
    if seconds:
        lines += [
            "",
            f"Training one distilled arm took {statistics.median(seconds):.0f} s of CPU time in the median of {len(seconds)} "
            f"({min(seconds):.0f} to {max(seconds):.0f}), one thread, fp32.",
        ]
    return "\n".join(lines)


def recipe_seed_differences() -> str:
    """Differences of two arms of the same seed, over seeds."""
    found = _over_seeds()
    if not found:
        return "_Not measured yet: run `make reproduce`._"
    pairs = [("prompt_kl", rival) for rival in ("before", "ce", "interpolate_05", "kl_text", "none_kl", "prompt")]
    pairs += [("prompt", rival) for rival in ("before", "ce", "interpolate_05", "kl_text")]
    return _seed_differences(found, {pair: f"`{pair[0]}` minus `{pair[1]}`" for pair in pairs})


# The README's short form: what is asked, and the two arms that answer it
ASKED = {
    ("prompt", "ce"): "the default against CE on the same rows",
    ("prompt", "interpolate_05"): "the default against interpolation at .5",
    ("prompt", "kl_text"): "the default against KL on text rows alone, nothing shared",
    ("prompt_kl", "prompt"): "`ce_weight` 0 against .5",
    ("prompt_kl", "none_kl"): "`kv_sharing` `prompt` against `none`, both with `ce_weight` 0",
}


def recipe_asked() -> str:
    """The questions that the seeds answer, in short."""
    found = _over_seeds()
    return _seed_differences(found, ASKED) if found else "_Not measured yet: run `make reproduce`._"


def _seed_differences(found: dict[str, Any], pairs: dict[tuple[str, str], str]) -> str:
    """Bold where the interval over seeds excludes 0."""
    head = ("first minus second", "drift", "seeds", "bits/byte, unseen texts", "image questions", "image tokens, nats")
    head += ("other tokens, nats",)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (arm, rival), title in pairs.items():
        for drift, part in found.items():
            measures = part["differences"].get(arm, {}).get(rival)
            if not measures:
                continue
            seeds = ", ".join(measures["bits_per_byte"]["values"])
            wanted = (("bits_per_byte", 3), ("questions", 3), ("image_nll", 2), ("rest_nll", 2))
            cells = [title, drift, seeds, *(_told_apart(measures.get(m), d) for m, d in wanted)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _told_apart(found: dict[str, Any] | None, digits: int) -> str:
    text = _spread(found, digits, "+")
    apart = found is not None and found["half"] is not None and abs(found["mean"]) > found["half"]
    return f"**{text}**" if apart else text


BLOCKS = {
    "demo": demo,
    "demo_prompts": demo_prompts,
    "demo_real": demo_real,
    "step_cost": step_cost,
    "recipe_screen": recipe_screen,
    "recipe_targets": recipe_targets,
    "recipe_settings": recipe_settings,
    "recipe_against": recipe_against,
    "recipe_seeds": recipe_seeds,
    "recipe_seed_differences": recipe_seed_differences,
    "recipe_asked": recipe_asked,
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

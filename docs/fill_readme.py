"""Fill the figures of the README, the docs and the recipe from result files and from the code, so that no number is typed.

    python docs/fill_readme.py            # rewrite them: a part of `make results`
    python docs/fill_readme.py --check    # exit 1 if one is stale

Blocks look like `<!-- results:NAME -->` ... `<!-- /results -->`; NAME is a function below.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
import json
import re
import sys
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hf_lingudistill.config import LinguDistillConfig
from hf_lingudistill.labs.demo_report import prompts_text, table, verdict
from hf_lingudistill.labs.diagnose import as_text
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
from hf_lingudistill.options import DistillOptions
from hf_lingudistill.sharing import MODES

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "docs/results/demo/report.json"
FAMILIES = ROOT / "docs/results/families.json"
STEP_COST = ROOT / "benchmarks/results/step_cost.json"
GPU_COST = ROOT / "benchmarks/results/gpu.json"
ON_POLICY_COST = ROOT / "benchmarks/results/on_policy_cost_gpu.json"
RECIPE = ROOT / "examples/recipes/five_artists"
SUMMARY = RECIPE / "results/summary.json"
ON_A_CPU = RECIPE / "results/cpu/summary.json"
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
    "ce_half": "CE at half the learning rate",
    "ce_anchor": "CE, half of it KL to the VLM before (ASFT)",
    "none_ce05": "`none` and CE (`ce_weight` .5)",
    "ce_replay_25": "CE, 4 of 16 rows are text",
    "interpolate_03": "interpolation .3 (nearer to the original), no training",
    "interpolate_07": "interpolation .7, no training",
    "vision_before_lora": "`vision_before`, LoRA 16",
    "vision_before_half": "`vision_before` at half the learning rate",
    "vision_half": "`vision` at half the learning rate",
    "vision_before_confident": "`vision_before`, `confident`, `ce_weight` .5",
    "vision_before_confident_ce0": "`vision_before`, `confident`, `ce_weight` 0",
    "vision_confident": "`vision`, `confident`, `ce_weight` 0",
    "caption": "KL to the original told the caption (upper bound)",
    "interpolate_05": "interpolation .5, no training",
    "ce_lora": "CE, LoRA 16",
    "ce_replay_10": "CE, 2 of 16 rows are text",
    "ce_replay_30": "CE, 5 of 16 rows are text",
    "ce_replay_50": "CE, 8 of 16 rows are text",
    "ce_people": "CE, people's texts (4 of 16 rows)",
    "vision_people": "`vision_before`, people's texts (4 of 16 rows)",
    "vision_parents": "`vision_parents`, no text rows",
    "parents": "`parents` (the better parent of every token), no text rows",
    "parents_people": "`parents`, people's texts (4 of 16 rows)",
    "ce_long": "CE, 160 steps",
    "none_long": "`none`, 160 steps",
    "vision_before_ce05_long": "the default, 160 steps",
    "ce_07": "CE, then .3 of the original mixed in",
    "none_07": "`none`, then .3 of the original mixed in",
    "vision_before_ce05_07": "the default, then .3 of the original mixed in",
    "vision_before_ce05_05": "the default, then .5 of the original mixed in",
    "vision_before_blind": "`vision_before`, `blind_weight` .5",
    "vision_before_blind_ce05": "the default, `blind_weight` .5",
    "vision_before_blind_ce05_long": "the default, `blind_weight` .5, 160 steps",
}
PAIRS = {
    "aligned-no-0": "aligned tower, no drift",
    "aligned-severe-0": "aligned tower, severe drift",
    "polished-severe-0": "polished tower, severe drift",
    "turned-severe-0": "turned tower, severe drift",
    "joint-severe-0": "joint tower (150 steps, blind), severe drift",
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
FILLED = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), RECIPE / "README.md")
PLAN_CHECK = ROOT / "benchmarks/results/plan_check.json"
ANSWERS_ONCE = ROOT / "benchmarks/results/answers_once.json"
METHODS = {
    "full": Setup(),
    "LoRA 16, bf16 weights": Setup(lora_rank=16, dtype="bfloat16"),
}
CARDS = (24, 48, 80, 141)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def demo() -> str:
    """The embedded demo's table."""
    report = _read(DEMO)
    return f"{table(report)}\n\n{' '.join(verdict(report).split())}"


def demo_table() -> str:
    """The table, and the first prompt of each kind with the beginnings of its answers."""
    report = _read(DEMO)
    firsts = [next(p for p in report["prompts"] if bool(p.get("image")) == seen) for seen in (False, True)]
    arms = ("original", "before", "after")
    begun = [p | {arm: textwrap.shorten(p[arm], 80, placeholder=" ...") for arm in arms} for p in firsts]
    return f"{table(report)}\n\n```\n{prompts_text(begun)}\n```"


def demo_prompts() -> str:
    """The embedded demo's prompts, before and after."""
    return "```\n" + prompts_text(_read(DEMO)["prompts"]) + "\n```"


def modes() -> str:
    """The sharing modes, from the objects that run them."""
    lines = [
        "| `kv_sharing` | the teacher reads the student's keys and values | it computes | choose it when |",
        "|---|---|---|---|",
    ]
    for name, mode in MODES.items():
        title = f"`{name}` (default)" if name == LinguDistillConfig.kv_sharing else f"`{name}`"
        lines.append(f"| {title} | {mode.reads} | {mode.computes} | {mode.choose} |")
    return "\n".join(lines)


def options() -> str:
    """The fields that `LinguDistillConfig` adds to `SFTConfig`."""
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for option in fields(DistillOptions):
        kind = DistillOptions.__annotations__[option.name].replace("|", "or")  # a parser writes over `option.type`
        meaning = option.metadata["help"].replace("%%", "%").replace("|", "\\|")
        lines.append(f"| `{option.name}` | `{kind}` | `{json.dumps(option.default)}` | {meaning} |")
    return "\n".join(lines)


def step_cost() -> str:
    """Time and memory of one step."""
    return _step_cost(_read(STEP_COST))


def step_cost_152k() -> str:
    """The same with a vocabulary as large as Qwen's."""
    return _step_cost(_read(STEP_COST.with_name("step_cost_152k.json")))


def _step_cost(result: dict[str, Any]) -> str:
    arms, shape, machine = result["arms"], result["shape"], result["machine"]
    base = arms["sft"].get("peak_mb")
    lines = [
        "| arm | step | over compact SFT (min - max) | over TRL's SFT | peak memory over TRL's SFT |",
        "|---|---|---|---|---|",
    ]
    for arm, row in arms.items():
        memory = f"{row['peak_mb'] - base:+.0f} MiB" if base and "peak_mb" in row else "not measured"
        lines.append(
            f"| `{arm}` | {row['seconds']:.2f} s | {row['ratio']:.3f} ({row['ratio_min']:.3f} - {row['ratio_max']:.3f}) "
            f"| {row['ratio_trl']:.3f} | {memory} |"
        )
    lines += [
        "",
        f"Medians of {result['rounds']} interleaved rounds; {shape['length']} tokens, {shape['image_tokens']} of them image, "
        f"{shape['response_tokens']} response; LM of {shape['lm_parameters'] / 1e6:.0f}M parameters, teacher in "
        f"{shape['teacher_quantization']}, one copy of K/V is {shape['kv_mb']:.0f} MiB; {machine['device']}, "
        f"{machine['dtype']}, load {machine['load_before']} to {machine['load_after']}.",
    ]
    if "sft_compact" not in arms:
        lines += ["", "_Measured before the step was rewritten: the new step is not in this table yet._"]
    return "\n".join(lines)


def gpu_cost() -> str:
    """Time and memory of one step on a GPU, of the cases that were measured."""
    result = _read(GPU_COST)
    lines = [
        "| student | batch | arm | step | over compact SFT (min - max) | over TRL's SFT | peak memory | over TRL's SFT |",
        "|---|---|---|---|---|---|---|---|",
    ]
    done = [case for case in result["cases"] if "arms" in case]
    for case in done:
        base = case["arms"]["sft"]["peak_mb"]
        for arm, row in case["arms"].items():
            lines.append(
                f"| {case['shape']} | {case['batch']} | `{arm}` | {row['seconds']:.3f} s | {row['ratio']:.3f} ({row['ratio_min']:.3f} - "
                f"{row['ratio_max']:.3f}) | {row['ratio_trl']:.3f} | {row['peak_mb'] / 1024:.1f} GiB | {row['peak_mb'] - base:+.0f} MiB |"
            )
    first = done[0]
    lines += [
        "",
        f"{result['device']}, torch {result['torch']}, {result['dtype']}; medians of {result['rounds']} interleaved rounds (the first "
        f"discarded), {first['length']} tokens, {first['response']} of them response, checkpointing on, teacher in {first['teacher']}, "
        "full fine-tuning with AdamW. `python benchmarks/gpu.py --out OUT` measures more cases where there is time.",
    ]
    return "\n".join(lines)


def gpu_claim() -> str:
    """README's half sentence: what a step costs in the cheapest and in the default mode, at the largest size that was measured."""
    case = next(case for case in _read(GPU_COST)["cases"] if "arms" in case)
    low, default = (case["arms"][arm]["ratio_trl"] for arm in ("full", "vision_before"))
    return (
        f"A step costs {low - 1:.0%} (`full`) to {default - 1:.0%} (the default) more than TRL's own fine-tuning, on an H100 at "
        f"{case['shape']} ([every mode](docs/cost.md))."
    )


def on_policy_cost() -> str:
    """What sampling adds to a step."""
    result = _read(ON_POLICY_COST)
    seconds, shape, machine = result["seconds"], result["shape"], result["machine"]
    return (
        f"{machine['device']}, {machine['dtype']}, a 135M LM, {shape['batch_size']} rows of {shape['length']} tokens with "
        f"{shape['answer_tokens']['given'] // shape['batch_size']} in each answer: {seconds['given']:.2f} s for a step on given answers, "
        f"{seconds['on_policy']:.2f} s on-policy, {seconds['sampling']:.2f} s of it for sampling with transformers; "
        f"{result['ratio']['median']:.1f} times ({result['ratio']['min']:.1f} to {result['ratio']['max']:.1f}, {result['rounds']} rounds). "
        "`python benchmarks/on_policy_cost.py --layers 30 --bf16 --batch_size 8`."
    )


# --------------------------------------------------------------------------------------------------------------------
# The recipe
# --------------------------------------------------------------------------------------------------------------------
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


def five_artists_modes() -> str:
    """What each sharing mode gives its teacher, pair by pair."""
    modes = _summary().get("modes", {})
    if not modes:
        return NOT_YET
    readers = list(dict.fromkeys(name for found in modes.values() for name in found["readers"]))
    lines = [
        "| pair | tokens | " + " | ".join(f"`{reader}`" for reader in readers) + " | `diagnose` says |",
        "|" + "---|" * (len(readers) + 3),
    ]
    for pair in (pair for pair in PAIRS if pair in modes):
        found = modes[pair]
        asked = found.get("diagnose", {})
        for part in ("dependent", "rest", "all"):
            known = found["readers"]
            cells = [f"{known[reader][part]:.3f}" if reader in known else "-" for reader in readers]
            losses = asked.get("losses")
            advice = (
                f"`{asked['recommended']}` ({losses['vision']:.3f}; `none` {losses['none']:.3f}{_twice_said(asked)})"
                if losses and part == "all"
                else ""
            )
            lines.append("| " + " | ".join([PAIRS[pair], part, *cells, advice]) + " |")
    return "\n".join(lines)


def _twice_said(asked: dict[str, Any]) -> str:
    """What `diagnose` says of a second reading; nothing in results of before it."""
    loss = asked["losses"].get("vision, read twice")
    return "" if loss is None else f"; both {loss:.3f}: `blind_weight` {asked['blind_weight']:g}"


def five_artists_severe() -> str:
    return _whole("P", "severe")


def five_artists_claim() -> str:
    """README's sentence: the library's default, and a teacher that cannot see, against cross-entropy on the same rows."""
    found = _read(RECIPE / "results/summary.json")
    paired, arms = found["paired"]["P"]["severe"], found["regimes"]["P"]["severe"]

    def less(arm: str, metric: str) -> str:
        """Of the KL that CE leaves, over the seeds of both, with the interval of the difference."""
        difference = paired[f"{arm} - ce"][metric]
        ce = arms[arm][metric]["mean"] - difference["mean"]
        return f"{-difference['mean'] / ce:.0%} ± {difference['half'] / ce:.0%}"

    name = found["default"]
    seeds = paired[f"{name} - ce"]["text_kl"]["seeds"]
    back = arms[name]["recovered_text_kl"]
    return (
        f"- **Measured** ({seeds} seeds, {found['device'].split(' ')[1]}, 135M): the default brings {back['mean']:.0%} ± {back['half']:.0%} of the "
        f"lost language back. It ends {less(name, 'text_kl')} closer to the original on text than cross-entropy on the same rows, "
        f"{less(name, 'image_kl')} about pictures; a blind teacher {less('none', 'text_kl')} and {less('none', 'image_kl')} "
        "([second recipe](examples/recipes/five_artists/README.md)). Instruction following (IFEval) did not come "
        f"back. {_longer()}Interpolating weights instead loses sight."
    )


def _longer() -> str:
    """What more steps and a second reading come to about pictures, over the CPU's seeds that have both arms."""
    rows = (json.loads(line) for line in (ON_A_CPU.parent / "arms.jsonl").read_text(encoding="utf-8").splitlines())
    found = {
        tuple(row["arm"].rsplit("/", 2)[1:]): row["image_kl"]
        for row in rows
        if row["arm"].startswith("aligned/P/severe/")
    }
    pairs = [
        (value, found[seed, "ce_long"])
        for (seed, arm), value in found.items()
        if arm == "vision_before_blind_ce05_long" and (seed, "ce_long") in found
    ]
    if not pairs:
        return ""
    below = sum(1 - ours / ce for ours, ce in pairs) / len(pairs)
    count = "one seed" if len(pairs) == 1 else f"{len(pairs)} seeds"
    return f"With more steps and `blind_weight`: {below:.0%} about pictures ({count}, CPU). "


def _less(regime: str, drift: str, arm: str, other: str, metric: str) -> str:
    """`32% (.082 ± .009)`: by how much an arm's KL is below another's, over the seeds of both."""
    summary = _read(SUMMARY)
    arms, difference = summary["regimes"][regime][drift], summary["paired"][regime][drift][f"{arm} - {other}"][metric]
    return f"{-difference['mean'] / arms[other][metric]['mean']:.0%} ({-difference['mean']:.3f} ± {difference['half']:.3f})"


def five_artists_says() -> str:
    """What follows from the tables, in sentences."""
    summary = _read(SUMMARY)
    severe, mild, texts = (_of(*where) for where in (("P", "severe"), ("P", "mild"), ("M", "severe")))
    default = summary["default"]

    def of(arm: str, metric: str, arms: dict[str, Any] = severe) -> str:
        return _spread(arms[arm][metric], 3)

    def gained(arm: str, other: str, metric: str) -> str:
        return _spread(summary["paired"]["P"]["severe"][f"{arm} - {other}"][metric], 3, "+")

    lines = [
        f"*Distilling beats cross-entropy on the same rows*, although those rows are the original's own words. Text KL: `{default}` (the "
        f"library's default) {of(default, 'text_kl')}, `vision_before` {of('vision_before', 'text_kl')}, `none` {of('none', 'text_kl')}, "
        f"cross-entropy {of('ce', 'text_kl')}. The default is {_less('P', 'severe', default, 'ce', 'text_kl')} below cross-entropy at severe "
        f"drift, {_less('P', 'mild', default, 'ce', 'text_kl')} at mild, {_less('M', 'severe', default, 'ce', 'text_kl')} with text rows "
        "beside.",
        f"*A teacher that sees is better where the picture matters*: {of(default, 'image_kl_dependent')} against "
        f"{of('none', 'image_kl_dependent')} for `none`, {_less('P', 'severe', default, 'none', 'image_kl_dependent')} less. Cross-entropy is "
        f"near ({of('ce', 'image_kl_dependent')}): it learns the picture from labels that were written with the caption at hand.",
        f"*Answers about pictures*: the default is {_less('P', 'severe', default, 'ce', 'image_kl')} below cross-entropy at severe drift, "
        f"{_less('P', 'mild', default, 'ce', 'image_kl')} at mild, {_less('M', 'severe', default, 'ce', 'image_kl')} with text rows. "
        f"A teacher that is told the caption, the upper bound, reaches {_less('P', 'severe', 'caption', 'ce', 'image_kl')}. At mild drift "
        f"`none` and `vision_before` are no better than cross-entropy ({of('none', 'image_kl', mild)}, {of('vision_before', 'image_kl', mild)}, "
        f"{of('ce', 'image_kl', mild)}): there the labels beside the teacher (`ce_weight` .5) are what helps.",
        f"*Sight stays*: against the VLM before, the default names {gained(default, 'before', 'naming_seen')} of the drawings by known artists, "
        f"{gained(default, 'before', 'naming_new')} of those by the new one, and answers {gained(default, 'before', 'yes_no')} of the yes/no questions "
        "right.",
        f"*With text rows at hand* the blind teacher is best on text ({of('none', 'text_kl', texts)} against "
        f"{of(default, 'text_kl', texts)}), the default on pictures ({of(default, 'image_kl', texts)} against {of('none', 'image_kl', texts)}).",
        f"*Lengths*: asked IFEval's prompts, the original writes {severe['original']['ifeval_tokens']['mean']:.0f} tokens (at most 256) and ends "
        f"{severe['original']['ifeval_stopped']['mean']:.0%} of its answers itself; the VLM before {severe['before']['ifeval_tokens']['mean']:.0f} tokens, "
        + ", ".join(
            f"`{arm}` {severe[arm]['ifeval_tokens']['mean']:.0f} ({severe[arm]['ifeval_stopped']['mean']:.0%})"
            for arm in ("none", "ce", default, "vision_before")
        )
        + ". Sharing shortens answers; a blind teacher's length is the original's.",
        f"*IFEval does not come back*: every arm is below the original ({of('original', 'ifeval_strict')}) and none above the VLM before; `none` is at "
        f"{gained('none', 'before', 'ifeval_strict')} against it, the default at {gained(default, 'before', 'ifeval_strict')}.",
        f"*Interpolation* costs nothing and is far behind at severe drift ({of('interpolate_05', 'text_kl')}); at mild drift it beats "
        f"cross-entropy on text ({of('interpolate_05', 'text_kl', mild)} against {of('ce', 'text_kl', mild)}) and is twice as far on pictures.",
        f"*On-policy did not pay here*: text {of('on_policy', 'text_kl')}, pictures {of('on_policy', 'image_kl')}, where cross-entropy has "
        f"{of('ce', 'text_kl')} and {of('ce', 'image_kl')}, and names {gained('on_policy', 'before', 'naming_seen')} against the VLM "
        f"before, at {severe['on_policy']['seconds']['mean'] / severe[default]['seconds']['mean']:.0f} times the seconds. A likely "
        "reason, not measured: a VLM that answers with a name gives its judges little to judge.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def five_artists_targets() -> str:
    """What was to be reached, and what was."""
    summary = _read(SUMMARY)
    arms, default = _of("P", "severe"), summary["default"]
    names = summary["paired"]["P"]["severe"][f"{default} - before"]["naming_seen"]

    def share_less(other: str, metric: str) -> float:
        difference: float = summary["paired"]["P"]["severe"][f"{default} - {other}"][metric]["mean"]
        return -difference / float(arms[other][metric]["mean"])

    back = arms[default]["recovered_text_kl"]
    strict, whole = arms[default]["ifeval_strict"], arms["original"]["ifeval_strict"]
    verdicts = [
        ("text fidelity lost to drift that comes back", ">= 90 %", _spread(back, 3), back["mean"] >= 0.9),
        (
            "the default's remaining text KL below cross-entropy's",
            ">= 25 %",
            _less("P", "severe", default, "ce", "text_kl"),
            share_less("ce", "text_kl") >= 0.25,
        ),
        (
            "KL of answers about pictures below cross-entropy's",
            ">= 30 %",
            _less("P", "severe", default, "ce", "image_kl"),
            share_less("ce", "image_kl") >= 0.3,
        ),
        (
            "sharing below no sharing where the picture matters",
            ">= 20 %",
            _less("P", "severe", default, "none", "image_kl_dependent"),
            share_less("none", "image_kl_dependent") >= 0.2,
        ),
        ("names against the VLM before", ">= -.01", _spread(names, 3, "+"), names["mean"] >= -0.01),
        (
            "IFEval, strict, against the original's",
            "within .02",
            f"{_spread(strict, 3)} against {_spread(whole, 3)}",
            strict["mean"] >= whole["mean"] - 0.02,
        ),
    ]
    rows = [(*row, "met" if met else "**missed**") for *row, met in verdicts]
    return "\n".join(["| what | asked | found | |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def five_artists_cpu() -> str:
    """Regime P at severe drift, as another machine had it."""
    arms = _read(ON_A_CPU)["regimes"]["P"]["severe"]
    return _arms_table(
        arms, ["before", "default", "vision_before", "ce", "none", "caption"]
    )  # of `vision`, one of two seeds ran away


def _seed_0_on_a_cpu() -> dict[str, Any]:
    """Arms of the aligned tower at severe drift, of both regimes; regime M's own by the share of text rows."""
    lines = (ON_A_CPU.parent / "arms.jsonl").read_text(encoding="utf-8").splitlines()
    arms: dict[str, Any] = {}
    for row in map(json.loads, lines):
        tower, regime, drift, seed, arm = row["arm"].split("/")
        if (tower, drift, seed) != ("aligned", "severe", "0") or (regime, arm) == ("M", "before"):
            continue
        arm = "ce_replay_25" if (regime, arm) == ("M", "ce") else arm
        if regime == "P" or arm.endswith("_people") or arm.startswith("ce_replay"):
            arms[arm] = {metric: {"mean": value} for metric, value in row.items() if isinstance(value, (int, float))}
    return arms


OF_REPLAY = (
    "ce",
    "ce_replay_10",
    "ce_replay_25",
    "ce_replay_30",
    "ce_replay_50",
    "ce_people",
    "vision_people",
    "parents_people",
)


def five_artists_cpu_replay() -> str:
    """Cross-entropy with more and more text rows, and texts that people wrote: seed 0 alone."""
    return _arms_table(_seed_0_on_a_cpu(), ["before", "vision_before_ce05", *OF_REPLAY])


def five_artists_cpu_arms() -> str:
    """Every arm of regime P at severe drift: seed 0 alone."""
    arms = _seed_0_on_a_cpu()
    return _arms_table(arms, sorted(set(arms) - set(OF_REPLAY[1:]), key=lambda arm: arms[arm]["text_kl"]["mean"]))


def five_artists_cpu_says() -> str:
    """What these two tables tell that the H100's do not."""
    arms = _seed_0_on_a_cpu()

    def of(arm: str, metric: str = "text_kl", digits: int = 3) -> str:
        return f"{arms[arm][metric]['mean']:.{digits}f}"

    replay = ", ".join(f"{rows} of 16: {of(arm)}" for rows, arm in zip((0, 2, 4, 5, 8), OF_REPLAY[:5], strict=True))
    lines = [
        f"*How much replay is enough?* Cross-entropy, where some of a step's rows are texts of the original's own ({replay}). The default "
        f"without a single row of text: {of('vision_before_ce05')}.",
        f"*Texts that people wrote* make cross-entropy worse ({of('ce_people')} with a quarter of the rows, {of('ce')} without): it learns how "
        f"people write, and this asks how the original does. Distilled, the same rows are the best of all ({of('vision_people')}): only "
        "their prefixes count.",
        f"*Cross-entropy at half the learning rate* is a better rival ({of('ce_half')}; {of('ce')} at the full one, {of('ce_tenth')} at a tenth, LoRA "
        f"{of('ce_lora')}).",
        f"*Interpolating nearer to the original* (.3) is lower on text than every arm that trains without text rows ({of('interpolate_03')}), for nothing, "
        f"and pays with sight: names {of('interpolate_03', 'naming_seen', 2)} against {of('before', 'naming_seen', 2)} before, pictures "
        f"{of('interpolate_03', 'image_kl')} against {of('vision_before_ce05', 'image_kl')} for the default. `lingudistill blend --keep` looks "
        "for such points.",
        f"*LoRA* (rank 16, at 5e-4) brings back less than full training, distilled ({of('vision_before_lora')}) or not ({of('ce_lora')}).",
        f"*The better parent of every token* ({of('parents')}) does not beat a parent per row ({of('vision_parents')}), and on texts that people "
        f"wrote it is {of('parents_people')}, against {of('vision_people')} where the LM judges all of such a row.",
    ]

    def below(arm: str, other: str, metric: str) -> str:
        return f"{1 - arms[arm][metric]['mean'] / arms[other][metric]['mean']:.0%}"

    if "ce_anchor" in arms:
        lines.append(
            "*Cross-entropy beside a KL anchor* (ASFT), half and half: to the VLM before it holds on to what drift did, text "
            f"{of('ce_anchor')}, pictures {of('ce_anchor', 'image_kl')}, names {of('ce_anchor', 'naming_seen', 2)}"
            + (
                f"; to the original, which is `none` with `ce_weight` .5, {of('none_ce05')}, {of('none_ce05', 'image_kl')} and "
                f"{of('none_ce05', 'naming_seen', 2)}."
                if "none_ce05" in arms
                else "."
            )
        )
    default, longer = "vision_before_ce05", "vision_before_ce05_long"
    if {longer, "ce_long", "none_long"} <= set(arms):
        lines.append(
            f"*Three and a half times as many steps* (160, each answer once): on text the default goes from {of(default)} to {of(longer)}, `none` "
            f"from {of('none')} to {of('none_long')}, cross-entropy from {of('ce')} to {of('ce_long')}; about pictures from "
            f"{of(default, 'image_kl')} to {of(longer, 'image_kl')}, {of('none', 'image_kl')} to {of('none_long', 'image_kl')} and "
            f"{of('ce', 'image_kl')} to {of('ce_long', 'image_kl')}. The default is then {below(longer, 'ce_long', 'text_kl')} below "
            f"cross-entropy on text and {below(longer, 'ce_long', 'image_kl')} about pictures ({below(default, 'ce', 'text_kl')} and "
            f"{below(default, 'ce', 'image_kl')} after 45 steps), and names as many. IFEval does not come back with more steps: "
            f"{of(longer, 'ifeval_strict')}, {of('none_long', 'ifeval_strict')} and {of('ce_long', 'ifeval_strict')} on 495 prompts."
        )
    mixed, half = "vision_before_ce05_07", "vision_before_ce05_05"
    if {mixed, half} <= set(arms):
        lines.append(
            "*Mixing the original's weights in after distilling*, which costs nothing: the default with .3 of the original goes from "
            f"{of(default)} to {of(mixed)} on text, from {of(default, 'image_kl')} to {of(mixed, 'image_kl')} about pictures, names from "
            f"{of(default, 'naming_seen', 2)} to {of(mixed, 'naming_seen', 2)}; with .5 of it to {of(half)}, {of(half, 'image_kl')} and "
            f"{of(half, 'naming_seen', 2)}; IFEval to {of(mixed, 'ifeval_strict')} and {of(half, 'ifeval_strict')}."
            + (
                f" It helps every arm: `none` comes to {of('none_07')}, {of('none_07', 'image_kl')} and names {of('none_07', 'naming_seen', 2)}, "
                f"cross-entropy to {of('ce_07')}, {of('ce_07', 'image_kl')} and {of('ce_07', 'naming_seen', 2)}; the default stays "
                f"{below(mixed, 'ce_07', 'text_kl')} below the latter on text and {below(mixed, 'ce_07', 'image_kl')} about pictures."
                if {"none_07", "ce_07"} <= set(arms)
                else ""
            )
        )
    lines += _read_twice(arms)
    return "\n".join(f"- {line}" for line in lines)


def _read_twice(arms: dict[str, Any]) -> list[str]:
    """What a second, blind reading does: over the seeds of the CPU that have both arms, and longer."""
    found, default, twice = _read(ON_A_CPU), "vision_before_ce05", "vision_before_blind_ce05"
    gains = found["paired"]["P"]["severe"].get(f"{twice} - {default}")
    if gains is None:
        return []
    against_ce = found["paired"]["P"]["severe"][f"{twice} - ce"]["image_kl"]
    severe = found["regimes"]["P"]["severe"]
    ce = severe["ce"]["image_kl"]["mean"]
    line = (
        f"*A teacher that reads twice* (`blind_weight` .5, {gains['text_kl']['seeds']} seeds), against the default: about pictures "
        f"{_spread(gains['image_kl'], 3, '+')}, where the picture matters {_spread(gains['image_kl_dependent'], 3, '+')}, on text "
        f"{_spread(gains['text_kl'], 3, '+')}, names {_spread(gains['naming_seen'], 3, '+')}. About pictures it is "
        f"{-against_ce['mean'] / ce:.0%} below cross-entropy."
    )
    alone = found["paired"]["P"]["severe"].get(f"vision_before_blind - {default}")
    if alone is not None:
        line += (
            f" Without labels (`ce_weight` 0, {alone['text_kl']['seeds']} seeds): pictures {_spread(alone['image_kl'], 3, '+')}, where the picture "
            f"matters {_spread(alone['image_kl_dependent'], 3, '+')}, text {_spread(alone['text_kl'], 3, '+')}."
        )
    longer = f"{twice}_long"
    if longer in arms:
        below = 1 - arms[longer]["image_kl"]["mean"] / arms["ce_long"]["image_kl"]["mean"]
        line += (
            f" After 160 steps (seed 0) pictures {arms[longer]['image_kl']['mean']:.3f} ({arms['vision_before_ce05_long']['image_kl']['mean']:.3f} "
            f"reading once), {below:.0%} below cross-entropy after as many, and text {arms[longer]['text_kl']['mean']:.3f}."
            + _and_seed_1(longer)
        )
    return [line]


def _and_seed_1(longer: str) -> str:
    """The same of the second seed; nothing without both of its arms."""
    rows = (json.loads(line) for line in (ON_A_CPU.parent / "arms.jsonl").read_text(encoding="utf-8").splitlines())
    found = {row["arm"].rpartition("/")[2]: row for row in rows if row["arm"].startswith("aligned/P/severe/1/")}
    if not {longer, "ce_long"} <= set(found):
        return ""
    pictures, ce = found[longer]["image_kl"], found["ce_long"]["image_kl"]
    return f" Seed 1: pictures {pictures:.3f} against {ce:.3f}, {1 - pictures / ce:.0%} below, and text {found[longer]['text_kl']:.3f}."


def five_artists_turned() -> str:
    """Every arm of the tower whose image tokens are no words: seed 0 alone."""
    arms = _read(ON_A_CPU)["towers"].get("turned", {}).get("P", {}).get("severe", {})
    return _arms_table(arms, sorted(arms, key=lambda arm: arms[arm]["text_kl"]["mean"])) if arms else NOT_YET


def five_artists_lengths() -> str:
    """Length of greedy answers, of the models that were asked: seed 0 on a CPU."""
    arms = _seed_0_on_a_cpu() | {"original": _read(ON_A_CPU)["regimes"]["P"]["severe"]["original"]}
    columns = (("an instruction", "text"), ("an instruction about a picture", "long"), ("its name", "short"))
    lines = [
        "| asked for | " + " | ".join(title for title, _ in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in (
        "original",
        "before",
        "on_policy",
        "on_policy_none",
        "ce",
        "none",
        "vision_before",
        "vision_before_ce05",
    ):
        arm = arms.get(name, {})
        if "tokens_text" in arm:
            cells = [
                f"{arm[f'tokens_{sort}']['mean']:.0f} ({arm[f'ended_{sort}']['mean']:.0%})"
                if f"tokens_{sort}" in arm
                else "-"
                for _, sort in columns
            ]
            lines.append(f"| {ARM_TITLES.get(name, f'`{name}`')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def five_artists_mild() -> str:
    return _whole("P", "mild")


def five_artists_replay() -> str:
    return _whole("M", "severe")


def five_artists_joint() -> str:
    return _whole("P", "severe", "joint")


def five_artists_polished() -> str:
    return _whole("P", "severe", "polished")


def _families() -> dict[str, Any]:
    return _read(FAMILIES)


def _by_fate() -> dict[str, list[dict[str, Any]]]:
    """Rows that went through every stage with the LM as the teacher, with the text half of the VLM before alone, that are refused, and the
    others."""
    found: dict[str, list[dict[str, Any]]] = {"lm": [], "itself": [], "refused": [], "fails": []}
    for row in _families()["families"]:
        done = "itself" if row.get("lm") == "itself" or "lm_note" in row else "lm"
        found[done if row["stage"] == "done" else "refused" if row.get("fits") is False else "fails"].append(row)
    return found


def families_count() -> str:
    fate = _by_fate()
    seen = sum(row.get("images") == "yes" for row in fate["refused"])
    fails = f", and {len(fate['fails'])} could not be built, or fail: see the notes" if fate["fails"] else ""
    return (
        f"Of the {sum(map(len, fate.values()))} types that `AutoModelForImageTextToText` knows (transformers {_families()['transformers']}), "
        f"{len(fate['lm'])} fit their LM and {len(fate['itself'])} more the text half of the VLM before; these went through every stage. "
        f"{len(fate['refused'])} are refused with their reason{fails}. Of the refused, {seen} can be held to the VLM before, run whole "
        "(`kv_sharing=images`)."
    )


_KNOWN = {
    "smolvlm": "SmolVLM",
    "llava": "LLaVA",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_5": "Qwen3.5",
    "internvl": "InternVL",
    "gemma3": "Gemma 3",
    "glm4v": "GLM-4.1V",
    "llama4": "Llama 4",
    "mllama": "Mllama",
    "blip-2": "BLIP-2",
}


def families_known() -> str:
    """README's line."""
    fate = _by_fate()
    fits, refused = fate["lm"] + fate["itself"], fate["refused"]

    def names(rows: list[dict[str, Any]]) -> str:
        there = {row["type"] for row in rows}
        return ", ".join(title for name, title in _KNOWN.items() if name in there)

    release = ".".join(_families()["transformers"].split(".")[:2])
    types = sum(map(len, fate.values()))
    return (
        f"{len(fits)} of transformers {release}'s {types} VLM types fit as [tiny models](docs/families.md): {names(fits)}, ... Refused: "
        f"{names(refused)}, ..."
    )


def families_table() -> str:
    """Every class, by what became of it."""
    lines = [
        "| type | text half | teacher | same weights | full length | note |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in _by_fate().items():
        for row in rows:
            done = row["stage"] == "done"
            errors = [f"{row[key]:.0e}" if key in row and done else "-" for key in ("same_error", "reference_error")]
            note = row.get("lm_note", "" if done else row["note"])
            if "lm_note" in row:
                note = f"with {row['lm']}: {note}"
            if row.get("images") == "yes":
                note = f"`images` works. {note}"
            note = textwrap.shorten(
                note.replace("|", "/").replace("<", "(").replace(">", ")"), 220, placeholder=" ..."
            )
            teacher = {"lm": f"`{row['lm']}`", "itself": "the VLM before", "refused": "refused"}.get(
                name, f"fails ({row['stage']})"
            )
            lines.append(
                f"| {row['type']} | {row.get('text', '-')} | {teacher} | {errors[0]} | {errors[1]} | {note} |"
            )
    return "\n".join(lines)


def _diagnosis(name: str) -> str:
    """What `lingudistill diagnose` printed from the perplexities on, as far as the reason of its recommendation."""
    text = as_text(_read(ROOT / f"docs/results/diagnose/{name}/drift.json"))
    return "```\n" + text[text.index("Perplexity of the answers") :].split("\n  - ")[0] + "\n```"


def diagnose_before() -> str:
    return _diagnosis("before")


def diagnose_after() -> str:
    return _diagnosis("after")


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
    return _read(PLAN_CHECK)


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


def plan_gpu() -> str:
    """Planned and measured peaks of the GPU's cases."""
    result = _read(GPU_COST)
    rows = ["| student | batch | `kv_sharing` | planned | measured | error |", "|---|---|---|---|---|---|"]
    errors = []
    for case in (case for case in result["cases"] if "arms" in case):
        for arm, row in case["arms"].items():
            if "planned_mb" in row:
                errors.append(row["planned_mb"] / row["peak_mb"] - 1)
                title = "`vision`, `kv_source=before`" if arm == "vision_before" else f"`{arm}`"
                rows.append(
                    f"| {case['shape']} | {case['batch']} | {title} | {row['planned_mb'] / 1024:.1f} GiB | {row['peak_mb'] / 1024:.1f} GiB | "
                    f"{errors[-1]:+.1%} |"
                )
    rows += ["", f"{result['device']}, torch {result['torch']}: {min(errors):+.1%} to {max(errors):+.1%}."]
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


def answers_once() -> str:
    """What asking once costs, and what it saves."""
    if not ANSWERS_ONCE.is_file():
        return (
            "_Not measured yet: run `python benchmarks/answers_once.py --json benchmarks/results/answers_once.json`._"
        )
    found = _read(ANSWERS_ONCE)
    rows = ["| | rows, labels | s per million labels | MiB per million labels |", "|---|---|---|---|"]
    for name in ("anchor_cache", "teacher_cache"):
        one = found[name]
        rows.append(
            f"| `{name}` | {one['rows']}, {one['labels']:,} | {one['seconds_per_million_labels']:,.0f} | "
            f"{one['mib_per_million_labels']:,.0f} |"
        )
    held, machine, lost = found["held_mib"], found["machine"], found["anchor_cache"]["lost"]
    said = (
        f"SmolLM2-135M-Instruct and a SmolVLM around it, {found['batch_size']} rows a batch, {machine['dtype']}, {machine['device']}, "
        f"{machine['threads']} thread, CPU time of the process; k = {found['anchor_cache']['k']}, {lost:.1%} of the probability outside of it (a "
        f"VLM that has seen no image yet). The run holds {held['cached']:,.0f} MiB of the two models (the teacher's head) in place of "
        f"{held['live']:,.0f}, and a step takes {found['step_ratio']:.2f} of its time."
    )
    return "\n".join([*rows, "", *textwrap.wrap(said, 130)])


def recipes() -> str:
    """The recipes of examples/recipes/write_recipes.py."""
    path = ROOT / "examples/recipes/write_recipes.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = writer  # where its dataclasses look themselves up
    spec.loader.exec_module(writer)
    return str(writer.index())


def suite_keys() -> str:
    """Every key of a suite, from the classes that read it."""
    from hf_lingudistill.labs.evaluation import suite

    parts = {
        "every task": suite.Data,
        "`texts`": suite.TextTask,
        "`vision`": suite.VisionTask,
        "`grounded`": suite.GroundedTask,
        "`fidelity`": suite.FidelityTask,
        "`ifeval`": suite.IfevalTask,
        "`lm_eval`, `lmms_eval`": suite.HarnessTasks,
    }
    common = {option.name for option in dataclasses.fields(suite.Data)}
    lines = ["| in | key, and its value where it is left out | meaning |", "|---|---|---|"]
    for part, kind in parts.items():
        said, grouped = _parameters(inspect.getdoc(kind) or ""), {}  # keys that one sentence is about share a row
        for option in dataclasses.fields(kind):
            if option.name in said and (kind is suite.Data or option.name not in common):
                needed = option.default is dataclasses.MISSING
                key = f"`{option.name}`" + (" (needed)" if needed else f": `{json.dumps(option.default)}`")
                grouped.setdefault(said[option.name], []).append(key)
        for meaning, keys in grouped.items():
            lines.append(f"| {part} | {', '.join(keys)} | {meaning} |")
    return "\n".join(lines)


def _parameters(doc: str) -> dict[str, str]:
    """{name: what is said of it} of a docstring's `Parameters:`; names that share a sentence share it."""
    found: dict[str, str] = {}
    body = doc.partition("Parameters:")[2]
    for entry in re.split(r"\n    (?=\S)", body):
        names, _, meaning = " ".join(entry.split()).partition(":")
        for name in re.sub(r"\([^)]*\)", "", names).split(","):
            found[name.strip()] = meaning.strip()
    return found


BLOCKS = {
    "answers_once": answers_once,
    "suite_keys": suite_keys,
    "recipes": recipes,
    "demo": demo,
    "demo_table": demo_table,
    "demo_prompts": demo_prompts,
    "step_cost": step_cost,
    "step_cost_152k": step_cost_152k,
    "five_artists": five_artists,
    "five_artists_modes": five_artists_modes,
    "five_artists_severe": five_artists_severe,
    "five_artists_claim": five_artists_claim,
    "five_artists_says": five_artists_says,
    "five_artists_targets": five_artists_targets,
    "five_artists_cpu": five_artists_cpu,
    "five_artists_cpu_replay": five_artists_cpu_replay,
    "five_artists_cpu_arms": five_artists_cpu_arms,
    "five_artists_cpu_says": five_artists_cpu_says,
    "five_artists_turned": five_artists_turned,
    "five_artists_lengths": five_artists_lengths,
    "gpu_cost": gpu_cost,
    "gpu_claim": gpu_claim,
    "on_policy_cost": on_policy_cost,
    "five_artists_mild": five_artists_mild,
    "five_artists_replay": five_artists_replay,
    "five_artists_joint": five_artists_joint,
    "five_artists_polished": five_artists_polished,
    "diagnose_before": diagnose_before,
    "diagnose_after": diagnose_after,
    "modes": modes,
    "options": options,
    "plan_smallest": plan_smallest,
    "families_count": families_count,
    "families_known": families_known,
    "families_table": families_table,
    "plan_lines": plan_lines,
    "plan_teachers": plan_teachers,
    "plan_peaks": plan_peaks,
    "plan_gpu": plan_gpu,
    "plan_moments": plan_moments,
    "plan_cost": plan_cost,
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

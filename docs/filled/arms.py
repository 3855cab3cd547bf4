"""The five_artists recipe: its tables."""

from __future__ import annotations

import json
import statistics
from typing import Any

from scipy.stats import t

from .files import LARGER, NOT_YET, ON_A_CPU, SUMMARY, read, read_lines

ARM_TITLES = {
    "original": "original LM",
    "before": "VLM before",
    "default": "**default**",
    "ce": "CE on the same rows",
    "ce_tenth": "CE at a tenth of the learning rate",
    "ce_half": "CE at half the learning rate",
    "ce_anchor": "CE, half of it KL to the VLM before (ASFT)",
    "none_ce05": "`none` and CE (`ce_weight` .5)",
    "interpolate_03": "interpolation .3 (nearer to the original), no training",
    "interpolate_07": "interpolation .7, no training",
    "vision_before_lora": "`vision_before`, LoRA 16",
    "vision_before_half": "`vision_before` at half the learning rate",
    "vision_half": "`vision` at half the learning rate",
    "vision_before_confident": "`vision_before`, `confident`, `ce_weight` .5",
    "vision_before_confident_ce0": "`vision_before`, `confident`, `ce_weight` 0",
    "vision_confident": "`vision`, `confident`, `ce_weight` 0",
    "vision_ce05": "`vision`, `ce_weight` .5",
    "prompt_confident": "`prompt`, `confident`, `ce_weight` .5",
    "vision_lora": "`vision`, LoRA 16",
    "caption": "KL to the original told the caption (upper bound)",
    "interpolate_05": "interpolation .5, no training",
    "ce_lora": "CE, LoRA 16",
    "ce_replay_10": "CE, 2 of 16 rows are text",
    "ce_replay_30": "CE, 5 of 16 rows are text",
    "ce_replay_50": "CE, 8 of 16 rows are text",
    "ce_people": "CE, people's texts (4 of 16 rows)",
    "vision_people": "`vision_before`, people's texts (4 of 16 rows)",
    "vision_parents": "`vision_parents`",
    "parents": "`parents` (the better parent of every token)",
    "parents_people": "`parents`, people's texts (4 of 16 rows)",
    "vision_parents_people": "`vision_parents`, people's texts (4 of 16 rows)",
    "ce_instructions": "CE, 8 of 16 rows are instructions",
    "none_instructions": "`none`, 8 of 16 rows are instructions",
    "vision_before_ce05_instructions": "the default, 8 of 16 rows are instructions",
    "vision_before_ce05_instructions_07": "the default, 8 of 16 rows are instructions, then .3 of the original mixed in",
    "vision_before_ce05_instructions_05": "the default, 8 of 16 rows are instructions, then .5 of the original mixed in",
    "ce_long": "CE, 160 steps",
    "none_long": "`none`, 160 steps",
    "vision_before_ce05_long": "the default, 160 steps",
    "ce_07": "CE, then .3 of the original mixed in",
    "none_07": "`none`, then .3 of the original mixed in",
    "vision_before_ce05_07": "the default, then .3 of the original mixed in",
    "vision_before_ce05_05": "the default, then .5 of the original mixed in",
    "ce_tower": "CE, tower trained along",
    "vision_before_ce05_tower": "the default, tower trained along",
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


# --------------------------------------------------------------------------------------------------------------------
# The recipe
# --------------------------------------------------------------------------------------------------------------------
def summary() -> dict[str, Any]:
    return read(SUMMARY) if SUMMARY.is_file() else {}


def spread(found: dict[str, Any] | None, digits: int, sign: str = "") -> str:
    """`mean ± half`, or the mean alone of a single seed."""
    if found is None:
        return "-"
    mean = f"{found['mean']:{sign}.{digits}f}"
    return mean if found.get("half") is None else f"{mean} ± {found['half']:.{digits}f}"


def arms_table(arms: dict[str, Any], order: list[str]) -> str:
    """A row per arm; a column that none of them has is left out."""
    columns = [column for column in ARM_COLUMNS if any(column[1] in arms[arm] for arm in order if arm in arms)]
    lines = ["| " + " | ".join(["arm", *(title for title, _, _ in columns)]) + " |"]
    lines.append("|" + "---|" * (len(columns) + 1))
    for arm in order:
        if arm in arms:
            cells = [spread(arms[arm].get(metric), digits) for _, metric, digits in columns]
            lines.append("| " + " | ".join([ARM_TITLES.get(arm, f"`{arm}`"), *cells]) + " |")
    return "\n".join(lines)


def of_regime(regime: str, drift: str, tower: str | None = None) -> dict[str, Any]:
    whole = summary()
    regimes = whole.get("regimes", {}) if tower is None else whole.get("towers", {}).get(tower, {})
    found: dict[str, Any] = regimes.get(regime, {}).get(drift, {})
    return found


def _whole(regime: str, drift: str, tower: str | None = None) -> str:
    arms = of_regime(regime, drift, tower)
    return arms_table(arms, by_text(arms)) if arms else NOT_YET


def five_artists_modes() -> str:
    """What each sharing mode gives its teacher, pair by pair."""
    modes = summary().get("modes", {})
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


def five_artists_mild() -> str:
    return _whole("P", "mild")


def five_artists_replay() -> str:
    return _whole("M", "severe")


def five_artists_joint() -> str:
    return _whole("P", "severe", "joint")


def five_artists_polished() -> str:
    return _whole("P", "severe", "polished")


def five_artists_cpu() -> str:
    """Regime P at severe drift, as another machine had it: the arms that all of its seeds with the default have."""
    rows = map(json.loads, (ON_A_CPU.parent / "arms.jsonl").read_text(encoding="utf-8").splitlines())
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        start, seed, arm = row["arm"].rsplit("/", 2)
        if start == "aligned/P/severe":
            found.setdefault(arm, {})[int(seed)] = row
    shown = ["before", "vision_before_ce05", "ce", "none"]
    seeds = sorted(set.intersection(*(set(found[arm]) for arm in shown)))
    columns = [column for column in ARM_COLUMNS if column[1] != "ifeval_strict"]  # asked of some of the seeds
    lines = [f"| arm | {' | '.join(title for title, _, _ in columns)} |", "|" + "---|" * (len(columns) + 1)]
    for arm in shown:
        title = "**default**" if arm == "vision_before_ce05" else ARM_TITLES.get(arm, f"`{arm}`")
        cells = [
            spread(_over_seeds([found[arm][seed][metric] for seed in seeds]), digits) for _, metric, digits in columns
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Seeds {', '.join(map(str, seeds))}."])


def _over_seeds(values: list[float]) -> dict[str, float]:
    """The mean, and half of the 95 % t interval."""
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.fmean(values), "half": float(half)}


def seed_0_on_a_cpu(regime: str = "P") -> dict[str, Any]:
    """Arms of the aligned tower at severe drift."""
    lines = (ON_A_CPU.parent / "arms.jsonl").read_text(encoding="utf-8").splitlines()
    arms: dict[str, Any] = {}
    for row in map(json.loads, lines):
        start, _, arm = row["arm"].rpartition("/")
        if start == f"aligned/{regime}/severe/0":
            arms[arm] = {metric: {"mean": value} for metric, value in row.items() if isinstance(value, (int, float))}
    return arms


def five_artists_cpu_replay() -> str:
    """Every arm of regime M at severe drift: seed 0 alone."""
    arms = seed_0_on_a_cpu("M") | _original_on_a_cpu()
    return arms_table(arms, by_text(arms))


def five_artists_cpu_arms() -> str:
    """Every arm of regime P at severe drift: seed 0 alone."""
    arms = seed_0_on_a_cpu() | _original_on_a_cpu()
    return arms_table(arms, by_text(arms))


def _original_on_a_cpu() -> dict[str, Any]:
    """The floor of that machine's figures."""
    return {"original": read(ON_A_CPU)["regimes"]["P"]["severe"]["original"]}


def by_text(arms: dict[str, Any]) -> list[str]:
    return sorted(
        (arm for arm in arms if arm != "default"), key=lambda arm: arms[arm].get("text_kl", {}).get("mean", 0.0)
    )


def five_artists_turned() -> str:
    """Every arm of the tower whose image tokens are no words: seed 0 alone."""
    arms = read(ON_A_CPU)["towers"].get("turned", {}).get("P", {}).get("severe", {})
    return arms_table(arms, by_text(arms)) if arms else NOT_YET


def larger() -> dict[str, Any]:
    """Arms of the larger LM at severe drift; {} before it was run."""
    found: dict[str, Any] = read(LARGER)["regimes"]["P"]["severe"] if LARGER.is_file() else {}
    return {arm: scores for arm, scores in found.items() if scores}


def five_artists_qwen() -> str:
    """Every arm of the larger LM over the seeds that it has, and beside it the default over the same ones."""
    arms = larger()
    if not arms:
        return NOT_YET
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in read_lines(LARGER.parent / "arms.jsonl"):
        *_, seed, arm = row["arm"].split("/")
        found.setdefault(arm, {})[int(seed)] = row
    columns = [column for column in ARM_COLUMNS if column[1] in found["ce"][0]]
    lines = [f"| arm | seeds | {' | '.join(title for title, *_ in columns)} |", "|" + "---|" * (len(columns) + 2)]

    def line(title: str, rows: list[dict[str, Any]]) -> None:
        cells = [spread(_over_seeds([row[metric] for row in rows]), digits) for _, metric, digits in columns]
        lines.append(f"| {title} | {len(rows)} | {' | '.join(cells)} |")

    default = found["vision_before_ce05"]
    for arm in sorted(found, key=lambda arm: (-len(found[arm]), arms[arm]["text_kl"]["mean"])):
        line("**default**" if found[arm] is default else ARM_TITLES.get(arm, f"`{arm}`"), list(found[arm].values()))
        if len(found[arm]) < len(default):
            line("default, on these seeds", [default[seed] for seed in found[arm]])
    return "\n".join(lines)


def five_artists_lengths() -> str:
    """Length of greedy answers, of the models that were asked: seed 0 on a CPU."""
    arms = seed_0_on_a_cpu() | {"original": read(ON_A_CPU)["regimes"]["P"]["severe"]["original"]}
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

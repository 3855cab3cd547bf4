"""The five_artists recipe: what its tables say, in sentences."""

from __future__ import annotations

import functools
import json
import statistics
from pathlib import Path
from typing import Any

from scipy.stats import t

from .arms import larger, of_regime, seed_0_on_a_cpu, spread
from .files import LARGER, LARGER_ON_A_CPU, NOT_YET, ON_A_CPU, SUMMARY, read, read_lines

DEPENDENT = "image_kl_dependent"
IFEVAL_PROMPTS = 495


def five_artists_claim() -> str:
    """README's table: the library's default against cross-entropy on the same rows; and what else it should be held against."""
    found, near, default = read(SUMMARY), seed_0_on_a_cpu(), "vision_before_ce05"
    device = found["device"].split(" ")[1]
    longer, twice = f"{default}_long", "vision_before_blind_ce05_long"
    names = found["paired"]["P"]["severe"][f"{default} - before"]["naming_seen"]
    rows = [
        _claimed("severe drift", device, default),
        _claimed("160 steps of each", "CPU", longer, "ce_long", cpu=True),
        _claimed("the same, read twice (`blind_weight`)", "CPU", twice, "ce_long", cpu=True),
        _claimed("mild drift", device, default, drift="mild"),
    ]
    if larger():
        gpu = read(LARGER)["device"].split(" ")[1]
        rows.append(_claimed("Qwen2.5-Coder-1.5B, LoRA", gpu, default, of=LARGER))
    return "\n".join(
        (
            "- **Measured**: the default against cross-entropy on the same rows, by KL to the original (95 % intervals; 135M except in the last row; "
            "[second recipe](examples/recipes/five_artists/README.md)):",
            "",
            "| setting | language back (cross-entropy) | closer to the original on text | about pictures | runs |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"- Names of drawings: {100 * names['mean']:+.0f} ± {100 * names['half']:.0f} points against before. {_ifeval_claim()}",
            f"- Cheaper cures (one seed, CPU). Cross-entropy at half the rate: the default is {_than_half('text_kl')} closer on text, {_than_half('image_kl')} about pictures. "
            f"70% of the original's weights mixed in, untrained: {near['interpolate_03']['recovered_text_kl']['mean']:.0%} "
            f"back, {near['interpolate_03']['naming_seen']['mean']:.0%} of names right; the default {near[default]['recovered_text_kl']['mean']:.0%} and "
            f"{near[default]['naming_seen']['mean']:.0%}, the VLM before {near['before']['naming_seen']['mean']:.0%} of names.",
            f"- {what_sight_does()}",
        )
    )


def _ifeval_claim() -> str:
    """Whether instruction following comes back: not from answers about pictures alone; of the seeds that were trained on instructions longest,
    the best share of weights."""
    original = read(ON_A_CPU)["regimes"]["P"]["severe"]["original"]["ifeval_strict"]["mean"]
    arms = ("vision_before_ce05_instructions_long", "vision_before_ce05_instructions_long_07")
    found = _seeds(ON_A_CPU.parent, "M", "severe")
    seeds = sorted(seed for seed, name in found if name == arms[0] and (seed, arms[1]) in found)
    if not seeds:
        return "IFEval did not come back."

    def of(arm: str) -> str:
        return f"{statistics.fmean(found[seed, arm]['ifeval_strict'] for seed in seeds):.1%}"

    half = 100 * max(found[seed, arm]["half"]["ifeval_strict"] for seed in seeds for arm in arms)
    rival, text = (
        "ce_instructions_long",
        f"IFEval: the original {original:.1%}, the VLM before {of('before')}; after 160 steps on such rows the default {of(arms[0])}",
    )
    if all((seed, rival) in found for seed in seeds):
        closer = statistics.fmean(
            1 - found[seed, arms[0]]["text_kl"] / found[seed, rival]["text_kl"] for seed in seeds
        )
        text += f", {closer:.0%} closer on text than cross-entropy, which has {of(rival)}"
    return f"{text} (each ± {half:.1f}; {_count(len(seeds))}, CPU)."


def _claimed(after: str, device: str, arm: str, other: str = "ce", **where: Any) -> str:
    """A row of README's table: over the seeds of both arms."""
    found = _seeds(
        (where.get("of") or (ON_A_CPU if where.get("cpu") else SUMMARY)).parent, "P", where.get("drift", "severe")
    )
    seeds = sorted(seed for seed, name in found if name == arm and (seed, other) in found)
    ours, theirs = ([found[seed, name]["recovered_text_kl"] for seed in seeds] for name in (arm, other))
    closer = [less(arm, other, metric, **where) for metric in ("text_kl", "image_kl")]
    which = f" ({','.join(map(str, seeds))})" if where.get("cpu") else ""
    return f"| {after} | {_interval(ours)} ({statistics.fmean(theirs):.0%}) | {closer[0]} | {closer[1]} | {_count(len(seeds))}{which}, {device} |"


def five_artists_qwen_says() -> str:
    """What the larger LM's table tells, over the seeds that the arms it compares share."""
    arms = larger()
    if not arms:
        return NOT_YET
    default, blind = "vision_before_ce05", "vision_before_blind_ce05"
    paired = read(LARGER)["paired"]["P"]["severe"]

    def gained(arm: str, other: str, metric: str) -> str:
        return spread(paired[f"{arm} - {other}"][metric], 3, "+")

    def seeds(arm: str) -> int:
        return int(arms[arm]["text_kl"]["seeds"])

    fewer = sorted(
        (arm for arm in arms if "seeds" in arms[arm]["text_kl"] and seeds(arm) < seeds("ce")), key=seeds, reverse=True
    )
    lines = [
        f"One H200, {_count(seeds('ce'))} of the VLM before, cross-entropy and the default; then the machine was gone: "
        + ", ".join(f"`{arm}` has {seeds(arm)}" for arm in fewer)
        + ". Drift differs from seed to seed, so arms are compared within seeds.",
        f"The default brings {_back(default)} of the language back, {_more(paired, default)} more than cross-entropy on the same seeds. It ends {less(default, 'ce', 'text_kl', of=LARGER)} "
        f"below cross-entropy on text, {less(default, 'ce', 'image_kl', of=LARGER)} about pictures, {less(default, 'ce', DEPENDENT, of=LARGER)} "
        f"where the picture decides. Names: {gained(default, 'before', 'naming_seen')} against the VLM before, "
        f"{gained(default, 'ce', 'naming_seen')} against cross-entropy.",
        f"Without labels and blind (`none`), text is level ({gained(default, 'none', 'text_kl')}, {_count(paired[f'{default} - none']['text_kl']['seeds'])}); "
        f"about pictures the default is {less(default, 'none', 'image_kl', of=LARGER)} below it, {less(default, 'none', DEPENDENT, of=LARGER)} where "
        f"the picture decides. With the same labels beside both (`none_ce05`, {_count(seeds('none_ce05'))}) it is "
        f"{less(default, 'none_ce05', 'image_kl', of=LARGER)} and {less(default, 'none_ce05', DEPENDENT, of=LARGER)} below, on text "
        f"{less(default, 'none_ce05', 'text_kl', of=LARGER)}.",
        f"A second, blind reading (`blind_weight` .5, {_count(seeds(blind))}) gains nothing here, against the default: text "
        f"{gained(blind, default, 'text_kl')}, pictures {gained(blind, default, 'image_kl')}, where the picture decides "
        f"{gained(blind, default, DEPENDENT)}. The library's default stays without it.",
        *_larger_on_a_cpu(),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _larger_on_a_cpu() -> list[str]:
    """The same on a CPU, seed 0."""
    arms = read(LARGER_ON_A_CPU)["regimes"]["P"]["severe"]
    scores = [
        f"{arms['vision_before_ce05'][metric]['mean']:.3f} against {arms['ce'][metric]['mean']:.3f}"
        for metric in ("text_kl", "image_kl")
    ]
    return [
        f"On a CPU (one seed, fewer pictures to name, measured in bf16; `results/qwen/cpu`) the default has {scores[0]} on text, {scores[1]} about pictures. "
        "There the drifted model answered *What is the capital of France?* with one word, and a request for a story with the picture's name.",
        *_ifeval_of_the_larger(arms),
    ]


def _ifeval_of_the_larger(arms: dict[str, Any]) -> list[str]:
    """Of how many of IFEval's prompts each follows every demand: seed 0 on a CPU."""
    if not all("ifeval_strict" in arms[arm] for arm in ("original", "before", "ce", "vision_before_ce05")):
        return []
    rows = {row["arm"].rpartition("/")[2]: row for row in read_lines(LARGER_ON_A_CPU.parent / "arms.jsonl")}

    def of(arm: str) -> str:
        return (
            f"{arms[arm]['ifeval_strict']['mean']:.2f} ({arms[arm]['ifeval_tokens']['mean']:.0f} tokens, "
            f"{arms[arm]['ifeval_stopped']['mean']:.0%} ended)"
        )

    return [
        f"*IFEval comes back in part, if at all*: of {rows['ce']['ifeval_prompts']} prompts, strict, the original follows {of('original')}, the VLM before "
        f"{of('before')}, cross-entropy {of('ce')}, the default {of('vision_before_ce05')}; ± {rows['vision_before_ce05']['half']['ifeval_strict']:.2f} over "
        "prompts, so that the last three are not told apart. The rows here are answers about pictures of at most 72 tokens."
    ]


def _more(paired: dict[str, Any], arm: str) -> str:
    """How much more of the language an arm of the larger LM brings back than cross-entropy, in points."""
    found = paired[f"{arm} - ce"]["recovered_text_kl"]
    return f"{100 * found['mean']:.0f} ± {100 * found['half']:.0f} points"


def _back(arm: str) -> str:
    """The share of the language that an arm of the larger LM brings back."""
    found = larger()[arm]["recovered_text_kl"]
    return f"{found['mean']:.0%} ± {found['half']:.0%}"


def what_sight_does() -> str:
    """What eyes give the teacher, on the words that the picture decides and over whole answers: without labels beside, and with them."""
    text = (
        f"A teacher that reads the picture leaves the student {less('vision_before', 'none', DEPENDENT)} closer to the original than a blind one on words "
        f"that depend on the picture, {less('vision_before', 'none', 'image_kl')} over whole answers "
        f"({_count(len(_shares('vision_before', 'none', 'image_kl')))}, {read(SUMMARY)['device'].split(' ')[1]})"
    )
    seeds = len(_shares("vision_before_ce05", "none_ce05", "image_kl", cpu=True))
    if not seeds:
        return f"{text}."
    labelled = [less("vision_before_ce05", "none_ce05", metric, cpu=True) for metric in (DEPENDENT, "image_kl")]
    return f"{text}; with labels beside, {labelled[0]} and {labelled[1]} ({_count(seeds)}, CPU)."


def _than_half(metric: str) -> str:
    """By which share the default is below cross-entropy at half the learning rate: seed 0 on a CPU."""
    arms = seed_0_on_a_cpu()
    return f"{1 - arms['vision_before_ce05'][metric]['mean'] / arms['ce_half'][metric]['mean']:.0%}"


def _count(seeds: int) -> str:
    return "one seed" if seeds == 1 else f"{seeds} seeds"


@functools.cache
def _seeds(folder: Path, regime: str, drift: str) -> dict[tuple[int, str], dict[str, Any]]:
    """{(seed, arm): what was measured} of the aligned tower."""
    found = {}
    for line in (folder / "arms.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tower, of, how, seed, arm = row["arm"].split("/")
        if (tower, of, how) == ("aligned", regime, drift):
            found[int(seed), arm] = row
    return found


def _shares(
    arm: str,
    other: str,
    metric: str,
    *,
    regime: str = "P",
    drift: str = "severe",
    cpu: bool = False,
    of: Path | None = None,
) -> list[float]:
    """By which share an arm is below another, seed by seed, over those of both. of: the summary of other results than the recipe's."""
    found = _seeds((of or (ON_A_CPU if cpu else SUMMARY)).parent, regime, drift)
    both = sorted(seed for seed, name in found if name == arm and (seed, other) in found)
    return [1 - found[seed, arm][metric] / found[seed, other][metric] for seed in both]


def _differences(arm: str, other: str, metric: str) -> dict[int, float]:
    """{seed: arm - other} at severe drift in regime P, over the CPU's seeds of both."""
    found = _seeds(ON_A_CPU.parent, "P", "severe")
    both = sorted(seed for seed, name in found if name == arm and (seed, other) in found)
    return {seed: found[seed, arm][metric] - found[seed, other][metric] for seed in both}


def _which(arm: str, other: str) -> str:
    """The seeds of both, as a list."""
    return ", ".join(map(str, _differences(arm, other, "image_kl")))


def _moved(arm: str, other: str) -> str:
    """What an arm has against another about pictures, where they matter, and on text, within seeds."""
    told = []
    for title, metric in (("pictures", "image_kl"), ("where the picture matters", DEPENDENT), ("text", "text_kl")):
        values = list(_differences(arm, other, metric).values())
        half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
        told.append(f"{title} {statistics.fmean(values):+.3f} ± {half:.3f}")
    return ", ".join(told)


def share(arm: str, other: str, metric: str, **where: Any) -> float:
    """By which share an arm is below another, on average over the seeds of both."""
    return statistics.fmean(_shares(arm, other, metric, **where))


def _least(arm: str, other: str, metric: str, **where: Any) -> float:
    """The lower end of `share`'s 95 % t interval."""
    found = _shares(arm, other, metric, **where)
    return statistics.fmean(found) - float(t.ppf(0.975, len(found) - 1)) * statistics.stdev(found) / len(found) ** 0.5


def less(arm: str, other: str, metric: str, **where: Any) -> str:
    """`31% ± 2%`: `share`, and half of its 95 % t interval; without it of a single seed."""
    return _interval(_shares(arm, other, metric, **where))


def _interval(found: list[float]) -> str:
    """Shares of several seeds: their mean, and half of its 95 % t interval."""
    if len(found) == 1:
        return f"{found[0]:.0%}".replace("-0%", "0%")
    half = t.ppf(0.975, len(found) - 1) * statistics.stdev(found) / len(found) ** 0.5
    return f"{statistics.fmean(found):.0%} ± {half:.0%}".replace("-0%", "0%")


def five_artists_says() -> str:
    """What follows from the tables, in sentences."""
    summary = read(SUMMARY)
    severe, mild, texts = (of_regime(*where) for where in (("P", "severe"), ("P", "mild"), ("M", "severe")))
    default = summary["default"]
    strict = "ifeval_strict"
    asked = [arm for arm in severe if strict in severe[arm] and arm not in ("original", "before", "default")]

    def of(arm: str, metric: str, arms: dict[str, Any] = severe) -> str:
        return spread(arms[arm][metric], 3)

    def gained(arm: str, other: str, metric: str) -> str:
        return spread(summary["paired"]["P"]["severe"][f"{arm} - {other}"][metric], 3, "+")

    lines = [
        f"*Distilling beats cross-entropy on the same rows*, although those rows are the original's own words. Text KL: `{default}` (the "
        f"library's default) {of(default, 'text_kl')}, `vision_before` {of('vision_before', 'text_kl')}, `none` {of('none', 'text_kl')}, "
        f"cross-entropy {of('ce', 'text_kl')}. The default is {less(default, 'ce', 'text_kl')} below cross-entropy at severe "
        f"drift, {less(default, 'ce', 'text_kl', drift='mild')} at mild, {less(default, 'ce', 'text_kl', regime='M')} with text rows "
        "beside.",
        f"*Answers about pictures*: the default is {less(default, 'ce', 'image_kl')} below cross-entropy at severe drift, "
        f"{less(default, 'ce', 'image_kl', drift='mild')} at mild, {less(default, 'ce', 'image_kl', regime='M')} with text rows. "
        f"A teacher that is told the caption, the upper bound, reaches {less('caption', 'ce', 'image_kl')}. At mild drift "
        f"`none` and `vision_before` are no better than cross-entropy ({of('none', 'image_kl', mild)}, {of('vision_before', 'image_kl', mild)}, "
        f"{of('ce', 'image_kl', mild)}): there the labels beside the teacher (`ce_weight` .5) are what helps.",
        "*What sight does, and what labels do.* The labels were written with the caption at hand, so that cross-entropy alone learns the picture "
        f"from them ({of('ce', DEPENDENT)} where it matters). Teachers without labels beside them: `vision_before` has {of('vision_before', DEPENDENT)} "
        f"there, `none` {of('none', DEPENDENT)}, {less('vision_before', 'none', DEPENDENT)} less. Over whole answers sight gives "
        f"{less('vision_before', 'none', 'image_kl')} at severe drift and {less('vision_before', 'none', 'image_kl', drift='mild')} at mild."
        + _with_labels(),
        f"*Names stay*: against the VLM before, the default names {gained(default, 'before', 'naming_seen')} of the drawings by known artists and "
        f"{gained(default, 'before', 'naming_new')} of those by the new one. Yes/no questions tell nothing: every arm, and the VLM before "
        f"({of('before', 'yes_no')}), is near chance. That is of a tower that stands still. {what_training_the_tower_does()}",
        f"*With text rows at hand* `none` has {of('none', 'text_kl', texts)} on text and {of('none', 'image_kl', texts)} on pictures, the default "
        f"{of(default, 'text_kl', texts)} and {of(default, 'image_kl', texts)}. `none` has no labels beside it, the default has: what of that "
        "is sight, the CPU's table of regime M below tells, with one seed (`none` with labels is level with the default on pictures, "
        "`vision_before` without is below `none` on text).",
        f"*Lengths*: asked IFEval's prompts, the original writes {severe['original']['ifeval_tokens']['mean']:.0f} tokens (at most 256) and ends "
        f"{severe['original']['ifeval_stopped']['mean']:.0%} of its answers itself; the VLM before {severe['before']['ifeval_tokens']['mean']:.0f} tokens, "
        + ", ".join(
            f"`{arm}` {severe[arm]['ifeval_tokens']['mean']:.0f} ({severe[arm]['ifeval_stopped']['mean']:.0%})"
            for arm in ("none", "ce", default, "vision_before")
        )
        + ". Sharing shortens answers; a blind teacher's length is the original's.",
        f"*IFEval does not come back*: of the {len(asked)} arms that were asked, the best follows {max(severe[arm][strict]['mean'] for arm in asked):.3f} "
        f"of the prompts, the default {of(default, strict)}, the original {of('original', strict)}. The VLM before is no yardstick: its "
        f"{severe['before']['ifeval_tokens']['mean']:.0f} tokens per answer break few demands ({of('before', strict)}).",
        f"*Interpolation* costs nothing and is far behind at severe drift ({of('interpolate_05', 'text_kl')}); at mild drift it beats "
        f"cross-entropy on text ({of('interpolate_05', 'text_kl', mild)} against {of('ce', 'text_kl', mild)}) and is twice as far on pictures.",
        f"*On-policy did not pay here*: text {of('on_policy', 'text_kl')}, pictures {of('on_policy', 'image_kl')}, where cross-entropy has "
        f"{of('ce', 'text_kl')} and {of('ce', 'image_kl')}, and names {gained('on_policy', 'before', 'naming_seen')} against the VLM "
        f"before, at {severe['on_policy']['seconds']['mean'] / severe['ce']['seconds']['mean']:.0f} times cross-entropy's seconds. A likely "
        "reason, not measured: a VLM that answers with a name gives its judges little to judge.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _with_labels() -> str:
    """The default against a blind teacher with the same labels, over the CPU's seeds that have both; nothing without them."""
    default, blind = "vision_before_ce05", "none_ce05"
    parts = []
    for drift in ("severe", "mild"):
        found = _shares(default, blind, "image_kl", drift=drift, cpu=True)
        if found:
            told = [
                less(default, blind, metric, drift=drift, cpu=True) for metric in (DEPENDENT, "image_kl", "text_kl")
            ]
            parts.append(f"{' / '.join(told)} after {drift} drift ({_count(len(found))})")
    return (
        " With the same labels beside both (`none_ce05`, on a CPU), the default is below the blind teacher, where the picture matters / over whole "
        f"answers / on text, by {', '.join(parts)}."
        if parts
        else ""
    )


def what_training_the_tower_does() -> str:
    """The default with tower and projector trained along, at the language model's rate, beside itself, over the CPU's seeds of both."""
    arm, default = "vision_before_ce05_tower", "vision_before_ce05"
    rows = _seeds(ON_A_CPU.parent, "P", "severe")
    seeds = sorted(seed for seed, name in rows if name == arm and (seed, default) in rows)

    def of(name: str, metric: str) -> str:
        values = [rows[seed, name][metric] for seed in seeds]
        mean = f"{statistics.fmean(values):.2f}"
        return (
            mean
            if len(values) < 2
            else f"{mean} ± {t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5:.2f}"
        )

    return (
        f"Trained along with the language model, at its rate of 2e-4, tower and projector forget: the default then names {of(arm, 'naming_seen')} of the "
        f"drawings, frozen {of(default, 'naming_seen')}, the VLM before {of('before', 'naming_seen')}. The language gains nothing by it: text KL "
        f"{of(arm, 'text_kl')} and {of(default, 'text_kl')}, pictures {of(arm, 'image_kl')} and {of(default, 'image_kl')} (severe drift, "
        f"{_count(len(seeds))}, CPU)."
    )


def five_artists_targets() -> str:
    """What was to be reached, and what was."""
    summary = read(SUMMARY)
    arms, default = of_regime("P", "severe"), summary["default"]
    names = summary["paired"]["P"]["severe"][f"{default} - before"]["naming_seen"]
    back = arms[default]["recovered_text_kl"]
    strict, whole = arms[default]["ifeval_strict"], arms["original"]["ifeval_strict"]
    verdicts = [
        (
            "text fidelity lost to drift that comes back (severe drift)",
            ">= 90 %",
            spread(back, 3),
            back["mean"] >= 0.9,
            back["mean"] - back["half"] >= 0.9,
        ),
        *(
            (
                what,
                f">= {wanted:.0%}",
                less(arm, other, metric),
                share(arm, other, metric) >= wanted,
                _least(arm, other, metric) >= wanted,
            )
            for what, wanted, arm, other, metric in (
                ("the default's remaining text KL below cross-entropy's", 0.25, default, "ce", "text_kl"),
                ("KL of answers about pictures below cross-entropy's", 0.3, default, "ce", "image_kl"),
                (
                    "sharing below no sharing where the picture matters, both without labels",
                    0.2,
                    "vision_before",
                    "none",
                    DEPENDENT,
                ),
            )
        ),
        (
            "names against the VLM before",
            ">= -.01",
            spread(names, 3, "+"),
            names["mean"] >= -0.01,
            names["mean"] - names["half"] >= -0.01,
        ),
        (
            "IFEval, strict, against the original's",
            "within .02",
            f"{spread(strict, 3)} against {spread(whole, 3)}",
            strict["mean"] >= whole["mean"] - 0.02,
            strict["mean"] - strict["half"] >= whole["mean"] - 0.02,
        ),
    ]
    rows = [
        (*row, ("met" if surely else "met, not beyond its interval") if met else "**missed**")
        for *row, met, surely in verdicts
    ]
    return "\n".join(["| what | asked | found | |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def five_artists_cpu_says() -> str:
    """What these two tables tell that the H100's do not."""
    arms = seed_0_on_a_cpu()

    def of(arm: str, metric: str = "text_kl", digits: int = 3) -> str:
        return f"{arms[arm][metric]['mean']:.{digits}f}"

    with_text = seed_0_on_a_cpu("M")

    def of_m(arm: str, metric: str = "text_kl", digits: int = 3) -> str:
        return f"{with_text[arm][metric]['mean']:.{digits}f}"

    shares = {2: "ce_replay_10", 4: "ce", 5: "ce_replay_30", 8: "ce_replay_50"}
    replay = ", ".join([f"0 of 16: {of('ce')}", *(f"{rows} of 16: {of_m(arm)}" for rows, arm in shares.items())])
    lines = [
        f"*How much replay is enough?* Cross-entropy, where some of a step's rows are texts of the original's own ({replay}). The default "
        f"without a single row of text: {of('vision_before_ce05')}.",
        f"*Texts that people wrote* make cross-entropy worse ({of_m('ce_people')} with a quarter of the rows, {of('ce')} without): it learns how "
        f"people write, and this asks how the original does. Distilled, the same rows give less KL than any cross-entropy "
        f"({of_m('vision_people')}): only their prefixes count.",
        f"*Cross-entropy at half the learning rate* is a better rival ({of('ce_half')}; {of('ce')} at the full one, {of('ce_tenth')} at a tenth, LoRA "
        f"{of('ce_lora')}).",
        f"*Interpolating nearer to the original* (.3), without training, is lower on text ({of('interpolate_03')}) than every arm that trains "
        f"without text rows and is not mixed afterwards, and names fewer pictures: {of('interpolate_03', 'naming_seen', 2)} against {of('before', 'naming_seen', 2)} before, pictures "
        f"{of('interpolate_03', 'image_kl')} against {of('vision_before_ce05', 'image_kl')} for the default. `lingudistill blend --keep` looks "
        "for such points.",
        f"*LoRA* (rank 16, at 5e-4) brings back less than full training, distilled ({of('vision_before_lora')}) or not ({of('ce_lora')}).",
        f"*The better parent of every token* ({of('parents')}) does not beat a parent per row ({of('vision_parents')}), and on texts that people "
        f"wrote it is {of_m('parents_people')}, against {of_m('vision_people')} where the LM judges all of such a row.",
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
            f"{of(longer, 'ifeval_strict')}, {of('none_long', 'ifeval_strict')} and {of('ce_long', 'ifeval_strict')} on 495 prompts. Over "
            f"{_count(len(_shares(longer, 'ce_long', 'text_kl', cpu=True)))} ({_which(longer, 'ce_long')}) it is {less(longer, 'ce_long', 'text_kl', cpu=True)} below "
            f"cross-entropy on text, {less(longer, 'ce_long', 'image_kl', cpu=True)} about pictures."
            + _longer_after_mild_drift(default, longer)
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
    lines += _instructions(with_text)
    return "\n".join(f"- {line}" for line in lines)


def _longer_after_mild_drift(default: str, longer: str) -> str:
    """160 steps in place of 45, where little was lost: regime P, over the seeds of all three arms."""
    found = _seeds(ON_A_CPU.parent, "P", "mild")
    arms = (default, longer, "ce_long")
    seeds = sorted(seed for seed, arm in found if arm == longer and all((seed, other) in found for other in arms))
    if not seeds:
        return ""

    def of(arm: str) -> str:
        text, pictures = (
            statistics.fmean(found[seed, arm][metric] for seed in seeds) for metric in ("text_kl", "image_kl")
        )
        return f"{text:.3f} and {pictures:.3f}"

    return (
        f" After mild drift ({'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}), on text and about pictures: the default {of(longer)} "
        f"({of(default)} after 45 steps), cross-entropy {of('ce_long')}."
    )


def _instructions(arms: dict[str, Any]) -> list[str]:
    """Whether text rows that demand a form bring instruction following back: regime M, seed 0."""
    original = read(ON_A_CPU)["regimes"]["P"]["severe"]["original"]
    default = "vision_before_ce05"
    asked = f"{default}_instructions"
    if not {default, asked} <= set(arms):
        return []

    def follows(arm: dict[str, Any]) -> str:
        return (
            f"{arm['ifeval_strict']['mean']:.3f} ({arm['ifeval_tokens']['mean']:.0f} tokens, {arm['ifeval_stopped']['mean']:.0%} of the answers "
            "ended)"
        )

    line = (
        f"*Text rows that ask for a form* (`*_instructions`: half of the rows are instructions of IFEval's kind, none of them IFEval's, answered by the "
        f"original in up to 256 tokens). Of IFEval's prompts the original follows {follows(original)}, the default with short questions as text "
        f"rows {follows(arms[default])}, with instructions {follows(arms[asked])}"
    )
    for arm, title in (
        ("ce_instructions", "cross-entropy on the same rows"),
        ("none_instructions", "a blind teacher"),
    ):
        if arm in arms:
            line += f", {title} {follows(arms[arm])}"
    line += "."
    mixed = [(share, f"{asked}_{name}") for share, name in ((".3", "07"), (".5", "05")) if f"{asked}_{name}" in arms]
    if mixed:
        each = ", ".join(
            f"{share} of it {arms[arm]['ifeval_strict']['mean']:.3f} (text {arms[arm]['text_kl']['mean']:.3f}, pictures "
            f"{arms[arm]['image_kl']['mean']:.3f}, names {arms[arm]['naming_seen']['mean']:.2f})"
            for share, arm in mixed
        )
        line += f" The default so trained, with the original's weights mixed in: {each}."
        lacks = original["ifeval_strict"]["mean"] - arms[default]["ifeval_strict"]["mean"]
        best = max(arms[arm]["ifeval_strict"]["mean"] for _, arm in mixed)
        line += (
            f" At best {1 - (original['ifeval_strict']['mean'] - best) / lacks:.0%} of what the default lacks comes back: "
            f"{round(best * IFEVAL_PROMPTS)} prompts in place of {round(arms[default]['ifeval_strict']['mean'] * IFEVAL_PROMPTS)} of "
            f"{IFEVAL_PROMPTS}, one seed, the better of two shares; not more than chance may do."
        )
    return [line, *_instructions_longer(original)]


def _instructions_longer(original: dict[str, Any]) -> list[str]:
    """The same for 160 steps: of each seed that has it, beside its VLM before."""
    found = _seeds(ON_A_CPU.parent, "M", "severe")
    arm = "vision_before_ce05_instructions_long"
    lines = []
    for seed in sorted(seed for seed, name in found if name == arm):
        long, mixed, before = (found.get((seed, name)) for name in (arm, f"{arm}_07", "before"))
        assert long is not None
        prompts = long["ifeval_prompts"]
        line = f"*The same for 160 steps* (seed {seed}: each instruction three times): of {prompts} prompts the default follows {long['ifeval_strict']:.3f}"
        if mixed is not None:
            line += f", with .3 of the original's weights mixed in {mixed['ifeval_strict']:.3f}"
        line += f"; the original {original['ifeval_strict']['mean']:.3f}"
        if before is not None and "ifeval_strict" in before:
            line += f", the VLM before {before['ifeval_strict']:.3f}"
        line += f" (each ± {long['half']['ifeval_strict']:.3f} over prompts). Text {long['text_kl']:.3f}"
        line += f" and {mixed['text_kl']:.3f}" if mixed is not None else ""
        line += f", pictures {long['image_kl']:.3f}" + (f" and {mixed['image_kl']:.3f}" if mixed is not None else "")
        line += f", names {long['naming_seen']:.2f}" + (
            f" and {mixed['naming_seen']:.2f}" if mixed is not None else ""
        )
        if before is not None:
            line += f" (before {before['naming_seen']:.2f})"
        told = "In this seed instruction following comes back where rows ask for it, with enough steps"
        if (rival := found.get((seed, "ce_instructions_long"))) is not None:
            told += (
                f": also with cross-entropy alone, {rival['ifeval_strict']:.3f}, not told apart from the default. What the teacher adds is nearness: cross-entropy "
                f"ends at {rival['text_kl']:.3f} on text and {rival['image_kl']:.3f} about pictures"
            )
        lines.append(f"{line}. {told}.")
    return lines


def _read_twice(arms: dict[str, Any]) -> list[str]:
    """What a second, blind reading does: over the seeds of the CPU that have both arms, and longer."""
    found, default, twice = read(ON_A_CPU), "vision_before_ce05", "vision_before_blind_ce05"
    gains = found["paired"]["P"]["severe"].get(f"{twice} - {default}")
    if gains is None:
        return []
    line = (
        f"*A teacher that reads twice* (`blind_weight` .5, {gains['text_kl']['seeds']} seeds), against the default: about pictures "
        f"{spread(gains['image_kl'], 3, '+')}, where the picture matters {spread(gains['image_kl_dependent'], 3, '+')}, on text "
        f"{spread(gains['text_kl'], 3, '+')}, names {spread(gains['naming_seen'], 3, '+')}. About pictures it is "
        f"{less(twice, 'ce', 'image_kl', cpu=True)} below cross-entropy."
    )
    alone = len(_differences("vision_before_blind", "vision_before", "image_kl"))
    if alone > 1:
        line += f" Without labels in either (`ce_weight` 0, {_count(alone)}): {_moved('vision_before_blind', 'vision_before')}."
    longer = f"{twice}_long"
    if longer in arms:
        seeds = len(_shares(longer, "ce_long", "image_kl", cpu=True))
        line += (
            f" After 160 steps ({_count(seeds)}: {_which(longer, 'ce_long')}) it is {less(longer, 'ce_long', 'image_kl', cpu=True)} below cross-entropy about pictures after as many, "
            f"{less(longer, 'ce_long', DEPENDENT, cpu=True)} where the picture matters, {less(longer, 'ce_long', 'text_kl', cpu=True)} on text "
            f"(seed 0: pictures {arms[longer]['image_kl']['mean']:.3f}, reading once {arms['vision_before_ce05_long']['image_kl']['mean']:.3f}, "
            f"text {arms[longer]['text_kl']['mean']:.3f}). Against the default after 160 steps (seeds {_which(longer, f'{default}_long')}): "
            f"{_moved(longer, f'{default}_long')}."
        )
    mild = found["paired"]["P"].get("mild", {}).get(f"{twice} - {default}")
    if mild is not None:
        line += (
            f" After mild drift ({mild['text_kl']['seeds']} seeds): pictures {spread(mild['image_kl'], 3, '+')}, where the picture matters "
            f"{spread(mild['image_kl_dependent'], 3, '+')}, text {spread(mild['text_kl'], 3, '+')}, names {spread(mild['naming_seen'], 3, '+')}."
        )
        line += _by_the_rule({"severe": gains, "mild": mild})
    return [line]


def _by_the_rule(gains: dict[str, dict[str, Any]], seeds: int = 5) -> str:
    """What the rule in recipe.yaml says of `blind_weight`; nothing before it has its seeds."""
    if any(of["image_kl"]["seeds"] < seeds for of in gains.values()):
        return ""
    missed = [
        f"{name} ({drift} drift)"
        for drift, of in gains.items()
        for name, met in (
            ("pictures", -of["image_kl"]["mean"] > of["image_kl"]["half"]),
            ("text", of["text_kl"]["mean"] <= 0.01),
            ("names", of["naming_seen"]["mean"] >= -0.01),
        )
        if not met
    ]
    return (
        f" The rule in `recipe.yaml` is not met: {', '.join(missed)}."
        if missed
        else " All that the rule in `recipe.yaml` asks is met; why the default stays without it, it says there."
    )

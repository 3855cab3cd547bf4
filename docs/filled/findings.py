"""The five_artists recipe: what its tables say, in sentences."""

from __future__ import annotations

import json
from typing import Any

from .arms import of_regime, seed_0_on_a_cpu, spread
from .files import ON_A_CPU, RECIPE, SUMMARY, read


def five_artists_claim() -> str:
    """README's sentence: the library's default, and a teacher that cannot see, against cross-entropy on the same rows."""
    found = read(RECIPE / "results/summary.json")
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
        f"- **Measured** ({seeds} seeds, {found['device'].split(' ')[1]}, 135M, towers frozen; ±: 95 % interval): the default brings {back['mean']:.0%} ± {back['half']:.0%} of the "
        f"lost language back. It ends {less(name, 'text_kl')} closer to the original on text than cross-entropy on the same rows, "
        f"{less(name, 'image_kl')} about pictures; a blind teacher {less('none', 'text_kl')} and {less('none', 'image_kl')} "
        "([second recipe](examples/recipes/five_artists/README.md)). Instruction following (IFEval) did not come "
        f"back. {_longer()}Interpolating weights half-way instead brings {arms['interpolate_05']['recovered_text_kl']['mean']:.0%} back."
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
    return f"With more steps and `blind_weight` it is {below:.0%} closer about pictures ({count}, CPU). "


def _less(regime: str, drift: str, arm: str, other: str, metric: str) -> str:
    """`32% (.082 ± .009)`: by how much an arm's KL is below another's, over the seeds of both."""
    summary = read(SUMMARY)
    arms, difference = summary["regimes"][regime][drift], summary["paired"][regime][drift][f"{arm} - {other}"][metric]
    return f"{-difference['mean'] / arms[other][metric]['mean']:.0%} ({-difference['mean']:.3f} ± {difference['half']:.3f})"


def five_artists_says() -> str:
    """What follows from the tables, in sentences."""
    summary = read(SUMMARY)
    severe, mild, texts = (of_regime(*where) for where in (("P", "severe"), ("P", "mild"), ("M", "severe")))
    default = summary["default"]

    def of(arm: str, metric: str, arms: dict[str, Any] = severe) -> str:
        return spread(arms[arm][metric], 3)

    def gained(arm: str, other: str, metric: str) -> str:
        return spread(summary["paired"]["P"]["severe"][f"{arm} - {other}"][metric], 3, "+")

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
    summary = read(SUMMARY)
    arms, default = of_regime("P", "severe"), summary["default"]
    names = summary["paired"]["P"]["severe"][f"{default} - before"]["naming_seen"]

    def share_less(other: str, metric: str) -> float:
        difference: float = summary["paired"]["P"]["severe"][f"{default} - {other}"][metric]["mean"]
        return -difference / float(arms[other][metric]["mean"])

    back = arms[default]["recovered_text_kl"]
    strict, whole = arms[default]["ifeval_strict"], arms["original"]["ifeval_strict"]
    verdicts = [
        ("text fidelity lost to drift that comes back", ">= 90 %", spread(back, 3), back["mean"] >= 0.9),
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
        ("names against the VLM before", ">= -.01", spread(names, 3, "+"), names["mean"] >= -0.01),
        (
            "IFEval, strict, against the original's",
            "within .02",
            f"{spread(strict, 3)} against {spread(whole, 3)}",
            strict["mean"] >= whole["mean"] - 0.02,
        ),
    ]
    rows = [(*row, "met" if met else "**missed**") for *row, met in verdicts]
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
        f"people write, and this asks how the original does. Distilled, the same rows are the best of all ({of_m('vision_people')}): only "
        "their prefixes count.",
        f"*Cross-entropy at half the learning rate* is a better rival ({of('ce_half')}; {of('ce')} at the full one, {of('ce_tenth')} at a tenth, LoRA "
        f"{of('ce_lora')}).",
        f"*Interpolating nearer to the original* (.3) is lower on text than every arm that trains without text rows ({of('interpolate_03')}), without "
        f"training, and names fewer pictures: {of('interpolate_03', 'naming_seen', 2)} against {of('before', 'naming_seen', 2)} before, pictures "
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
    lines += _instructions(with_text)
    return "\n".join(f"- {line}" for line in lines)


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
        line += f" At best {1 - (original['ifeval_strict']['mean'] - best) / lacks:.0%} of what the default lacks comes back."
    return [line]


def _read_twice(arms: dict[str, Any]) -> list[str]:
    """What a second, blind reading does: over the seeds of the CPU that have both arms, and longer."""
    found, default, twice = read(ON_A_CPU), "vision_before_ce05", "vision_before_blind_ce05"
    gains = found["paired"]["P"]["severe"].get(f"{twice} - {default}")
    if gains is None:
        return []
    against_ce = found["paired"]["P"]["severe"][f"{twice} - ce"]["image_kl"]
    severe = found["regimes"]["P"]["severe"]
    ce = severe["ce"]["image_kl"]["mean"]
    line = (
        f"*A teacher that reads twice* (`blind_weight` .5, {gains['text_kl']['seeds']} seeds), against the default: about pictures "
        f"{spread(gains['image_kl'], 3, '+')}, where the picture matters {spread(gains['image_kl_dependent'], 3, '+')}, on text "
        f"{spread(gains['text_kl'], 3, '+')}, names {spread(gains['naming_seen'], 3, '+')}. About pictures it is "
        f"{-against_ce['mean'] / ce:.0%} below cross-entropy."
    )
    alone = found["paired"]["P"]["severe"].get(f"vision_before_blind - {default}")
    if alone is not None:
        line += (
            f" Without labels (`ce_weight` 0, {alone['text_kl']['seeds']} seeds): pictures {spread(alone['image_kl'], 3, '+')}, where the picture "
            f"matters {spread(alone['image_kl_dependent'], 3, '+')}, text {spread(alone['text_kl'], 3, '+')}."
        )
    longer = f"{twice}_long"
    if longer in arms:
        below = 1 - arms[longer]["image_kl"]["mean"] / arms["ce_long"]["image_kl"]["mean"]
        line += (
            f" After 160 steps (seed 0) pictures {arms[longer]['image_kl']['mean']:.3f} ({arms['vision_before_ce05_long']['image_kl']['mean']:.3f} "
            f"reading once), {below:.0%} below cross-entropy after as many, and text {arms[longer]['text_kl']['mean']:.3f}."
            + _and_seed_1(longer)
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
        else " All that the rule in `recipe.yaml` asks is met; why the default waits, it says there."
    )


def _and_seed_1(longer: str) -> str:
    """The same of the second seed; nothing without both of its arms."""
    rows = (json.loads(line) for line in (ON_A_CPU.parent / "arms.jsonl").read_text(encoding="utf-8").splitlines())
    found = {row["arm"].rpartition("/")[2]: row for row in rows if row["arm"].startswith("aligned/P/severe/1/")}
    if not {longer, "ce_long"} <= set(found):
        return ""
    pictures, ce = found[longer]["image_kl"], found["ce_long"]["image_kl"]
    return f" Seed 1: pictures {pictures:.3f} against {ce:.3f}, {1 - pictures / ce:.0%} below, and text {found[longer]['text_kl']:.3f}."

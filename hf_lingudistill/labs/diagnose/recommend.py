"""Which sharing mode a drift report recommends, and why: one rule over the teacher's loss by mode, with no model in sight.

The trainer's own default wins ties, whatever it is: what `diagnose` says and what the trainer does are one voice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...config import LinguDistillConfig
from ...sharing import MODES
from ..statistics import Bootstrap, Items, interval
from .measure import TWICE
from .prompts import CONDITIONS

SAME = 1e-3  # nats per token; below it, two modes differ by rounding
FEWEST = 6  # prompts; five that all agree do so by chance more often than in one of twenty cases
LONG = 24  # tokens of an answer; of shorter ones most is decided by the image, which no teacher of language can judge


def default_mode() -> str:
    """The `kv_sharing` of a config in which none is named."""
    found = {field.name: field.default for field in dataclasses.fields(LinguDistillConfig)}
    return str(found["kv_sharing"])


def rule(default: str) -> str:
    """The rule in words."""
    return (
        f"The mode whose teacher has the lowest loss on the answers: on those of at least {LONG} tokens where there are {FEWEST} of them, and "
        f"on answers about an image, or else behind one, or else without. It stays {default}, the trainer's default, unless another mode's "
        f"loss is lower by more than the 95 % interval of the paired difference. A difference below {SAME:g} nats per token, or on fewer "
        f"than {FEWEST} prompts, is a tie. Where there are images, none is no candidate: its teacher does not see them. Without images, only "
        "none and the default are compared."
    )


@dataclass(frozen=True)
class Recommendation:
    """mode: the value for `kv_sharing`. blind_weight: .5 or 0. condition: the prompts that decided. reason: a sentence. notes: what else
    follows."""

    mode: str
    blind_weight: float
    condition: str
    reason: str
    notes: tuple[str, ...]


def recommend(
    perplexity: Mapping[str, Mapping[str, Items]],
    *,
    drifted: bool,
    bootstrap: Bootstrap,
    default: str | None = None,
) -> Recommendation:
    """Apply `rule`.

    Args:
        perplexity: condition -> reader (`student`, or a sharing mode) -> Items (nats, tokens) by prompt.
        drifted: whether the weights have moved at all.
        default: the mode that wins ties; default: the trainer's.

    Raises:
        ValueError: without any prompt.
    """
    default = default or default_mode()
    present = [name for name in ("about", "behind", "text") if perplexity.get(name)]
    if not present:
        raise ValueError("No prompt was measured: a recommendation needs at least one.")
    long = {name: _long(perplexity[name]) for name in present}
    seen = [name for name in present if name != "text"]
    several = [name for name in seen if len(long[name]["student"]) >= FEWEST]
    several += [name for name in seen if len(perplexity[name]["student"]) >= FEWEST]
    condition = (several or present)[0]
    enough = len(long[condition]["student"]) >= FEWEST
    items = long[condition] if enough else perplexity[condition]
    rivals = [mode for mode in items if mode in MODES and mode != default and _candidate(mode, condition)]
    gains = {mode: bootstrap.difference(items[mode], items[default]) for mode in rivals}
    best = min(rivals, key=lambda mode: gains[mode]["value"]) if rivals else default
    mode = best if rivals and tell(gains[best]) == "lower" else default
    told = _losses(items, condition, enough, bootstrap)
    reason = (
        f"{told} {_reason(gains[best], best, default) if rivals else f'So {default}: there is no other to choose.'}"
    )
    notes = _notes(perplexity, mode, drifted, bootstrap)
    blind_weight, note = _blind_weight(items, mode, condition, bootstrap) if drifted else (0.0, None)
    return Recommendation(mode, blind_weight, condition, reason, (*notes, note) if note else notes)


def _blind_weight(
    items: Mapping[str, Items], mode: str, condition: str, bootstrap: Bootstrap
) -> tuple[float, str | None]:
    """Whether the teacher should answer a second time without the image, and why."""
    if condition == "text" or mode not in TWICE:
        return 0.0, None
    twice = items[TWICE[mode]]
    gap = bootstrap.difference(twice, items[mode])
    found = 0.5 if tell(gap) == "lower" else 0.0
    losses = (
        f"{bootstrap.score(twice)['value']:.3f} against {bootstrap.score(items[mode])['value']:.3f} nats per token"
    )
    return found, (
        f"Answering a second time without the image, the mean of both ({mode} and none) has a loss of {losses}, {gap['value']:+z.3f}, "
        f"{interval(gap)}: blind_weight={found:g}."
    )


def _long(items: Mapping[str, Items]) -> dict[str, Items]:
    kept = [key for key, (_, tokens) in items["student"].items() if tokens >= LONG]
    return {reader: {key: of[key] for key in kept} for reader, of in items.items()}


def _candidate(mode: str, condition: str) -> bool:
    """With images, the modes whose teacher sees them; without, the original alone."""
    return MODES[mode].reads_student if condition != "text" else not MODES[mode].reads_student


def tell(difference: Mapping[str, Any]) -> Literal["lower", "higher", "tie"]:
    """What a paired difference of `Bootstrap` says: outside its interval, above rounding, and on enough prompts to mean it."""
    if difference["n"] >= FEWEST and difference["high"] < -SAME:
        return "lower"
    return "higher" if difference["n"] >= FEWEST and difference["low"] > SAME else "tie"


def _losses(items: Mapping[str, Items], condition: str, long: bool, bootstrap: Bootstrap) -> str:
    """What was measured, by mode."""
    losses = ", ".join(f"{mode} {bootstrap.score(of)['value']:.3f}" for mode, of in items.items() if mode in MODES)
    count = len(items["student"])
    kind = f"{count} answers of at least {LONG} tokens" if long else f"{count} answers"
    return f"The teacher's loss on {kind} ({CONDITIONS[condition]}), nats per token: {losses}."


def _reason(gain: Mapping[str, Any], best: str, default: str) -> str:
    if gain["n"] < FEWEST:
        return f"{best} against {default}: {gain['value']:+z.3f}. Fewer than {FEWEST} prompts cannot tell the two apart, so {default}, the default."
    compared = f"{best} against {default}: {gain['value']:+z.3f}, {interval(gain)}."
    if tell(gain) == "lower":
        return f"{compared} So {best}: it is lower by more than the interval."
    if gain["value"] < -SAME:
        return f"{compared} A tie, which goes to {default}, the default."
    return f"{compared} So {default}, the default: it is no higher."


def _notes(
    perplexity: Mapping[str, Mapping[str, Items]], mode: str, drifted: bool, bootstrap: Bootstrap
) -> tuple[str, ...]:
    if not drifted:
        return (
            "No drift: every weight is the original's up to the rounding of bf16. There is nothing to restore, and no mode to choose.",
        )
    notes = [_against_student(items, mode, condition, bootstrap) for condition, items in perplexity.items() if items]
    seen = perplexity.get("about")
    if seen and tell(bootstrap.difference(seen["none"], seen[mode])) == "lower":
        notes.append(
            f"About images, a teacher that sees nothing reads better still (none: {_perplexity(seen['none'], bootstrap)}): what it "
            "takes from the student's image costs it more than it tells, as with a tower that was not aligned with the LM first. Try "
            "none as well, as a baseline."
        )
    return tuple(notes)


def _against_student(items: Mapping[str, Items], mode: str, condition: str, bootstrap: Bootstrap) -> str:
    """What the teacher has to say that the student does not say as well or better."""
    gap = bootstrap.difference(items[mode], items["student"])
    found = tell(gap)
    teacher, student = (_perplexity(items[reader], bootstrap) for reader in (mode, "student"))
    read = f"{CONDITIONS[condition].capitalize()}: teacher ({mode}) {teacher}, student {student}"
    if found == "lower":
        return f"{read}. The teacher knows better: this is what distillation can bring back."
    if found == "tie":
        return f"{read}. That is no difference to build on ({gap['n']} prompts, {gap['value']:+z.3f} nats per token, {interval(gap)})."
    if condition == "text":
        return f"{read}. The student is the better one already: such text has nothing to bring back."
    return (
        f"{read}. The teacher is the worse judge here: set distill_tokens=confident and keep ce_weight above 0, so that it cannot erase "
        "what the student sees."
    )


def _perplexity(items: Items, bootstrap: Bootstrap) -> str:
    return shown(math.exp(bootstrap.score(items)["value"]))


def shown(perplexity: float) -> str:
    """Three digits, or all that stand before the point."""
    digits = 0 if perplexity >= 100 else 1 if perplexity >= 10 else 2
    return f"{perplexity:,.{digits}f}"

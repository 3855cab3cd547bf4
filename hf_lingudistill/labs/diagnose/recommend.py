"""Which sharing mode a drift report recommends, and why: one rule over perplexities, with no model in sight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..statistics import Bootstrap, Items
from .prompts import CONDITIONS

RULE = (
    "With images: prompt, unless full or vision has a lower teacher perplexity on the answers (those about an image, "
    "or else those behind one) by more than the 95 % interval of the paired difference. Without images: prompt, "
    "unless none is lower by more than that. A difference below 0.001 nats per token, or on fewer than 6 prompts, is "
    "a tie. prompt wins ties because it computes least; with images, none is no candidate because its teacher does "
    "not see them."
)
SAME = 1e-3  # nats per token; below it, two modes differ by rounding
FEWEST = 6  # prompts; five that all agree do so by chance more often than in one of twenty cases
SEEING: tuple[str, ...] = ("full", "vision")
BLIND: tuple[str, ...] = ("none",)


@dataclass(frozen=True)
class Recommendation:
    """mode: the value for `kv_sharing`. condition: the prompts that decided. reason: a sentence. notes: what else follows."""

    mode: str
    condition: str
    reason: str
    notes: tuple[str, ...]


def recommend(perplexity: Mapping[str, Mapping[str, Items]], *, drifted: bool, bootstrap: Bootstrap) -> Recommendation:
    """Apply `RULE`.

    Args:
        perplexity: condition -> reader (`student`, or a sharing mode) -> Items (nats, tokens) by prompt.
        drifted: whether the weights have moved at all.

    Raises:
        ValueError: without any prompt.
    """
    present = [name for name in ("about", "behind", "text") if perplexity.get(name)]
    if not present:
        raise ValueError("No prompt was measured: a recommendation needs at least one.")
    seen = [name for name in present if name != "text" and len(perplexity[name]["prompt"]) >= FEWEST]
    condition = (seen or present)[0]
    items = perplexity[condition]
    rivals = BLIND if condition == "text" else SEEING
    gains = {mode: bootstrap.difference(items[mode], items["prompt"]) for mode in rivals}
    best = min(rivals, key=lambda mode: gains[mode]["value"])
    mode: str = best if tell(gains[best]) == "lower" else "prompt"
    reason = _reason(items, best, gains[best], condition, bootstrap)
    return Recommendation(mode, condition, reason, _notes(perplexity, mode, drifted, bootstrap))


def tell(difference: Mapping[str, Any]) -> Literal["lower", "higher", "tie"]:
    """What a paired difference of `Bootstrap` says: outside its interval, above rounding, and on enough prompts to mean it."""
    if difference["n"] >= FEWEST and difference["high"] < -SAME:
        return "lower"
    return "higher" if difference["n"] >= FEWEST and difference["low"] > SAME else "tie"


def _reason(
    items: Mapping[str, Items], best: str, gain: Mapping[str, Any], condition: str, bootstrap: Bootstrap
) -> str:
    ours, theirs = (_perplexity(items[mode], bootstrap) for mode in ("prompt", best))
    rival = "none" if condition == "text" else f"{best} (the better of full and vision)"
    compared = (
        f"On {gain['n']} prompts ({CONDITIONS[condition]}) the teacher's perplexity is {ours} with prompt and {theirs} with {rival}: "
        f"{gain['value']:+.3f} nats per token, 95 % interval {gain['low']:+.3f} to {gain['high']:+.3f}."
    )
    if gain["n"] < FEWEST:
        return f"{compared} Fewer than {FEWEST} prompts cannot tell the two apart, so prompt: it computes least."
    if tell(gain) == "lower":
        return f"{compared} So {best}: it is lower by more than the interval."
    if gain["value"] < -SAME:
        return f"{compared} A tie, which goes to prompt: it computes least."
    return f"{compared} So prompt: it is no higher, and computes least."


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
            "takes from the student's image costs it more than it tells. Try none as well, as a baseline."
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
        return f"{read}. That is no difference to build on ({gap['n']} prompts, {gap['low']:+.3f} to {gap['high']:+.3f} nats per token)."
    if condition == "text":
        return f"{read}. The student is the better one already: such text has nothing to bring back."
    return (
        f"{read}. The teacher is the worse judge here: keep distill_tokens=confident and ce_weight above 0, so that it cannot erase "
        "what the student sees."
    )


def _perplexity(items: Items, bootstrap: Bootstrap) -> str:
    return shown(math.exp(bootstrap.score(items)["value"]))


def shown(perplexity: float) -> str:
    """Three digits, or all that stand before the point."""
    digits = 0 if perplexity >= 100 else 1 if perplexity >= 10 else 2
    return f"{perplexity:,.{digits}f}"

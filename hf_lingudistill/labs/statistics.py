"""What may be said about a score: its bootstrap interval, paired differences, and the share of a loss that came back.

A score is a ratio of sums over items (nats over bytes, right answers over questions), so an item is a pair (value, weight).
Items are what is resampled; two models are compared on the same items, drawn together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from scipy import stats

Items = Mapping[str, tuple[float, float]]  # item key -> (value, weight)
Array = np.ndarray[Any, np.dtype[Any]]

CHUNK = 2_000_000  # drawn indices held at a time
# No resample leaves the range of its items, which holds the middle of where they come from with probability 1 - 2 ** (1 - n): of
# five items with .94
FEWEST = 6


class NotFiniteScore(ValueError):
    """A model gave NaN or infinity where a score was expected: no mean of it, and no comparison with it, says anything."""


def check_finite(items: Items, what: str) -> None:
    """Raise NotFiniteScore, which names the item and `what` (the model and its task)."""
    bad = next((key for key, pair in items.items() if not all(map(math.isfinite, pair))), None)
    if bad is not None:
        raise NotFiniteScore(f"{what}: the score of item {bad!r} is not finite. {OVERFLOW}")


OVERFLOW = "The model's numbers overflow on it: score it in a wider dtype (--dtype float32), or leave it out."


class Bootstrap:
    """Percentile bootstrap over items, with one seed for everything: an identical rerun gives identical numbers.

    The percentiles are those of Hesterberg (What Teachers Should Know About the Bootstrap, 2015, "expanded"): as far out as a t interval's
    ends, since resamples of few items spread less than samples do. Of fewer than `FEWEST` items there is no interval: its ends are
    infinite. Where every item of a share (right or wrong) agrees, resamples all do too, and say nothing of the next item: the ends
    are then exact (Clopper and Pearson) for the share of items that would not agree.

    resamples: number of resamples. level: of the interval.
    """

    def __init__(self, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> None:
        self.resamples, self.seed, self.level = resamples, seed, level

    def score(self, items: Items) -> dict[str, Any]:
        """{"value", "low", "high", "n"} of sum(values) / sum(weights). n: of items that weigh something.

        Raises:
            ValueError: without items, or if one is not finite.
        """
        return self._interval(lambda sums: sums[0], [items], of_shares=(0.0, 1.0))

    def difference(self, items: Items, reference: Items) -> dict[str, Any]:
        """The score of `items` minus that of `reference`, on the items that both have: {"value", "low", "high", "n"}."""
        return self._interval(lambda sums: sums[0] - sums[1], [items, reference], of_shares=(-1.0, 1.0))

    def recovered(self, items: Items, before: Items, original: Items) -> dict[str, Any]:
        """(before - this) / (before - original): the share of what was lost that came back, paired over items.

        {"value": None, "reason": "nothing was lost"} where the interval of `before - original` holds zero: a share of noise says
        nothing. Which direction is a loss this cannot know; ask `loss_is_real` of the "lost" that it returns.
        """
        lost = self.difference(before, original)
        if lost["n"] < FEWEST:
            return {"value": None, "reason": f"fewer than {FEWEST} items cannot tell", "lost": lost}
        if lost["low"] <= 0 <= lost["high"]:
            return {"value": None, "reason": "nothing was lost", "lost": lost}
        share = self._interval(
            lambda sums: (sums[1] - sums[0]) / np.where(sums[1] == sums[2], np.nan, sums[1] - sums[2]),
            [items, before, original],
        )
        if share["low"] == share["high"] and all(_are_shares(of.values()) for of in (items, before, original)):
            # All resamples agree, and say nothing of the next item: the ends are those of what came back, over what was lost
            back = self.difference(before, items)
            share["low"], share["high"] = sorted((back["low"] / lost["value"], back["high"] / lost["value"]))
        # + 0.0: no minus zero
        return {name: number + 0.0 for name, number in share.items()} | {"n": share["n"], "lost": lost}

    def _interval(
        self, statistic: Callable[[Array], Array], models: list[Items], of_shares: tuple[float, float] | None = None
    ) -> dict[str, Any]:
        """of_shares: what the statistic can be at least and at most where items are shares (each right, wrong or between)."""
        keys = sorted(set(models[0]).intersection(*models[1:]))
        if not keys:
            raise ValueError("No item was scored by all the models compared; score the same suite with each of them.")
        for of in models:
            check_finite({key: of[key] for key in keys}, "A model")
        values = np.array([[items[key][0] for key in keys] for items in models], dtype=np.float64)  # (M, n)
        weights = np.array([[items[key][1] for key in keys] for items in models], dtype=np.float64)
        if not (weights.sum(axis=1) > 0).all():
            raise ValueError("The items weigh nothing in all (no token, byte or question to score); check the data.")
        # An answer without a token that depends on the picture says nothing of those: it is no item, and counts as none
        weighs = (weights > 0).any(axis=0)
        values, weights = values[:, weighs], weights[:, weighs]
        low, high = self._bounds(statistic, values, weights)
        value, count = float(statistic(values.sum(axis=1) / weights.sum(axis=1))), int(weighs.sum())
        if low == high and of_shares is not None and _are_shares(zip(values.flat, weights.flat, strict=True)):
            others = 1 - ((1 - self.level) / 2) ** (1 / count)  # of the items that were not drawn
            low, high = value - (value - of_shares[0]) * others, value + (of_shares[1] - value) * others
        return {"value": value, "low": low, "high": high, "n": count}

    def _bounds(self, statistic: Callable[[Array], Array], values: Array, weights: Array) -> tuple[float, float]:
        """The interval's ends. values, weights: (M, n)."""
        models, count = values.shape
        if count < FEWEST:
            return -math.inf, math.inf

        def of_sums(*sampled: Array, axis: int) -> Array:
            sums = np.stack([sample.sum(axis=axis) for sample in sampled])  # values of all models, then their weights
            return statistic(sums[:models] / sums[models:])

        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            drawn = stats.bootstrap(
                (*values, *weights),
                of_sums,
                paired=True,
                vectorized=True,
                n_resamples=self.resamples,
                batch=max(1, CHUNK // count),
                method="percentile",
                rng=np.random.default_rng(self.seed),
            ).bootstrap_distribution
        # A resample may weigh nothing (answers without a token that depends on the image): scipy's own interval is then nan
        tail = stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf((1 - self.level) / 2, count - 1))
        low, high = np.nanquantile(drawn, [tail, 1 - tail])
        return float(low), float(high)


def _are_shares(pairs: Iterable[tuple[float, float]]) -> bool:
    """Whether every item is right, wrong or between. pairs: (value, weight)."""
    return all(0 <= value <= 1 == weight for value, weight in pairs)


def interval(score: Mapping[str, Any], shown: Callable[[float], str] = "{:+z.3f}".format) -> str:
    """A score's interval in words: "95 % interval +0.100 to +0.200", or that there is none, as of a few items."""
    if not math.isfinite(score["high"]):
        return f"no interval: fewer than {FEWEST} cannot tell"
    return f"95 % interval {shown(score['low'])} to {shown(score['high'])}"


def ends(score: Mapping[str, Any], shown: Callable[[float], str]) -> tuple[str, str]:
    """The ends of a score's interval as they are written; dashes where there is none, as of a few items."""
    if not math.isfinite(score["high"]):
        return "-", "-"
    return shown(score["low"]), shown(score["high"])


def loss_is_real(difference: Mapping[str, Any], *, higher_is_better: bool) -> bool:
    """Whether a paired difference (before minus original) is a loss outside its interval."""
    return bool(difference["high"] < 0 if higher_is_better else difference["low"] > 0)

"""What a batch carries of answers that were computed before training, in place of a model that is asked in the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .bad_rows import ROW_COLUMN
from .losses import KeptAnchor
from .queries import QueryPlan
from .row_cache import RowCache, row_key
from .sharing import Sharing
from .top_k import TopK

Rows = list[bytes]  # the key of each row of a batch


@dataclass(frozen=True)
class CachedAnswers:
    """Of one batch; M labelled positions, N of them distilled, as in its plan.

    anchor: (M - N, k), the VLM before at the other positions; None where it is asked live, or not at all. anchored: (M - N,) bool,
    whether a position is. teacher: (C, H_t), hidden states at the loss positions of rows that were kept, or (C, 2, H_t) where it read
    some of them twice; None where the teacher is asked live. kept: (N,) bool, these positions. live: what the teacher is still asked.
    """

    anchor: TopK | None = None
    anchored: torch.Tensor | None = None
    teacher: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    live: QueryPlan | None = None

    def to(self, device: Any, non_blocking: bool = False, **_: Any) -> CachedAnswers:
        """On another device, as accelerate moves the tensors of a batch."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> CachedAnswers:
        """In pinned memory, as a `DataLoader` pins the tensors of a batch."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Any) -> CachedAnswers:
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{name: change(part) for name, part in parts.items() if part is not None})

    def as_anchor(self) -> KeptAnchor | None:
        """For the loss."""
        return None if self.anchor is None or self.anchored is None else KeptAnchor(self.anchor, self.anchored)

    def with_live(self, answered: torch.Tensor) -> torch.Tensor:
        """(N, H_t), or (N, 2, H_t): what was kept, and what the teacher has answered of the other positions, in order."""
        if self.teacher is None or self.kept is None:
            return answered
        if not answered.shape[0]:
            return self.teacher
        kept, answered = same_readings([self.teacher.to(answered.dtype), answered])
        hidden = answered.new_empty(self.kept.shape[0], *answered.shape[1:])
        hidden[self.kept], hidden[~self.kept] = kept, answered
        return hidden


def same_readings(states: list[torch.Tensor]) -> list[torch.Tensor]:
    """(n, H) and (n, 2, H) -> all of one shape: one reading is both."""
    if len({part.dim() for part in states}) < 2:
        return states
    return [part if part.dim() == 3 else part[:, None].expand(-1, 2, -1) for part in states]


def flat_readings(states: torch.Tensor, *, once: bool) -> torch.Tensor:
    """(n, H) or (n, 2, H) of one row -> (n, H), or (2n, H), one reading behind the other. once: the two are one."""
    if states.dim() == 2:
        return states
    return states[:, 0].clone() if once else states.transpose(0, 1).flatten(0, 1)


def readings(kept: torch.Tensor, count: int) -> torch.Tensor:
    """What `flat_readings` made of a row with so many loss positions -> (n, H) or (n, 2, H)."""
    return kept if len(kept) == count else kept.unflatten(0, (2, count)).transpose(0, 1)


def keys_of(batch: dict[str, Any], images: list[list[Any]]) -> Rows:
    """The key of each row of a collated batch. images: of each row."""
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    attended = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return [row_key(ids[b][attended[b]], labels[b][attended[b]], images[b] if images else ()) for b in range(len(ids))]


def still_rows(mode: Sharing, plan: QueryPlan, *, stands_still: bool) -> torch.Tensor:
    """(B,) bool: rows on which the teacher reads nothing that training moves. stands_still: nor does what it reads elsewhere."""
    if stands_still or not mode.reads_student:
        return torch.ones_like(plan.text_only)
    return plan.text_only if not mode.text_reads_student else torch.zeros_like(plan.text_only)


@dataclass(frozen=True)
class LookUp:
    """Looks up a batch, as a part of collating it: in a dataloader's worker, on the CPU.

    anchor, teacher: the caches that there are. stands_still: see `still_rows`. plan: makes plans.
    """

    anchor: RowCache | None
    teacher: RowCache | None
    stands_still: bool
    plan: Callable[[dict[str, Any]], QueryPlan]

    def __call__(self, batch: dict[str, Any], images: list[list[Any]]) -> CachedAnswers:
        """Of a collated batch with its `queries`.

        Raises:
            ValueError: if a row that is needed is not in.
        """
        plan: QueryPlan = batch["queries"]
        keys, marked = keys_of(batch, images), batch["distill"]
        found: dict[str, Any] = {}
        if self.anchor is not None and plan.has_unmarked_labels:
            anchored = ~marked[plan.other_rows]
            found |= {"anchor": _spread(self.anchor, keys, batch, anchored), "anchored": anchored}
        if self.teacher is not None:
            still = still_rows(plan.sharing, plan, stands_still=self.stands_still)
            kept = still[plan.loss_rows]
            rows, counts = plan.loss_rows[kept].unique(return_counts=True)
            states = [
                readings(_found(self.teacher, keys, batch, b)["states"], count)
                for b, count in zip(rows.tolist(), counts.tolist(), strict=True)
            ]
            teacher = torch.cat(same_readings(states)) if states else None
            live = self.plan({**batch, "distill": marked & ~still})
            found |= {"teacher": teacher, "kept": kept, "live": live}
        return CachedAnswers(**found)


def _spread(cache: RowCache, keys: Rows, batch: dict[str, Any], asked: torch.Tensor) -> TopK:
    """What is kept of each asked position, and something finite at the others."""
    rows = batch["queries"].other_rows
    answers = [_found(cache, keys, batch, b) for b in rows[asked].unique().tolist()]
    k = answers[0]["ids"].shape[1] if answers else 1
    ids = torch.zeros(len(rows), k, dtype=torch.long)
    log_p, log_rest = torch.zeros(len(rows), k), torch.full((len(rows),), -torch.inf)
    if answers:
        ids[asked] = torch.cat([answer["ids"] for answer in answers]).long()
        log_p[asked] = torch.cat([answer["log_p"] for answer in answers])
        log_rest[asked] = torch.cat([answer["log_rest"] for answer in answers])
    return TopK(ids, log_p, log_rest)


def _found(cache: RowCache, keys: Rows, batch: dict[str, Any], b: int) -> dict[str, torch.Tensor]:
    answer = cache.get(keys[b])
    if answer is None:
        name = f"Row {int(batch[ROW_COLUMN][b])}" if ROW_COLUMN in batch else "A row"
        raise ValueError(
            f"{name} is not in the {cache.title} in {str(cache.folder)!r}, which was filled before training: pass every "
            f"evaluation set when the trainer is made; if the data changed on disk, remove {str(cache.folder / 'complete.json')!r} and "
            "start again."
        )
    return answer

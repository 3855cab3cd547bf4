"""What the teacher is asked about: from token ids, labels and flags alone, before any model runs.

The collator makes the plan on the CPU, where counting costs nothing; its tensors travel with the batch. Made on an accelerator
instead (a collator of the caller's own), it waits for the device a few times.

Shapes: B rows, T positions, Q queries in all rows together, R rows that are asked about, W queries of the longest of them,
N loss positions, M labelled positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from .sharing import Sharing


@dataclass(frozen=True)
class Vocabulary:
    """What the tokens of a student mean to its teacher.

    size: the student's vocabulary. shared_size: ids below it are the same token to both. unreadable: the student's image
    placeholders, which the teacher cannot read, wherever they lie; none where its config names none. aliases: student id -> teacher
    id of tokens that mean the same under another name: the end of a turn.
    """

    size: int
    shared_size: int
    unreadable: tuple[int, ...] = ()
    aliases: tuple[tuple[int, int], ...] = ()

    def readable(self, ids: torch.Tensor) -> torch.Tensor:
        """Bool, like ids (any shape): the teacher knows this token."""
        known = (ids >= 0) & (ids < self.shared_size)
        if self.unreadable:
            known &= ~torch.isin(ids, torch.tensor(self.unreadable, device=ids.device))
        for ours, _ in self.aliases:
            known |= ids == ours
        return known

    def images(self, ids: torch.Tensor) -> torch.Tensor:
        """Bool, like ids: a place of an image. Where no placeholder is known, whatever the teacher cannot read."""
        return (
            torch.isin(ids, torch.tensor(self.unreadable, device=ids.device))
            if self.unreadable
            else ~self.readable(ids)
        )

    def scorable(self, ids: torch.Tensor) -> torch.Tensor:
        """Bool, like ids: the teacher has a probability for this token as a label. A token that its turns end with speaks for
        the student's end of turn instead of itself."""
        known = self.readable(ids)
        for _, theirs in self.aliases:
            known &= ids != theirs
        return known

    def unshared(self) -> list[int]:
        """Ids without a probability of the teacher's: see `scorable`. Image placeholders inside the LM's vocabulary keep the one
        that it gives them."""
        ours = {ours for ours, _ in self.aliases}
        return [i for i in range(self.shared_size, self.size) if i not in ours] + [
            theirs for _, theirs in self.aliases
        ]

    def to_teacher(self, ids: torch.Tensor) -> torch.Tensor:
        """The teacher's ids of readable tokens, 0 at all others."""
        known = ids * self.readable(ids)
        for ours, theirs in self.aliases:
            known = torch.where(ids == ours, theirs, known)
        return known


@dataclass(frozen=True)
class QueryPlan:
    """Which positions of a batch the teacher computes, and where the loss is taken.

    A *loss position* t is one whose next-token distribution is distilled: the row is marked, `labels[t + 1]` counts, and the
    teacher can read both the token at t and the label (of sampled labels, the token at t alone). Queries of all rows are packed one after another; attention unpacks
    them into rows.

    sharing: the mode that it was made for. rows, positions: (Q,) ascending. token_ids: (Q,) as the teacher reads them. readable: (Q,) bool, whether it can.
    own: indices of the queries whose keys and values are the teacher's own. loss: (N,) indices of the queries whose next token is
    distilled. asked_rows: (R,) batch rows. slots: (R, W) queries of each row, the last repeated as padding. flat: (Q,) where each
    query lies in the flattened (R, W). label_rows, label_positions: (M,) positions t with a label at t + 1, the N loss
    positions first. batch, length: B and T. marked: (B,) bool, the rows to distil. text_only: (B,) bool, the row has no token that
    the teacher cannot read. has_image: (B,) bool.
    """

    sharing: Sharing
    batch: int
    length: int
    rows: torch.Tensor
    positions: torch.Tensor
    token_ids: torch.Tensor
    readable: torch.Tensor
    own: torch.Tensor
    loss: torch.Tensor
    asked_rows: torch.Tensor
    slots: torch.Tensor
    flat: torch.Tensor
    label_rows: torch.Tensor
    label_positions: torch.Tensor
    marked: torch.Tensor
    text_only: torch.Tensor
    has_image: torch.Tensor
    # What the teacher reads a second time, without images, and which of the N loss positions those are, (K,); None: nothing
    blind: QueryPlan | None = field(default=None)
    blind_loss: torch.Tensor | None = field(default=None)
    # Known without asking a device: whether some loss position lies in a row without an image, whether some row that is not marked
    # has a label, and how many columns hold all that the teacher reads of the student, and every image token of every row
    has_text_loss: bool = field(default=False)
    has_unmarked_labels: bool = field(default=False)
    columns_read: int = field(default=0)

    @property
    def num_queries(self) -> int:
        """Q, the number of positions that the teacher computes."""
        return self.rows.numel()

    @property
    def num_loss(self) -> int:
        """N, the number of loss positions."""
        return self.loss.numel()

    @property
    def num_labels(self) -> int:
        """M, the number of labelled positions."""
        return self.label_rows.numel()

    @property
    def loss_rows(self) -> torch.Tensor:
        """(N,) batch rows of the loss positions, ascending."""
        return self.label_rows[: self.num_loss]

    @property
    def loss_positions(self) -> torch.Tensor:
        """(N,) positions t of the loss positions."""
        return self.label_positions[: self.num_loss]

    @property
    def other_rows(self) -> torch.Tensor:
        """(M - N,) batch rows of the labelled positions that are not distilled."""
        return self.label_rows[self.num_loss :]

    @property
    def other_positions(self) -> torch.Tensor:
        """(M - N,) positions t of those."""
        return self.label_positions[self.num_loss :]

    @property
    def rectangular(self) -> bool:
        """Whether every row has the same number of queries: then unpacking is a view."""
        return self.slots.numel() == self.num_queries

    def to(self, device: Any, non_blocking: bool = False, **_: Any) -> QueryPlan:
        """The plan on another device, as accelerate moves the tensors of a batch."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> QueryPlan:
        """The plan in pinned memory, as a `DataLoader` pins the tensors of a batch."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Any) -> QueryPlan:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {n: change(t) for n, t in tensors.items() if isinstance(t, torch.Tensor)}
        if self.blind is not None:
            changed["blind"] = self.blind._each(change)
        return replace(self, **changed)

    def check(self, labels: torch.Tensor, distill: torch.Tensor) -> None:
        """That labels (B, T) and distill (B,) are those that the plan was made from. Rows may have lost their mark since.

        Raises:
            ValueError: if they are not. On an accelerator, which is not waited for, its own assertion error.
        """
        same = (labels[:, 1:] != -100).sum() == self.num_labels
        same &= (labels[self.label_rows, self.label_positions + 1] != -100).all() & ~(distill & ~self.marked).any()
        if same.is_cuda:
            torch._assert_async(same)
        elif not same:
            raise ValueError(
                "The labels or marks of this batch were changed after its queries were planned: remove 'queries' from the batch, and "
                "they are planned anew."
            )

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """(1, H, Q, D) -> (R, H, W, D)."""
        _, H, Q, D = states.shape
        rows, width = self.slots.shape
        if self.rectangular:
            return states.view(H, rows, width, D).transpose(0, 1)
        return states[0].index_select(1, self.slots.flatten()).view(H, rows, width, D).transpose(0, 1)

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """(R, H, W, D) -> (1, Q, H, D)."""
        states = states.transpose(1, 2).flatten(0, 1)
        return (states if self.rectangular else states.index_select(0, self.flat))[None]


@dataclass(frozen=True)
class Planner:
    """Makes the plans of a run; it holds no model, so that it can travel to a dataloader's worker.

    at_least_one, any_label: see `plan_queries`. blind: the mode in which the teacher reads rows with images a second time; None: once.
    """

    sharing: Sharing
    vocabulary: Vocabulary
    at_least_one: bool = False
    any_label: bool = False
    blind: Sharing | None = None

    def __call__(self, batch: dict[str, Any]) -> QueryPlan:
        """The queries of a batch, from its `input_ids`, `labels`, `distill` and `attention_mask` (each (B, T), or (B,))."""
        plan = self._plan(batch, self.sharing, batch.get("distill"))
        if self.blind is None:
            return plan
        seen = plan.has_image
        loss = seen[plan.loss_rows].nonzero().flatten()
        if not loss.numel() and not self.at_least_one:
            return plan
        return replace(plan, blind=self._plan(batch, self.blind, plan.marked.to(seen.device) & seen), blind_loss=loss)

    def _plan(self, batch: dict[str, Any], sharing: Sharing, distill: torch.Tensor | None) -> QueryPlan:
        plan: QueryPlan = plan_queries(
            batch["input_ids"],
            batch["labels"],
            distill,
            sharing=sharing,
            vocabulary=self.vocabulary,
            attention_mask=batch.get("attention_mask"),
            at_least_one=self.at_least_one,
            any_label=self.any_label,
        )
        return plan


@torch.compiler.disable  # type: ignore[untyped-decorator]
def plan_queries(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    distill: torch.Tensor | None = None,
    *,
    sharing: Sharing,
    vocabulary: Vocabulary,
    attention_mask: torch.Tensor | None = None,
    at_least_one: bool = False,
    any_label: bool = False,
) -> QueryPlan:
    """Decide where the teacher is queried.

    Args:
        input_ids: (B, T) long.
        labels: (B, T) long, -100 where no loss is taken; `labels[:, t + 1]` is scored at position t.
        distill: (B,) bool, the rows to distil; None = every row.
        attention_mask: (B, T), 0 at padding; None = no padding.
        at_least_one: ask about the first token, without a loss, where there is nothing to ask: under an engine that shards the
            teacher, every process runs it (see `engines.py`).
        any_label: distil whatever the label is: where the labels were sampled, the loss is over distributions alone, and choosing
            positions by what was sampled there would bias it.
    """
    B, T = input_ids.shape
    attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    readable = vocabulary.readable(input_ids) & attended
    labelled = labels != -100
    scored = torch.zeros_like(labelled)
    scored[:, :-1] = labelled[:, 1:]  # position t predicts token t + 1
    # A label that the teacher does not know has no honest probability: it keeps cross-entropy
    loss = torch.zeros_like(labelled)
    loss[:, :-1] = readable[:, :-1] & (scored[:, :-1] if any_label else vocabulary.scorable(labels[:, 1:]))
    marked = loss.new_ones(B) if distill is None else distill.bool()
    if distill is not None:
        loss &= distill.bool().to(loss.device)[:, None]

    where = torch.arange(T, device=input_ids.device)
    last = torch.where(loss, where, -1).amax(dim=1, keepdim=True)  # nothing after it can reach the loss
    own = sharing.own(readable, labelled, attended) & (where <= last)
    queried = loss | own
    # An image needs all its places, in rows that the teacher does not read too, and where they are labels (of running text)
    images = vocabulary.images(input_ids) & attended
    others = (where <= last) & ~own
    read = images | (attended & ((~readable & ~labelled) | others))
    # Where every row that the teacher is asked about is its own, as text is, nothing is read: also not of other rows' images
    reads = bool((attended & others).any())
    if at_least_one and not bool(queried.any()):
        queried[0, 0] = True
        own[0, 0] = sharing.own(readable | True, labelled, attended)[0, 0]

    rows, positions = queried.nonzero(as_tuple=True)
    counts = queried.sum(dim=1)
    asked_rows = counts.nonzero().flatten()
    counts = counts[asked_rows]
    begins = counts.cumsum(0) - counts
    width = int(counts.max()) if asked_rows.numel() else 0
    offsets = torch.arange(width, device=input_ids.device)
    slots = begins[:, None] + torch.minimum(offsets, counts[:, None] - 1)
    row_of = torch.repeat_interleave(torch.arange(len(counts), device=input_ids.device), counts)
    flat = row_of * width + torch.arange(len(rows), device=input_ids.device) - begins[row_of]

    loss_at, other_at = loss.nonzero(as_tuple=True), (scored & ~loss).nonzero(as_tuple=True)
    text_only = ~(attended & ~readable).any(dim=1)
    return QueryPlan(
        sharing=sharing,
        batch=B,
        length=T,
        rows=rows,
        positions=positions,
        token_ids=vocabulary.to_teacher(input_ids)[rows, positions],
        readable=readable[rows, positions],
        own=own[rows, positions].nonzero().flatten(),
        loss=loss[rows, positions].nonzero().flatten(),
        asked_rows=asked_rows,
        slots=slots,
        flat=flat,
        label_rows=torch.cat([loss_at[0], other_at[0]]),
        label_positions=torch.cat([loss_at[1], other_at[1]]),
        marked=marked,
        text_only=text_only,
        has_image=images.any(dim=1),
        has_text_loss=bool((loss.any(dim=1) & text_only).any()),
        has_unmarked_labels=distill is not None and bool((scored & ~marked.to(scored.device)[:, None]).any()),
        columns_read=int(torch.where(read, where + 1, 0).max()) if reads else 0,
    )

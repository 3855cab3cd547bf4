"""The loss, from tensors alone. M labelled positions, the first N of them distilled; V vocabulary entries, H hidden size; nats.

One pass over both heads gives everything: cross-entropy, the divergence, what the gate and the metrics need, and the gradient of
the sum of it all in the logits. That sum is a scalar, so the gradients of hidden states and head are products with this one logit
gradient, taken chunk by chunk while it is at hand: four head products in a step (two forward, two backward), and no `[M, V]` matrix
that outlives its chunk. (TRL's fused head scores cross-entropy alone, and its `ChunkedDivergenceFunction` projects both models again in
the backward pass: eight products together. Both are oracles in `tests/test_losses.py`.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ._internals import Head, gathered
from .top_k import TopK, divergence_from
from .top_k import top_k as most_likely

# Logits per chunk and model. Larger chunks read both heads less often; these are fractions of the device's memory.
CPU_CHUNK = 2**25  # 128 MiB in fp32
MIN_CHUNK, MAX_CHUNK, OF_DEVICE = 2**24, 2**28, 128
CPU_SLICE, SLICE = 2**20, 2**22  # logits whose products are summed at a time: what caches hold

# Added to the teacher's finished logits of tokens that it does not share with the student: e^-100 is nothing beside a real token, and
# finite (-inf gives a NaN divergence), and small enough that reverse KL charges 1 nat for 1 % of student mass on them.
UNSHARED_BIAS = -100.0


@dataclass(frozen=True)
class Weights:
    """What a token's loss is made of.

    At distilled tokens `cross_entropy * CE + divergence * D`, at anchored ones `(1 - anchor) * CE + anchor * A`, elsewhere `unjudged *
    CE`. margin: distil only where the teacher gives the label at least the student's probability plus this many nats; None =
    everywhere. beta: 0 = KL(teacher || student), 1 = KL(student || teacher), between: beta-mixture JSD (TRL's meaning).
    temperature: divides both models' logits in the divergence D, without a factor of its square. blind: the share of the teacher's
    second reading in its distribution, where there is one. anchor_beta, anchor_temperature:
    the same of the divergence A to the VLM before; left at 0 and 1, A = KL(VLM before || student).
    """

    cross_entropy: float = 0.5
    divergence: float = 1.0
    margin: float | None = None
    beta: float = 0.0
    temperature: float = 1.0
    blind: float = 0.0
    anchor: float = 0.0
    anchor_beta: float = 0.0
    anchor_temperature: float = 1.0
    unjudged: float = 1.0


@dataclass(frozen=True)
class Anchor:
    """The VLM before, at the M - N labelled positions that are not distilled.

    hidden: (M - N, H), or raw logits as in `score`. head: over the student's vocabulary. asked: (M - N,) bool, the positions that
    are anchored.
    """

    hidden: torch.Tensor
    head: Head
    asked: torch.Tensor


@dataclass(frozen=True)
class KeptAnchor:
    """The same as it was computed before training. kept: of the M - N positions; where one is not `asked`, anything finite."""

    kept: TopK
    asked: torch.Tensor


@dataclass(frozen=True)
class Scores:
    """What the two models say at the labelled positions. `total` has a gradient, nothing else has.

    total: (), the sum of all token losses. loss, cross_entropy, entropy: (M,) nats of the student. is_top1: (M,) bool, the label is
    the student's most likely token. At the N distilled positions: divergence: (N,) nats. chosen: (N,) bool, the positions that
    the gate lets through. teacher_log_prob: (N,) of the label at temperature 1. teacher_entropy: (N,). agrees: (N,) bool,
    both models have the same most likely token. At the M - N others, with an anchor: anchor_kl: (M - N,) nats of A, 0 where
    `anchored`, (M - N,) bool, is false. Both are empty without one.
    """

    total: torch.Tensor
    loss: torch.Tensor
    cross_entropy: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    divergence: torch.Tensor
    chosen: torch.Tensor
    teacher_log_prob: torch.Tensor
    teacher_entropy: torch.Tensor
    agrees: torch.Tensor
    anchor_kl: torch.Tensor
    anchored: torch.Tensor


# Traced, it would be compiled anew for each number of labels, until the compiler gives up
@torch.compiler.disable  # type: ignore[untyped-decorator]
def score(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    weights: Weights,
    marked: torch.Tensor | None = None,
    anchor: Anchor | KeptAnchor | None = None,
) -> Scores:
    """Score M labelled positions, the first N of them against the teacher.

    Args:
        hidden: (M, H_s) of the student. With a head that is not one matrix (see `Head.of_logits`), its raw logits (M, V).
        labels: (M,) token ids.
        teacher_hidden: (N, H_t), N <= M; or (N, 2, H_t) of a teacher that has read everything twice: it then says `(1 - blind) p_1 +
            blind p_2`, a mixture of probabilities. Both heads have the same V.
        marked: (N,) bool; where false, a position keeps cross-entropy whatever the teacher says. None = all true.
        anchor: the VLM before, for the other positions. Where it was kept, A is KL(VLM before || student) at temperature 1.
    """
    count = teacher_hidden.shape[0]
    if marked is None:
        marked = torch.ones(count, dtype=torch.bool, device=hidden.device)
    outputs = _Score.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, labels, teacher_hidden.detach(), teacher_head, weights, marked, anchor
    )
    return Scores(*outputs)


@torch.no_grad()
def divergence(hidden: torch.Tensor, head: Head, teacher_hidden: torch.Tensor, teacher_head: Head) -> torch.Tensor:
    """KL(teacher || student) in nats, (N,), without gradient."""
    labels = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    found: torch.Tensor = score(hidden, head, labels, teacher_hidden, teacher_head, Weights()).divergence
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def label_nll(hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
    """-log p(label) in nats, (N,), in chunks. hidden: (N, H), labels: (N,)."""
    found = [
        torch.nn.functional.cross_entropy(
            _finish(_raw_logits(hidden[rows], head), head), labels[rows], reduction="none"
        )
        for rows in _chunks(labels.numel(), head.vocab_size, hidden.device)
    ]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def top_k(hidden: torch.Tensor, head: Head, k: int) -> TopK:
    """What a model says at hidden states (N, H), or raw logits as in `score`, kept as its k most likely tokens; in chunks."""
    parts = [
        most_likely(torch.log_softmax(_finish(_raw_logits(hidden[rows], head), head), dim=-1), k)
        for rows in _chunks(hidden.shape[0], head.vocab_size or hidden.shape[1], hidden.device)
    ]
    return TopK(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "log_p", "log_rest")))


@torch.no_grad()
def head_error(head: Head, hidden: torch.Tensor, own: torch.Tensor) -> float:
    """How far the head's logits of hidden (N, H) are from the model's own, (N, V): the largest difference, relative to the largest
    logit."""
    own = own.float()
    return float((_finish(_raw_logits(hidden, head), head) - own).abs().max() / own.abs().max())


def confident_tokens(
    teacher_log_prob: torch.Tensor, student_log_prob: torch.Tensor, margin: float = 0.0
) -> torch.Tensor:
    """(N,) bool: the teacher gives the label at least the student's probability, by `margin` nats.

    Where it does not, the teacher knows less about this token than the student does (it cannot see the image), and its
    distribution would erase what the student has learnt.
    """
    return teacher_log_prob >= student_log_prob + margin


def _compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype that products with a head take: that of autocast on an accelerator, fp32 on a CPU, where no product of bf16
    inputs gives fp32."""
    if not weight.is_cuda:
        return torch.float32
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32, not rounded to the dtype of its inputs: in bf16, logits of 16 to 32 are 0.125 nats apart."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _raw_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """(n, H) x (V, H) -> (n, V) in fp32."""
    if head.weight is None:
        return hidden.float()
    dtype = _compute_dtype(hidden, head.weight)
    logits = _product(hidden.to(dtype), head.weight.to(dtype).t())
    return logits if head.bias is None else logits.add_(head.bias.float())


def _finish(raw: torch.Tensor, head: Head) -> torch.Tensor:
    """Logit scale and soft-capping, and then what the head does not share with the other model's. May write to `raw`, where it has
    nothing to do before."""
    logits = raw if head.scale == 1.0 else raw * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    for target, source in head.moved:
        logits[:, target] = logits[:, source]
    if head.unshared is not None:
        logits[:, head.unshared] += UNSHARED_BIAS
    return logits


def _through_finish(gradient: torch.Tensor, raw: torch.Tensor | None, head: Head) -> torch.Tensor:
    """From the gradient in the finished logits to that in the raw ones, in place. raw: the raw ones, where they are soft-capped."""
    if head.softcap is not None and raw is not None:
        gradient.mul_(1 - torch.tanh(raw * head.scale / head.softcap).square())
    return gradient if head.scale == 1.0 else gradient.mul_(head.scale)


@dataclass(frozen=True)
class _Ours:
    """The student at n positions. logits: (n, V), None where no temperature asks for them. log_p, p: (n, V) at temperature 1.
    most_likely: (n,) token ids."""

    logits: torch.Tensor | None
    log_p: torch.Tensor
    p: torch.Tensor
    most_likely: torch.Tensor

    def __getitem__(self, rows: slice) -> _Ours:
        logits = None if self.logits is None else self.logits[rows]
        return _Ours(logits, self.log_p[rows], self.p[rows], self.most_likely[rows])

    def softened(self, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and probabilities at a temperature."""
        if temperature == 1.0 or self.logits is None:
            return self.log_p, self.p
        log_p = torch.log_softmax(self.logits / temperature, dim=-1)
        return log_p, log_p.exp()


def _teacher_says(
    hidden: torch.Tensor, head: Head, weights: Weights
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(n, H) or (n, 2, H) -> log-probabilities and probabilities (n, V) at temperature 1, and at that of the divergence."""
    T, readings = weights.temperature, [hidden] if hidden.dim() == 2 else hidden.unbind(dim=1)

    def logits_of(reading: torch.Tensor) -> torch.Tensor:
        return _finish(_raw_logits(reading, head), head)

    if T == 1.0:  # no name holds one reading's logits while the other's are made
        log_p = _mixed([torch.log_softmax(logits_of(reading), dim=-1) for reading in readings], weights.blind)
        sharp = log_p, log_p.exp()
        return sharp, sharp
    both = [logits_of(reading) for reading in readings]
    at_one, softened = (
        _mixed([torch.log_softmax(logits / t, dim=-1) for logits in both], weights.blind) for t in (1.0, T)
    )
    return (at_one, at_one.exp()), (softened, softened.exp())


def _only_finite(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, ...) -> the same with zeros for rows that are not finite, and which are, (n,) bool. A token that is not distilled has weight 0,
    and 0 times NaN is NaN: cheaper here than over the vocabulary."""
    sound = hidden.isfinite().flatten(1).all(dim=1)
    return hidden.masked_fill(~sound.view(-1, *(1,) * (hidden.dim() - 1)), 0.0), sound


def _mixed(log_p: list[torch.Tensor], second: float) -> torch.Tensor:
    """One or two log-probabilities (n, V) -> that of their mixture; second: the share of the second. Writes to them."""
    if len(log_p) == 1 or second == 0.0:
        return log_p[0]
    return torch.logaddexp(log_p[0].add_(math.log1p(-second)), log_p[1].add_(math.log(second)), out=log_p[0])


def _divergence(log_s: torch.Tensor, p_s: torch.Tensor, log_t: torch.Tensor, p_t: torch.Tensor, beta: float) -> Any:
    """(n, V) log-probabilities and probabilities -> divergence (n,) and its gradient in the student's logits (n, V). Writes it over one
    of the teacher's two."""
    if beta == 0.0:
        value = _dot(p_t, log_t) - _dot(p_t, log_s)
        return value, p_t.neg_().add_(p_s)
    if beta == 1.0:
        gap = log_t.neg_().add_(log_s)
        value = _dot(p_s, gap)
        return value, gap.sub_(value[:, None]).mul_(p_s)
    log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    value = beta * (_dot(p_t, log_t) - _dot(p_t, log_m))
    gap = log_m.neg_().add_(log_s)
    kl_student = _dot(p_s, gap)
    return value + (1 - beta) * kl_student, gap.sub_(kl_student[:, None]).mul_(p_s).mul_(1 - beta)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row by row, (n, V) x (n, V) -> (n,). In slices: the products are a tensor of their size before they are summed."""
    step = max(1, (SLICE if a.is_cuda else CPU_SLICE) // a.shape[1])
    with torch.autocast(a.device.type, enabled=False):  # which would take it for a matrix product, in bf16
        dots = [torch.linalg.vecdot(x, y, dim=-1) for x, y in zip(a.split(step), b.split(step), strict=True)]
    return torch.cat(dots)


class _Score(torch.autograd.Function):
    """See `score`. Tensors the gradient flows to come first; heads are passed again for their scaling."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        *given: Any,
    ) -> tuple[torch.Tensor, ...]:
        """given: what `_Pass` takes behind the hidden states."""
        gradients = _Gradients(ctx.needs_input_grad[:3], hidden, weight, bias)
        asked = _Pass(gradients, hidden, *given)
        teacher_head = asked.teacher_head
        before_head = asked.anchor.head if isinstance(asked.anchor, Anchor) else Head(None)
        with (
            gathered(weight, bias),
            gathered(teacher_head.weight, teacher_head.bias),
            gathered(before_head.weight, before_head.bias),
        ):
            for part in _chunks(hidden.shape[0], teacher_head.vocab_size, hidden.device):
                asked.take(part)
        ctx.gradients = gradients.closed()
        said = asked.said()
        ctx.mark_non_differentiable(*said)
        return (asked.loss.sum(), *said)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("The loss was differentiated before, and its gradients are freed: compute it again.")
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(upstream).to(dtype) for g, dtype in gradients), *(None,) * 7)


class _Pass:
    """One pass over both heads, chunk by chunk, and what it finds: see `Scores`."""

    def __init__(
        self,
        gradients: _Gradients,
        hidden: torch.Tensor,
        head: Head,
        labels: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_head: Head,
        weights: Weights,
        marked: torch.Tensor,
        anchor: Anchor | KeptAnchor | None,
    ) -> None:
        self.hidden, self.head, self.labels = hidden, head, labels
        self.teacher_hidden, self.teacher_head, self.marked = teacher_hidden, teacher_head, marked
        self.weights, self.anchor, self.gradients = weights, anchor, gradients
        M, N, device = hidden.shape[0], teacher_hidden.shape[0], hidden.device
        self.loss, self.cross_entropy, self.entropy = (torch.zeros(M, device=device) for _ in range(3))
        self.is_top1 = torch.zeros(M, dtype=torch.bool, device=device)
        self.value, self.teacher_log_prob, self.teacher_entropy = (torch.zeros(N, device=device) for _ in range(3))
        self.chosen, self.agrees = (torch.zeros(N, dtype=torch.bool, device=device) for _ in range(2))
        self.anchor_kl = torch.zeros(0 if anchor is None else M - N, device=device)
        self.anchored = torch.zeros_like(self.anchor_kl, dtype=torch.bool)

    def said(self) -> tuple[torch.Tensor, ...]:
        """All of `Scores` but the total."""
        value = torch.where(self.chosen, self.value, 0.0)
        of_student = (self.loss, self.cross_entropy, self.entropy, self.is_top1)
        of_teacher = (value, self.chosen, self.teacher_log_prob, self.teacher_entropy, self.agrees)
        return (*of_student, *of_teacher, self.anchor_kl, self.anchored)

    def take(self, part: slice) -> None:
        """One chunk. It holds four tensors (n, V) at most, five where the teacher has two readings, and more at other temperatures or with
        soft-capping (held in tests/test_losses.py); they go when it returns, before the next one's are made."""
        weights, label, N = self.weights, self.labels[part, None], self.teacher_hidden.shape[0]
        ours, capped = self._student(part)
        top = ours.most_likely
        ce = -ours.log_p.gather(1, label)[:, 0]
        self.cross_entropy[part], self.entropy[part] = ce, -_dot(ours.p, ours.log_p)
        self.is_top1[part] = top == label[:, 0]
        ce_weight = torch.full_like(ce, weights.unjudged)
        pulls: list[tuple[slice, torch.Tensor, torch.Tensor]] = []  # rows, gradient of a divergence, and its factor
        n = max(min(part.stop, N) - part.start, 0)
        if n:
            asked, rows = slice(part.start, part.start + n), slice(0, n)
            pull, factor = self._ask_teacher(asked, label[rows], ce[rows], ours[rows])
            passed = self.chosen[asked]
            ce_weight[rows] = torch.where(passed, weights.cross_entropy, weights.unjudged)
            pulls.append((rows, pull, factor / weights.temperature))
        n_anchor = 0 if self.anchor is None else part.stop - max(part.start, N)
        if n_anchor > 0:
            rest, rows = slice(part.stop - N - n_anchor, part.stop - N), slice(-n_anchor, None)
            pull = self._ask_before(rest, ours[rows])
            ce_weight[rows] = torch.where(self.anchored[rest], 1.0 - weights.anchor, weights.unjudged)
            if weights.anchor:
                pulls.append((rows, pull, self.anchored[rest] * weights.anchor / weights.anchor_temperature))
        # Not `factor * value` alone: what is not finite must not spoil a token that is not distilled (nor its gradient, `_only_finite`)
        self.loss[part] = ce_weight * ce
        if n:
            self.loss[asked] += torch.where(passed, weights.divergence * self.value[asked], 0.0)
        if n_anchor > 0 and weights.anchor:
            self.loss[part][rows] += weights.anchor * self.anchor_kl[rest]
        if self.gradients.needed:
            gradient = ours.p.mul_(ce_weight[:, None]).scatter_add_(1, label, -ce_weight[:, None])
            while pulls:
                rows, pull, factor = pulls.pop()
                gradient[rows].addcmul_(pull, factor[:, None])
                del pull
            self.gradients.add(part, _through_finish(gradient, capped, self.head))

    def _student(self, part: slice) -> tuple[_Ours, torch.Tensor | None]:
        """What the student says at n positions, and its raw logits where they are soft-capped, which the gradient goes back through."""
        raw = _raw_logits(self.hidden[part], self.head)
        logits = _finish(raw, self.head)
        capped = None if self.head.softcap is None else raw
        del raw
        log_p = torch.log_softmax(logits, dim=-1)
        top = logits.argmax(dim=-1)
        sharpened = not self.weights.temperature == self.weights.anchor_temperature == 1.0
        kept = logits if sharpened else None
        del logits
        return _Ours(kept, log_p, log_p.exp(), top), capped

    def _ask_teacher(
        self, asked: slice, label: torch.Tensor, ce: torch.Tensor, ours: _Ours
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The divergence at n of the N distilled positions: its gradient in the student's logits, (n, V), and its weight in the loss, (n,)."""
        weights = self.weights
        told, sound = _only_finite(self.teacher_hidden[asked])
        (log_t, p_t), theirs = _teacher_says(told, self.teacher_head, weights)
        self.teacher_log_prob[asked] = torch.where(sound, log_t.gather(1, label)[:, 0], torch.nan)
        self.teacher_entropy[asked] = torch.where(sound, -_dot(p_t, log_t), torch.nan)
        self.agrees[asked] = log_t.argmax(dim=-1) == ours.most_likely
        del log_t, p_t
        passed = self.marked[asked]
        if weights.margin is not None:
            passed = passed & confident_tokens(self.teacher_log_prob[asked], -ce, weights.margin)
        apart, pull = _divergence(*ours.softened(weights.temperature), *theirs, weights.beta)
        self.value[asked] = torch.where(sound, apart, torch.nan)
        self.chosen[asked] = passed
        return pull, torch.where(passed & ~sound, torch.nan, passed * weights.divergence)

    def _ask_before(self, rest: slice, ours: _Ours) -> torch.Tensor:
        """The divergence to the VLM before at n of the M - N other positions: its gradient in the student's logits, (n, V)."""
        anchor, weights = self.anchor, self.weights
        assert anchor is not None
        asked = anchor.asked[rest]
        if isinstance(anchor, KeptAnchor):
            kl, pull = divergence_from(anchor.kept[rest], ours.log_p, ours.p)
        else:
            hidden = anchor.hidden[rest].masked_fill(~asked[:, None], 0.0)
            T = weights.anchor_temperature
            before = _finish(_raw_logits(hidden, anchor.head), anchor.head)
            log_b = torch.log_softmax(before if T == 1.0 else before / T, dim=-1)
            del before
            kl, pull = _divergence(*ours.softened(T), log_b, log_b.exp(), weights.anchor_beta)
        self.anchor_kl[rest], self.anchored[rest] = torch.where(asked, kl, 0.0), asked
        return pull


class _Gradients:
    """The gradients of hidden states, weight and bias, summed over chunks. needed: whether there is one to compute."""

    def __init__(
        self, needs: tuple[bool, ...], hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> None:
        self.needed = any(needs)
        self.needs_weight, self.needs_bias = needs[1:]
        self.inputs = (hidden.detach(), weight, bias)
        # fp32 until it is scaled: fp16 would lose what the loss scale is there to keep
        self.hidden = torch.zeros(hidden.shape, device=hidden.device) if needs[0] else None
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    def add(self, part: slice, gradient: torch.Tensor) -> None:
        """gradient: (n, V) in the raw logits of these positions."""
        hidden, weight, _ = self.inputs
        if self.needs_bias:
            added = gradient.sum(dim=0)
            self.bias = added if self.bias is None else self.bias.add_(added)
        if weight is None:
            if self.hidden is not None:
                self.hidden[part] = gradient
            return
        dtype = _compute_dtype(hidden, weight)
        gradient = gradient.to(dtype)
        if self.hidden is not None:
            self.hidden[part] = _product(gradient, weight.to(dtype))
        if not self.needs_weight:
            return
        inputs = hidden[part].to(dtype)
        if self.weight is None:
            whole = _product if weight.dtype == torch.float32 else torch.mm
            self.weight = whole(gradient.t(), inputs)
        elif dtype == torch.float32:
            self.weight.addmm_(gradient.t(), inputs)
        else:  # several chunks: a sum in bf16 would lose the small ones
            self.weight = self.weight.float()
            for tile in _tiles(gradient.shape[1]):
                self.weight[tile].add_(_product(gradient[:, tile].t(), inputs))

    def closed(self) -> list[tuple[torch.Tensor | None, torch.dtype]]:
        """(gradient, dtype to return it in) of hidden states, weight and bias; without labelled positions, zeros."""
        hidden, weight, bias = self.inputs
        if self.needs_weight and self.weight is None and weight is not None:
            self.weight = torch.zeros_like(weight)
        if self.needs_bias and self.bias is None and bias is not None:
            self.bias = torch.zeros_like(bias)
        return [
            (grad, hidden.dtype if like is None else like.dtype)
            for grad, like in ((self.hidden, hidden), (self.weight, weight), (self.bias, bias))
        ]


def chunk_elements(memory: int) -> int:
    """Logits per chunk and model on an accelerator with so many bytes."""
    return min(max(memory // (4 * OF_DEVICE), MIN_CHUNK), MAX_CHUNK)


def _chunk_elements(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_CHUNK
    return chunk_elements(torch.cuda.get_device_properties(device).total_memory)


def _chunks(count: int, vocab: int, device: torch.device) -> Iterator[slice]:
    step = max(1, _chunk_elements(device) // max(vocab, 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _tiles(vocab: int, size: int = 2**14) -> Iterator[slice]:
    for start in range(0, vocab, size):
        yield slice(start, min(start + size, vocab))

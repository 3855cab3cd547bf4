"""The loss against plain torch in float64: cross-entropy, divergence, gate, what is said of both models, and every gradient.

Two oracles: the definition, written below on whole `[M, V]` logits in float64, and TRL's own chunked kernels.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import is_triton_available

from hf_lingudistill import losses
from hf_lingudistill._internals import Head
from hf_lingudistill.labs.plan import Setup, memory
from hf_lingudistill.losses import (
    UNSHARED_BIAS,
    Anchor,
    Scores,
    Weights,
    confident_tokens,
    divergence,
    label_nll,
    score,
)

BETAS = (0.0, 0.3, 1.0)
# Largest difference from the float64 reference as a share of the reference's largest entry: (value, gradient). In bf16
# the reference gets the same rounded inputs, but gradients are returned in bf16.
TOLERANCES = {torch.float32: (1e-5, 3e-4), torch.bfloat16: (1e-4, 8e-3)}
# M, N, V, H_s, H_t. The last V is beyond one vocabulary chunk of TRL's kernel (32768), and no multiple of anything.
SHAPES = ((1, 1, 2, 3, 5), (3, 0, 37, 8, 8), (9, 7, 50, 16, 24), (6, 5, 33_001, 4, 6))


@dataclasses.dataclass
class Problem:
    """Student at M positions, teacher at the first N of them, and a label for each. Leaves carry gradient."""

    hidden: torch.Tensor
    head: Head
    teacher_hidden: torch.Tensor
    teacher_head: Head
    labels: torch.Tensor

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [leaf for leaf in (self.hidden, self.head.weight, self.head.bias) if leaf is not None]

    @property
    def count(self) -> int:
        """N."""
        return self.teacher_hidden.shape[0]

    def score(self, marked: torch.Tensor | None = None, **weights: Any) -> Scores:
        return score(
            self.hidden, self.head, self.labels, self.teacher_hidden, self.teacher_head, Weights(**weights), marked
        )

    @property
    def logits(self) -> torch.Tensor:
        return reference_logits(self.hidden, self.head)

    @property
    def teacher_logits(self) -> torch.Tensor:
        return reference_logits(self.teacher_hidden, self.teacher_head).detach()


def make_problem(
    shape: tuple[int, int, int, int, int] = SHAPES[2],
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    scales: tuple[float, float] = (1.0, 1.0),
    softcaps: tuple[float | None, float | None] = (None, None),
) -> Problem:
    M, N, V, H_s, H_t = shape
    torch.manual_seed(0)

    def half(count: int, H: int, scale: float, softcap: float | None, grad: bool) -> tuple[torch.Tensor, Head]:
        hidden = torch.randn(count, H).to(dtype)
        # Logits with a standard deviation of 3 before the head's own scale: neither flat nor one-hot.
        weight = (3 * torch.randn(V, H) / H**0.5).to(dtype)
        offset = torch.randn(V).to(dtype) if bias else None
        for leaf in (hidden, weight, offset):
            if leaf is not None:
                leaf.requires_grad_(grad)
        return hidden, Head(weight, offset, scale, softcap)

    student, teacher = half(M, H_s, scales[0], softcaps[0], True), half(N, H_t, scales[1], softcaps[1], False)
    return Problem(*student, *teacher, labels=torch.randint(V, (M,)))


def reference_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden.double() @ head.weight.double().T  # type: ignore[union-attr]
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = head.scale * logits
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    columns = [logits[:, dict(head.moved).get(v, v)] for v in range(logits.shape[1])] if head.moved else None
    logits = torch.stack(columns, dim=1) if columns else logits
    if head.unshared is not None:
        logits = logits + UNSHARED_BIAS * F.one_hot(head.unshared, logits.shape[1]).sum(0)
    return logits


def reference_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float = 0.0, temperature: float = 1.0
) -> torch.Tensor:
    """Generalised JSD by its definition, all of [N, V] at once. -> (N,) nats."""
    log_s = F.log_softmax(student_logits / temperature, dim=-1)
    log_t = F.log_softmax(teacher_logits / temperature, dim=-1)

    def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)

    if beta == 0.0:
        return kl(log_t, log_s)
    if beta == 1.0:
        return kl(log_s, log_t)
    log_m = ((1 - beta) * log_s.exp() + beta * log_t.exp()).log()
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def reference(problem: Problem, weights: Weights, marked: torch.Tensor | None = None) -> torch.Tensor:
    """The loss of each token by its definition, (M,), in float64."""
    N = problem.count
    log_p = F.log_softmax(problem.logits, dim=-1).gather(1, problem.labels[:, None])[:, 0]
    log_q = F.log_softmax(problem.teacher_logits, dim=-1).gather(1, problem.labels[:N, None])[:, 0]
    chosen = torch.ones(N, dtype=torch.bool, device=log_p.device) if marked is None else marked.clone()
    if weights.margin is not None:
        chosen &= log_q >= log_p[:N].detach() + weights.margin
    kd = reference_divergence(problem.logits[:N], problem.teacher_logits, weights.beta, weights.temperature)
    distilled = -weights.cross_entropy * log_p[:N] + weights.divergence * kd
    return torch.cat([torch.where(chosen, distilled, -log_p[:N]), -log_p[N:]])


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest expected entry."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max()) if expected.numel() else 0.0


def gradients(loss: torch.Tensor, problem: Problem) -> list[torch.Tensor]:
    # Of the plain sum; a token's own gradient shows in its row of the hidden states
    return list(torch.autograd.grad(loss.sum(), problem.leaves))


def assert_matches_reference(problem: Problem, marked: torch.Tensor | None = None, **settings: Any) -> Scores:
    value_tolerance, gradient_tolerance = TOLERANCES[problem.hidden.dtype]
    said, expected = problem.score(marked, **settings), reference(problem, Weights(**settings), marked)
    assert said.loss.shape == expected.shape and said.total.shape == ()
    assert difference(said.loss, expected) < value_tolerance
    assert difference(said.total, expected.sum()) < value_tolerance
    for got, wanted in zip(gradients(said.total, problem), gradients(expected, problem), strict=True):
        assert got.dtype == problem.hidden.dtype
        assert difference(got, wanted) < gradient_tolerance
    return said


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_loss_and_gradients_match_the_definition(beta: float, shape: Any, dtype: torch.dtype) -> None:
    assert_matches_reference(make_problem(shape, dtype), beta=beta, cross_entropy=0.5, divergence=2.0)


FEATURES: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "logit scale": {"scales": (0.25, 2.0)},
    "softcaps": {"softcaps": (4.0, 6.0)},
    "all": {"bias": True, "scales": (0.5, 2.0), "softcaps": (4.0, 6.0)},
}


@pytest.mark.parametrize("settings", [(0.0, 0.5), (0.3, 3.0), (1.0, 1.0), (1.0, 3.0)], ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_bias_scale_softcap_and_temperature_are_read(features: str, settings: tuple[float, float]) -> None:
    problem = make_problem(**FEATURES[features])
    beta, temperature = settings
    assert_matches_reference(problem, beta=beta, temperature=temperature, margin=0.0)
    # Control: each of these features moves the value by far more than the tolerance.
    bare = dataclasses.replace(problem, head=Head(problem.head.weight), teacher_head=Head(problem.teacher_head.weight))
    weights = Weights(beta=beta, temperature=temperature)
    assert difference(reference(bare, weights), reference(problem, weights)) > 1e-2


def test_the_reference_tells_the_settings_apart() -> None:
    """Control of the tests above: with any of these mixed up they would fail."""
    problem = make_problem()
    settings = [
        Weights(beta=beta, temperature=t, cross_entropy=ce, divergence=kd, margin=margin)
        for beta in (*BETAS, 0.7)
        for t in (1.0, 2.0)
        for ce, kd in ((0.5, 1.0), (1.0, 0.5))
        for margin in (None, 0.0)
    ]
    values = [reference(problem, weights) for weights in settings]
    for i, first in enumerate(values):
        for second in values[:i]:
            assert difference(first, second) > 5e-4


@pytest.mark.parametrize("margin", [0.0, 1.0, -2.0])
def test_the_gate_leaves_tokens_to_cross_entropy_and_changes_no_other(margin: float) -> None:
    problem = make_problem((12, 10, 50, 16, 24), bias=True)
    said = assert_matches_reference(problem, margin=margin)
    everything = problem.score()
    log_p = -said.cross_entropy[: problem.count]
    passes = said.teacher_log_prob >= log_p + margin
    assert passes.any() and not passes.all()
    assert torch.equal(said.chosen, passes) and everything.chosen.all()
    torch.testing.assert_close(said.divergence, torch.where(passes, everything.divergence, 0.0))
    # What is said of the teacher is said of every position: the metrics must not see the gate.
    for name in ("teacher_log_prob", "teacher_entropy", "agrees"):
        assert torch.equal(getattr(said, name), getattr(everything, name))
    assert not problem.score(margin=1e3).chosen.any()


def test_a_row_that_lost_its_mark_keeps_cross_entropy() -> None:
    problem = make_problem()
    marked = torch.tensor([True, False] * 4)[: problem.count]
    said = assert_matches_reference(problem, marked)
    assert torch.equal(said.chosen, marked)
    assert difference(said.loss, problem.score().loss) > 1e-2  # control


def test_a_divergence_that_is_not_finite_spoils_no_token_outside_the_gate() -> None:
    """The watch over what is not finite names the rows of such tokens, so that no other row may take it over."""
    problem = make_problem()
    problem.teacher_hidden[1] = torch.nan
    said = problem.score(margin=-1e3)
    fine = torch.arange(problem.count) != 1
    assert torch.equal(said.chosen, fine) and said.divergence.isfinite().all()
    assert torch.equal(said.loss[1], said.cross_entropy[1]) and said.loss.isfinite().all()
    assert problem.score().loss.isfinite().tolist() == [*fine.tolist(), *[True] * (len(said.loss) - problem.count)]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.7}, {"blind": 0.4}], ids=["plain", "temperature", "blind"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nor_its_gradient(bad: float, settings: dict[str, float], beta: float) -> None:
    """Of a token that the gate leaves out, and of one in a row that has lost its mark."""
    problem = make_problem()
    if "blind" in settings:
        problem.teacher_hidden = torch.stack([problem.teacher_hidden, problem.teacher_hidden.flip(0)], dim=1)
    spoilt = dataclasses.replace(problem, teacher_hidden=problem.teacher_hidden.clone())
    spoilt.teacher_hidden.view(problem.count, -1)[1, -1] = bad
    out = torch.arange(problem.count) == 1

    def scored(one: Problem, marked: torch.Tensor, margin: float | None) -> tuple[Any, list[torch.Tensor]]:
        arguments = (one.hidden, one.head, one.labels, one.teacher_hidden, one.teacher_head)
        said = score(*arguments, Weights(beta=beta, margin=margin, **settings), marked=marked)
        return said, gradients(said.total, one)

    expected, wanted = scored(problem, ~out, None)
    for marked, margin in ((~out, None), (torch.ones_like(out), -1e3)):
        said, found = scored(spoilt, marked, margin)
        assert torch.equal(said.chosen, ~out) and torch.equal(said.loss, expected.loss)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
        assert said.teacher_log_prob.isnan().tolist() == out.tolist()  # which the watch asks for
    # Control: what is distilled is told, in the loss and in the gradient
    said, found = scored(spoilt, torch.ones_like(out), None)
    assert said.loss[1].isnan() and not found[0][1].isfinite().any()


def test_nor_does_the_vlm_before_where_it_is_not_asked() -> None:
    problem = make_problem((8, 3, 37, 8, 6))
    hidden, head, asked = torch.randn(5, 5), Head(torch.randn(37, 5)), torch.arange(5) % 3 != 1
    arguments = (problem.hidden, problem.head, problem.labels, problem.teacher_hidden, problem.teacher_head)
    results = []
    for bad in (0.0, torch.nan):
        hidden[~asked] = bad
        said = score(*arguments, Weights(anchor=0.3), anchor=Anchor(hidden, head, asked))
        results.append([said.loss, *gradients(said.total, problem)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and results[1][0].isfinite().all()
    hidden[0] = torch.nan  # control
    said = score(*arguments, Weights(anchor=0.3), anchor=Anchor(hidden, head, asked))
    assert said.loss[problem.count].isnan() and gradients(said.total, problem)[0].isnan().any()


def test_confident_tokens_are_those_whose_label_the_teacher_gives_at_least_the_students_probability() -> None:
    teacher, student = torch.tensor([-1.0, -1.5, -2.0, -2.5]), torch.full((4,), -2.0)
    assert confident_tokens(teacher, student).tolist() == [True, True, True, False]
    assert confident_tokens(teacher, student, 0.5).tolist() == [True, True, False, False]
    assert confident_tokens(teacher, student, 0.75).tolist() == [True, False, False, False]
    assert confident_tokens(teacher, student, -0.5).tolist() == [True, True, True, True]


def test_divergence_of_equal_distributions_is_zero_and_pulls_nowhere() -> None:
    problem = make_problem((6, 6, 50, 16, 16))
    same = dataclasses.replace(
        problem,
        teacher_hidden=problem.hidden.detach().clone(),
        teacher_head=Head(problem.head.weight.detach().clone()),  # type: ignore[union-attr]
    )
    for beta in BETAS:
        said = same.score(beta=beta, cross_entropy=0.0)
        assert said.divergence.abs().max() < 1e-5
        assert all(gradient.abs().max() < 1e-5 for gradient in gradients(said.total, same))
        assert problem.score(beta=beta).divergence.min() > 0.1  # control: other logits do not agree


def test_what_is_said_of_both_models_is_that_of_the_definition() -> None:
    problem = make_problem(bias=True)
    said, N = problem.score(), problem.count
    log_p, log_q = F.log_softmax(problem.logits, dim=-1), F.log_softmax(problem.teacher_logits, dim=-1)
    expected = {
        "cross_entropy": -log_p.gather(1, problem.labels[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "is_top1": log_p.argmax(-1) == problem.labels,
        "teacher_log_prob": log_q.gather(1, problem.labels[:N, None])[:, 0],
        "teacher_entropy": -(log_q.exp() * log_q).sum(-1),
        "agrees": log_p[:N].argmax(-1) == log_q.argmax(-1),
    }
    for name, wanted in expected.items():
        torch.testing.assert_close(getattr(said, name).double(), wanted.detach().double(), atol=1e-5, rtol=1e-5)
        assert not getattr(said, name).requires_grad
    # Control: other labels, other opinion; and agreement both ways
    other = dataclasses.replace(problem, labels=(problem.labels + 1) % 50).score()
    assert (said.teacher_log_prob - other.teacher_log_prob).abs().max() > 1e-2
    eye = Head(torch.eye(5))
    teacher = 4 * F.one_hot(torch.tensor([0, 1, 2, 3]), 5).float()
    student = 4 * F.one_hot(torch.tensor([0, 4, 2, 4]), 5).float()
    mixed = score(student, eye, torch.tensor([0, 1, 2, 4]), teacher, eye, Weights())
    assert mixed.agrees.tolist() == [True, False, True, False]
    assert mixed.is_top1.tolist() == [True, False, True, True]


def test_the_teacher_gets_no_gradient() -> None:
    problem = make_problem(bias=True)
    theirs = [problem.teacher_hidden, problem.teacher_head.weight, problem.teacher_head.bias]
    for leaf in theirs:
        leaf.requires_grad_(True)  # type: ignore[union-attr]
    problem.score(beta=0.3).total.backward()
    assert all(leaf.grad is None for leaf in theirs)  # type: ignore[union-attr]
    assert all(leaf.grad is not None and leaf.grad.abs().max() > 0 for leaf in problem.leaves)


def test_the_gradient_follows_what_the_loss_is_multiplied_by_once() -> None:
    problem = make_problem()
    whole = gradients(problem.score().total, problem)
    halved = gradients(problem.score().total / 2, problem)
    for half, full in zip(halved, whole, strict=True):
        torch.testing.assert_close(half, full / 2)
    total = problem.score().total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated before"):
        total.backward()


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_only_what_is_trained_gets_a_gradient(frozen: str) -> None:
    problem = make_problem(bias=True)
    expected = gradients(problem.score().total, problem)
    off = [problem.hidden] if frozen == "hidden" else [problem.head.weight, problem.head.bias]
    for leaf in off:
        leaf.requires_grad_(False)  # type: ignore[union-attr]
    problem.score().total.backward()
    assert all(leaf.grad is None for leaf in off)  # type: ignore[union-attr]
    for leaf, wanted in zip(problem.leaves, expected, strict=True):
        assert not leaf.requires_grad or torch.equal(leaf.grad, wanted)  # type: ignore[arg-type]


def test_logits_take_the_place_of_hidden_states_where_the_head_is_not_one_matrix() -> None:
    """An adapter on the head: its logits come from itself, and the gradient goes back through it."""
    problem = make_problem(scales=(0.5, 1.0), softcaps=(6.0, None))
    plain = problem.score(margin=0.0)
    expected = gradients(plain.total, problem)
    logits = F.linear(problem.hidden, problem.head.weight)  # type: ignore[arg-type]
    wrapped = dataclasses.replace(problem, hidden=logits, head=dataclasses.replace(problem.head, weight=None))
    said = wrapped.score(margin=0.0)
    torch.testing.assert_close(said.total, plain.total)
    for got, wanted in zip(gradients(said.total, problem), expected, strict=True):
        assert difference(got, wanted) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
def test_under_bf16_autocast_the_loss_stays_near_the_fp32_definition(beta: float) -> None:
    problem = make_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = problem.score(beta=beta)
    assert said.total.dtype == torch.float32
    expected = reference(problem, Weights(beta=beta))
    assert difference(said.loss, expected) < 1e-5  # a CPU multiplies heads in fp32: no bf16 product gives fp32 there
    for got, wanted in zip(gradients(said.total, problem), gradients(expected, problem), strict=True):
        assert got.dtype == torch.float32 and difference(got, wanted) < 3e-4


@pytest.mark.gpu
@pytest.mark.parametrize("beta", BETAS)
def test_on_a_gpu_logits_of_bf16_inputs_are_not_rounded_to_bf16(beta: float) -> None:
    problem = make_problem((300, 200, 500, 64, 64), torch.bfloat16)
    for name in ("hidden", "teacher_hidden", "labels"):
        setattr(problem, name, getattr(problem, name).detach().cuda())
    problem.head = Head(problem.head.weight.detach().cuda().requires_grad_(True))  # type: ignore[union-attr]
    problem.teacher_head = Head(problem.teacher_head.weight.cuda())  # type: ignore[union-attr]
    problem.hidden.requires_grad_(True)
    said, expected = problem.score(beta=beta), reference(problem, Weights(beta=beta))
    assert difference(said.loss, expected) < 1e-4
    for got, wanted in zip(gradients(said.total, problem), gradients(expected, problem), strict=True):
        assert difference(got, wanted) < 3e-2


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_matches_trls_kernel(beta: float) -> None:
    problem = make_problem((7, 7, 50, 16, 24), bias=True, scales=(0.5, 2.0), softcaps=(4.0, 6.0))
    ours = problem.score(beta=beta, temperature=2.0, cross_entropy=0.0)
    s, t = problem.head, problem.teacher_head
    if is_triton_available() and not torch.cuda.is_available():
        pytest.skip("where Triton is installed the kernel is Triton's, which needs a GPU")
    kernels = pytest.importorskip("trl.kernels.chunked_divergence", reason="TRL 1.15 has it for Triton alone")
    theirs, _entropy = kernels.ChunkedDivergenceFunction.apply(
        problem.hidden, s.weight, s.bias, problem.teacher_hidden, t.weight, t.bias,
        beta, 2.0, s.scale, s.softcap, t.scale, t.softcap,
    )  # fmt: skip
    assert difference(ours.divergence, theirs) < 1e-5
    for got, wanted in zip(gradients(ours.total, problem), gradients(theirs, problem), strict=True):
        assert difference(got, wanted) < 1e-4


@pytest.mark.parametrize("elements", [1, 50, 3 * 50 + 1, 2**24])
def test_nothing_depends_on_the_chunk_size(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(bias=True)
    settings = {"margin": 0.0, "beta": 0.3}
    whole = problem.score(**settings)
    expected = gradients(whole.total, problem)
    chunks: list[int] = []
    original = losses._raw_logits
    monkeypatch.setattr(
        losses, "_raw_logits", lambda hidden, head: (chunks.append(len(hidden)), original(hidden, head))[1]
    )
    monkeypatch.setattr(losses, "CPU_CHUNK", elements)
    chunked = problem.score(**settings)
    rows = min(9, max(1, elements // 50))
    # Control: it did go chunk by chunk, the student at all positions and the teacher at the first seven
    assert max(chunks) == rows and sum(chunks) == 9 + 7
    got = gradients(chunked.total, problem)
    assert sum(chunks) == 9 + 7  # four head products: nothing is projected again in the backward pass
    for field in dataclasses.fields(Scores):
        actual, wanted = getattr(chunked, field.name), getattr(whole, field.name)
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-5)
    for a, b in zip(got, expected, strict=True):
        assert difference(a, b) < 1e-5


def test_no_label_at_all_gives_zero_and_stays_connected() -> None:
    problem = make_problem((3, 0, 50, 16, 24), bias=True)
    empty = dataclasses.replace(problem, hidden=problem.hidden[:0], labels=problem.labels[:0])
    total = empty.score().total
    assert total.item() == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(total, problem.leaves))


def test_label_nll_and_divergence_without_gradient() -> None:
    problem = make_problem(bias=True)
    said = problem.score()
    N = problem.count
    torch.testing.assert_close(label_nll(problem.hidden, problem.head, problem.labels), said.cross_entropy)
    kl = divergence(problem.hidden[:N], problem.head, problem.teacher_hidden, problem.teacher_head)
    torch.testing.assert_close(kl, said.divergence)
    assert not kl.requires_grad


# --------------------------------------------------------------------------------------------------------------------
# A student with more tokens than its teacher
# --------------------------------------------------------------------------------------------------------------------
SHARED, EXTRA = 40, 6


def make_grown(extra_logit: float, shared: bool = True, **features: Any) -> tuple[Problem, Problem]:
    """A student of SHARED + EXTRA tokens: with its teacher's head covering them, and with both cut to the shared ones.

    extra_logit: what the student gives each of its own tokens, on top of random logits. shared: mark the extra ones as unshared.
    """
    problem = make_problem((5, 5, SHARED + EXTRA, 16, 24), **features)
    weight, teacher_weight = problem.head.weight, problem.teacher_head.weight.clone()  # type: ignore[union-attr]
    offset = torch.zeros(SHARED + EXTRA)
    offset[SHARED:] = extra_logit
    offset.requires_grad_(True)
    teacher_weight[SHARED:] = 0.0
    labels = problem.labels % SHARED
    unshared = torch.arange(SHARED, SHARED + EXTRA) if shared else None
    grown = dataclasses.replace(
        problem,
        labels=labels,
        head=dataclasses.replace(problem.head, weight=weight, bias=offset),
        teacher_head=dataclasses.replace(problem.teacher_head, weight=teacher_weight, unshared=unshared),
    )
    sliced = dataclasses.replace(
        problem,
        labels=labels,
        head=dataclasses.replace(problem.head, weight=weight[:SHARED], bias=offset[:SHARED]),  # type: ignore[index]
        teacher_head=dataclasses.replace(problem.teacher_head, weight=teacher_weight[:SHARED]),
    )
    return grown, sliced


@pytest.mark.parametrize("features", [{}, {"scales": (1.0, 1 / 16)}, {"softcaps": (None, 30.0)}], ids=str)
def test_unshared_tokens_have_no_mass_whatever_the_heads_scale_and_cap(features: dict[str, Any]) -> None:
    grown, sliced = make_grown(0.0, **features)
    with_extra, without = grown.score(), sliced.score()
    torch.testing.assert_close(with_extra.teacher_log_prob, without.teacher_log_prob, atol=1e-6, rtol=0)
    torch.testing.assert_close(with_extra.teacher_entropy, without.teacher_entropy, atol=1e-5, rtol=0)
    extra = dataclasses.replace(grown, labels=torch.full((5,), SHARED)).score().teacher_log_prob
    assert (extra < -90).all()
    # Control: zero rows alone give the extra tokens logits of 0, which is mass.
    unbiased = make_grown(0.0, shared=False, **features)[0].score()
    assert (unbiased.teacher_log_prob - without.teacher_log_prob).abs().max() > 1e-2


def test_student_mass_on_unshared_tokens_is_penalised() -> None:
    """KL(teacher || student) grows by -log(1 - mass); slicing the student's head does not see the mass at all."""
    found = []
    for extra_logit in (-2.0, 3.0):
        grown, sliced = make_grown(extra_logit)
        mass = F.softmax(grown.logits, dim=-1)[:, SHARED:].sum(dim=-1)
        expected = reference_divergence(sliced.logits, sliced.teacher_logits) - torch.log1p(-mass)
        said = grown.score(cross_entropy=0.0)
        torch.testing.assert_close(said.divergence.double(), expected.detach(), atol=1e-4, rtol=1e-5)
        found.append(said.divergence)
    assert (found[1] > found[0] + 0.1).all()
    *_, bias_gradient = gradients(said.total, grown)
    assert (bias_gradient[SHARED:] > 1e-3).all()  # a step downhill lowers the logits of the student's own tokens


@pytest.mark.parametrize("beta", BETAS)
def test_unshared_tokens_give_no_nan_and_reverse_kl_charges_a_nat_per_percent(beta: float) -> None:
    grown, _ = make_grown(3.0)
    said = grown.score(beta=beta, cross_entropy=0.0)
    assert said.divergence.isfinite().all() and said.divergence.min() > 0
    assert all(gradient.isfinite().all() for gradient in gradients(said.total, grown))
    if beta == 1.0:
        mass = F.softmax(grown.logits, dim=-1)[:, SHARED:].sum(dim=-1)
        free = make_grown(3.0, shared=False)[0].score(beta=1.0).divergence
        assert ((said.divergence - free) / -UNSHARED_BIAS - mass).abs().max() < 2e-2 and mass.max() > 0.1


def test_the_end_of_turn_is_one_event_under_two_names() -> None:
    """The student's token SHARED means what the teacher's token 2 means: the teacher's probability moves there, and 2 has none."""
    grown, sliced = make_grown(0.0)
    unshared = torch.tensor([2, *range(SHARED + 1, SHARED + EXTRA)])
    head = dataclasses.replace(grown.teacher_head, moved=((SHARED, 2),), unshared=unshared)
    aliased = dataclasses.replace(grown, teacher_head=head, labels=torch.full((5,), SHARED))
    expected = dataclasses.replace(sliced, labels=torch.full((5,), 2)).score().teacher_log_prob
    said = assert_matches_reference(aliased)
    torch.testing.assert_close(said.teacher_log_prob, expected, atol=1e-5, rtol=0)
    gone = dataclasses.replace(aliased, labels=torch.full((5,), 2)).score().teacher_log_prob
    assert (gone < -90).all() and (expected > -60).all()


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------
class Held(TorchDispatchMode):
    """The most bytes that tensors made in it held at a time, views counted with what they are views of."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[torch.Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        self.seen += [weakref.ref(leaf) for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        alive = [tensor for one in self.seen if (tensor := one()) is not None]
        self.seen = [weakref.ref(tensor) for tensor in alive]
        self.peak = max(
            self.peak, sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())
        )
        return output


@pytest.mark.parametrize(
    ("tensors", "settings"),
    [
        (4, {}),
        (4, {"margin": 0.0}),
        (4, {"beta": 1.0}),
        (5, {"blind": 0.5}),
        (4, {"anchor": 0.5}),
        (8, {"temperature": 2.0}),
    ],
    ids=str,
)
def test_what_a_chunk_holds_at_once(tensors: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In logits-sized tensors of fp32. Several chunks: what one held is gone before the next one's are made."""
    rows, V = 16, 2**14
    monkeypatch.setattr(losses, "CPU_CHUNK", rows * V)
    monkeypatch.setattr(losses, "CPU_SLICE", V)
    problem = make_problem((4 * rows, 3 * rows, V, 4, 4))
    told = problem.teacher_hidden
    if "blind" in settings:
        told = torch.stack([told, told.flip(0)], dim=1)
    anchor = None
    if "anchor" in settings:
        anchor = Anchor(torch.randn(rows, 4), Head(torch.randn(V, 4)), torch.ones(rows, dtype=torch.bool))
    with Held() as held:
        score(
            problem.hidden,
            problem.head,
            problem.labels,
            told,
            problem.teacher_head,
            Weights(**settings),
            anchor=anchor,
        )
    others = 2 * problem.head.weight.numel() * 4  # type: ignore[union-attr]  # the head's gradient, and room
    assert tensors <= held.peak / (rows * V * 4) <= tensors + others / (rows * V * 4)


def test_the_plan_counts_what_a_chunk_holds() -> None:
    assert (memory.chunk_tensors(Setup()), memory.chunk_tensors(Setup(blind_weight=0.5))) == (4, 5)

"""The loss against plain torch in float64: divergence, the teacher's opinion, the gate, and the token mean.

Two oracles: the definition, written below on whole `[N, V]` logits in float64, and TRL's own chunked kernel.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from hf_lingudistill import losses
from hf_lingudistill._internals import Head
from hf_lingudistill.losses import Distilled, combine, confident_tokens, distil, divergence
from hf_lingudistill.teacher import UNSHARED_BIAS

BETAS = (0.0, 0.3, 1.0)

# Largest difference from the float64 reference as a share of the reference's largest entry: (value, gradient). In bf16
# the reference gets the same rounded inputs, but the logits and the gradients are rounded as well.
TOLERANCES = {torch.float32: (1e-5, 3e-4), torch.bfloat16: (3e-2, 8e-2)}

# N, V, H_s, H_t. The last V is beyond one vocabulary chunk of TRL's kernel (32768), and no multiple of anything.
SHAPES = ((1, 2, 3, 5), (1, 37, 8, 8), (7, 50, 16, 24), (5, 33_001, 4, 6))


@dataclasses.dataclass
class Problem:
    """Student and teacher at N positions, and a label for each. Leaves carry gradient."""

    student_hidden: torch.Tensor
    student_head: Head
    teacher_hidden: torch.Tensor
    teacher_head: Head
    labels: torch.Tensor

    @property
    def leaves(self) -> list[torch.Tensor]:
        found = [self.student_hidden, self.student_head.weight, self.student_head.bias]
        return [leaf for leaf in found if leaf is not None]

    def distil(self, **settings: Any) -> Distilled:
        return distil(
            self.student_hidden, self.student_head, self.teacher_hidden, self.teacher_head, self.labels, **settings
        )

    def divergence(self, **settings: float) -> torch.Tensor:
        return self.distil(**settings).divergence

    def reference(self, **settings: float) -> torch.Tensor:
        return reference_divergence(self.student_logits, self.teacher_logits, **settings)

    @property
    def student_logits(self) -> torch.Tensor:
        return reference_logits(self.student_hidden, self.student_head)

    @property
    def teacher_logits(self) -> torch.Tensor:
        return reference_logits(self.teacher_hidden, self.teacher_head).detach()

    @property
    def student_log_prob(self) -> torch.Tensor:
        """(N,) of the labels, in float64."""
        return label_log_probs(self.student_logits.detach(), self.labels)

    @property
    def teacher_log_prob(self) -> torch.Tensor:
        return label_log_probs(self.teacher_logits, self.labels)


def label_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(logits, dim=-1)[torch.arange(labels.numel()), labels]


def make_problem(
    shape: tuple[int, int, int, int] = SHAPES[2],
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    scales: tuple[float, float] = (1.0, 1.0),
    softcaps: tuple[float | None, float | None] = (None, None),
) -> Problem:
    N, V, H_s, H_t = shape
    torch.manual_seed(0)

    def half(H: int, scale: float, softcap: float | None, grad: bool) -> tuple[torch.Tensor, Head]:
        hidden = torch.randn(N, H).to(dtype)
        # Logits with a standard deviation of 3 before the head's own scale: neither flat nor one-hot.
        weight = (3 * torch.randn(V, H) / H**0.5).to(dtype)
        offset = torch.randn(V).to(dtype) if bias else None
        for leaf in (hidden, weight, offset):
            if leaf is not None:
                leaf.requires_grad_(grad)
        return hidden, Head(weight, offset, scale, softcap)

    student, teacher = half(H_s, scales[0], softcaps[0], True), half(H_t, scales[1], softcaps[1], False)
    return Problem(*student, *teacher, labels=torch.randint(V, (N,)))


def reference_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = head.scale * logits
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


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


def gradients(per_token: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    # Not the plain sum: each token has its own weight, or a gradient of the wrong token would go unseen.
    weights = torch.linspace(0.5, 2.0, per_token.numel(), dtype=per_token.dtype)
    return list(torch.autograd.grad((weights * per_token).sum(), leaves))


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest expected entry."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


def assert_matches_reference(problem: Problem, **kwargs: float) -> None:
    value_tolerance, gradient_tolerance = TOLERANCES[problem.student_hidden.dtype]
    actual, expected = problem.divergence(**kwargs), problem.reference(**kwargs)
    assert actual.shape == expected.shape == problem.student_hidden.shape[:1]
    assert difference(actual, expected) < value_tolerance
    for got, wanted in zip(gradients(actual, problem.leaves), gradients(expected, problem.leaves), strict=True):
        assert got.dtype == problem.student_hidden.dtype
        assert difference(got, wanted) < gradient_tolerance


# --------------------------------------------------------------------------------------------------------------------
# divergence
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_divergence_and_its_gradients_match_the_definition(
    beta: float, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    assert_matches_reference(make_problem(shape, dtype), beta=beta)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    "features",
    [
        {"bias": True},
        {"scales": (0.25, 2.0)},
        {"softcaps": (4.0, None)},
        {"softcaps": (None, 4.0)},
        {"bias": True, "scales": (0.5, 2.0), "softcaps": (4.0, 6.0)},
    ],
    ids=["bias", "logit scale", "student softcap", "teacher softcap", "all"],
)
def test_divergence_reads_bias_scale_softcap_and_temperature(
    features: dict[str, object], temperature: float, beta: float
) -> None:
    problem = make_problem(**features)  # type: ignore[arg-type]
    assert_matches_reference(problem, beta=beta, temperature=temperature)
    # Control: each of these features moves the value by far more than the tolerance.
    bare = dataclasses.replace(
        problem, student_head=Head(problem.student_head.weight), teacher_head=Head(problem.teacher_head.weight)
    )
    settings = {"beta": beta, "temperature": temperature}
    assert difference(bare.reference(**settings), problem.reference(**settings)) > 1e-2


def test_the_reference_tells_the_betas_and_temperatures_apart() -> None:
    """Control of the tests above: with any of these mixed up they would fail."""
    problem = make_problem()
    values = {(beta, t): problem.reference(beta=beta, temperature=t) for beta in (*BETAS, 0.7) for t in (1.0, 2.0)}
    for first in values:
        for second in values:
            if first != second:
                assert difference(values[first], values[second]) > 1e-2, (first, second)


def test_divergence_of_equal_distributions_is_zero_and_pulls_nowhere() -> None:
    problem = make_problem((6, 50, 16, 16))
    same = dataclasses.replace(
        problem,
        teacher_hidden=problem.student_hidden.detach().clone(),
        teacher_head=Head(problem.student_head.weight.detach().clone()),
    )
    for beta in BETAS:
        per_token = same.divergence(beta=beta)
        assert per_token.abs().max() < 1e-5
        assert all(gradient.abs().max() < 1e-5 for gradient in gradients(per_token, same.leaves))
        assert problem.divergence(beta=beta).min() > 0.1  # control: other logits do not agree


def test_the_teacher_gets_no_gradient() -> None:
    problem = make_problem(bias=True)
    theirs = [problem.teacher_hidden, problem.teacher_head.weight, problem.teacher_head.bias]
    for leaf in theirs:
        leaf.requires_grad_(True)  # type: ignore[union-attr]
    problem.divergence(beta=0.3).sum().backward()
    assert all(leaf.grad is None for leaf in theirs)  # type: ignore[union-attr]
    assert all(leaf.grad is not None and leaf.grad.abs().max() > 0 for leaf in problem.leaves)


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_under_bf16_autocast_stays_near_the_fp32_definition(beta: float) -> None:
    problem = make_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = problem.divergence(beta=beta)
    assert actual.dtype == torch.float32
    expected = problem.reference(beta=beta)
    assert 1e-6 < difference(actual, expected) < 3e-2  # not equal: the inputs of the matrix product were rounded
    for got, wanted in zip(gradients(actual, problem.leaves), gradients(expected, problem.leaves), strict=True):
        assert got.dtype == torch.float32
        assert difference(got, wanted) < 5e-2


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_matches_trls_kernel(beta: float) -> None:
    problem = make_problem((7, 50, 16, 24), bias=True, scales=(0.5, 2.0), softcaps=(4.0, 6.0))
    student, teacher = problem.student_head, problem.teacher_head
    theirs, _entropy = ChunkedDivergenceFunction.apply(
        problem.student_hidden,
        student.weight,
        student.bias,
        problem.teacher_hidden,
        teacher.weight,
        teacher.bias,
        beta,
        2.0,
        student.scale,
        student.softcap,
        teacher.scale,
        teacher.softcap,
    )
    ours = problem.divergence(beta=beta, temperature=2.0)
    assert difference(ours, theirs) < 1e-5
    for got, wanted in zip(gradients(ours, problem.leaves), gradients(theirs, problem.leaves), strict=True):
        assert difference(got, wanted) < 1e-4


def test_divergence_without_gradient_is_the_kl_of_the_definition() -> None:
    problem = make_problem(bias=True)
    actual = divergence(problem.student_hidden, problem.student_head, problem.teacher_hidden, problem.teacher_head)
    assert not actual.requires_grad
    assert difference(actual, problem.reference()) < 1e-5


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(trained: str) -> None:
    """Adapters freeze the head; a frozen backbone leaves only the head."""
    problem = make_problem(bias=True)
    leaves = dict(zip(("hidden", "weight", "bias"), problem.leaves, strict=True))
    expected = dict(zip(leaves, gradients(problem.divergence(), problem.leaves), strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trained)
    (actual,) = gradients(problem.divergence(), [leaves[trained]])
    assert torch.equal(actual, expected[trained])


@pytest.mark.parametrize("beta", BETAS)
def test_logits_are_recomputed_in_the_backward_pass_where_their_gradient_is_not_kept(
    beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"beta": beta, "temperature": 2.0}
    problem = make_problem(bias=True, scales=(0.5, 2.0), softcaps=(4.0, 6.0))
    kept = gradients(problem.divergence(**settings), problem.leaves)
    monkeypatch.setattr(losses, "KEEP_ELEMENTS", problem.labels.numel() * 50 - 1)
    calls: list[int] = []
    original = losses._raw_logits

    def counted(hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(hidden.shape[0])
        return original(hidden, *args)

    monkeypatch.setattr(losses, "_raw_logits", counted)
    per_token = problem.divergence(**settings)
    forward_calls = len(calls)
    recomputed = gradients(per_token, problem.leaves)
    assert len(calls) == 2 * forward_calls  # control: it did go the other way
    for got, wanted in zip(recomputed, kept, strict=True):
        assert difference(got, wanted) < 1e-5


def test_a_second_backward_pass_gives_the_same_gradients() -> None:
    problem = make_problem(bias=True)
    per_token = problem.divergence(beta=0.3)
    passes = [torch.autograd.grad(per_token.sum(), problem.leaves, retain_graph=True) for _ in range(2)]
    for first, second in zip(*passes, strict=True):
        assert difference(second, first) < 1e-5


# --------------------------------------------------------------------------------------------------------------------
# What the teacher says
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "bias, scale and softcap"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_teachers_opinion_matches_the_full_log_softmax(
    shape: tuple[int, int, int, int], plain: bool, temperature: float
) -> None:
    """At temperature 1, whatever the temperature of the divergence: it is compared with the cross-entropy."""
    features = {} if plain else {"bias": True, "scales": (0.5, 2.0), "softcaps": (4.0, 6.0)}
    problem = make_problem(shape, **features)  # type: ignore[arg-type]
    said = problem.distil(temperature=temperature)
    log_p = F.log_softmax(problem.teacher_logits, dim=-1)
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(said.teacher_log_prob.double(), problem.teacher_log_prob, **close)
    torch.testing.assert_close(said.teacher_entropy.double(), -(log_p.exp() * log_p).sum(-1), **close)
    assert torch.equal(said.agrees, problem.student_logits.argmax(-1) == problem.teacher_logits.argmax(-1))
    assert not any(t.requires_grad for t in (said.teacher_log_prob, said.teacher_entropy, said.agrees, said.chosen))
    # Control: other labels, other opinion.
    other = label_log_probs(problem.teacher_logits, (problem.labels + 1) % shape[1])
    assert (said.teacher_log_prob - other).abs().max() > 1e-2


def test_agreement_is_counted_where_the_most_likely_tokens_are_the_same() -> None:
    V = 5
    eye = Head(torch.eye(V))
    teacher = 4 * F.one_hot(torch.tensor([0, 1, 2, 3]), V).float()
    student = 4 * F.one_hot(torch.tensor([0, 4, 2, 4]), V).float()
    said = distil(student, eye, teacher, eye, torch.tensor([0, 1, 2, 3]))
    assert said.agrees.tolist() == [True, False, True, False]


@pytest.mark.parametrize("margin", [None, 0.0], ids=["all", "gated"])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("elements", [1, 50, 3 * 50 + 1, 2**24])
def test_nothing_depends_on_the_chunk_size(
    elements: int, keep: bool, margin: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem((7, 50, 16, 24), bias=True)
    settings = {"margin": margin, "beta": 0.3, "student_log_prob": problem.student_log_prob.float()}
    whole = problem.distil(**settings)
    whole_gradients = gradients(whole.divergence, problem.leaves)

    chunks: list[int] = []
    original = losses._raw_logits

    def counted(hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        chunks.append(hidden.shape[0])
        return original(hidden, *args)

    monkeypatch.setattr(losses, "_raw_logits", counted)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", elements)
    if not keep:
        monkeypatch.setattr(losses, "KEEP_ELEMENTS", 0)
    chunked = problem.distil(**settings)
    rows = min(7, max(1, elements // 50))
    assert max(chunks) == rows and len(chunks) == 2 * -(-7 // rows)  # control: it did go chunk by chunk
    for field in dataclasses.fields(Distilled):
        actual, expected = getattr(chunked, field.name), getattr(whole, field.name)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    for got, wanted in zip(gradients(chunked.divergence, problem.leaves), whole_gradients, strict=True):
        assert difference(got, wanted) < 1e-5
    assert max(chunks) == rows  # also in the backward pass


def test_nothing_to_distil_gives_nothing_and_stays_connected() -> None:
    problem = make_problem()
    empty = dataclasses.replace(
        problem,
        student_hidden=problem.student_hidden[:0],
        teacher_hidden=problem.teacher_hidden[:0],
        labels=problem.labels[:0],
    )
    said = empty.distil()
    assert all(getattr(said, field.name).shape == (0,) for field in dataclasses.fields(Distilled))
    hidden, weight = torch.autograd.grad(said.divergence.sum(), [problem.student_hidden, problem.student_head.weight])
    assert not hidden.any() and not weight.any()


# --------------------------------------------------------------------------------------------------------------------
# A student with more tokens than its teacher
# --------------------------------------------------------------------------------------------------------------------
SHARED, EXTRA = 40, 6


@dataclasses.dataclass
class Grown:
    """A student of SHARED + EXTRA tokens: with its teacher padded by a bias, and with both cut to the shared ones."""

    padded: Problem
    sliced: Problem


def make_grown(extra_logit: float, bias: float = UNSHARED_BIAS) -> Grown:
    """extra_logit: what the student gives each of its own tokens, on top of random logits."""
    problem = make_problem((5, SHARED + EXTRA, 16, 24))
    weight = problem.student_head.weight
    offset = torch.zeros(SHARED + EXTRA)
    offset[SHARED:] = extra_logit
    offset.requires_grad_(True)
    teacher_weight = problem.teacher_head.weight.clone()
    teacher_weight[SHARED:] = 0.0
    teacher_bias = torch.zeros(SHARED + EXTRA)
    teacher_bias[SHARED:] = bias
    shared = dataclasses.replace(problem, labels=problem.labels % SHARED)
    return Grown(
        padded=dataclasses.replace(
            shared, student_head=Head(weight, offset), teacher_head=Head(teacher_weight, teacher_bias)
        ),
        sliced=dataclasses.replace(
            shared,
            student_head=Head(weight[:SHARED], offset[:SHARED]),
            teacher_head=Head(teacher_weight[:SHARED]),
        ),
    )


def test_the_bias_on_unshared_tokens_leaves_the_softmax_over_the_shared_ones_exact() -> None:
    grown = make_grown(0.0)
    with_extra, without = grown.padded.distil(), grown.sliced.distil()
    torch.testing.assert_close(with_extra.teacher_log_prob, without.teacher_log_prob, atol=1e-6, rtol=0)
    torch.testing.assert_close(with_extra.teacher_entropy, without.teacher_entropy, atol=1e-5, rtol=0)
    # Control: zero rows alone give the extra tokens logits of 0, which is mass.
    unbiased = make_grown(0.0, bias=0.0).padded.distil()
    assert (unbiased.teacher_log_prob - without.teacher_log_prob).abs().max() > 1e-2


@pytest.mark.parametrize("beta", BETAS)
def test_the_bias_on_unshared_tokens_gives_no_nan(beta: float) -> None:
    grown = make_grown(3.0)
    per_token = grown.padded.divergence(beta=beta)
    assert per_token.isfinite().all() and per_token.min() > 0
    assert all(gradient.isfinite().all() for gradient in gradients(per_token, grown.padded.leaves))
    infinite = make_grown(3.0, bias=-torch.inf).padded.divergence(beta=beta)
    assert not infinite.isfinite().all()  # control: why the bias is finite


def test_student_mass_on_unshared_tokens_is_penalised() -> None:
    """KL(teacher || student) grows by -log(1 - mass); slicing the student's head does not see the mass at all."""
    little, much = make_grown(-2.0), make_grown(3.0)
    for grown in (little, much):
        mass = F.softmax(grown.padded.student_logits, dim=-1)[:, SHARED:].sum(dim=-1)
        expected = grown.sliced.reference() - torch.log1p(-mass)
        torch.testing.assert_close(grown.padded.divergence().double(), expected, atol=1e-4, rtol=1e-5)
    assert (much.padded.divergence() > little.padded.divergence() + 0.1).all()
    assert torch.equal(much.sliced.divergence(), little.sliced.divergence())  # control
    *_, bias_gradient = gradients(much.padded.divergence(), much.padded.leaves)
    assert (bias_gradient[SHARED:] > 1e-3).all()  # a step downhill lowers the logits of the student's own tokens
    *_, bias_gradient = gradients(much.sliced.divergence(), [much.padded.leaves[2]])
    assert (bias_gradient[SHARED:] == 0).all()  # control


def test_reverse_kl_charges_unshared_mass_at_the_size_of_the_bias() -> None:
    """Reverse KL pays the bias for the mass: 1 nat for each percent, on top of the divergence over the shared tokens."""
    for extra_logit in (-2.0, 3.0):
        grown = make_grown(extra_logit).padded
        mass = F.softmax(grown.student_logits, dim=-1)[:, SHARED:].sum(dim=-1)
        shared_part = make_grown(extra_logit, bias=0.0).padded.divergence(beta=1.0)
        charged = (grown.divergence(beta=1.0) - shared_part) / -UNSHARED_BIAS
        assert (charged - mass).abs().max() < 2e-2 and mass.max() > 0.1


# --------------------------------------------------------------------------------------------------------------------
# The gate
# --------------------------------------------------------------------------------------------------------------------
def test_confident_tokens_are_those_whose_label_the_teacher_gives_at_least_the_students_probability() -> None:
    teacher = torch.tensor([-1.0, -2.0, -3.0])
    student = torch.tensor([-2.0, -2.0, -2.0])
    assert confident_tokens(teacher, student).tolist() == [True, True, False]


def test_the_margin_is_in_nats_above_the_student() -> None:
    teacher = torch.tensor([-1.0, -1.5, -2.0, -2.5])
    student = torch.full((4,), -2.0)
    assert confident_tokens(teacher, student, 0.5).tolist() == [True, True, False, False]
    assert confident_tokens(teacher, student, 0.75).tolist() == [True, False, False, False]
    assert confident_tokens(teacher, student, -0.5).tolist() == [True, True, True, True]
    assert confident_tokens(teacher, student, -0.25).tolist() == [True, True, True, False]


@pytest.mark.parametrize("margin", [0.0, 1.0, -2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_the_gate_leaves_out_a_token_and_changes_no_other(beta: float, margin: float) -> None:
    problem = make_problem((12, 50, 16, 24), bias=True)
    passes = problem.teacher_log_prob >= problem.student_log_prob + margin
    assert passes.any() and not passes.all()
    settings = {"student_log_prob": problem.student_log_prob.float(), "margin": margin, "beta": beta}
    gated = problem.distil(**settings)
    everything = problem.distil(beta=beta)
    assert torch.equal(gated.chosen, passes) and everything.chosen.all()
    torch.testing.assert_close(gated.divergence, torch.where(passes, everything.divergence, 0.0))
    # What is said of the teacher is said of every position: the metrics must not see the gate.
    for name in ("teacher_log_prob", "teacher_entropy", "agrees"):
        assert torch.equal(getattr(gated, name), getattr(everything, name))
    weighted = gradients(torch.where(passes, everything.divergence, 0.0), problem.leaves)
    for got, wanted in zip(gradients(gated.divergence, problem.leaves), weighted, strict=True):
        assert difference(got, wanted) < 1e-5
    (hidden,) = gradients(problem.distil(**settings).divergence, [problem.student_hidden])
    assert not hidden[~passes].any() and hidden[passes].any(dim=1).all()


def test_a_gate_that_lets_nothing_pass_gives_zeros_and_stays_connected() -> None:
    problem = make_problem(bias=True)
    gated = problem.distil(student_log_prob=problem.student_log_prob.float(), margin=1e3)
    assert not gated.chosen.any() and not gated.divergence.any()
    assert not any(gradient.any() for gradient in gradients(gated.divergence, problem.leaves))


# --------------------------------------------------------------------------------------------------------------------
# combine
# --------------------------------------------------------------------------------------------------------------------
CE_WEIGHT, DISTILL_WEIGHT = 0.5, 2.0


@dataclasses.dataclass
class Batch:
    """All (B, T - 1). candidates: the loss positions. chosen: those that pass the gate. kd: read where chosen."""

    cross_entropy: torch.Tensor
    label_mask: torch.Tensor
    candidates: torch.Tensor
    chosen: torch.Tensor
    kd: torch.Tensor

    def __getitem__(self, rows: slice | torch.Tensor) -> Batch:
        return Batch(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    def padded(self, left: int, right: int) -> Batch:
        return Batch(*(F.pad(getattr(self, field.name), (left, right)) for field in dataclasses.fields(self)))

    def combined(self) -> torch.Tensor:
        rows, positions = self.candidates.nonzero(as_tuple=True)
        chosen = self.chosen[rows, positions]
        return combine(
            self.cross_entropy,
            torch.where(chosen, self.kd[rows, positions], 0.0),
            chosen,
            rows,
            positions,
            ce_weight=CE_WEIGHT,
            distill_weight=DISTILL_WEIGHT,
        )


def make_batch(B: int = 5, T: int = 9) -> Batch:
    # Rows with very different numbers of labels: a mean over rows is then far from the mean over tokens.
    label_mask = torch.rand(B, T - 1) < torch.linspace(0.2, 1.0, B)[:, None]
    label_mask[:, 0] = True
    candidates = label_mask & (torch.rand(B, T - 1) < 0.8)
    candidates[0] = False  # a row that is not distilled
    chosen = candidates & (torch.rand(B, T - 1) < 0.6)
    cross_entropy = torch.where(label_mask, 5 * torch.rand(B, T - 1), 0.0)
    return Batch(cross_entropy, label_mask, candidates, chosen, torch.rand(B, T - 1))


def test_combine_weighs_distilled_tokens_and_leaves_the_others_alone() -> None:
    batch = make_batch()
    for kind in (batch.chosen, batch.candidates & ~batch.chosen, batch.label_mask & ~batch.candidates):
        assert kind.any()
    expected = torch.where(
        batch.chosen, CE_WEIGHT * batch.cross_entropy + DISTILL_WEIGHT * batch.kd, batch.cross_entropy
    )
    torch.testing.assert_close(batch.combined(), expected)


def test_nothing_distilled_is_plain_cross_entropy() -> None:
    batch = make_batch()
    assert not torch.equal(batch.combined(), batch.cross_entropy)  # control
    none = torch.zeros_like(batch.chosen)
    assert torch.equal(dataclasses.replace(batch, chosen=none).combined(), batch.cross_entropy)
    assert torch.equal(dataclasses.replace(batch, chosen=none, candidates=none).combined(), batch.cross_entropy)


def test_the_global_token_mean_is_unchanged_by_splitting_the_batch() -> None:
    batch = make_batch()
    num_items_in_batch = batch.label_mask.sum()
    whole = batch.combined().sum() / num_items_in_batch
    for sizes in ([1] * 5, [2, 3], [4, 1]):
        parts, start = [], 0
        for size in sizes:
            parts.append(batch[slice(start, start + size)])
            start += size
        accumulated = sum(part.combined().sum() / num_items_in_batch for part in parts)
        torch.testing.assert_close(accumulated, whole)
        # Control: the mean of the parts' own means, which is how accumulation goes wrong.
        local = sum(part.combined().sum() / part.label_mask.sum() for part in parts) / len(parts)
        assert (local - whole).abs() > 1e-2


def test_the_global_token_mean_is_unchanged_by_padding() -> None:
    batch = make_batch()
    whole = batch.combined().sum() / batch.label_mask.sum()
    for left, right in ((0, 4), (4, 0), (3, 2)):
        padded = batch.padded(left, right)
        torch.testing.assert_close(padded.combined().sum() / padded.label_mask.sum(), whole)
        # Control: a mean over positions does change.
        assert (padded.combined().mean() - batch.combined().mean()).abs() > 1e-2


def test_the_global_token_mean_is_unchanged_by_row_order() -> None:
    batch = make_batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(batch[order].combined(), batch.combined()[order])
    # Control: divergences that stay behind while their rows move.
    stale = dataclasses.replace(batch[order], kd=batch.kd)
    assert (stale.combined() - batch.combined()[order]).abs().max() > 1e-2


def test_combine_passes_gradient_to_both_parts_with_their_weights() -> None:
    batch = make_batch()
    batch.cross_entropy.requires_grad_(True)
    batch.kd.requires_grad_(True)
    batch.combined().sum().backward()
    assert torch.equal(batch.cross_entropy.grad, torch.where(batch.chosen, CE_WEIGHT, 1.0))
    assert torch.equal(batch.kd.grad, DISTILL_WEIGHT * batch.chosen)

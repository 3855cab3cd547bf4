"""The loss against plain torch in float64: divergence, the teacher's opinion, the gate, and the token mean."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hf_lingudistill import losses
from hf_lingudistill._internals import Head
from hf_lingudistill.losses import combine, confident_tokens, divergence, teacher_opinion
from hf_lingudistill.teacher import UNSHARED_BIAS

BETAS = (0.0, 0.3, 1.0)

# Largest difference from the float64 reference as a share of the reference's largest entry: (value, gradient). In bf16
# the reference gets the same rounded inputs; its gradients are returned, and accumulated from tiles, in bf16.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-4, 2e-2)}

# N, V, H_s, H_t. The last V is beyond one vocabulary chunk of the kernel (32768), and no multiple of anything.
SHAPES = ((1, 2, 3, 5), (1, 37, 8, 8), (7, 50, 16, 24), (5, 33_001, 4, 6))


@dataclasses.dataclass
class Problem:
    """Student and teacher at N positions. Leaves carry gradient."""

    student_hidden: torch.Tensor
    student_head: Head
    teacher_hidden: torch.Tensor
    teacher_head: Head

    @property
    def leaves(self) -> list[torch.Tensor]:
        found = [self.student_hidden, self.student_head.weight, self.student_head.bias]
        return [leaf for leaf in found if leaf is not None]

    def divergence(self, **kwargs: float) -> torch.Tensor:
        return divergence(self.student_hidden, self.student_head, self.teacher_hidden, self.teacher_head, **kwargs)

    def reference(self, **kwargs: float) -> torch.Tensor:
        return reference_divergence(
            reference_logits(self.student_hidden, self.student_head),
            reference_logits(self.teacher_hidden, self.teacher_head).detach(),
            **kwargs,
        )


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

    return Problem(*half(H_s, scales[0], softcaps[0], True), *half(H_t, scales[1], softcaps[1], False))


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
    bare_student, bare_teacher = Head(problem.student_head.weight), Head(problem.teacher_head.weight)
    bare = Problem(problem.student_hidden, bare_student, problem.teacher_hidden, bare_teacher)
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
    same = Problem(
        problem.student_hidden,
        problem.student_head,
        problem.student_hidden.detach().clone(),
        Head(problem.student_head.weight.detach().clone()),
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


# --------------------------------------------------------------------------------------------------------------------
# teacher_opinion
# --------------------------------------------------------------------------------------------------------------------
def opinion_of(problem: Problem, labels: torch.Tensor) -> losses.TeacherOpinion:
    return teacher_opinion(
        problem.student_hidden, problem.student_head, problem.teacher_hidden, problem.teacher_head, labels
    )


def labels_for(problem: Problem) -> torch.Tensor:
    V = problem.student_head.weight.shape[0]
    return torch.randint(V, problem.student_hidden.shape[:1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "bias, scale and softcap"])
def test_teacher_opinion_matches_the_full_log_softmax(shape: tuple[int, int, int, int], plain: bool) -> None:
    features = {} if plain else {"bias": True, "scales": (0.5, 2.0), "softcaps": (4.0, 6.0)}
    problem = make_problem(shape, **features)  # type: ignore[arg-type]
    labels = labels_for(problem)
    opinion = opinion_of(problem, labels)
    student = reference_logits(problem.student_hidden, problem.student_head)
    teacher = reference_logits(problem.teacher_hidden, problem.teacher_head)
    log_p = F.log_softmax(teacher, dim=-1)
    rows = torch.arange(labels.numel())
    torch.testing.assert_close(opinion.log_prob.double(), log_p[rows, labels], atol=1e-4, rtol=0)
    torch.testing.assert_close(opinion.entropy.double(), -(log_p.exp() * log_p).sum(-1), atol=1e-4, rtol=0)
    assert torch.equal(opinion.agrees, student.argmax(-1) == teacher.argmax(-1))
    assert not any(t.requires_grad for t in (opinion.log_prob, opinion.entropy, opinion.agrees))
    # Control: other labels, other opinion.
    assert (opinion.log_prob - log_p[rows, (labels + 1) % shape[1]]).abs().max() > 1e-2


def test_agreement_is_counted_where_the_most_likely_tokens_are_the_same() -> None:
    V = 5
    eye = Head(torch.eye(V))
    teacher = 4 * F.one_hot(torch.tensor([0, 1, 2, 3]), V).float()
    student = 4 * F.one_hot(torch.tensor([0, 4, 2, 4]), V).float()
    opinion = teacher_opinion(student, eye, teacher, eye, torch.tensor([0, 1, 2, 3]))
    assert opinion.agrees.tolist() == [True, False, True, False]


@pytest.mark.parametrize("elements", [1, 50, 3 * 50 + 1, 2**24])
def test_teacher_opinion_is_invariant_to_the_chunk_size(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem((7, 50, 16, 24))
    labels = labels_for(problem)
    whole = opinion_of(problem, labels)

    chunks: list[int] = []
    original = losses._logits

    def counted(hidden: torch.Tensor, head: Head) -> torch.Tensor:
        chunks.append(hidden.shape[0])
        return original(hidden, head)

    monkeypatch.setattr(losses, "_logits", counted)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", elements)
    chunked = opinion_of(problem, labels)
    rows = min(7, max(1, elements // 50))
    assert max(chunks) == rows and len(chunks) == 2 * -(-7 // rows)  # control: it did go chunk by chunk
    torch.testing.assert_close(chunked.log_prob, whole.log_prob, atol=1e-5, rtol=0)
    torch.testing.assert_close(chunked.entropy, whole.entropy, atol=1e-5, rtol=0)
    assert torch.equal(chunked.agrees, whole.agrees)


# --------------------------------------------------------------------------------------------------------------------
# A student with more tokens than its teacher
# --------------------------------------------------------------------------------------------------------------------
SHARED, EXTRA = 40, 6


@dataclasses.dataclass
class Grown:
    """A student of SHARED + EXTRA tokens: with its teacher padded by a bias, and with both cut to the shared tokens."""

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
    padded = Problem(
        problem.student_hidden, Head(weight, offset), problem.teacher_hidden, Head(teacher_weight, teacher_bias)
    )
    sliced = Problem(
        problem.student_hidden,
        Head(weight[:SHARED], offset[:SHARED]),
        problem.teacher_hidden,
        Head(teacher_weight[:SHARED]),
    )
    return Grown(padded, sliced)


def test_the_bias_on_unshared_tokens_leaves_the_softmax_over_the_shared_ones_exact() -> None:
    grown = make_grown(0.0)
    labels = torch.randint(SHARED, (5,))
    with_extra, without = opinion_of(grown.padded, labels), opinion_of(grown.sliced, labels)
    torch.testing.assert_close(with_extra.log_prob, without.log_prob, atol=1e-6, rtol=0)
    torch.testing.assert_close(with_extra.entropy, without.entropy, atol=1e-5, rtol=0)
    # Control: zero rows alone give the extra tokens logits of 0, which is mass.
    unbiased = opinion_of(make_grown(0.0, bias=0.0).padded, labels)
    assert (unbiased.log_prob - without.log_prob).abs().max() > 1e-2


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
        log_p = F.log_softmax(reference_logits(grown.padded.student_hidden, grown.padded.student_head), dim=-1)
        mass = log_p[:, SHARED:].exp().sum(dim=-1)
        expected = grown.sliced.reference() - torch.log1p(-mass)
        torch.testing.assert_close(grown.padded.divergence().double(), expected, atol=1e-4, rtol=1e-5)
    assert (much.padded.divergence() > little.padded.divergence() + 0.1).all()
    assert torch.equal(much.sliced.divergence(), little.sliced.divergence())  # control
    *_, bias_gradient = gradients(much.padded.divergence(), much.padded.leaves)
    assert (bias_gradient[SHARED:] > 1e-3).all()  # a step downhill lowers the logits of the student's own tokens
    *_, bias_gradient = gradients(much.sliced.divergence(), [much.padded.leaves[2]])
    assert (bias_gradient[SHARED:] == 0).all()  # control


def test_reverse_kl_charges_unshared_mass_at_the_size_of_the_bias() -> None:
    """What is exact for beta=0 is harsh for beta=1: each percent of mass costs 100 nats, but it stays finite."""
    for extra_logit in (-2.0, 3.0):
        grown = make_grown(extra_logit).padded
        log_p = F.log_softmax(reference_logits(grown.student_hidden, grown.student_head), dim=-1)
        mass = log_p[:, SHARED:].exp().sum(dim=-1)
        charged = grown.divergence(beta=1.0) / -UNSHARED_BIAS
        assert (charged - mass).abs().max() < 2e-2 and mass.max() > 0.1


# --------------------------------------------------------------------------------------------------------------------
# confident_tokens
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


# --------------------------------------------------------------------------------------------------------------------
# combine
# --------------------------------------------------------------------------------------------------------------------
CE_WEIGHT, DISTILL_WEIGHT = 0.5, 2.0


@dataclasses.dataclass
class Batch:
    """cross_entropy, label_mask, chosen: (B, T - 1). kd: (B, T - 1), read at the chosen positions only."""

    cross_entropy: torch.Tensor
    label_mask: torch.Tensor
    chosen: torch.Tensor
    kd: torch.Tensor

    def __getitem__(self, rows: slice | torch.Tensor) -> Batch:
        return Batch(self.cross_entropy[rows], self.label_mask[rows], self.chosen[rows], self.kd[rows])

    def padded(self, left: int, right: int) -> Batch:
        return Batch(*(F.pad(getattr(self, field.name), (left, right)) for field in dataclasses.fields(self)))

    def combined(self) -> torch.Tensor:
        rows, positions = self.chosen.nonzero(as_tuple=True)
        return combine(
            self.cross_entropy,
            self.kd[rows, positions],
            rows,
            positions,
            ce_weight=CE_WEIGHT,
            distill_weight=DISTILL_WEIGHT,
        )


def make_batch(B: int = 5, T: int = 9) -> Batch:
    # Rows with very different numbers of labels: a mean over rows is then far from the mean over tokens.
    label_mask = torch.rand(B, T - 1) < torch.linspace(0.2, 1.0, B)[:, None]
    label_mask[:, 0] = True
    chosen = label_mask & (torch.rand(B, T - 1) < 0.5)
    chosen[0] = False  # a row that is not distilled
    cross_entropy = torch.where(label_mask, 5 * torch.rand(B, T - 1), 0.0)
    return Batch(cross_entropy, label_mask, chosen, torch.rand(B, T - 1))


def test_combine_weighs_distilled_tokens_and_leaves_the_others_alone() -> None:
    batch = make_batch()
    assert batch.chosen.any() and (batch.label_mask & ~batch.chosen).any()
    expected = torch.where(
        batch.chosen, CE_WEIGHT * batch.cross_entropy + DISTILL_WEIGHT * batch.kd, batch.cross_entropy
    )
    torch.testing.assert_close(batch.combined(), expected)


def test_nothing_distilled_is_plain_cross_entropy() -> None:
    batch = make_batch()
    batch.chosen[:] = False
    assert torch.equal(batch.combined(), batch.cross_entropy)


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

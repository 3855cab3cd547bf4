"""What must hold of any batch: masks, gathering, normalisation, divergence. Each checker is shown to find a mutated implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_losses
import test_mask_rows
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lingudistill.kv_sharing import _LayerMask, mask_rows
from hf_lingudistill.losses import combine, confident_tokens, distil

MaskRows = Callable[..., torch.Tensor]


# --------------------------------------------------------------------------------------------------------------------
# Masks, as flash attention passes them: padding, window, documents
# --------------------------------------------------------------------------------------------------------------------
@st.composite
def masks(draw: Any) -> dict[str, Any]:
    """A batch of 1 to 3 rows of 1 to 12 tokens: padding on one side, a window or none, or documents in one packed row."""
    length = draw(st.integers(1, 12))
    window = draw(st.one_of(st.none(), st.integers(1, length)))
    documents = None
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
        length, documents = sum(lengths), [d for d, size in enumerate(lengths) for _ in range(size)]
        padding = [[1] * length]
    else:
        sizes = draw(st.lists(st.integers(1, length), min_size=1, max_size=3))
        left = draw(st.booleans())
        padding = [[0] * (length - n) + [1] * n if left else [1] * n + [0] * (length - n) for n in sizes]
    rows = draw(st.lists(st.integers(0, len(padding) - 1), min_size=1, max_size=len(padding), unique=True))
    queries = [draw(st.lists(st.integers(0, length - 1), min_size=2, max_size=2)) for _ in rows]
    return {"padding": padding, "window": window, "documents": documents, "rows": rows, "queries": queries}


def rows_are_right(case: dict[str, Any], implementation: MaskRows) -> bool:
    """Every cell, by the meaning of the words."""
    padding, documents, length = case["padding"], case["documents"], len(case["padding"][0])
    boundaries = None
    if documents is not None:
        boundaries = torch.tensor([0, *[t for t in range(1, length) if documents[t] != documents[t - 1]], length])
    whole = all(all(row) for row in padding)
    layer = _LayerMask(None if whole else torch.tensor(padding), True, case["window"], boundaries)
    found = implementation(layer, torch.tensor(case["rows"]), torch.tensor(case["queries"]), length)
    for r, row in enumerate(case["rows"]):
        for q, query in enumerate(case["queries"][r]):
            for key in range(length):
                seen = test_mask_rows.visible(query, key, window=case["window"], documents=documents)
                if bool(found[r, 0, q, key]) != (seen and bool(padding[row][key])):
                    return False
    return True


@given(masks())
@settings(max_examples=200)
def test_mask_rows_are_those_of_the_definition(case: dict[str, Any]) -> None:
    assert rows_are_right(case, mask_rows)


def without(part: str) -> MaskRows:
    """`mask_rows` that forgets a part of the mask, or is off by one."""

    def mutated(layer: _LayerMask, rows: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        values = {"mask": layer.mask, "window": layer.sliding_window, "documents": layer.cu_seq_lens}
        if part == "window by one" and layer.sliding_window is not None:
            values["window"] = layer.sliding_window + 1
        elif part == "query by one":
            positions = (positions + 1).clamp(max=length - 1)
        elif part == "boundary by one" and layer.cu_seq_lens is not None:
            values["documents"] = layer.cu_seq_lens + torch.tensor([0, *[1] * (len(layer.cu_seq_lens) - 2), 0])
        elif part in values:
            values[part] = None
        return mask_rows(
            _LayerMask(values["mask"], True, values["window"], values["documents"]), rows, positions, length
        )

    return mutated


@pytest.mark.parametrize("part", ["mask", "window", "documents", "window by one", "query by one", "boundary by one"])
def test_a_mask_that_forgets_something_is_found(part: str) -> None:
    """The control: the same cases, the same checker."""
    verdicts: list[bool] = []

    @given(masks())
    @settings(max_examples=200)
    def look(case: dict[str, Any]) -> None:
        verdicts.append(rows_are_right(case, without(part)))

    look()
    assert not all(verdicts)


# --------------------------------------------------------------------------------------------------------------------
# Normalisation
# --------------------------------------------------------------------------------------------------------------------
@st.composite
def split_batches(draw: Any) -> tuple[Any, list[list[int]]]:
    """A batch, and its rows shared out in any order to micro-batches (or processes), some of which may be empty."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    count = draw(st.integers(1, 6))
    batch = test_losses.make_batch(count, draw(st.integers(2, 9)))
    parts = draw(st.integers(1, 4))
    owner = [draw(st.integers(0, parts - 1)) for _ in range(count)]
    order = draw(st.permutations(range(count)))
    return batch, [[row for row in order if owner[row] == part] for part in range(parts)]


def total(batch: Any, shares: list[list[int]], divisor: str) -> float:
    loss = 0.0
    for share in shares:
        part = batch[torch.tensor(share, dtype=torch.long)]
        labels = batch.label_mask.sum() if divisor == "global" else part.label_mask.sum().clamp(min=1) * len(shares)
        loss += float(part.combined().double().sum() / labels)
    return loss


@given(split_batches())
@settings(max_examples=100)
def test_the_loss_of_a_step_does_not_depend_on_how_its_rows_are_shared_out(case: tuple[Any, list[list[int]]]) -> None:
    batch, shares = case
    whole = total(batch, [list(range(len(batch.label_mask)))], "global")
    assert total(batch, shares, "global") == pytest.approx(whole, rel=1e-5)


def test_a_mean_of_local_means_is_found() -> None:
    """The control."""
    gaps: list[float] = []

    @given(split_batches())
    @settings(max_examples=100)
    def look(case: tuple[Any, list[list[int]]]) -> None:
        batch, shares = case
        gaps.append(abs(total(batch, shares, "local") - total(batch, [list(range(len(batch.label_mask)))], "global")))

    look()
    assert max(gaps) > 0.1


@given(split_batches(), st.floats(0, 3), st.floats(0, 3))
@settings(max_examples=60)
def test_the_weights_are_linear(case: tuple[Any, Any], ce_weight: float, distill_weight: float) -> None:
    batch, _ = case
    rows, positions = batch.candidates.nonzero(as_tuple=True)
    chosen = batch.chosen[rows, positions]
    kd = torch.where(chosen, batch.kd[rows, positions], 0.0)
    loss = combine(
        batch.cross_entropy, kd, chosen, rows, positions, ce_weight=ce_weight, distill_weight=distill_weight
    )
    others = batch.cross_entropy[~batch.chosen].sum()
    expected = (
        others + ce_weight * batch.cross_entropy[batch.chosen].sum() + distill_weight * batch.kd[batch.chosen].sum()
    )
    torch.testing.assert_close(loss.sum(), expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# Divergence and gate
# --------------------------------------------------------------------------------------------------------------------
problems = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 6), st.integers(2, 40), st.integers(1, 6), st.integers(1, 6)),
        "bias": st.booleans(),
        "scales": st.tuples(st.floats(0.1, 2.0), st.floats(0.1, 2.0)),
        "softcaps": st.tuples(*[st.one_of(st.none(), st.floats(2.0, 30.0))] * 2),
    }
)
betas = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0.01, 0.99))


@given(problems, betas, st.floats(0.25, 4.0))
@settings(max_examples=100)
def test_divergence_is_not_negative_and_is_that_of_the_definition(
    case: dict[str, Any], beta: float, temperature: float
) -> None:
    problem = test_losses.make_problem(**case)
    actual = problem.divergence(beta=beta, temperature=temperature)
    expected = problem.reference(beta=beta, temperature=temperature)
    assert (actual > -1e-5).all()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-5)
    ours = test_losses.gradients(actual, problem.leaves)
    theirs = test_losses.gradients(expected, problem.leaves)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-3, atol=1e-4)


def test_another_beta_or_temperature_is_found() -> None:
    """The control: at any but these the definition gives other numbers."""
    problem = test_losses.make_problem()
    for other in ({"beta": 0.1}, {"temperature": 1.1}):
        assert test_losses.difference(problem.divergence(), problem.reference(**other)) > 1e-2


@given(problems, betas, st.floats(0.25, 4.0))
@settings(max_examples=60)
def test_equal_distributions_have_no_divergence_and_no_gradient(
    case: dict[str, Any], beta: float, temperature: float
) -> None:
    problem = test_losses.make_problem(**case)
    hidden, head = problem.student_hidden, problem.student_head
    value = distil(hidden, head, hidden.detach(), head, problem.labels, beta=beta, temperature=temperature).divergence
    assert value.abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(value.sum(), [hidden])
    assert gradient.abs().max() < 1e-5
    # the control
    assert problem.divergence(beta=0.5).max() > 1e-4 or case["shape"][1] == 2


log_probs = st.lists(st.floats(-20, 0), min_size=1, max_size=8)


@given(log_probs, st.floats(-3, 3), st.floats(0, 3), st.randoms(use_true_random=False))
def test_a_larger_margin_lets_no_other_token_pass(values: list[float], margin: float, more: float, rng: Any) -> None:
    teacher = torch.tensor(values, dtype=torch.float64)
    student = torch.tensor(rng.sample(values, len(values)), dtype=torch.float64)
    loose, strict = confident_tokens(teacher, student, margin), confident_tokens(teacher, student, margin + more)
    assert (loose | ~strict).all()
    assert torch.equal(loose, torch.tensor([t >= s + margin for t, s in zip(teacher, student, strict=True)]))

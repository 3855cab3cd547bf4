"""What must hold of any batch: masks, gathering, normalisation, divergence. Each checker is shown to find a mutated implementation."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import test_losses
import test_mask_rows
import test_query_plan
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hf_lingudistill import replay
from hf_lingudistill.losses import Weights, confident_tokens, score
from hf_lingudistill.queries import QueryPlan
from hf_lingudistill.replay import _Replay, mask_rows
from hf_lingudistill.student_kv import LayerMask, SharedKV

MaskRows = Callable[..., torch.Tensor]
Planner = Callable[..., QueryPlan]


class Found(Exception):
    """A checker has said no."""


def found_by(strategy: Any, check: Callable[[Any], bool], examples: int = 100) -> bool:
    """Whether a checker says no to any of the cases that the property is tried on."""

    @given(strategy)
    @settings(max_examples=examples, phases=[Phase.generate])  # the first no is enough, however large
    def look(case: Any) -> None:
        if not check(case):
            raise Found

    try:
        look()
    except Found:
        return True
    return False


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
    layer = LayerMask(None if whole else torch.tensor(padding), True, case["window"], boundaries)
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

    def mutated(layer: LayerMask, rows: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
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
            LayerMask(values["mask"], True, values["window"], values["documents"]), rows, positions, length
        )

    return mutated


@pytest.mark.parametrize("part", ["mask", "window", "documents", "window by one", "query by one", "boundary by one"])
def test_a_mask_that_forgets_something_is_found(part: str) -> None:
    """The control: the same cases, the same checker."""
    assert found_by(masks(), lambda case: rows_are_right(case, without(part)), examples=200)


# --------------------------------------------------------------------------------------------------------------------
# Gathering: whose keys and values a query reads
# --------------------------------------------------------------------------------------------------------------------
def own_tokens(rows: test_query_plan.Rows, mode: str, row: int) -> set[int]:
    """Where the teacher's own K/V stand, by the meaning of the mode; up to the row's last loss position."""
    planned = test_query_plan.reference(rows, mode)  # type: ignore[arg-type]
    real = [True] * len(rows.input_ids[row]) if rows.mask is None else [bool(m) for m in rows.mask[row]]
    read = [t for t, token in enumerate(rows.input_ids[row]) if real[t] and test_query_plan.readable(token)]
    answer = [t for t in read if rows.labels[row][t] != test_query_plan.IGNORED]
    shared_nowhere = {"full": [], "prompt": answer, "vision": read, "none": read}
    return {t for t in shared_nowhere[mode] if t <= planned[row].loss[-1]}


def columns_are_right(rows: test_query_plan.Rows, mode: Any, planner: Planner = test_query_plan.Rows.plan) -> bool:
    """Every query's attention, column by column: which positions it reads, and whether the student's K/V or the teacher's own.

    Keys are zero, so that a query weighs all that it sees alike; the value at a position names the position and whose it is.
    """
    plan = planner(rows, mode)
    if not plan.num_queries:
        return bool(test_query_plan.reference(rows, mode) == {})
    B, T = plan.batch, plan.length
    students, own = torch.eye(2 * T)[:T], torch.eye(2 * T)[T:]
    shared = SharedKV(
        keys={0: torch.zeros(B, 1, T, 2 * T)},
        values={0: students.expand(B, 1, T, 2 * T)},
        masks={0: LayerMask(None if rows.mask is None else torch.tensor(rows.mask), True, None, None)},
    )
    layer: Any = types.SimpleNamespace(config=object(), layer_idx=0)
    zeros = torch.zeros(1, 1, plan.num_queries, 2 * T)
    replay._REPLAYS[id(layer.config)] = _Replay(shared, plan)
    try:
        read, _ = replay._replay_attention(layer, zeros, zeros, own[plan.positions][None, None], None)
    finally:
        del replay._REPLAYS[id(layer.config)]
    if set(plan.asked_rows.tolist()) != set(test_query_plan.reference(rows, mode)):
        return False
    for index, (row, query) in enumerate(zip(plan.rows.tolist(), plan.positions.tolist(), strict=True)):
        teachers = own_tokens(rows, mode, row)
        seen = [k for k in range(query + 1) if rows.mask is None or rows.mask[row][k]]
        if not seen:  # a query at padding
            return False
        expected = torch.zeros(2 * T)
        expected[[k + T if k in teachers else k for k in seen]] = 1 / len(seen)
        if not torch.allclose(read[0, index, 0], expected, atol=1e-6):
            return False
    return True


SHARING = st.tuples(test_query_plan.batches(), st.sampled_from(["full", "prompt", "vision"]))


@given(SHARING)
@settings(max_examples=100)
def test_a_query_reads_the_columns_that_its_mode_says(case: tuple[test_query_plan.Rows, str]) -> None:
    assert columns_are_right(*case)


@given(test_query_plan.batches())
@settings(max_examples=100)
def test_without_sharing_the_teacher_reads_the_text_alone(rows: test_query_plan.Rows) -> None:
    """Mode `none` compacts: what is left of a slot are all readable tokens before it, and nothing else."""
    for row, positions in test_query_plan.queried(rows.plan("none")).items():
        assert positions == sorted(own_tokens(rows, "none", row))


def mutated_plan(part: str) -> Planner:
    def plan(rows: test_query_plan.Rows, mode: Any) -> QueryPlan:
        if part == "another mode":
            return rows.plan("full" if mode == "prompt" else "prompt")
        if part == "padding":
            return dataclasses.replace(rows, mask=None).plan(mode)
        found = rows.plan(mode)
        if part == "query by one":
            # what is read at a slot is not of the position that the slot stands for
            return dataclasses.replace(found, positions=(found.positions + 1).clamp(max=found.length - 1))
        if part == "slots of another row":
            return dataclasses.replace(found, slots=found.slots.flip(0))
        if part == "own forgotten":
            return dataclasses.replace(found, own=found.own[:0])
        others = torch.ones(found.num_queries, dtype=torch.bool).index_fill_(0, found.own, False)
        return dataclasses.replace(found, own=others.nonzero().flatten())

    return plan


@pytest.mark.parametrize(
    "part", ["another mode", "padding", "query by one", "slots of another row", "own forgotten", "own inverted"]
)
def test_a_plan_that_reads_other_columns_is_found(part: str) -> None:
    """The control."""
    assert found_by(SHARING, lambda case: columns_are_right(*case, planner=mutated_plan(part)))


# --------------------------------------------------------------------------------------------------------------------
# The loss of a batch, from ids to one number
# --------------------------------------------------------------------------------------------------------------------
V, WEIGHTS = test_query_plan.VOCAB, {"ce_weight": 0.25, "distill_weight": 2.0}
# A model whose logits depend on the token that it stands at alone: padding and order cannot matter to it, only to the loss
STUDENT = torch.randn(V, V, generator=torch.Generator().manual_seed(1))
TEACHER = torch.randn(V, V, generator=torch.Generator().manual_seed(2))
EYE = test_losses.Head(torch.eye(V))
STUDENT_LOG, TEACHER_LOG = STUDENT.log_softmax(-1).tolist(), TEACHER.log_softmax(-1).tolist()
KL = torch.nn.functional.kl_div(STUDENT.log_softmax(-1), TEACHER.softmax(-1), reduction="none").sum(-1).tolist()


def loss_by_token(rows: test_query_plan.Rows, mode: Any) -> float:
    """Sum over the tokens, one by one, by the number of labels."""
    planned, total, count = test_query_plan.reference(rows, mode), 0.0, 0
    for row, (ids, labels) in enumerate(zip(rows.input_ids, rows.labels, strict=True)):
        for t in range(len(ids) - 1):
            label = labels[t + 1]
            if label == test_query_plan.IGNORED:
                continue
            count += 1
            student, teacher = STUDENT_LOG[ids[t]][label], TEACHER_LOG[ids[t]][label]
            distilled = row in planned and t in planned[row].loss and teacher >= student
            total -= student * (WEIGHTS["ce_weight"] if distilled else 1.0)
            total += WEIGHTS["distill_weight"] * KL[ids[t]] if distilled else 0.0
    return total / max(count, 1)


def loss_of_batch(rows: test_query_plan.Rows, mode: Any, planner: Planner, divisor: str) -> float:
    """As the step puts it together."""
    ids, labels = torch.tensor(rows.input_ids), torch.tensor(rows.labels)
    plan = planner(rows, mode)
    at = ids[plan.label_rows, plan.label_positions]
    label = labels[plan.label_rows, plan.label_positions + 1].clamp(min=0)
    weights = Weights(cross_entropy=WEIGHTS["ce_weight"], divergence=WEIGHTS["distill_weight"], margin=0.0)
    said = score(STUDENT[at], EYE, label, TEACHER[at[: plan.num_loss]], EYE, weights)
    count = (labels[:, 1:] != test_query_plan.IGNORED).sum() if divisor == "labels" else labels[:, 1:].numel()
    return float(said.total / max(int(count), 1))


def rearranged(rows: test_query_plan.Rows, left: int, right: int, order: list[int]) -> test_query_plan.Rows:
    """The same rows, padded and in another order."""

    def padded(parts: list[list[int]], fill: int) -> list[list[int]]:
        return [[fill] * left + parts[row] + [fill] * right for row in order]

    mask = rows.mask or [[1] * len(ids) for ids in rows.input_ids]
    return test_query_plan.Rows(
        padded(rows.input_ids, test_query_plan.PAD),
        padded(rows.labels, test_query_plan.IGNORED),
        padded(mask, 0),
        None if rows.distill is None else [rows.distill[row] for row in order],
    )


def loss_is_right(
    case: tuple[Any, ...], planner: Planner = test_query_plan.Rows.plan, divisor: str = "labels"
) -> bool:
    """The loss of the batch as it is, padded and reordered, is that of its tokens."""
    rows, mode, left, right, rng = case
    order = rng.sample(range(len(rows.input_ids)), len(rows.input_ids))
    expected = loss_by_token(rows, mode)
    batches = (rows, rearranged(rows, left, right, order))
    return all(
        abs(loss_of_batch(batch, mode, planner, divisor) - expected) <= 1e-4 * max(1.0, abs(expected))
        for batch in batches
    )


def unlabelled_at_first(rows: test_query_plan.Rows) -> test_query_plan.Rows:
    """A row's first token has nothing before it. (SFT predicts it all the same where padding stands before it.)"""
    labels = [list(row) for row in rows.labels]
    for row in range(len(labels)):
        labels[row][0 if rows.mask is None else (rows.mask[row] + [1]).index(1) % len(labels[row])] = -100
    return dataclasses.replace(rows, labels=labels)


LOSSES = st.tuples(
    test_query_plan.batches().filter(lambda rows: len(rows.input_ids[0]) > 1).map(unlabelled_at_first),
    st.sampled_from(test_query_plan.MODES),
    st.integers(0, 3),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)


@given(LOSSES)
@settings(max_examples=100)
def test_the_loss_is_that_of_its_tokens_whatever_the_padding_and_the_order(case: tuple[Any, ...]) -> None:
    assert loss_is_right(case)


def planned_without(part: str) -> Planner:
    def plan(rows: test_query_plan.Rows, mode: Any) -> QueryPlan:
        if part == "distill":
            return dataclasses.replace(rows, distill=None).plan(mode)
        found = rows.plan(mode)
        if part == "position by one":
            return dataclasses.replace(found, label_positions=(found.label_positions - 1).clamp(min=0))
        return dataclasses.replace(found, label_rows=found.label_rows.flip(0))

    return plan


@pytest.mark.parametrize("part", ["distill", "position by one", "row order"])
def test_a_plan_that_is_off_changes_the_loss(part: str) -> None:
    """The control."""
    assert found_by(LOSSES, lambda case: loss_is_right(case, planned_without(part)))


def test_a_mean_over_positions_is_found() -> None:
    """The control."""
    assert found_by(LOSSES, lambda case: loss_is_right(case, divisor="positions"))


@st.composite
def shared_out(draw: Any) -> tuple[test_query_plan.Rows, Any, list[list[int]]]:
    """A batch, and its rows shared out in any order to micro-batches (or processes), some of which may be empty."""
    rows = draw(test_query_plan.batches().filter(lambda rows: len(rows.input_ids[0]) > 1).map(unlabelled_at_first))
    parts = draw(st.integers(1, 4))
    owner = [draw(st.integers(0, parts - 1)) for _ in rows.input_ids]
    order = draw(st.permutations(range(len(owner))))
    return rows, draw(st.sampled_from(["prompt", "none"])), [[r for r in order if owner[r] == p] for p in range(parts)]


def alike(case: tuple[test_query_plan.Rows, Any, list[list[int]]], divisor: str) -> bool:
    """Whether the sum over the shares is the loss of the whole."""
    rows, mode, shares = case
    parts = [rearranged(rows, 0, 0, share) for share in shares if share]
    labels = [sum(label != -100 for row in part.labels for label in row[1:]) for part in parts]
    losses = [loss_of_batch(part, mode, test_query_plan.Rows.plan, "labels") for part in parts]
    if divisor == "global":
        total = sum(loss * count for loss, count in zip(losses, labels, strict=True)) / max(sum(labels), 1)
    else:
        total = sum(losses) / len(losses)
    return total == pytest.approx(loss_by_token(rows, mode), rel=1e-4, abs=1e-4)


@given(shared_out())
@settings(max_examples=60)
def test_the_loss_of_a_step_does_not_depend_on_how_its_rows_are_shared_out(case: tuple[Any, ...]) -> None:
    assert alike(case, "global")


def test_a_mean_of_local_means_is_found() -> None:
    """The control."""
    assert found_by(shared_out(), lambda case: alike(case, "local"))


# --------------------------------------------------------------------------------------------------------------------
# Divergence and gate
# --------------------------------------------------------------------------------------------------------------------
problems = st.fixed_dictionaries(
    {
        "shape": st.builds(
            lambda n, *rest: (n, n, *rest), st.integers(1, 6), st.integers(2, 40), st.integers(1, 6), st.integers(1, 6)
        ),
        "bias": st.booleans(),
        "scales": st.tuples(st.floats(0.1, 2.0), st.floats(0.1, 2.0)),
        "softcaps": st.tuples(*[st.one_of(st.none(), st.floats(2.0, 30.0))] * 2),
    }
)
betas = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0.01, 0.99))


DIVERGENCES = st.tuples(problems, betas, st.floats(0.25, 4.0))


def divergence_is_right(case: tuple[Any, ...], implementation: Callable[..., Any]) -> bool:
    """Not negative; value and gradient those of the definition in float64."""
    problem, beta, temperature = test_losses.make_problem(**case[0]), case[1], case[2]
    value, total = implementation(problem, beta=beta, temperature=temperature)
    expected = test_losses.reference_divergence(problem.logits, problem.teacher_logits, beta, temperature)
    if not (value > -1e-5).all() or not torch.allclose(value.double(), expected, rtol=1e-3, atol=1e-5):
        return False
    ours, theirs = test_losses.gradients(total, problem), test_losses.gradients(expected, problem)
    return all(
        torch.allclose(got.double(), wanted.double(), rtol=1e-3, atol=1e-4)
        for got, wanted in zip(ours, theirs, strict=True)
    )


def divergence_of(problem: test_losses.Problem, **settings: float) -> tuple[torch.Tensor, torch.Tensor]:
    said = problem.score(cross_entropy=0.0, **settings)
    return said.divergence, said.total


@given(DIVERGENCES)
@settings(max_examples=100)
def test_divergence_is_not_negative_and_is_that_of_the_definition(case: tuple[Any, ...]) -> None:
    assert divergence_is_right(case, divergence_of)


@pytest.mark.parametrize("part", ["beta", "temperature", "squared", "gradient", "softcap"])
def test_another_divergence_is_found(part: str) -> None:
    """The control."""

    def mutated(problem: test_losses.Problem, beta: float, temperature: float) -> Any:
        if part == "beta":
            return divergence_of(problem, beta=1 - beta, temperature=temperature)
        if part == "temperature":
            return divergence_of(problem, beta=beta, temperature=1.1 * temperature)
        if part == "softcap":
            capless = dataclasses.replace(problem, head=dataclasses.replace(problem.head, softcap=None))
            return divergence_of(capless, beta=beta, temperature=temperature)
        value, total = divergence_of(problem, beta=beta, temperature=temperature)
        factor = temperature**2 if part == "squared" else 1.0
        return value * factor, total * (factor if part == "squared" else 2.0)

    assert found_by(DIVERGENCES, lambda case: divergence_is_right(case, mutated))


@given(problems, betas, st.floats(0.25, 4.0))
@settings(max_examples=60)
def test_equal_distributions_have_no_divergence_and_no_gradient(
    case: dict[str, Any], beta: float, temperature: float
) -> None:
    problem = test_losses.make_problem(**case)
    same = dataclasses.replace(problem, teacher_hidden=problem.hidden.detach(), teacher_head=problem.head)
    value, total = divergence_of(same, beta=beta, temperature=temperature)
    assert value.abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(total, [problem.hidden])
    assert gradient.abs().max() < 1e-5
    # the control
    assert divergence_of(problem, beta=0.5)[0].max() > 1e-4 or case["shape"][2] == 2


log_probs = st.lists(st.floats(-20, 0), min_size=1, max_size=8)


GATES = st.tuples(log_probs, st.floats(-3, 3), st.floats(0, 3), st.randoms(use_true_random=False))


def gate_is_right(case: tuple[Any, ...], gate: Callable[..., torch.Tensor]) -> bool:
    """A larger margin lets no other token pass, and each token passes by the definition."""
    values, margin, more, rng = case
    teacher = torch.tensor(values, dtype=torch.float64)
    student = torch.tensor(rng.sample(values, len(values)), dtype=torch.float64)
    loose, strict = gate(teacher, student, margin), gate(teacher, student, margin + more)
    expected = torch.tensor([t >= s + margin for t, s in zip(teacher, student, strict=True)])
    return bool((loose | ~strict).all()) and torch.equal(loose, expected)


@given(GATES)
def test_a_larger_margin_lets_no_other_token_pass(case: tuple[Any, ...]) -> None:
    assert gate_is_right(case, confident_tokens)


GATES_THAT_ARE_OFF: dict[str, Callable[..., torch.Tensor]] = {
    "sign": lambda teacher, student, margin: teacher >= student - margin,
    "no margin": lambda teacher, student, margin: teacher >= student,
    "the other way": lambda teacher, student, margin: student >= teacher + margin,
    "above alone": lambda teacher, student, margin: teacher > student + margin,
}


@pytest.mark.parametrize("part", GATES_THAT_ARE_OFF)
def test_another_gate_is_found(part: str) -> None:
    """The control."""
    assert found_by(GATES, lambda case: gate_is_right(case, GATES_THAT_ARE_OFF[part]))

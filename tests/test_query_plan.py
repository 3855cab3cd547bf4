"""Where the teacher is queried: `plan_queries` against a reference that walks through every row, token by token."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planning import KV_SHARING_MODES, plan_queries

from hf_lingudistill import queries
from hf_lingudistill.queries import QueryPlan, Vocabulary
from hf_lingudistill.sharing import sharing

MODES: tuple[str, ...] = KV_SHARING_MODES
IGNORED = -100

# Ids below SHARED mean the same to both, but IMAGE among them (as in Qwen-VL) is no text; the rest are the student's.
SHARED, VOCAB, IMAGE, PAD = 6, 8, 2, 0
OWN_TOKEN = 7


@dataclasses.dataclass(frozen=True)
class Rows:
    """Token ids, labels and padding of a batch, row by row, as plain lists. distill: None = every row."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    mask: list[list[int]] | None = None
    distill: list[bool] | None = None

    def plan(self, mode: str) -> QueryPlan:
        return plan_queries(
            torch.tensor(self.input_ids),
            torch.tensor(self.labels),
            None if self.distill is None else torch.tensor(self.distill),
            kv_sharing=mode,
            shared_vocab_size=SHARED,
            unreadable_token_ids=(IMAGE,),
            attention_mask=None if self.mask is None else torch.tensor(self.mask),
        )


@dataclasses.dataclass
class PlannedRow:
    """What is expected of one distilled row: positions, ascending."""

    queried: list[int]
    loss: list[int]
    own: list[int]


def readable(token: int) -> bool:
    return token in (0, 1, 3, 4, 5)


def reference(rows: Rows, mode: str, shift: int = 1) -> dict[int, PlannedRow]:
    """The plan by its description in words: batch row -> what is queried. Rows without a loss position are absent."""
    planned = {}
    for row, (ids, labels) in enumerate(zip(rows.input_ids, rows.labels, strict=True)):
        if rows.distill is not None and not rows.distill[row]:
            continue
        real = [True] * len(ids) if rows.mask is None else [bool(m) for m in rows.mask[row]]
        loss = []
        for t in range(len(ids) - shift):
            label = labels[t + shift]
            if real[t] and readable(ids[t]) and label != IGNORED and readable(label):
                loss.append(t)
        if not loss:
            continue
        own = []
        for t in range(loss[-1] + 1):
            if mode == "inputs" and real[t]:
                own.append(t)  # of what it cannot read it gets the student's embedding
            if mode == "inputs" or not (real[t] and readable(ids[t])):
                continue  # otherwise it has no keys and values of its own for what it cannot read
            if mode == "full":
                continue
            if mode == "prompt" and labels[t] == IGNORED:
                continue
            own.append(t)
        planned[row] = PlannedRow(sorted({*loss, *own}), loss, own)
    return planned


def flat(planned: dict[int, PlannedRow]) -> list[tuple[int, int]]:
    return [(row, t) for row, expected in planned.items() for t in expected.loss]


def as_pairs(plan: QueryPlan) -> list[tuple[int, int]]:
    return list(zip(plan.loss_rows.tolist(), plan.loss_positions.tolist(), strict=True))


def queried(plan: QueryPlan) -> dict[int, list[int]]:
    """Batch row -> its queries, in order."""
    found: dict[int, list[int]] = {row: [] for row in plan.asked_rows.tolist()}
    for row, position in zip(plan.rows.tolist(), plan.positions.tolist(), strict=True):
        found[row].append(position)
    return found


def of_row(plan: QueryPlan, indices: torch.Tensor, row: int) -> list[int]:
    """The positions of those queries (by index) that are in a row."""
    chosen = indices[plan.rows[indices] == row]
    return plan.positions[chosen].tolist()


def assert_plan_is(plan: QueryPlan, planned: dict[int, PlannedRow]) -> None:
    assert plan.asked_rows.tolist() == list(planned)
    assert as_pairs(plan) == flat(planned)
    assert plan.num_loss == len(flat(planned))
    assert queried(plan) == {row: expected.queried for row, expected in planned.items()}
    for row, expected in planned.items():
        assert of_row(plan, plan.loss, row) == expected.loss
        assert of_row(plan, plan.own, row) == expected.own
    # Packed and unpacked: every query has its place in its row, and unused places repeat the row's last query, since one that
    # sees nothing would be NaN
    width = max((len(expected.queried) for expected in planned.values()), default=0)
    assert plan.slots.shape == (len(planned), width)
    assert plan.slots.flatten()[plan.flat].tolist() == list(range(plan.num_queries))
    for index, expected in enumerate(planned.values()):
        last = expected.queried[-1]
        places = expected.queried + [last] * (width - len(expected.queried))
        assert plan.positions[plan.slots[index]].tolist() == places


@st.composite
def batches(draw: st.DrawFn) -> Rows:
    B, T = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    token, label = st.integers(0, VOCAB - 1), st.sampled_from([IGNORED, *range(VOCAB)])
    padding = draw(st.sampled_from(["none", "left", "right"]))
    input_ids, labels, mask = [], [], []
    for _ in range(B):
        length = T if padding == "none" else draw(st.integers(0, T))
        ids = [draw(token) for _ in range(length)]
        # Labels that follow the tokens, as a collator makes them, or arbitrary ones.
        arbitrary = draw(st.booleans())
        own = [draw(label) if arbitrary else draw(st.sampled_from([token_id, IGNORED])) for token_id in ids]
        pad = T - length
        left = pad if padding == "left" else 0
        right = pad - left
        input_ids.append([PAD] * left + ids + [PAD] * right)
        labels.append([IGNORED] * left + own + [IGNORED] * right)
        mask.append([0] * left + [1] * length + [0] * right)
    distill = draw(st.none() | st.lists(st.booleans(), min_size=B, max_size=B))
    return Rows(input_ids, labels, None if padding == "none" else mask, distill)


# image, image, question, answer of three tokens and the VLM's own end of turn; then the same, shorter and padded.
TYPICAL = Rows(
    input_ids=[[2, 2, 1, 3, 4, 5, 3, 7, 1], [2, 1, 4, 5, 7, 0, 0, 0, 0]],
    labels=[[-100, -100, -100, -100, 4, 5, 3, 7, -100], [-100, -100, 4, 5, 7, -100, -100, -100, -100]],
    mask=[[1] * 9, [1] * 5 + [0] * 4],
)


@pytest.mark.parametrize("mode", MODES)
def test_plan_matches_a_token_by_token_reading(mode: str) -> None:
    @settings(max_examples=150)
    @given(batches())
    @example(TYPICAL)
    def check(rows: Rows) -> None:
        assert_plan_is(rows.plan(mode), reference(rows, mode))

    check()


def test_the_reference_sees_labels_that_are_off_by_one() -> None:
    """Control of the test above: position t is scored against `labels[t + 1]`."""
    for mode in MODES:
        with pytest.raises(AssertionError):
            assert_plan_is(TYPICAL.plan(mode), reference(TYPICAL, mode, shift=0))


def test_the_reference_tells_the_modes_apart() -> None:
    plans = {mode: reference(TYPICAL, mode) for mode in MODES}
    assert plans["full"] != plans["prompt"] != plans["vision"] != plans["full"]
    assert plans["vision"] == plans["none"]  # the same queries: one reads the student's image, the other none at all
    with pytest.raises(AssertionError):
        assert_plan_is(TYPICAL.plan("prompt"), plans["full"])


def test_a_typical_batch_by_hand() -> None:
    """The plan spelled out, so that the reference is not the only witness."""
    assert as_pairs(TYPICAL.plan("full")) == [(0, 3), (0, 4), (0, 5), (1, 1), (1, 2)]
    expected = {
        "full": ({0: [3, 4, 5], 1: [1, 2]}, {0: [], 1: []}),
        "prompt": ({0: [3, 4, 5], 1: [1, 2]}, {0: [4, 5], 1: [2]}),
        "vision": ({0: [2, 3, 4, 5], 1: [1, 2]}, {0: [2, 3, 4, 5], 1: [1, 2]}),
        "none": ({0: [2, 3, 4, 5], 1: [1, 2]}, {0: [2, 3, 4, 5], 1: [1, 2]}),
        "inputs": ({0: [0, 1, 2, 3, 4, 5], 1: [0, 1, 2]}, {0: [0, 1, 2, 3, 4, 5], 1: [0, 1, 2]}),
    }
    for mode in MODES:
        plan = TYPICAL.plan(mode)
        own = {row: of_row(plan, plan.own, row) for row in (0, 1)}
        assert (queried(plan), own) == expected[mode], mode


@settings(max_examples=100)
@given(batches(), st.sampled_from(MODES))
def test_packing_is_undone_by_unpacking(rows: Rows, mode: str) -> None:
    plan = rows.plan(mode)
    if not plan.num_queries:
        return
    states = torch.arange(plan.num_queries, dtype=torch.float32)[None, None, :, None].expand(1, 2, -1, 3)
    unpacked = plan.unpack(states)
    assert unpacked.shape == (len(plan.asked_rows), 2, plan.slots.shape[1], 3)
    assert torch.equal(unpacked[:, 0, :, 0].long(), plan.slots)
    assert torch.equal(plan.pack(unpacked), states.transpose(1, 2))


def test_a_batch_that_changed_after_its_plan_is_refused() -> None:
    ids, labels = torch.tensor(TYPICAL.input_ids), torch.tensor(TYPICAL.labels)
    marked = torch.tensor([True, False])
    plan = plan_queries(ids, labels, marked, kv_sharing="prompt", shared_vocab_size=SHARED)
    plan.check(labels, marked)
    plan.check(labels, torch.tensor([False, False]))  # a row may lose its mark
    for other, marks in (
        (labels, ~marked),
        (labels.roll(1, dims=1), marked),
        (labels.masked_fill(labels == 5, -100), marked),
    ):
        with pytest.raises(ValueError, match="changed after its queries were planned: remove 'queries'"):
            plan.check(other, marks)


@settings(max_examples=100)
@given(batches(), st.sampled_from(MODES))
def test_loss_slots_and_loss_positions_list_the_same_tokens_in_the_same_order(rows: Rows, mode: str) -> None:
    """`hidden[plan.loss]` must line up with `labels[plan.loss_rows, plan.loss_positions + 1]`."""
    plan = rows.plan(mode)
    assert torch.equal(plan.rows[plan.loss], plan.loss_rows)
    assert torch.equal(plan.positions[plan.loss], plan.loss_positions)


@settings(max_examples=100)
@given(batches(), st.sampled_from(MODES))
def test_nothing_is_queried_after_the_last_loss_position(rows: Rows, mode: str) -> None:
    plan = rows.plan(mode)
    for row, positions in queried(plan).items():
        assert max(positions) == max(of_row(plan, plan.loss, row))


def test_text_after_the_last_loss_position_exists_and_is_left_out() -> None:
    """Control: without the cut, `vision` would query the token that follows the end of turn."""
    plan = TYPICAL.plan("vision")
    assert TYPICAL.input_ids[0][8] == 1 and readable(TYPICAL.input_ids[0][8])
    assert 8 not in queried(plan)[0]


def test_labels_outside_the_shared_vocabulary_are_never_distilled() -> None:
    for mode in MODES:
        for label in (SHARED - 1, SHARED, OWN_TOKEN, IMAGE, IGNORED):
            rows = Rows([[1, 3, 4]], [[IGNORED, IGNORED, label]])
            assert as_pairs(rows.plan(mode)) == ([(0, 1)] if label == SHARED - 1 else []), label


def test_a_token_that_the_teacher_cannot_read_is_never_a_loss_position() -> None:
    for mode in MODES:
        for token in (SHARED - 1, SHARED, OWN_TOKEN, IMAGE):
            rows = Rows([[1, token, 4]], [[IGNORED, IGNORED, 4]])
            assert as_pairs(rows.plan(mode)) == ([(0, 1)] if token == SHARED - 1 else []), token


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_own_nor_loss_nor_queried(side: str) -> None:
    for mode in MODES:
        ids, labels = [1, 3, 4, 5], [IGNORED, IGNORED, 4, 5]
        padding = [PAD] * 3
        for mask_is_given in (True, False):
            ones, zeros = [1] * 4, [0] * 3
            rows = Rows(
                [padding + ids if side == "left" else ids + padding],
                # Labels at padding, so that the attention mask alone keeps it out.
                [[4] * 3 + labels if side == "left" else labels + [4] * 3],
                [zeros + ones if side == "left" else ones + zeros] if mask_is_given else None,
            )
            plan = rows.plan(mode)
            padded = set(range(3)) if side == "left" else set(range(4, 7))
            touched = padded & set(queried(plan)[0])
            if mask_is_given:
                assert not touched
            else:
                assert touched  # control: the mask is what keeps padding out


@settings(max_examples=100)
@given(batches(), st.sampled_from(MODES), st.integers(1, 3))
def test_left_and_right_padding_query_the_same_tokens(rows: Rows, mode: str, pad: int) -> None:
    mask = rows.mask or [[1] * len(ids) for ids in rows.input_ids]

    def padded(left: int, right: int) -> QueryPlan:
        return Rows(
            [[PAD] * left + ids + [PAD] * right for ids in rows.input_ids],
            [[IGNORED] * left + labels + [IGNORED] * right for labels in rows.labels],
            [[0] * left + row + [0] * right for row in mask],
            rows.distill,
        ).plan(mode)

    left, right = padded(pad, 0), padded(0, pad)
    assert torch.equal(left.positions, right.positions + pad)
    assert torch.equal(left.loss_positions, right.loss_positions + pad)
    for name in ("rows", "own", "loss", "loss_rows", "slots", "flat"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def test_rows_that_are_not_distilled_cost_nothing() -> None:
    for mode in MODES:
        both = TYPICAL.plan(mode)
        second = dataclasses.replace(TYPICAL, distill=[False, True]).plan(mode)
        assert both.asked_rows.tolist() == [0, 1] and second.asked_rows.tolist() == [1]
        assert second.num_queries < both.num_queries
        assert as_pairs(second) == [pair for pair in as_pairs(both) if pair[0] == 1]
        everything = dataclasses.replace(TYPICAL, distill=[True, True]).plan(mode)
        assert as_pairs(everything) == as_pairs(both)  # None = every row


@pytest.mark.parametrize(
    "rows",
    [
        dataclasses.replace(TYPICAL, distill=[False, False]),
        Rows([[1, 3, 4]], [[IGNORED] * 3]),
        Rows([[1, 3, 4]], [[4, IGNORED, IGNORED]]),  # the first token's label has nothing before it
        Rows([[1]], [[1]]),
        Rows([[2, 2, 7]], [[IGNORED, 2, 7]]),
        Rows([[1, 3, 4]], [[IGNORED, 3, 4]], mask=[[0, 0, 1]]),
    ],
    ids=["no row marked", "all masked", "first label only", "one token", "nothing readable", "all but one padding"],
)
def test_a_batch_without_a_loss_position_gives_an_empty_plan(rows: Rows) -> None:
    for mode in MODES:
        plan = rows.plan(mode)
        assert plan.num_loss == 0 and plan.num_queries == 0
        assert plan.slots.shape == (0, 0)
        assert TYPICAL.plan(mode).num_queries > 0  # control


def test_the_plan_keeps_the_batch_as_it_was() -> None:
    input_ids, labels = torch.tensor(TYPICAL.input_ids), torch.tensor(TYPICAL.labels)
    distill = torch.tensor([True, False])
    before = [tensor.clone() for tensor in (input_ids, labels, distill)]
    plan_queries(input_ids, labels, distill, kv_sharing="prompt", shared_vocab_size=SHARED)
    assert all(torch.equal(a, b) for a, b in zip(before, (input_ids, labels, distill), strict=True))


def test_an_end_of_turn_under_another_name_is_read_and_scored() -> None:
    """The student ends its turns with a token of its own, the teacher with token 5: one event, whose probability goes to the
    student's label alone."""
    vocabulary = Vocabulary(VOCAB, SHARED, (IMAGE,), aliases=((OWN_TOKEN, 5),))
    ids = torch.tensor([[3, OWN_TOKEN, 4, 5, 3]])
    assert vocabulary.to_teacher(ids).tolist() == [[3, 5, 4, 5, 3]]
    assert vocabulary.scorable(ids).tolist() == [[True, True, True, False, True]]
    assert vocabulary.unshared() == [6, 5]
    plan = queries.plan_queries(ids, ids, sharing=sharing("prompt"), vocabulary=vocabulary)
    assert plan.loss_positions.tolist() == [0, 1, 3] and plan.token_ids.tolist() == [3, 5, 4, 5]
    apart = queries.plan_queries(ids, ids, sharing=sharing("prompt"), vocabulary=Vocabulary(VOCAB, SHARED, (IMAGE,)))
    assert apart.loss_positions.tolist() == [2, 3]  # control: without the alias the token is nobody's


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_text_is_text(side: str) -> None:
    """The first batch compares the teacher on rows without an image: padding, whatever its id, is none."""
    pad = [IMAGE, OWN_TOKEN]
    ids, mask, labels = [3, 4, 5], [1, 1, 1], [-100, 4, 5]
    join = (lambda a, b: b + a) if side == "left" else (lambda a, b: a + b)
    padded = Rows([join(ids, pad), [IMAGE, 3, 4, 5, 3]], [join(labels, [-100] * 2)] * 2, [join(mask, [0, 0]), [1] * 5])
    plan = padded.plan("prompt")
    assert plan.text_only.tolist() == [True, False] and plan.has_text_loss


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("named", [False, True], ids=["no placeholder is named", "a placeholder is named"])
def test_every_place_of_an_image_is_within_the_columns(labelled: bool, named: bool) -> None:
    """Whether it is a label or not, in a row that the teacher does not read; a token of the student's own behind it is no image."""
    image = IMAGE if named else VOCAB - 2
    ids = torch.tensor([[image, 3, 4, 5, 3, 3], [3, 3, image, OWN_TOKEN, 3, 3], [3, OWN_TOKEN, 3, 3, 3, 3]])
    labels = torch.full_like(ids, IGNORED)
    labels[0, 2] = 4
    labels[1:, 0 if labelled else 4 :] = ids[1:, 0 if labelled else 4 :]
    marked = torch.tensor([True, False, False])
    vocabulary = Vocabulary(VOCAB, SHARED, (IMAGE,) if named else ())
    plan = queries.plan_queries(ids, labels, marked, sharing=sharing("vision"), vocabulary=vocabulary)
    assert plan.columns_read == (3 if named and labelled else 4)
    assert plan.has_image.tolist() == [True, True, not named]
    assert plan.text_only.tolist() == [False, False, False]

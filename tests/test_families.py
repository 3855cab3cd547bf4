"""Every family, padded left, right and not at all: the teacher pass against the student and an independent oracle.

`families.py` makes the models and batches, `oracle.py` computes the same thing the slow way without hf_lingudistill.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES, Family, Inputs, build_family, with_other_pixels
from oracle import loss_mask, oracle_hidden, readable_tokens, student_kv
from peft import LoraConfig, get_peft_model
from planning import plan_queries, teacher_pass
from transformers import PreTrainedModel

from hf_lingudistill import replay
from hf_lingudistill import student_kv as student_kv_module
from hf_lingudistill._internals import checkpoint_activations, keep_image_dtype
from hf_lingudistill.batch import DistillCollator
from hf_lingudistill.queries import QueryPlan
from hf_lingudistill.student_kv import SharedKV, recording

SHARING: tuple[str, ...] = ("full", "prompt", "vision")
MODES: tuple[str, ...] = (*SHARING, "none")
TOLERANCE = 1e-4  # fp32, absolute, on logits and hidden states whose scale the tests assert
CLEARLY = 1e-2

# Plain RoPE with a tied head, M-RoPE with deepstack, sliding windows with bidirectional image blocks.
DETAIL_FAMILIES = ("smolvlm", "qwen3_vl", "gemma3")
SIDES = ("left", "right", "none")


@dataclasses.dataclass(frozen=True)
class Case:
    """A family with its two teachers (built once) and one batch."""

    family: Family
    identical: PreTrainedModel
    other: PreTrainedModel
    padding_side: str
    inputs: Inputs

    @property
    def is_image(self) -> torch.Tensor:
        """(B, T) bool."""
        return torch.isin(self.inputs["input_ids"], torch.tensor(self.family.image_token_ids))

    @property
    def oracle_arguments(self) -> dict[str, Any]:
        return {
            "unreadable_token_ids": self.family.image_token_ids,
            "shared_vocab_size": self.family.text_vocab_size,
        }

    @property
    def loss_mask(self) -> torch.Tensor:
        """(B, T) bool, from the oracle."""
        return loss_mask(self.inputs, readable_tokens(self.inputs, **self.oracle_arguments))

    def plan(self, mode: str, distill: torch.Tensor | None = None) -> QueryPlan:
        return plan_queries(
            self.inputs["input_ids"],
            self.inputs["labels"],
            distill,
            kv_sharing=mode,
            shared_vocab_size=self.family.text_vocab_size,
            unreadable_token_ids=self.family.image_token_ids,
            attention_mask=self.inputs["attention_mask"],
        )

    def oracle(self, teacher: PreTrainedModel, mode: str, student: PreTrainedModel | None = None) -> torch.Tensor:
        """(N, H_t) at the loss positions, in row-major order like a plan's."""
        student = student or self.family.student
        return oracle_hidden(teacher, student, self.inputs, mode, **self.oracle_arguments)[self.loss_mask]


def record(student: PreTrainedModel, inputs: Inputs) -> tuple[SharedKV, Any]:
    """One recorded forward without gradient: the record and the student's outputs."""
    with torch.no_grad(), recording(student) as shared:
        outputs = student(**inputs)
    return shared, outputs


@pytest.fixture(scope="session")
def teachers() -> Callable[[str], tuple[Family, PreTrainedModel, PreTrainedModel]]:
    built: dict[str, tuple[Family, PreTrainedModel, PreTrainedModel]] = {}

    def get(name: str) -> tuple[Family, PreTrainedModel, PreTrainedModel]:
        if name not in built:
            family = build_family(name)
            built[name] = (family, family.make_teacher(identical=True), family.make_teacher(identical=False))
        return built[name]

    return get


def case_of(param: tuple[str, str], teachers: Callable[[str], Any]) -> Case:
    name, side = param
    family, identical, other = teachers(name)
    return Case(family, identical, other, side, family.make_inputs(side, seed=0))


@pytest.fixture(params=[(name, side) for name in FAMILY_NAMES for side in SIDES], ids="-".join)
def case(request: pytest.FixtureRequest, teachers: Callable[[str], Any]) -> Case:
    """Every family on every side: for what families do with masks and positions."""
    return case_of(request.param, teachers)


@pytest.fixture(params=[(name, "left") for name in FAMILY_NAMES], ids="-".join)
def one_side(request: pytest.FixtureRequest, teachers: Callable[[str], Any]) -> Case:
    """Every family, padded left, where its mask and positions are furthest from the plain ones."""
    return case_of(request.param, teachers)


@pytest.fixture(params=[(name, side) for name in DETAIL_FAMILIES for side in SIDES], ids="-".join)
def detail_sides(request: pytest.FixtureRequest, teachers: Callable[[str], Any]) -> Case:
    """A family of each kind on every side: for what is ours alone."""
    return case_of(request.param, teachers)


@pytest.fixture(params=DETAIL_FAMILIES)
def detail(request: pytest.FixtureRequest, teachers: Callable[[str], Any]) -> Case:
    family, identical, other = teachers(request.param)
    return Case(family, identical, other, "left", family.make_inputs("left", seed=1))


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference."""
    return float((a.detach().float() - b.detach().float()).abs().max())


# --- the oracle and the models themselves ----------------------------------------------------------------------------


def test_oracle_with_identical_teacher_reproduces_the_student(one_side: Case) -> None:
    case = one_side
    expected = case.family.student(**case.inputs).logits[case.loss_mask]
    for mode in SHARING:
        logits = case.identical.lm_head(case.oracle(case.identical, mode))
        assert worst(logits, expected) < TOLERANCE, mode
    # Control: without the student's image K/V the same weights say something else.
    blind = case.identical.lm_head(case.oracle(case.identical, "none"))
    assert worst(blind, expected) > 1.0


def assert_worth_testing(case: Case) -> None:
    assert case.is_image.any(dim=1).all()
    assert case.loss_mask.any(dim=1).all()
    student = case.family.student.config.get_text_config()
    assert student.num_attention_heads != student.num_key_value_heads
    assert case.other.config.hidden_size != student.hidden_size
    assert case.other.config.num_attention_heads != student.num_attention_heads


# --- (a) identical teacher -------------------------------------------------------------------------------------------


def test_sharing_between_identical_models_is_a_no_op(case: Case) -> None:
    assert_worth_testing(case)
    shared, outputs = record(case.family.student, case.inputs)
    for mode in SHARING:
        plan = case.plan(mode)
        assert torch.equal(torch.stack([plan.loss_rows, plan.loss_positions], dim=1), case.loss_mask.nonzero())
        expected = outputs.logits[plan.loss_rows, plan.loss_positions]
        assert 5 < float(expected.std()) < 10
        logits = case.identical.lm_head(teacher_pass(case.identical, shared, plan))
        assert worst(logits, expected) < TOLERANCE, mode


def test_recording_changes_nothing_and_equals_the_cache(case: Case) -> None:
    plain = case.family.student(**case.inputs).logits
    shared, outputs = record(case.family.student, case.inputs)
    assert torch.equal(outputs.logits, plain)
    cache = student_kv(case.family.student, case.inputs)
    real = case.inputs["attention_mask"].bool()
    assert sorted(shared.keys) == sorted(shared.values) == list(range(len(cache.keys)))
    for layer in range(len(cache.keys)):
        for recorded, cached in ((shared.keys, cache.keys), (shared.values, cache.values)):
            assert not recorded[layer].requires_grad
            assert worst(recorded[layer].transpose(1, 2)[real], cached[layer].transpose(1, 2)[real]) < TOLERANCE
    assert shared.last_hidden_state is not None
    assert worst(shared.last_hidden_state[real], cache.last_hidden_state[real]) < TOLERANCE
    padding = ~real
    masks = [layer.mask for layer in shared.masks.values()]
    if case.padding_side == "none":
        assert not padding.any()
        # Without padding, sdpa gets no mask at all (unless the family's rule is more than causal).
        assert all(mask is None for mask in masks) == (case.family.name not in ("gemma3", "paligemma"))
    else:
        assert padding.any(dim=1).tolist() == [False, True]
        assert all(mask is not None for mask in masks)


def text_only(case: Case) -> Case:
    """The same models on a batch without pixels or placeholders: (2, 14), row 1 three tokens shorter."""
    input_ids = torch.randint(5, 150, (2, 14), generator=torch.Generator().manual_seed(3))
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    labels[:, :7] = -100
    if case.padding_side != "none":
        padding = slice(0, 3) if case.padding_side == "left" else slice(-3, None)
        input_ids[1, padding], attention_mask[1, padding], labels[1, padding] = 0, 0, -100
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if case.family.name == "paligemma":
        # Without them, transformers runs an unpadded text-only PaliGemma batch without any mask: it sees the answer.
        inputs["token_type_ids"] = (labels != -100).long()
    return dataclasses.replace(case, inputs=inputs)


@pytest.mark.parametrize(
    "param",
    [
        (name, side)
        for name in FAMILY_NAMES
        for side in (SIDES if name in (*DETAIL_FAMILIES, "paligemma") else SIDES[:1])
    ],
    ids="-".join,
)
def test_text_only_batches_share_in_every_mode(param: tuple[str, str], teachers: Callable[[str], Any]) -> None:
    case = text_only(case_of(param, teachers))
    shared, outputs = record(case.family.student, case.inputs)
    for mode in MODES:
        plan = case.plan(mode)
        assert worst(teacher_pass(case.other, shared, plan), case.oracle(case.other, mode)) < TOLERANCE, mode
        expected = outputs.logits[plan.loss_rows, plan.loss_positions]
        logits = case.identical.lm_head(teacher_pass(case.identical, shared, plan))
        # Without an image, even a teacher that shares nothing agrees; not where the student's prompt is bidirectional.
        agrees = mode != "none" or case.family.name != "paligemma"
        assert (worst(logits, expected) < TOLERANCE) == agrees, mode


@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("prefix_lm", [True, False])
def test_the_collator_keeps_answers_from_being_seen_before_they_are_predicted(
    prefix_lm: bool, with_image: bool
) -> None:
    """TRL's collator leaves a PaliGemma answer at type 0 (or gives no types to text): exchanging its last token must not move
    the logits before it. Without `prefix_lm` it does: the control."""
    family = build_family("paligemma")
    whole = family.make_inputs("none", seed=0)
    if not with_image:
        whole = {name: whole[name] for name in ("input_ids", "attention_mask", "labels")}
        whole["input_ids"] = whole["input_ids"].clamp(max=100)

    def collated(last: int) -> dict[str, Any]:
        def inner(_: Any) -> dict[str, Any]:
            batch = {name: value.clone() for name, value in whole.items() if name != "token_type_ids"}
            if with_image:
                batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
            batch["input_ids"][:, -1] = last
            return batch

        batch = DistillCollator(inner, vision=False, prefix_lm=prefix_lm)([{}, {}])
        return {name: value for name, value in batch.items() if name not in ("labels", "distill")}

    model = family.student.eval()
    with torch.no_grad():
        first, second = (model(**collated(last), use_cache=False).logits[:, :-1] for last in (20, 21))
    assert torch.equal(first, second) == prefix_lm


# --- (b) different teacher -------------------------------------------------------------------------------------------


def test_another_teacher_equals_a_full_length_pass(case: Case) -> None:
    shared, _ = record(case.family.student, case.inputs)
    found = {}
    for mode in MODES:
        hidden = teacher_pass(case.other, shared, case.plan(mode))
        expected = case.oracle(case.other, mode)
        assert worst(hidden, expected) < TOLERANCE, mode
        found[mode], expected_logits = case.other.lm_head(hidden), case.other.lm_head(expected)
        assert 5 < float(expected_logits.std()) < 10
        assert worst(found[mode], expected_logits) < TOLERANCE, mode
    for mode, other_mode in itertools.combinations(MODES, 2):  # control
        assert worst(found[mode], found[other_mode]) > CLEARLY, (mode, other_mode)


def test_undistilled_rows_are_left_out(detail_sides: Case) -> None:
    case = detail_sides
    shared, _ = record(case.family.student, case.inputs)
    for mode in MODES:
        expected = oracle_hidden(case.other, case.family.student, case.inputs, mode, **case.oracle_arguments)
        for row in (0, 1):
            plan = case.plan(mode, distill=torch.tensor([row == 0, row == 1]))
            assert plan.asked_rows.tolist() == [row]
            hidden = teacher_pass(case.other, shared, plan)
            assert worst(hidden, expected[row][case.loss_mask[row]]) < TOLERANCE, mode


def test_query_heads_that_are_not_folded_read_their_own_key_heads(
    detail: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries beyond a number, which no batch here has, are not folded into their key heads."""
    shared, _ = record(detail.family.student, detail.inputs)
    counted = []
    monkeypatch.setattr(replay, "folds", lambda query, key: counted.append(query.shape[1] // key.shape[1]) or 1)
    for mode in SHARING:
        hidden = teacher_pass(detail.other, shared, detail.plan(mode))
        assert worst(hidden, detail.oracle(detail.other, mode)) < TOLERANCE, mode
    assert min(counted) > 1  # control: there are groups


def test_the_teacher_is_told_the_students_positions(detail: Case) -> None:
    """Some families scale their queries by them, beside the rotary embedding."""
    inputs = detail.inputs
    if detail.family.name != "qwen3_vl":  # which computes such positions by itself, in three axes
        places = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        inputs = {**inputs, "position_ids": places}
    shared, _ = record(detail.family.student, inputs)
    plan, told = detail.plan("vision"), []
    hook = detail.other.get_decoder().register_forward_pre_hook(
        lambda _, __, kwargs: told.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        teacher_pass(detail.other, shared, plan)
    finally:
        hook.remove()
    assert shared.position_ids is not None
    text = shared.position_ids[0] if shared.position_ids.ndim == 3 else shared.position_ids
    assert torch.equal(told[0][0], text[plan.rows, plan.positions])
    assert not torch.equal(told[0][0], plan.positions)  # control: padding on the left moves them


# --- (c) controls that must differ -----------------------------------------------------------------------------------


def spoil_image(shared: SharedKV, case: Case) -> None:
    for record_ in (shared.keys, shared.values):
        for layer, tensor in record_.items():
            record_[layer] = tensor.masked_fill(case.is_image[:, None, :, None], 0.0)


def spoil_layer_order(shared: SharedKV, case: Case) -> None:
    layers = len(shared.keys)
    for record_ in (shared.keys, shared.values):
        rotated = {layer: record_[(layer + 1) % layers] for layer in range(layers)}
        record_.update(rotated)


def spoil_causality(shared: SharedKV, case: Case) -> None:
    real = case.inputs["attention_mask"].bool()
    everything = real[:, None, None, :].expand(-1, 1, real.shape[1], -1)
    for layer, mask in shared.masks.items():
        shared.masks[layer] = dataclasses.replace(mask, mask=everything)


def spoil_positions(shared: SharedKV, case: Case) -> None:
    for kind, (cos, sin) in shared.rotary.items():
        shared.rotary[kind] = (cos.roll(1, dims=1), sin.roll(1, dims=1))


def test_a_spoiled_record_changes_the_teacher(one_side: Case) -> None:
    case = one_side
    shared, _ = record(case.family.student, case.inputs)
    plans = {mode: case.plan(mode) for mode in SHARING}

    def logits(spoilt: SharedKV) -> dict[str, torch.Tensor]:
        return {
            mode: case.identical.lm_head(teacher_pass(case.identical, spoilt, plan)) for mode, plan in plans.items()
        }

    before = logits(shared)
    for spoil in (spoil_image, spoil_layer_order, spoil_causality, spoil_positions):
        parts = {name: dict(getattr(shared, name)) for name in ("keys", "values", "masks", "rotary")}
        spoilt = dataclasses.replace(shared, **parts)
        spoil(spoilt, case)
        after = logits(spoilt)
        for mode in SHARING:
            assert worst(before[mode], after[mode]) > CLEARLY, (spoil.__name__, mode)


def test_teacher_changes_when_the_image_changes(one_side: Case) -> None:
    case = one_side
    shared, _ = record(case.family.student, case.inputs)
    shared_other, _ = record(case.family.student, with_other_pixels(case.inputs, seed=5))
    for mode in MODES:
        plan = case.plan(mode)
        before = case.other.lm_head(teacher_pass(case.other, shared, plan))
        after = case.other.lm_head(teacher_pass(case.other, shared_other, plan))
        # Each row sees its own image, so each row must move.
        moved = (before - after).abs().amax(dim=-1)
        for row in (0, 1):
            if mode == "none":
                assert torch.equal(before, after)
            else:
                assert float(moved[plan.loss_rows == row].max()) > CLEARLY, (mode, row)


# --- (d) how the student is trained ----------------------------------------------------------------------------------


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_step(model: Any, base: PreTrainedModel, inputs: Inputs, record_kv: bool) -> SharedKV | None:
    """Forward, leave the recording, backward. Gradients end up in `model`."""
    model.zero_grad(set_to_none=True)
    if not record_kv:
        model(**inputs).loss.backward()
        return None
    with recording(base) as shared:
        loss = model(**inputs).loss
    before = {layer: (shared.keys[layer], shared.values[layer]) for layer in shared.keys}
    loss.backward()
    assert sorted(shared.keys) == sorted(before)
    for layer, (keys, values) in before.items():  # the very same tensors: the backward pass recorded nothing
        assert shared.keys[layer] is keys and shared.values[layer] is values
    return shared


def assert_same_gradients(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert sorted(a) == sorted(b) and a
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert sum(float(g.abs().sum()) > 0 for g in a.values()) > len(a) // 2  # control: they are gradients, not zeros


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_activation_checkpointing_records_the_forward_and_not_the_backward(detail: Case, use_reentrant: bool) -> None:
    expected, _ = record(detail.family.student, detail.inputs)
    student = detail.family.fresh_student().train()
    checkpoint_activations(student, {"use_reentrant": use_reentrant})
    decoder = student.get_decoder()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    decoder.layers[0].self_attn.register_forward_hook(count)
    train_step(student, student, detail.inputs, record_kv=False)
    assert calls == 2  # control: checkpointing is on, the layer ran once more during backward
    plain = gradients(student)
    shared = train_step(student, student, detail.inputs, record_kv=True)
    assert calls == 4
    assert_same_gradients(gradients(student), plain)
    assert shared is not None
    for layer in expected.keys:
        assert torch.equal(shared.keys[layer], expected.keys[layer])
        assert torch.equal(shared.values[layer], expected.values[layer])
    for mode in SHARING:
        hidden = teacher_pass(detail.other, shared, detail.plan(mode))
        assert worst(hidden, detail.oracle(detail.other, mode)) < TOLERANCE


def test_recording_leaves_gradients_alone_without_checkpointing(detail: Case) -> None:
    student = detail.family.fresh_student().train()
    train_step(student, student, detail.inputs, record_kv=False)
    plain = gradients(student)
    shared = train_step(student, student, detail.inputs, record_kv=True)
    assert_same_gradients(gradients(student), plain)
    assert shared is not None and shared.last_hidden_state is not None and shared.last_hidden_state.requires_grad
    assert not any(t.requires_grad for t in (*shared.keys.values(), *shared.values.values()))


def test_teacher_pass_leaves_the_record_and_the_students_gradients_alone(detail: Case) -> None:
    student = detail.family.fresh_student().train()
    train_step(student, student, detail.inputs, record_kv=False)
    plain = gradients(student)
    student.zero_grad(set_to_none=True)
    with recording(student) as shared:
        loss = student(**detail.inputs).loss
    keys = {layer: tensor.clone() for layer, tensor in shared.keys.items()}
    teacher = copy.deepcopy(detail.other).requires_grad_(True)  # a caller may forget to freeze it
    for mode in MODES:
        assert not teacher_pass(teacher, shared, detail.plan(mode)).requires_grad
    assert all(torch.equal(keys[layer], shared.keys[layer]) for layer in keys)
    loss.backward()
    assert_same_gradients(gradients(student), plain)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_eager_and_sdpa_students(detail: Case, implementation: str) -> None:
    student = detail.family.fresh_student()
    decoder = student.get_decoder()
    decoder.set_attn_implementation(implementation)
    assert decoder.config._attn_implementation == implementation
    shared, outputs = record(student, detail.inputs)
    for mode in SHARING:
        plan = detail.plan(mode)
        expected = outputs.logits[plan.loss_rows, plan.loss_positions]
        assert worst(detail.identical.lm_head(teacher_pass(detail.identical, shared, plan)), expected) < TOLERANCE
        assert worst(teacher_pass(detail.other, shared, plan), detail.oracle(detail.other, mode)) < TOLERANCE


@pytest.mark.parametrize("how", ["autocast", "autocast_bf16_teacher", "bf16_weights"])
def test_bf16(detail: Case, how: str) -> None:
    tolerance = 0.2  # mean, on logits of scale 5-10; bf16 alone moves the student's logits by 0.06 to 0.11
    student, teacher = detail.family.fresh_student(), detail.family.make_teacher(identical=True)
    keep_image_dtype(student)
    full_precision = student(**detail.inputs).logits[detail.loss_mask].detach()
    if how == "bf16_weights":
        student = student.to(torch.bfloat16)
    if how != "autocast":
        teacher = teacher.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how != "bf16_weights"):
        shared, outputs = record(student, detail.inputs)
        for mode in SHARING:
            plan = detail.plan(mode)
            logits = teacher.lm_head(teacher_pass(teacher, shared, plan))
            for expected in (outputs.logits[plan.loss_rows, plan.loss_positions], full_precision):
                assert float((logits - expected).abs().float().mean()) < tolerance, mode
        spoil_layer_order(shared, detail)
        spoiled = teacher.lm_head(teacher_pass(teacher, shared, detail.plan("full")))
    assert float((spoiled - full_precision).abs().float().mean()) > 10 * tolerance  # control
    assert {tensor.dtype for tensor in (*shared.keys.values(), *shared.values.values())} == {torch.bfloat16}


def test_lora_on_top(detail: Case) -> None:
    base_record, _ = record(detail.family.student, detail.inputs)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r".*(text_model|language_model).*\.(q|k|v)_proj", init_lora_weights=False)
    model = get_peft_model(detail.family.fresh_student(), config).train()
    student = model.get_base_model()
    train_step(model, student, detail.inputs, record_kv=False)
    plain = gradients(model)
    assert all("lora_" in name for name in plain)
    shared = train_step(model, student, detail.inputs, record_kv=True)
    assert_same_gradients(gradients(model), plain)
    assert shared is not None
    assert worst(shared.keys[0], base_record.keys[0]) > CLEARLY  # control: the adapter is in what was recorded
    for mode in SHARING:
        hidden = teacher_pass(detail.other, shared, detail.plan(mode))
        assert worst(hidden, detail.oracle(detail.other, mode, student=student)) < TOLERANCE


# --- patches are undone ----------------------------------------------------------------------------------------------


def patched_state(model: PreTrainedModel) -> dict[str, Any]:
    """Whatever recording or replaying may touch."""
    decoder = model.get_decoder()
    return {
        "implementations": [
            module.config._attn_implementation for module in model.modules() if isinstance(module, PreTrainedModel)
        ],
        "hooks": [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ],
        "rotary_forward": "forward" in vars(decoder.rotary_emb),
        "decoder_implementation": decoder.config._attn_implementation,
        "records": (dict(student_kv_module._RECORDS), dict(replay._REPLAYS)),
    }


class Failure(RuntimeError):
    pass


@contextmanager
def failing_last_layer(model: PreTrainedModel) -> Iterator[None]:
    """The forward raises after the earlier layers have run."""

    def fail(*_: Any) -> None:
        raise Failure

    hook = model.get_decoder().layers[-1].register_forward_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def test_recording_is_undone(detail: Case) -> None:
    student = detail.family.student
    vision_config = student.config.vision_config
    before = patched_state(student)
    with torch.no_grad(), recording(student):
        assert student.get_decoder().config._attn_implementation != before["decoder_implementation"]
        assert vision_config._attn_implementation == before["decoder_implementation"]  # the vision tower is left alone
        student(**detail.inputs)
    assert patched_state(student) == before


def test_recording_is_undone_when_the_forward_raises(detail: Case) -> None:
    student = detail.family.student
    before = patched_state(student)
    with failing_last_layer(student), pytest.raises(Failure), torch.no_grad(), recording(student):
        assert patched_state(student) != before  # control
        student(**detail.inputs)
    assert patched_state(student) == before
    # And the next recording works as if nothing had happened.
    shared, outputs = record(student, detail.inputs)
    plan = detail.plan("full")
    logits = detail.identical.lm_head(teacher_pass(detail.identical, shared, plan))
    assert worst(logits, outputs.logits[plan.loss_rows, plan.loss_positions]) < TOLERANCE


@pytest.mark.parametrize("mode", SHARING)
def test_replay_is_undone_when_the_teacher_raises(detail: Case, mode: str) -> None:
    teacher = detail.other
    shared, _ = record(detail.family.student, detail.inputs)
    before = patched_state(teacher)
    inside: list[dict[str, Any]] = []
    first_layer = teacher.get_decoder().layers[0]
    hook = first_layer.register_forward_pre_hook(lambda *_: inside.append(patched_state(teacher)))
    try:
        with failing_last_layer(teacher), pytest.raises(Failure):
            teacher_pass(teacher, shared, detail.plan(mode))
    finally:
        hook.remove()
    assert inside[0]["decoder_implementation"] != before["decoder_implementation"]  # control
    assert patched_state(teacher) == before
    text = detail.inputs["input_ids"][:1, -4:].clamp(max=detail.family.text_vocab_size - 1)
    assert teacher(input_ids=text).logits.isfinite().all()

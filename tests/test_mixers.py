"""Layers without softmax attention (gated delta rules of Qwen3.5 and, in a LLaVA, Qwen3-Next; LFM2's gated short convolution): what tokens write to their state is
shared as keys and values are. Against the LM's own forward, and against a full-length pass that knows nothing of the package."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import randomise_
from family_shrunk import FIRST_IMAGE_ID, lm_config, tiny
from family_stages import copy_weights, full_length, projections
from oracle import StudentKV
from planning import plan_queries, teacher_pass
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from hf_lingudistill._internals import checkpoint_activations
from hf_lingudistill.labs.diagnose.states import layer_outputs, recording_own, state_drift
from hf_lingudistill.mixers import mixers_of
from hf_lingudistill.queries import QueryPlan
from hf_lingudistill.self_check import self_check
from hf_lingudistill.student_kv import SharedKV, recording

MODES = ("full", "prompt", "vision", "inputs")
LENGTH = 26


class Pair:
    """A tiny student, the LM with its weights, another LM, and a batch whose second row is padded on the left."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.student: Any = AutoModelForImageTextToText.from_config(tiny(name)).float().eval()
        randomise_(self.student, seed=1)
        text = self.student.config.get_text_config()
        self.same, self.other = (
            AutoModelForCausalLM.from_config(lm_config(text, other=other)).float().eval() for other in (False, True)
        )
        randomise_(self.other, seed=3)
        assert copy_weights(self.student, self.same)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 300, (2, LENGTH), generator=generator)
        self.ids[:, 7:12] = FIRST_IMAGE_ID
        self.mask = torch.ones_like(self.ids)
        self.mask[1, :4] = 0
        self.image = self.ids == FIRST_IMAGE_ID
        self.labels = torch.where(torch.arange(LENGTH) >= 16, self.ids, -100).repeat(1, 1)
        with torch.no_grad():
            embeddings = self.student.get_input_embeddings()(self.ids)
            features = torch.randn(embeddings.shape, generator=generator)
            self.embeddings = torch.where(self.image[..., None], features, embeddings)

    def record(self, embeddings: torch.Tensor | None = None) -> tuple[SharedKV, torch.Tensor, dict[str, torch.Tensor]]:
        given = self.embeddings if embeddings is None else embeddings
        decoder = self.student.get_decoder()
        with torch.no_grad(), recording(self.student, keep_inputs=True) as shared, projections(decoder) as written:
            hidden = self.student.base_model(inputs_embeds=given, attention_mask=self.mask, use_cache=False)[0]
        return shared, hidden, written

    def plan(self, mode: str, distill: torch.Tensor | None = None) -> QueryPlan:
        given: dict[str, Any] = {"kv_sharing": mode, "shared_vocab_size": 320, "attention_mask": self.mask}
        return plan_queries(self.ids, self.labels, distill, **given)


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_next", "lfm2_vl"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.isfinite().all() and b.isfinite().all() and float(b.std()) > 0.3
    return float((a - b).abs().max())


def test_both_kinds_of_layers_are_there(pair: Pair) -> None:
    decoder = pair.student.get_decoder()
    mixers = mixers_of(decoder)
    shared, _, written = pair.record()
    assert 0 < len(mixers) < decoder.config.num_hidden_layers
    assert sorted({*shared.keys, *shared.mixer_layers}) == list(range(decoder.config.num_hidden_layers))
    assert len(shared.mixed) == len(written) == sum(len(mixer.written) for mixer in mixers)
    assert not any(states.requires_grad for states in shared.mixed.values())
    assert shared.nbytes() > sum(states.nbytes for states in shared.mixed.values()) > 0
    shared.release()
    assert not shared.mixed


def test_sharing_between_identical_models_is_a_no_op(pair: Pair) -> None:
    shared, hidden, _ = pair.record()
    for mode in MODES:
        plan = pair.plan(mode)
        expected = hidden[plan.loss_rows, plan.loss_positions]
        assert off(teacher_pass(pair.same, shared, plan), expected) < 1e-4, mode
        one_row = pair.plan(mode, torch.tensor([False, True]))  # a part of the batch, and it is the padded one
        expected = hidden[one_row.loss_rows, one_row.loss_positions]
        assert off(teacher_pass(pair.same, shared, one_row), expected) < 1e-4, mode
    # Controls: what was recorded of the image and of the order of tokens is read
    plan = pair.plan("vision")
    expected = hidden[plan.loss_rows, plan.loss_positions]
    for spoil in (lambda x: x.masked_fill(pair.image[..., None], 0.0), lambda x: x.roll(1, dims=1)):
        spoilt = pair.record()[0]
        spoilt.mixed = {key: spoil(states) for key, states in spoilt.mixed.items()}
        assert off(teacher_pass(pair.same, spoilt, plan), expected) > 1e-2
    assert off(teacher_pass(pair.same, shared, pair.plan("none")), expected) > 1e-1


def test_another_teacher_equals_a_full_length_pass(pair: Pair) -> None:
    shared, hidden, written = pair.record()
    seen = StudentKV(shared.keys, shared.values, hidden, shared.rotary)  # type: ignore[arg-type]  # by layer
    found = {}
    for mode in ("full", "prompt", "vision"):
        plan = pair.plan(mode)
        real = pair.mask.bool()
        own = plan.sharing.own(~pair.image & real, pair.labels != -100, real)
        queried = torch.zeros_like(own)
        queried[plan.rows, plan.positions] = True
        with torch.no_grad():
            ids = pair.ids.masked_fill(pair.image, 0)
            full = full_length(pair.other, ids, seen, written, own, queried, pair.mask)
            expected = full[plan.loss_rows, plan.loss_positions]
            found[mode] = teacher_pass(pair.other, shared, plan)
            assert off(found[mode], expected) < 1e-4, mode
            # Control: with the student's own inputs left out of the mixers, it is another pass
            blind = full_length(pair.other, ids, seen, {}, own, queried, pair.mask)
            assert off(found[mode], blind[plan.loss_rows, plan.loss_positions]) > 1e-2, mode
    assert off(found["full"], found["vision"]) > 1e-2


def test_the_teacher_sees_another_image(pair: Pair) -> None:
    other = torch.where(pair.image[..., None], pair.embeddings.roll(1, dims=-1), pair.embeddings)
    before, after = pair.record()[0], pair.record(other)[0]
    for mode in (*MODES, "none"):
        plan = pair.plan(mode)
        teacher = pair.same if mode == "inputs" else pair.other  # which needs the student's width
        moved = [teacher_pass(teacher, shared, plan) for shared in (before, after)]
        assert (off(*moved) > 1e-3) == (mode != "none"), mode


def test_unshared_rows_do_not_reach_into_one_another(pair: Pair) -> None:
    """Without sharing, rows of very different lengths are packed into one where attention alone mixes tokens."""
    ids = torch.randint(5, 300, (8, 40), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1:, 6:] = 0
    labels = torch.where(mask.bool() & (torch.arange(40) > 1), ids, -100)
    plan = plan_queries(ids, labels, kv_sharing="none", shared_vocab_size=320, attention_mask=mask)
    hidden = teacher_pass(pair.other, SharedKV(), plan)
    with torch.no_grad():
        for row in range(8):
            alone = pair.other.model(ids[row : row + 1, : int(mask[row].sum())])[0][0]
            asked = plan.loss_rows == row
            assert off(hidden[asked], alone[plan.loss_positions[asked]]) < 1e-4


def test_the_student_trains_with_checkpointing_as_without(pair: Pair) -> None:
    grads = []
    for checkpointing in (False, True):
        student = copy.deepcopy(pair.student).train()
        if checkpointing:
            checkpoint_activations(student, {"use_reentrant": False})
        with recording(student) as shared:
            hidden = student.base_model(inputs_embeds=pair.embeddings, attention_mask=pair.mask, use_cache=False)[0]
        kept = dict(shared.mixed)
        hidden.square().mean().backward()
        assert all(shared.mixed[key] is kept[key] for key in kept)  # the recomputation records nothing
        grads.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 15
    assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-6) for name in grads[0])


def test_the_self_check_passes_the_pair_and_refuses_a_layer_that_cannot_be_followed(pair: Pair) -> None:
    self_check(pair.student, pair.same, pair.ids[:1])
    mixer = mixers_of(pair.other.get_decoder())[0]
    hook = mixer.module.register_forward_hook(lambda _, __, output: output + output.roll(1, dims=1))
    try:
        with pytest.raises(ValueError, match="The teacher is not itself under KV sharing"):
            self_check(pair.student, pair.other, pair.ids[:1])
    finally:
        hook.remove()


def modules_of(model: PreTrainedModel) -> list[tuple[str, int, int, int]]:
    return [
        (name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


def test_nothing_is_left_behind_when_the_teacher_raises(pair: Pair) -> None:
    shared = pair.record()[0]
    before = modules_of(pair.other), modules_of(pair.student)
    hook = pair.other.model.layers[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher_pass(pair.other, shared, pair.plan("vision"))
    hook.remove()
    assert (modules_of(pair.other), modules_of(pair.student)) == before
    lacking = copy.copy(shared)
    lacking.mixed = {}
    with pytest.raises(
        ValueError, match=r"Layer 0: the teacher's mixer reads in_proj\w*, the student's writes none that can be"
    ):
        teacher_pass(pair.other, lacking, pair.plan("vision"))
    shared.mixed = {key: states[..., :-1] for key, states in shared.mixed.items()}
    with pytest.raises(ValueError, match=r"Layer 0: the teacher's mixer writes \d+ channels, the student's \d+"):
        teacher_pass(pair.other, shared, pair.plan("vision"))
    assert (modules_of(pair.other), modules_of(pair.student)) == before


def test_diagnose_leaves_out_what_a_layer_does_not_have(pair: Pair) -> None:
    with layer_outputs(pair.student) as ours:
        shared = pair.record()[0]
    plan = pair.plan("vision")
    with layer_outputs(pair.same) as theirs, recording_own(pair.same) as own:
        teacher_pass(pair.same, shared, plan)
    drift = state_drift(shared, ours, own, theirs, plan)
    mixed = torch.tensor([layer in shared.mixer_layers for layer in range(len(drift))])
    assert drift[mixed][:, :2].isnan().all() and drift[~mixed].isfinite().all()
    assert float(drift[:, 2, 0].max()) < 1e-3  # the hidden states of every layer: the same model

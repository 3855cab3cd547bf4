"""`kv_sharing="inputs"`: the teacher on the student's image features, against a full-length pass and against the student itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES, Family, build_family, with_other_pixels
from oracle import Inputs, loss_mask, oracle_hidden, readable_tokens
from planning import plan_queries, teacher_pass
from transformers import PreTrainedModel

from hf_lingudistill.sharing import sharing
from hf_lingudistill.student_kv import recording

TOLERANCE = 1e-4
FAMILIES = [name for name in FAMILY_NAMES if name != "qwen3_vl"]  # deepstack: refused


def asked(family: Family, student: PreTrainedModel, teacher: PreTrainedModel, inputs: Inputs) -> Any:
    """-> (the teacher's hidden states at the loss positions, the student's logits there)."""
    plan = plan_queries(
        inputs["input_ids"],
        inputs["labels"],
        kv_sharing="inputs",
        shared_vocab_size=family.text_vocab_size,
        unreadable_token_ids=family.image_token_ids,
        attention_mask=inputs["attention_mask"],
    )
    with torch.no_grad(), recording(student, keep_kv=False, keep_inputs=True) as shared:
        logits = student(**inputs).logits
    assert not shared.keys and shared.inputs_embeds is not None
    return teacher_pass(teacher, shared, plan), logits[plan.loss_rows, plan.loss_positions]


def another(teacher: PreTrainedModel, inputs: Inputs) -> PreTrainedModel:
    """A teacher of the same width that says something else."""
    other = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim > 1:
                parameter += 0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_identical_weights_give_the_students_logits_and_others_those_of_a_full_length_pass(
    name: str, side: str
) -> None:
    family = build_family(name)
    inputs = family.make_inputs(side, seed=0)
    teacher = family.make_teacher(identical=True)
    sharing("inputs").check(family.student, teacher)
    hidden, expected = asked(family, family.student, teacher, inputs)
    assert worst(teacher.lm_head(hidden), expected) < TOLERANCE and 5 < float(expected.std()) < 10

    other = another(teacher, inputs)
    hidden, _ = asked(family, family.student, other, inputs)
    arguments: Any = {"unreadable_token_ids": family.image_token_ids, "shared_vocab_size": family.text_vocab_size}
    mask = loss_mask(inputs, readable_tokens(inputs, **arguments))
    wanted = oracle_hidden(other, family.student, inputs, "inputs", **arguments)[mask]
    assert worst(hidden, wanted) < TOLERANCE
    # Controls: it is another teacher, and it sees the image
    assert worst(hidden, asked(family, family.student, teacher, inputs)[0]) > 1e-2
    assert worst(hidden, asked(family, family.student, other, with_other_pixels(inputs, seed=5))[0]) > 1e-2


def test_what_cannot_read_the_students_embeddings_is_refused() -> None:
    family = build_family("smolvlm")
    wider = family.make_teacher(identical=False)
    with pytest.raises(ValueError, match=r"the student's are \d+ wide, the teacher's \d+. Use kv_sharing='vision'"):
        sharing("inputs").check(family.student, wider)
    sharing("vision").check(family.student, wider)  # the control
    deep = build_family("qwen3_vl")
    with pytest.raises(ValueError, match="adds image features to deeper layers as well"):
        sharing("inputs").check(deep.student, deep.make_teacher(identical=True))
    gemma = build_family("gemma3")
    scaled = gemma.make_teacher(identical=True)
    scaled.get_input_embeddings().scalar_embed_scale = 1.0
    with pytest.raises(ValueError, match=r"the student multiplies its by [\d.]+, the teacher by 1\."):
        sharing("inputs").check(gemma.student, scaled)

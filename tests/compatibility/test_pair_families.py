"""Every family fits the LM that it was built from, and no other. Configs and tokenizers only, no weights."""

from __future__ import annotations

import pytest
import torch
from pairs import FAMILIES, IMAGE, LAYERS, Tokenizers, llama, statuses, vlm
from transformers import AutoModelForImageTextToText

from hf_lingudistill.compatibility import check_compatibility


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fits_the_lm_it_was_built_from(family: str, tokenizers: Tokenizers) -> None:
    student, teacher, notes = FAMILIES[family]()
    report = check_compatibility(student, teacher, **tokenizers)
    assert report.misfits == []
    assert statuses(report, "note") == notes | {"vocabulary"}
    assert report.image_token_ids == (IMAGE,)
    assert (report.shared_vocab_size, report.student_vocab_size, report.teacher_vocab_size) == (48, 49, 48)
    report.raise_for_misfit()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_fits_an_lm_with_one_layer_less(family: str, tokenizers: Tokenizers) -> None:
    """Control of the test above."""
    student, teacher, _ = FAMILIES[family]()
    arguments = {name: value for name, value in teacher.to_dict().items() if name not in ("model_type", "layer_types")}
    shorter = type(teacher)(**{**arguments, "num_hidden_layers": LAYERS - 1})
    report = check_compatibility(student, shorter, **tokenizers)
    assert statuses(report, "misfit") == {"decoder layers"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_swapped_pair_is_recognised(family: str, tokenizers: Tokenizers) -> None:
    student, teacher, _ = FAMILIES[family]()
    report = check_compatibility(teacher, student, **tokenizers)
    assert [check.name for check in report.checks] == ["roles"]
    with pytest.raises(ValueError, match="The student and teacher look swapped: "):
        report.raise_for_misfit()


def test_a_model_is_judged_by_its_config_and_stays_untouched(tokenizers: Tokenizers) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(vlm())
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert check_compatibility(model, llama(), **tokenizers).fits
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before

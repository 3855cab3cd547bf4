"""What quantisation costs the teacher is a divergence from the whole one, in the direction that the card names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing

from hf_lingudistill._internals import Head
from hf_lingudistill.first_batch import FirstBatch, leading_token


def test_the_cost_of_quantisation_is_kl_of_the_whole_teacher_to_the_quantised_one_and_measured_once() -> None:
    quantised, whole, head = torch.randn(5, 4), torch.randn(5, 4), Head(torch.randn(9, 4), None, 1.0, None)
    log_q, log_p = ((hidden @ head.matrix.T).log_softmax(dim=-1) for hidden in (quantised, whole))
    passes: list[Any] = []
    mode: Any = SimpleNamespace(reads_student=True, teacher_pass=lambda *of: passes.append(of) or whole)
    teacher: Any = SimpleNamespace(head=head, model=None)
    plan: Any = SimpleNamespace(num_loss=5)
    first = FirstBatch(mode, teacher, whole_teacher=lambda: teacher, compare_sharing=False)
    first.answered(None, plan, quantised)  # type: ignore[arg-type]
    first.answered(None, plan, whole)  # type: ignore[arg-type]
    expected, other = (float((a.exp() * (a - b)).sum(-1).mean()) for a, b in ((log_p, log_q), (log_q, log_p)))
    assert first.quantization_kl == pytest.approx(expected, rel=1e-5) != pytest.approx(other, rel=1e-2)
    assert len(passes) == 1


def tokenizer_that_leads(lead: bool) -> Any:
    tokenizer = tiny.make_tokenizer(extra=False)
    if lead:
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
        )
    return tokenizer


def test_a_leading_token_is_what_the_tokenizer_puts_before_a_text() -> None:
    plain, leading = tokenizer_that_leads(False), tokenizer_that_leads(True)
    assert plain.bos_token_id is not None and leading_token(plain) is None
    assert leading_token(leading) == (leading.bos_token, leading.bos_token_id)
    assert leading_token(SimpleNamespace(tokenizer=leading)) == leading_token(leading)
    assert leading_token(SimpleNamespace(bos_token_id=None)) is None


@pytest.mark.parametrize(
    ("leading", "ids", "mask", "said"),
    [
        (("<s>", 1), [[1, 5, 6], [1, 7, 8]], [[1, 1, 1], [1, 1, 1]], False),
        (("<s>", 1), [[9, 1, 6], [9, 9, 1]], [[0, 1, 1], [0, 0, 1]], False),  # padded on the left
        (("<s>", 1), [[4, 1, 6], [5, 7, 1]], None, True),
        (("<s>", 1), [[1, 4, 6], [1, 5, 7]], [[0, 1, 1], [0, 1, 1]], True),  # the pad token is the same one
        (None, [[4, 5, 6]], None, False),
    ],
)
def test_rows_that_begin_without_it_are_said_once(
    caplog: pytest.LogCaptureFixture, leading: Any, ids: list[list[int]], mask: list[list[int]] | None, said: bool
) -> None:
    first = FirstBatch(
        SimpleNamespace(reads_student=False),  # type: ignore[arg-type]
        SimpleNamespace(),  # type: ignore[arg-type]
        whole_teacher=None,
        compare_sharing=False,
        leading=leading,
    )
    inputs = {"input_ids": torch.tensor(ids)} | ({} if mask is None else {"attention_mask": torch.tensor(mask)})
    for _ in range(2):
        first.scored(inputs, None, None, None, training=True)  # type: ignore[arg-type]
    assert caplog.text.count("No row begins with <s>") == said


@pytest.mark.parametrize("lead", [True, False])
def test_a_trainer_says_that_its_rows_lack_what_the_processor_adds(
    make_trainer: Any, caplog: pytest.LogCaptureFixture, lead: bool
) -> None:
    processor = tiny.make_processor()
    processor.chat_template = processor.chat_template.replace("<|im_start|>", "the ")
    if lead:
        bos = processor.tokenizer
        bos._tokenizer.post_processor = TemplateProcessing(
            single=f"{bos.bos_token} $A", special_tokens=[(bos.bos_token, bos.bos_token_id)]
        )
    make_trainer(processing_class=processor).train()
    assert ("No row begins with <|im_start|>" in caplog.text) == lead

"""Answers are scored as the chat template writes them: SmolVLM's puts a space before what the assistant says, behind where its prompt ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_labels_of_rows import picture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from hf_lingudistill.labs.diagnose import measure as diagnosing
from hf_lingudistill.labs.diagnose.prompts import prompt_of
from hf_lingudistill.labs.evaluation.cache import ItemCache
from hf_lingudistill.labs.evaluation.data import TextTask
from hf_lingudistill.labs.evaluation.fidelity import (
    Question,
    Reference,
    fidelity,
    image_measures,
    original_answers,
    text_measures,
)
from hf_lingudistill.labs.evaluation.grounded import answer_scores
from hf_lingudistill.labs.evaluation.language import bits_per_byte
from hf_lingudistill.labs.evaluation.models import Scored, user_turn
from hf_lingudistill.labs.evaluation.reading import Written
from hf_lingudistill.labs.score_mix.measure import student_reader

ANSWER = "the sea is deep"
QUESTION = "tell me about the sea"
TEMPLATES = {"SmolVLM's": (DEFAULT_CHAT_TEMPLATE, " "), "ChatML": (tiny.CHATML, "")}


def a_vlm(template: str) -> Scored:
    processor = tiny.make_processor()
    processor.chat_template = processor.tokenizer.chat_template = template
    return Scored("vlm", "", "vlm", tiny.make_vlm(0), processor, template[:9])


VICUNA = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def of_pieces(template: str) -> Scored:
    """An LM whose tokenizer, as Llama's, puts a space before every text of its own, and none inside of one."""
    plain = Tokenizer(models.BPE(unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    plain.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    plain.train_from_iterator([tiny.TEXT, "USER: ASSISTANT: What is it?"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return Scored("lm", "", "lm", tiny.make_lm(1, vocab_size=len(tokenizer)), tokenizer, "pieces")


@pytest.fixture(params=[*TEMPLATES, "pieces, Vicuna's", "pieces, ChatML"])
def case(request: pytest.FixtureRequest) -> tuple[Scored, str]:
    if request.param.startswith("pieces"):
        vicuna = request.param.endswith("Vicuna's")
        return of_pieces(VICUNA if vicuna else tiny.CHATML), " " if vicuna else ""
    template, lead = TEMPLATES[request.param]
    return a_vlm(template), lead


def as_trained(scored: Scored) -> float:
    """Nats of the answer's tokens in a row as training has it, from the plain logits."""
    turns = [*user_turn(QUESTION), {"role": "assistant", "content": ANSWER}]
    whole = scored.render(turns, answer=False)
    ids = scored.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    place = whole.rindex(ANSWER)
    answer = [i for i, (s, e) in enumerate(ids["offset_mapping"]) if e > place and s < place + len(ANSWER)]
    row = torch.tensor([ids["input_ids"]])
    with torch.no_grad():
        log_probs = scored.model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].log_softmax(-1)
    return -sum(float(log_probs[i - 1, row[0, i]]) for i in answer)


def test_the_lead_is_found(case: tuple[Scored, str]) -> None:
    scored, lead = case
    assert scored.answer_lead == lead
    whole = scored.render([*user_turn(QUESTION), {"role": "assistant", "content": ANSWER}], answer=False)
    row = [*scored.ids(scored.render(user_turn(QUESTION))), *scored.answer_ids(ANSWER)]
    assert scored.ids(whole)[: len(row)] == row
    # Of another template in its stead
    assert replace(scored, template=tiny.CHATML).answer_lead == ""
    assert replace(scored, template="{{ raise_exception('no') if messages|length > 1 }}ask").answer_lead == ""


def test_each_measure_scores_the_row_that_training_has(case: tuple[Scored, str], tmp_path: Path) -> None:
    scored, lead = case
    expected = as_trained(scored)
    rendered = scored.render(user_turn(QUESTION))
    (scores,) = answer_scores(scored, [rendered], [()], [scored.answer_ids(ANSWER)])
    assert -sum(p for p, _ in scores) == pytest.approx(expected, abs=1e-3)
    prompt = prompt_of({"prompt": QUESTION, "completion": ANSWER}, "0")
    (record,) = student_reader(scored, 64)([prompt])
    assert sum(record["own"]) == pytest.approx(expected, abs=1e-3)
    inputs, labels = diagnosing._inputs(scored, prompt, 64)
    with torch.no_grad():
        logits = scored.model(**inputs).logits[0]
    kept = labels[0] != -100
    nats = torch.nn.functional.cross_entropy(logits[:-1][kept[1:]], labels[0][kept], reduction="sum")
    assert float(nats) == pytest.approx(expected, abs=1e-3)
    # Control: without the space it is another row, but for a tokenizer that puts one there itself
    if lead and scored.fingerprint != "pieces":
        (scores,) = answer_scores(scored, [rendered], [()], [scored.ids(ANSWER)])
        assert abs(-sum(p for p, _ in scores) - expected) > 0.5


def test_bits_per_byte_of_the_chat_form_are_those_of_the_row(case: tuple[Scored, str], tmp_path: Path) -> None:
    scored, _ = case
    head, body = "the cat sat on the mat and looked at a", "small red circle. the sea is deep, wide and full of salt."
    task = TextTask(name="t", path="x", head_words=len(head.split()))
    cache = ItemCache(tmp_path / "items.jsonl", {})
    ((bits, size),) = bits_per_byte(scored, task, "chat", {"0": f"{head} {body}"}, cache).values()
    asked = user_turn(f"Continue this text: {head}")
    whole = scored.render([*asked, {"role": "assistant", "content": body}], answer=False)
    ids = scored.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    place = whole.rindex(body)
    row = torch.tensor([ids["input_ids"]])
    with torch.no_grad():
        log_probs = scored.model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].log_softmax(-1)
    said = [i for i, (s, e) in enumerate(ids["offset_mapping"]) if e > place and s < place + len(body)]
    nats = -sum(float(log_probs[i - 1, row[0, i]]) for i in said)
    assert bits == pytest.approx(nats / 0.6931472, rel=1e-4) and size == len(body.encode())


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_fidelity_compares_tokens_that_both_write(name: str, images: bool) -> None:
    """Of a template with a space, all but the first of an answer, in a row that the template would write."""
    template, lead = TEMPLATES[name]
    scored = a_vlm(template)
    tokenizer = tiny.make_tokenizer(extra=True)
    lm = Scored("lm", "", "lm", tiny.make_lm(1, vocab_size=len(tokenizer)), tokenizer, "lm")
    shown = (picture(),) if images else ()
    questions = [
        Question("0", QUESTION, "a cat" if images else None, shown),
        Question("1", "what is it?", "a mat" if images else None, shown),
    ]
    answers = {"0": Written(tuple(lm.ids(ANSWER)), False), "1": Written(tuple(lm.ids("it")[:1]), False)}
    reference = Reference.of(lm, questions, answers)
    assert reference.lead == ""
    found = fidelity(reference, scored)
    kl = found["0"]["kl"]
    unlike = (
        2 if lead else 0
    )  # `t`, `he` and not one token for both: the tiny tokenizer has one for the word with its space alone
    assert len(kl) == len(answers["0"].ids) and kl[:unlike] == [None] * unlike and None not in kl[unlike:]

    def log_probs(model: Scored, rendered: str, pictures: Any, answer: str, count: int) -> torch.Tensor:
        text = rendered + answer
        more: Any = {"images": [list(pictures)]} if pictures else {}
        inputs = model.processing(text=[text], return_tensors="pt", add_special_tokens=False, **more)
        with torch.no_grad():
            logits = model.model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                **({"pixel_values": inputs["pixel_values"]} if pictures else {}),
            ).logits[0]
        return logits[-count - 1 : -1].log_softmax(-1)

    rest = len(answers["0"].ids) - unlike
    theirs = log_probs(lm, lm.render(user_turn(questions[0].told())), (), ANSWER, rest)
    ours = log_probs(scored, scored.render(user_turn(QUESTION, len(shown))), shown, lead + ANSWER, rest)
    expected = (theirs.exp() * (theirs - ours)).sum(-1)
    torch.testing.assert_close(torch.tensor(kl[-rest:]), expected, atol=2e-3, rtol=2e-3)
    measures = text_measures(found)
    assert measures["kl"]["0"] == pytest.approx((float(expected.sum()), rest), abs=0.02)
    assert measures["kl"]["1"][1] == (0 if lead else 1)  # a single token that is not the same
    split = image_measures(found, {"0": [True] * len(kl), "1": [False]})
    assert split["kl_dependent"]["0"][1] == rest and split["kl_rest"]["1"][1] == measures["kl"]["1"][1]
    # The original asked in the model's own template writes the same tokens
    same = replace(lm, template=scored.processing.chat_template)
    again = Reference.of(same, questions[:1], original_answers(same, questions[:1], max_new_tokens=4))
    assert None not in fidelity(again, scored)["0"]["kl"]


MakeTrainer = Callable[..., Any]


def test_the_rows_that_training_has_are_those(make_trainer: MakeTrainer) -> None:
    """What `as_trained` takes for training's is what the trainer makes."""
    processor = tiny.make_processor()
    processor.chat_template = processor.tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    row = {"prompt": [{"role": "user", "content": QUESTION}], "completion": [{"role": "assistant", "content": ANSWER}]}
    trainer = make_trainer(train_dataset=[row] * 4, processing_class=processor)
    labels = [label for label in trainer.train_dataset[0]["labels"] if label != -100]
    scored = a_vlm(DEFAULT_CHAT_TEMPLATE)
    assert labels[: len(scored.answer_ids(ANSWER))] == scored.answer_ids(ANSWER)

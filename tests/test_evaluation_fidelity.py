"""Fidelity to the original: against a plain loop over tokens and vocabulary, and against drift of a known size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image as PILImage

from hf_lingudistill.labs.evaluation import fidelity as module
from hf_lingudistill.labs.evaluation.cache import ItemCache
from hf_lingudistill.labs.evaluation.data import grey
from hf_lingudistill.labs.evaluation.fidelity import (
    Question,
    Reference,
    dependence,
    fidelity,
    image_measures,
    original_answers,
    text_measures,
)
from hf_lingudistill.labs.evaluation.models import Scored, user_turn
from hf_lingudistill.labs.evaluation.reading import Written, answering_head, end_of_turn, stop_ids, write_answers
from hf_lingudistill.labs.statistics import Bootstrap

INSTRUCTIONS = ("tell me about the sea", "what shape is it?", "is there a green shape? yes or no.", "the cat sat on")
COLORS = ("red", "blue", "green", "teal")


def an_lm(seed: int = 1, **settings: Any) -> Scored:
    """An LM over the VLM's whole vocabulary, so that a VLM may hold exactly its weights."""
    tokenizer = tiny.make_tokenizer(extra=True)
    return Scored("lm", "", "lm", tiny.make_lm(seed, vocab_size=len(tokenizer), **settings), tokenizer, "lm")


def a_vlm(lm: Scored | None = None, *, drift: float = 0.0, seed: int = 0, name: str = "vlm") -> Scored:
    """A VLM with the text weights of an LM, moved by so much of their own size."""
    vlm = tiny.make_vlm(seed)
    if lm is not None:
        vlm.get_decoder().load_state_dict(lm.model.get_decoder().state_dict())
        generator = torch.Generator().manual_seed(3)
        for parameter in vlm.get_decoder().parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * drift * parameter.data.std())
    return Scored(name, "", "vlm", vlm, tiny.make_processor(), name)


@pytest.fixture(scope="module")
def lm() -> Scored:
    return an_lm()


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return [Question(str(index), text) for index, text in enumerate(INSTRUCTIONS)]


@pytest.fixture(scope="module")
def shown() -> list[Question]:
    """The same with a caption and an image each."""
    return [
        Question(str(index), text, f"a {color} circle", (PILImage.new("RGB", (40, 40), color),))
        for index, (text, color) in enumerate(zip(INSTRUCTIONS, COLORS, strict=True))
    ]


@pytest.fixture(scope="module")
def reference(lm: Scored, asked: list[Question]) -> Reference:
    written = original_answers(lm, asked, max_new_tokens=6, temperature=1.0)
    # of several lengths, so that a batch is padded
    return Reference.of(lm, asked, {key: Written(a.ids[: 2 + int(key)], a.stopped) for key, a in written.items()})


@pytest.fixture(scope="module")
def told(lm: Scored, shown: list[Question]) -> Reference:
    return Reference.of(lm, shown, original_answers(lm, shown, max_new_tokens=6, temperature=1.0), batch_size=3)


# --------------------------------------------------------------------------------------------------------------------
# The oracle: one row, no padding, double precision, a loop over the vocabulary
# --------------------------------------------------------------------------------------------------------------------
def distributions(scored: Scored, text: str, images: Sequence[PILImage.Image], ids: Sequence[int]) -> torch.Tensor:
    """(n, V) probabilities of the answer's tokens, from the model's own logits."""
    rendered = scored.render(user_turn(text, len(images)))
    if images:
        inputs = dict(
            scored.processing(text=[rendered], images=[list(images)], return_tensors="pt", add_special_tokens=False)
        )
    else:
        inputs = {"input_ids": torch.tensor([scored.ids(rendered)])}
    start = inputs["input_ids"].size(1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([list(ids)])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        return scored.model(**inputs, use_cache=False).logits[0, start - 1 : -1].double().softmax(dim=-1)


def oracle(
    original: Scored,
    model: Scored,
    question: Question,
    answer: Written,
    *,
    caption: str | None = None,
    images: Sequence[PILImage.Image] | None = None,
    same: tuple[int, int] | None = None,
) -> tuple[list[float], list[int]]:
    """KL and agreement per token. same: (the original's, the model's) token that are one event."""
    p = distributions(original, question.told(caption), (), answer.ids)
    q = distributions(model, question.instruction, question.images if images is None else images, answer.ids)
    kl, top1 = [], []
    for row in range(len(answer.ids)):
        left = dict(enumerate(p[row].tolist()))
        right = dict(enumerate(q[row].tolist()))
        if same is not None:
            right[same[0]] += right.pop(same[1])
            left[same[0]] += left.pop(same[1], 0.0)
        kl.append(sum(value * math.log(value / right[token]) for token, value in left.items() if value > 0))
        top1.append(int(max(left, key=left.__getitem__) == max(right, key=right.__getitem__)))
    return kl, top1


@pytest.mark.parametrize("chunk", [2**24, 700], ids=["whole", "in chunks of a token"])
def test_text_fidelity_is_that_of_a_plain_loop_whatever_the_padding(
    lm: Scored, reference: Reference, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    other = a_vlm(seed=4)
    found = fidelity(reference, other, batch_size=3)
    assert len({len(answer.ids) for answer in reference.answers.values()}) > 1
    for question in reference.questions:
        kl, top1 = oracle(lm, other, question, reference.answers[question.key])
        assert found[question.key]["kl"] == pytest.approx(kl, abs=1e-4)
        assert found[question.key]["top1"] == top1
    assert min(min(record["kl"]) for record in found.values()) > 0.01  # the loop is held against something


def test_image_fidelity_is_that_of_a_plain_loop(lm: Scored, told: Reference) -> None:
    other = a_vlm(lm, drift=0.3)
    found = fidelity(told, other, batch_size=3)
    blank = {question.key: [grey(image) for image in question.images] for question in told.questions}
    control = fidelity(told, other, images=blank, batch_size=3)
    for question in told.questions:
        answer = told.answers[question.key]
        kl, top1 = oracle(lm, other, question, answer)
        assert (found[question.key]["kl"], found[question.key]["top1"]) == (pytest.approx(kl, abs=1e-4), top1)
        kl, _ = oracle(lm, other, question, answer, images=blank[question.key])
        assert control[question.key]["kl"] == pytest.approx(kl, abs=1e-4)
    assert control != found  # the images are looked at


def test_the_same_model_is_at_0_and_drift_moves_it_away(lm: Scored, reference: Reference) -> None:
    def measured(model: Scored) -> tuple[float, float]:
        items = text_measures(fidelity(reference, model))
        scores = {measure: Bootstrap(resamples=10).score(values) for measure, values in items.items()}
        assert scores["kl"]["n"] == len(reference.questions)
        return scores["kl"]["value"], scores["top1"]["value"]

    for same in (lm, a_vlm(lm)):
        kl, top1 = measured(same)
        assert (kl, top1) == (pytest.approx(0, abs=1e-5), 1.0)
    near, far = measured(a_vlm(lm, drift=0.1)), measured(a_vlm(lm, drift=1.0))
    assert 0.001 < near[0] < far[0] / 3
    assert 1.0 >= near[1] > far[1]


def test_a_model_with_more_tokens_is_charged_for_what_it_gives_to_them() -> None:
    """Its own image tokens: the KL is that over the whole vocabulary, not over the shared part."""
    small = Scored("lm", "", "lm", tiny.make_lm(1), tiny.make_tokenizer(extra=False), "lm")
    questions = [Question("0", INSTRUCTIONS[0])]
    reference = Reference.of(small, questions, original_answers(small, questions, max_new_tokens=4))
    vlm = a_vlm(seed=2)
    found = fidelity(reference, vlm)["0"]["kl"]
    kl, _ = oracle(small, vlm, questions[0], reference.answers["0"])
    assert found == pytest.approx(kl, abs=1e-4)


def test_the_two_ends_of_turn_are_one_event(lm: Scored, reference: Reference) -> None:
    vlm = a_vlm(lm, drift=0.2)
    ends = [lm.tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<end_of_utterance>")]
    assert end_of_turn(lm) == end_of_turn(vlm) == ends[0]
    plain = fidelity(reference, vlm)
    template = tiny.CHATML.replace("<|im_end|>\n{% endfor %}", "<end_of_utterance>\n{% endfor %}")
    processor = tiny.make_processor()
    processor.chat_template = processor.tokenizer.chat_template = template
    other = Scored("other", "", "vlm", vlm.model, processor, "other")
    assert end_of_turn(other) == ends[1]
    assert ends[1] in stop_ids(other) and ends[1] not in stop_ids(vlm)
    found = fidelity(reference, other)
    for question in reference.questions:
        kl, top1 = oracle(lm, other, question, reference.answers[question.key], same=(ends[0], ends[1]))
        assert found[question.key]["kl"] == pytest.approx(kl, abs=1e-4)
        assert found[question.key]["top1"] == top1
    assert found != plain  # a prompt that ends in another token, and one event instead of two


def test_a_model_of_other_tokens_is_refused(reference: Reference) -> None:
    stranger = a_vlm(seed=4)
    backend = stranger.tokenizer
    names = backend.convert_ids_to_tokens(range(len(backend)))
    stranger.processing.tokenizer.convert_ids_to_tokens = lambda ids: [names[-i] for i in ids]
    with pytest.raises(ValueError, match=r"^vlm has not the original's tokens: \d+% of the original's probability"):
        fidelity(reference, stranger)


def test_a_vlm_whose_forward_leaves_out_its_logit_scale_is_read_as_it_answers(lm: Scored) -> None:
    vlm = a_vlm(lm)
    vlm.model.config.text_config.logit_scale = 0.25  # declared, and not applied: as Aya Vision does
    assert answering_head(vlm).scale == 1.0
    vlm.model.forward = lambda **_: type("Output", (), {"logits": torch.full((1, 1, len(vlm.tokenizer)), 9.0)})()
    with pytest.raises(ValueError, match=r"^vlm: its output head does not give its own logits"):
        answering_head(vlm)


def test_bf16_weights_are_compared_in_fp32(lm: Scored, reference: Reference) -> None:
    vlm = a_vlm(lm, drift=0.3)
    exact = text_measures(fidelity(reference, vlm))["kl"]
    vlm.model.to(torch.bfloat16)
    rounded = text_measures(fidelity(reference, vlm))["kl"]
    assert answering_head(vlm).weight.dtype == torch.float32
    for key, (kl, tokens) in exact.items():
        assert rounded[key] == (pytest.approx(kl, rel=0.1, abs=0.05), tokens)


# --------------------------------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------------------------------
def plain_greedy(scored: Scored, text: str, steps: int) -> list[int]:
    ids = scored.ids(scored.render(user_turn(text)))
    start = len(ids)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(scored.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in stop_ids(scored):
                break
    return ids[start:]


def test_greedy_answers_are_the_argmax_of_a_plain_forward(lm: Scored, asked: list[Question]) -> None:
    lm.model.generation_config.repetition_penalty = 5.0  # a habit of the checkpoint, not of its distribution
    found = original_answers(lm, asked, max_new_tokens=5, batch_size=3)
    lm.model.generation_config.repetition_penalty = None
    assert {key: list(answer.ids) for key, answer in found.items()} == {
        question.key: plain_greedy(lm, question.instruction, 5) for question in asked
    }


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(lm: Scored, asked: list[Question]) -> None:
    def sample(seed: int, batch_size: int) -> Any:
        return original_answers(lm, asked, max_new_tokens=5, temperature=1.0, seed=seed, batch_size=batch_size)

    assert sample(0, 1) == sample(0, 4)
    assert sample(0, 4) != sample(1, 4)


def test_samples_follow_the_models_distribution(lm: Scored) -> None:
    prompt = lm.render(user_turn(INSTRUCTIONS[0]))
    wanted = distributions(lm, INSTRUCTIONS[0], (), [0])[0]
    drawn = write_answers(lm, [prompt] * 1500, [()] * 1500, max_new_tokens=1, temperature=2.0, seeds=range(1500))
    shares = torch.bincount(torch.tensor([answer.ids[0] for answer in drawn]), minlength=len(wanted)) / 1500
    hot = (wanted.log() / 2).softmax(-1)
    top = hot.topk(5).indices
    assert shares[top].tolist() == pytest.approx(hot[top].tolist(), abs=0.04)
    assert abs(shares[top] - wanted[top]).max() > 0.04  # another temperature would not pass


def test_an_answer_ends_with_its_stop_token_and_says_whether_it_did(lm: Scored) -> None:
    prompt = lm.render(user_turn("what?"))
    first = int(distributions(lm, "what?", (), [0])[0].argmax())
    before = lm.model.generation_config.eos_token_id
    lm.model.generation_config.eos_token_id = [first]
    (stopped,) = write_answers(lm, [prompt], [()], max_new_tokens=4)
    lm.model.generation_config.eos_token_id = before
    assert stopped == Written((first,), True)
    (cut,) = write_answers(lm, [prompt], [()], max_new_tokens=1)
    assert cut == Written((first,), False)


def test_what_is_cached_is_neither_written_nor_read_again(
    lm: Scored, asked: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = original_answers(lm, asked, max_new_tokens=4, cache=ItemCache(tmp_path / "answers.jsonl", {}))
    reference = Reference.of(lm, asked, first)
    vlm = a_vlm(lm, drift=0.2)
    scores = fidelity(reference, vlm, cache=ItemCache(tmp_path / "scores.jsonl", {}))
    for name in ("write_answers", "answer_states", "answering_head"):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("a model was asked"))
    assert original_answers(lm, asked, max_new_tokens=4, cache=ItemCache(tmp_path / "answers.jsonl", {})) == first
    assert fidelity(reference, vlm, cache=ItemCache(tmp_path / "scores.jsonl", {})) == scores


# --------------------------------------------------------------------------------------------------------------------
# Which tokens depend on the picture
# --------------------------------------------------------------------------------------------------------------------
def test_tokens_that_the_caption_moves_are_told_from_the_rest(lm: Scored, told: Reference) -> None:
    found, signs = dependence(told, lm, threshold=0.5, batch_size=3), set()
    flags = [flag for row in found.values() for flag in row]
    assert any(flags) and not all(flags)
    # by a plain loop over every caption that may have been told instead
    for question in told.questions:
        answer = told.answers[question.key]
        rows = torch.arange(len(answer.ids))

        def log_probs(
            caption: str | None, question: Question = question, answer: Any = answer, rows: Any = rows
        ) -> Any:
            return distributions(lm, question.told(caption), (), answer.ids)[rows, list(answer.ids)].log()

        others = [f"a {color} circle" for color in COLORS if f"a {color} circle" != question.caption]
        apart = [log_probs(None) - log_probs(other) for other in others]
        possible = [(gap.abs() > 0.5).tolist() for gap in apart]
        assert found[question.key] in possible
        signs |= set(apart[possible.index(found[question.key])][found[question.key]].sign().tolist())
    assert signs == {-1.0, 1.0}  # control: of some tokens less likely, too
    with pytest.raises(ValueError, match="moves no token of the original's answers by 1000.0 nats"):
        dependence(told, lm, threshold=1000.0)


def test_captions_that_are_all_the_same_cannot_be_exchanged(lm: Scored) -> None:
    questions = [Question(str(i), "what?", "a cat") for i in range(3)]
    reference = Reference.of(lm, questions, original_answers(lm, questions, max_new_tokens=2))
    with pytest.raises(ValueError, match=r"^Exchanging captions needs at least two that differ; all 3 say 'a cat'\.$"):
        dependence(reference, lm)


def test_the_measures_by_hand() -> None:
    found = {"a": {"kl": [1.0, 2.0, 4.0], "top1": [1, 0, 1]}, "b": {"kl": [8.0], "top1": [0]}}
    measures = image_measures(found, {"a": [True, False, True], "b": [False]})
    assert measures == {
        "kl": {"a": (7.0, 3.0), "b": (8.0, 1.0)},
        "top1": {"a": (2.0, 3.0), "b": (0.0, 1.0)},
        "kl_dependent": {"a": (5.0, 2.0), "b": (0.0, 0.0)},
        "kl_rest": {"a": (2.0, 1.0), "b": (8.0, 1.0)},
    }


def test_the_original_is_told_the_caption_and_the_model_the_instruction_alone() -> None:
    question = Question("0", "Write a poem about it.", "a lobster")
    assert question.told() == "Here is what a picture shows: a lobster\n\nWrite a poem about it."
    assert "a violin" in question.told("a violin") and "a lobster" not in question.told("a violin")
    assert Question("1", "Write a poem.").told() == "Write a poem."

"""Tokens: the shared prefix, images, chat templates. Configs and tokenizers only, no weights."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairs import VOCAB, Tokenizers, llama, messages, only, sizes, statuses, vlm
from tokenizers_for_tests import PARTS_TEMPLATE, TEXT_TEMPLATE, word_tokenizer
from transformers import CONFIG_MAPPING, Qwen2Config, Qwen2VLConfig

from hf_lingudistill.compatibility import CompatibilityReport, check_compatibility


def check_tokenizers(student: Any, teacher: Any, rows: tuple[int, int] | None = None) -> CompatibilityReport:
    """rows: of the student's and the teacher's embedding, by default as many as there are tokens."""
    ours, theirs = rows or (len(student), len(teacher))
    return check_compatibility(
        vlm(llama(vocab_size=ours)),
        llama(vocab_size=theirs),
        student_tokenizer=student,
        teacher_tokenizer=teacher,
    )


def test_equal_tokenizers_share_every_id() -> None:
    report = check_tokenizers(word_tokenizer(VOCAB), word_tokenizer(VOCAB))
    assert only(report, "vocabulary").status == "fits"
    assert report.shared_vocab_size == VOCAB


def test_one_id_that_differs_in_the_middle_is_found() -> None:
    report = check_tokenizers(word_tokenizer(VOCAB), word_tokenizer(VOCAB, renamed={20: "other"}))
    assert statuses(report, "misfit") == {"vocabulary"}
    assert messages(report, "vocabulary") == [
        "1 token id differs between the tokenizers, the first is 20 ('w20' for the student, 'other' for the teacher): "
        "what the teacher says would be read as something else. Use the LM that the student was built from, with its "
        "own tokenizer."
    ]
    assert report.shared_vocab_size == 20


@given(
    st.dictionaries(st.integers(4, VOCAB - 1), st.sampled_from(["x", "y", "z"]), max_size=4), st.integers(40, VOCAB)
)
def test_the_shared_prefix_is_what_a_comparison_id_by_id_gives(renamed: dict[int, str], student_size: int) -> None:
    renamed = {index: f"{token}{index}" for index, token in renamed.items()}
    student, teacher = word_tokenizer(student_size), word_tokenizer(VOCAB, renamed=renamed)
    report = check_tokenizers(student, teacher)
    common = range(min(len(student), len(teacher)))
    different = [i for i in common if student.convert_ids_to_tokens(i) != teacher.convert_ids_to_tokens(i)]
    assert report.shared_vocab_size == (different[0] if different else len(common))
    assert report.fits == (not different)
    if different:
        assert messages(report, "vocabulary")[0].startswith(f"{len(different)} token id")


def test_swapped_tokens_are_found_although_the_sets_agree() -> None:
    report = check_tokenizers(word_tokenizer(VOCAB), word_tokenizer(VOCAB, renamed={10: "w11", 11: "w10"}))
    assert report.shared_vocab_size == 10
    assert messages(report, "vocabulary")[0].startswith("2 token ids differ between the tokenizers, the first is 10 ")


def test_extra_student_tokens_are_counted() -> None:
    report = check_tokenizers(word_tokenizer(VOCAB, extra=("<image>", "<row>", "<tile>")), word_tokenizer(VOCAB))
    assert report.fits
    assert messages(report, "vocabulary") == [
        "Student has 3 tokens that the teacher lacks (id 48: '<image>'). Positions with labels from id 48 on get "
        "cross-entropy only."
    ]
    assert report.shared_vocab_size == VOCAB


def test_extra_teacher_tokens_are_counted() -> None:
    report = check_tokenizers(word_tokenizer(VOCAB), word_tokenizer(VOCAB, extra=("<tool>",)))
    assert report.fits
    assert messages(report, "vocabulary") == [
        "Teacher has 1 token that the student lacks (id 48: '<tool>'): what it predicts there is left out."
    ]
    assert report.shared_vocab_size == VOCAB


def test_a_reserved_id_that_the_student_took_over_is_a_note() -> None:
    """Reserved ids behind the teacher's last word: all of its language is shared. Control: the word test above."""
    teacher = word_tokenizer(VOCAB, extra=("<reserved_0>", "<reserved_1>"))
    report = check_tokenizers(word_tokenizer(VOCAB, extra=("<reserved_0>", "<image>")), teacher)
    assert report.fits
    assert messages(report, "vocabulary") == [
        "1 token id differs between the tokenizers, the first is 49 ('<image>' for the student, '<reserved_1>' for "
        "the teacher), all among ids that the teacher keeps in reserve. Positions with labels from id 49 on get "
        "cross-entropy only."
    ]
    assert report.shared_vocab_size == 49


def test_padding_rows_of_the_embeddings_are_not_shared_tokens() -> None:
    report = check_tokenizers(word_tokenizer(VOCAB), word_tokenizer(VOCAB), rows=(64, 56))
    assert only(report, "vocabulary").status == "fits"
    assert (report.shared_vocab_size, report.student_vocab_size, report.teacher_vocab_size) == (48, 64, 56)


def test_tokens_without_a_row_are_not_shared() -> None:
    report = check_tokenizers(word_tokenizer(VOCAB), word_tokenizer(VOCAB), rows=(VOCAB, VOCAB - 2))
    assert report.fits
    assert messages(report, "vocabulary") == [
        "The smaller embedding has rows for 46 of the 48 shared tokens. Positions with labels from id 46 on get "
        "cross-entropy only."
    ]
    assert report.shared_vocab_size == VOCAB - 2


def test_a_missing_tokenizer_is_a_misfit_and_shares_nothing() -> None:
    report = check_compatibility(vlm(), llama(), student_tokenizer=word_tokenizer(VOCAB))
    assert messages(report, "vocabulary") == [
        "Vocabularies cannot be compared for lack of the teacher's tokenizer: none was given, and the config does not "
        "say where it came from. Save it beside the model (save_pretrained), or pass a folder or Hub id that has one (in Python, teacher_tokenizer)."
    ]
    assert report.shared_vocab_size == 0


def test_a_processor_stands_for_its_tokenizer() -> None:
    class Processor:
        tokenizer = word_tokenizer(VOCAB, extra=("<image>",))
        chat_template = PARTS_TEMPLATE

    teacher = word_tokenizer(VOCAB, chat_template=TEXT_TEMPLATE)
    report = check_compatibility(vlm(), llama(), student_tokenizer=Processor(), teacher_tokenizer=teacher)
    assert report.shared_vocab_size == VOCAB
    assert only(report, "chat template").status == "fits"


def test_image_and_video_tokens_are_read_from_the_config(tokenizers: Tokenizers) -> None:
    student = Qwen2VLConfig(text_config=sizes(), image_token_id=40, video_token_id=41)
    assert check_compatibility(student, Qwen2Config(**sizes()), **tokenizers).image_token_ids == (40, 41)


def test_an_image_token_is_read_from_the_vision_config(tokenizers: Tokenizers) -> None:
    """Phi-4-multimodal's own config names none."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = CONFIG_MAPPING["phi4_multimodal"](
        **sizes(), vision_config={**vision, "image_token_id": 40}, audio_config={"num_blocks": 1}
    )
    report = check_compatibility(student, CONFIG_MAPPING["phi3"](**sizes()), **tokenizers)
    assert report.image_token_ids == (40,)
    assert messages(report, "image tokens") == []
    student.image_token_id = 41  # the config's own goes before
    assert check_compatibility(student, llama(), **tokenizers).image_token_ids == (41,)


def test_an_image_token_without_a_row_is_noted(tokenizers: Tokenizers) -> None:
    report = check_compatibility(vlm(llama(vocab_size=VOCAB)), llama(), **tokenizers)
    assert messages(report, "image tokens") == ["Student's embedding has 48 rows and none for image token id 48."]


def test_a_student_that_names_no_image_token_is_noted(tokenizers: Tokenizers) -> None:
    student = CONFIG_MAPPING["blip-2"](text_config=llama(vocab_size=49))
    report = check_compatibility(student, llama(), **tokenizers)
    assert report.image_token_ids == ()
    assert messages(report, "image tokens") == [
        "Student's config names no image token: vision and none cannot tell images from text. Use kv_sharing=full or "
        "prompt."
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (None, None, []),
        (PARTS_TEMPLATE, TEXT_TEMPLATE, []),  # another template, the same text
        (
            PARTS_TEMPLATE,
            None,
            [
                "Teacher has no chat template, the student has one: turn markers may be new to the teacher. If there "
                "is an instruct LM that the student was built from, use that one."
            ],
        ),
        (
            None,
            TEXT_TEMPLATE,
            [
                "Student has no chat template, the teacher has one: the teacher expects turn markers and sees none. "
                "If there is a base LM that the student was built from, use that one."
            ],
        ),
        (
            PARTS_TEMPLATE,
            TEXT_TEMPLATE.replace("<eos>", "<end>"),
            [
                "Chat formats differ (student: '<|user|>Question<eos><|assistant|>Answer<eos>'; teacher: "
                "'<|user|>Question<end><|assistant|>Answer<end>'): the teacher reads the student's."
            ],
        ),
    ],
    ids=["neither", "same-text", "base-teacher", "base-student", "other-markers"],
)
def test_chat_formats_are_compared_by_what_they_write(
    ours: str | None, theirs: str | None, expected: list[str]
) -> None:
    student = word_tokenizer(VOCAB, extra=("<image>",), chat_template=ours)
    report = check_tokenizers(student, word_tokenizer(VOCAB, chat_template=theirs))
    assert report.fits
    assert messages(report, "chat template") == expected

"""What keeps a pair from fitting is refused with its fix. Configs and tokenizers only, no weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairs import IDS, USE_THE_ORIGINAL_LM, VOCAB, Tokenizers, llama, messages, only, sizes, statuses, vlm
from tokenizers_for_tests import word_tokenizer
from transformers import BertConfig, CLIPVisionConfig, MistralConfig, PreTrainedConfig, Qwen2Config, T5Config

from hf_lingudistill.compatibility import TABLE_WIDTH, check_compatibility


@pytest.mark.parametrize(
    ("teacher", "name", "message"),
    [
        (
            {"num_hidden_layers": 2},
            "decoder layers",
            "Teacher has 2 layers, the student's language model has 3: KV sharing pairs layers one to one.",
        ),
        (
            {"num_hidden_layers": 1},
            "decoder layers",
            "Teacher has 1 layer, the student's language model has 3: KV sharing pairs layers one to one.",
        ),
        (
            {"num_key_value_heads": 4},
            "KV heads",
            "Teacher has 4 KV heads, the student's language model has 2: the teacher's queries attend to the "
            "student's keys and values head by head.",
        ),
        (
            {"head_dim": 16},
            "head_dim",
            "Teacher has 16 dimensions a head, the student's language model has 8: the teacher's queries and the "
            "student's keys must have the same size.",
        ),
    ],
)
def test_each_shape_that_differs_is_refused_with_the_fix(
    teacher: dict[str, Any], name: str, message: str, tokenizers: Tokenizers
) -> None:
    report = check_compatibility(vlm(), llama(**teacher), **tokenizers)
    assert statuses(report, "misfit") == {name}
    with pytest.raises(ValueError) as error:
        report.raise_for_misfit()
    assert str(error.value) == f"{message} {USE_THE_ORIGINAL_LM}"


def test_a_head_dim_that_the_config_leaves_out_follows_from_the_width(tokenizers: Tokenizers) -> None:
    teacher = Qwen2Config(**sizes(hidden_size=64))
    assert getattr(teacher, "head_dim", None) is None, "control: it is not stated"
    report = check_compatibility(vlm(Qwen2Config(**sizes(vocab_size=49))), teacher, **tokenizers)
    assert statuses(report, "misfit") == {"head_dim"}
    assert (only(report, "head_dim").student, only(report, "head_dim").teacher) == ("8", "16")


def test_all_misfits_are_told_at_once(tokenizers: Tokenizers) -> None:
    report = check_compatibility(vlm(), llama(num_hidden_layers=2, num_key_value_heads=1), **tokenizers)
    with pytest.raises(ValueError) as error:
        report.raise_for_misfit()
    assert str(error.value) == (
        "2 reasons why the teacher does not fit:\n"
        "- Teacher has 2 layers, the student's language model has 3: KV sharing pairs layers one to one. "
        f"{USE_THE_ORIGINAL_LM}\n"
        "- Teacher has 1 KV head, the student's language model has 2: the teacher's queries attend to the student's "
        f"keys and values head by head. {USE_THE_ORIGINAL_LM}"
    )


SHAPES = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 4),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([4, 8, 16]),
        "hidden_size": st.sampled_from([32, 64]),
        "num_attention_heads": st.sampled_from([4, 8]),
        "rope_theta": st.sampled_from([1e4, 1e5]),
        "sliding_window": st.sampled_from([None, 4, 8]),
    }
)


@given(ours=SHAPES, theirs=SHAPES)
def test_random_pairs_fit_if_and_only_if_their_kv_shapes_agree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    student = vlm(MistralConfig(**sizes(**ours, vocab_size=VOCAB + 1)))
    teacher = MistralConfig(**sizes(**theirs))
    report = check_compatibility(
        student, teacher, student_tokenizer=_STUDENT_TOKENIZER, teacher_tokenizer=_TEACHER_TOKENIZER
    )
    must_agree = {"num_hidden_layers": "decoder layers", "num_key_value_heads": "KV heads", "head_dim": "head_dim"}
    may_differ = {
        "hidden_size": "hidden_size",
        "num_attention_heads": "query heads",
        "rope_theta": "RoPE",
        "sliding_window": "sliding window",
    }
    assert statuses(report, "misfit") == {name for key, name in must_agree.items() if ours[key] != theirs[key]}
    expected = {name for key, name in may_differ.items() if ours[key] != theirs[key]} | {"vocabulary"}
    if ours["num_hidden_layers"] != theirs["num_hidden_layers"]:  # a window over other layers is another window
        expected |= {"sliding window"} if ours["sliding_window"] else set()
    assert statuses(report, "note") == expected
    json.dumps(report.to_dict())
    assert max(map(len, str(report).splitlines())) <= TABLE_WIDTH


_STUDENT_TOKENIZER, _TEACHER_TOKENIZER = word_tokenizer(VOCAB, extra=("<image>",)), word_tokenizer(VOCAB)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            BertConfig(**IDS, architectures=["BertForMaskedLM"]),
            "Teacher bert was saved as BertForMaskedLM: it has no language-model head.",
        ),
        (
            llama(architectures=["LlamaForSequenceClassification"]),
            "Teacher llama was saved as LlamaForSequenceClassification: it has no language-model head.",
        ),
        (T5Config(), "Teacher t5 is an encoder-decoder: KV sharing needs decoder-only models."),
        (CLIPVisionConfig(), "Teacher clip_vision_model is not a model that AutoModelForCausalLM loads."),
    ],
    ids=["masked-lm", "classifier", "encoder-decoder", "vision-encoder"],
)
def test_a_teacher_that_is_no_text_only_lm_is_refused(
    teacher: PreTrainedConfig, message: str, tokenizers: Tokenizers
) -> None:
    roles = only(check_compatibility(vlm(), teacher, **tokenizers), "roles")
    assert roles.status == "misfit"
    assert roles.reason == message


def test_a_student_without_vision_is_refused(tokenizers: Tokenizers) -> None:
    report = check_compatibility(llama(), llama(), **tokenizers)
    assert messages(report, "roles") == [
        "Student llama has no vision config: it is a text-only model. Pass the vision-language model as the student."
    ]

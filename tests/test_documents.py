"""Documents joined to one row, and rows of a batch joined for a teacher: nobody reads another's, or they are not joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import tiny_families
import torch
from datasets import Dataset
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_lingudistill import replay
from hf_lingudistill.documents import decoder_keeps_apart
from hf_lingudistill.labs.plan.known_models import BUILT_IN_PAIRS
from hf_lingudistill.queries import Vocabulary, plan_queries
from hf_lingudistill.sharing import sharing

MakeTrainer = Callable[..., Any]

LMS: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, False),
    "afmoe": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "head_dim": 8,
            "num_dense_layers": 1,
        },
        False,
    ),
    "qwen3": ({"head_dim": 8}, True),
    "llama": ({}, True),
    "olmo2": ({}, True),
}


def an_lm(kind: str) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**settings, **LMS[kind][0]})).eval()
    tiny.scale_up(model, 1.5)
    return model


@pytest.mark.parametrize("kind", LMS)
def test_a_teacher_reads_each_row_of_a_batch_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = an_lm(kind), (30, 10, 12)
    ids = torch.randint(3, 60, (3, 30), generator=torch.Generator().manual_seed(1))
    real = torch.arange(30)[None] < torch.tensor(lengths)[:, None]
    labels = ids.where(real, -100)
    labels[:, :3] = -100

    def states(ids: torch.Tensor, labels: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        plan = plan_queries(
            ids, labels, torch.ones(len(ids)).bool(), sharing=sharing("none"), vocabulary=Vocabulary(64, 64), attention_mask=real.long()
        )  # fmt: skip
        return replay.plain_pass(model, plan)

    alone = torch.cat(
        [states(*(part[row : row + 1, :n] for part in (ids, labels, real))) for row, n in enumerate(lengths)]
    )
    torch.testing.assert_close(states(ids, labels, real), alone, atol=2e-5, rtol=1e-4)
    assert replay.packs_rows(model, ids.device) is LMS[kind][1]
    # Control: joined by a model that does not look where a document ends, they are others
    monkeypatch.setattr(replay, "decoder_keeps_apart", lambda *_: True)
    gap = (states(ids, labels, real) - alone).norm() / alone.norm()
    assert (gap > 0.1) is not LMS[kind][1]


def test_it_is_tried_once_for_each_decoder() -> None:
    model = an_lm("qwen3")
    seen: list[int] = []
    hook = model.model.register_forward_pre_hook(lambda *_: seen.append(1))
    for _ in range(3):
        assert decoder_keeps_apart(model.model, 64, torch.device("cpu"))
    hook.remove()
    assert len(seen) == 2


TEXTS = Dataset.from_list(
    [
        {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": said}]}
        for asked, said in (
            ("tell me about the sea", "the sea is deep, wide and full of salt."),
            ("what shape", "a small red circle."),
            ("is there a green shape?", "it is a blue triangle. the cat sat on the mat."),
            ("yes.", "no."),
        )
    ]
)
JOINED = {"packing": {"packing": True, "max_length": 128}, "padding_free": {"padding_free": True, "max_length": None}}


@pytest.mark.parametrize("way", JOINED)
@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("HuggingFaceTB/SmolVLM-256M-Instruct", True),
        ("llava-hf/llava-1.5-7b-hf", True),
        ("OpenGVLab/InternVL3-1B-hf", True),
        ("Qwen/Qwen2.5-VL-3B-Instruct", False),
    ],
)
def test_rows_are_not_joined_for_a_student_that_reads_them_as_one(
    make_trainer: MakeTrainer, name: str, apart: bool, way: str
) -> None:
    def made(**more: Any) -> Any:
        return make_trainer(
            model=tiny_families.make_student(name),
            teacher_model=tiny_families.make_teacher(BUILT_IN_PAIRS[name]),
            processing_class=tiny_families.make_processor(tiny_families.family_of(name)),
            train_dataset=TEXTS,
            train_sampling_strategy="sequential",
            learning_rate=0.0,
            **more,
        )

    if not apart:
        with pytest.raises(
            ValueError, match=r"reads packed documents as one with attn_implementation='sdpa'.* Set packing=False"
        ):
            made(**JOINED[way])
    joined, padded = made(**JOINED[way], self_check=apart), made()
    losses = []
    for trainer in (joined, padded):
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    # Control: without the check the loss of the one that is refused is another
    assert (abs(losses[0] - losses[1]) < 1e-4 * losses[1]) is apart

"""Students that run flash attention: what the teacher reads is what it reads from the same student under sdpa.

The kernels need a GPU, so these tests put a plain stand-in of the same signature behind transformers' own flash code, which unpads,
finds documents and sets windows as it would for the real one. `-m gpu` runs the real one.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from families import _llava, build_family, randomise_, scale_logits_
from planning import plan_queries, teacher_pass
from transformers import MistralConfig, MistralForCausalLM, modeling_flash_attention_utils
from transformers.modeling_utils import PreTrainedModel

from hf_lingudistill._internals import _attention_configs, decoder_of
from hf_lingudistill.student_kv import SharedKV, recording

FLASH = "flash_attention_2"


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> torch.Tensor:
    """(T, H, D) each, by the definition of the real kernel's arguments."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    gap = torch.arange(q.shape[0])[:, None] - torch.arange(k.shape[0])
    hidden = torch.zeros_like(gap, dtype=torch.bool)
    if causal:
        hidden |= gap < 0
    if window[0] >= 0:
        hidden |= gap > window[0]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(dim=-1), v)


def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> torch.Tensor:  # fmt: skip
    CALLS.append("plain")
    return torch.stack(
        [_attend(*row, softmax_scale, causal, window_size, softcap) for row in zip(q, k, v, strict=True)]
    )


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
    return_attn_probs: bool = False, block_table: Any = None,
) -> torch.Tensor:  # fmt: skip
    CALLS.append("varlen")
    ends = cu_seqlens_q.tolist()
    parts = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
    return torch.cat([_attend(q[p], k[p], v[p], softmax_scale, causal, window_size, softcap) for p in parts])


CALLS: list[str] = []


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    utils = modeling_flash_attention_utils
    imported = (flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: imported)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    CALLS.clear()
    yield


def under(model: PreTrainedModel, implementation: str) -> None:
    """Switch the text backbone. transformers would first look for the package."""
    for config in _attention_configs(decoder_of(model)):
        config._attn_implementation = implementation


def read(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    implementation: str,
    inputs: dict[str, Any],
    mode: str,
    vocab: int,
    images: tuple[int, ...],
) -> tuple[torch.Tensor, SharedKV]:
    """The teacher's hidden states at the loss positions, with this implementation in the student."""
    under(student, implementation)
    plan = plan_queries(
        inputs["input_ids"],
        inputs["labels"],
        kv_sharing=mode,  # type: ignore[arg-type]
        shared_vocab_size=vocab,
        unreadable_token_ids=images,
        attention_mask=inputs.get("attention_mask"),
    )
    with torch.no_grad(), recording(student, keep_inputs=True) as shared:
        student(**{name: value for name, value in inputs.items() if name != "labels"})
    under(student, "sdpa")
    return teacher_pass(teacher, shared, plan), shared


@pytest.fixture(scope="module")
def mistral() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A LLaVA with a sliding window of 4, and another Mistral as its teacher."""

    def config() -> MistralConfig:
        return MistralConfig(
            vocab_size=168, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, sliding_window=4, pad_token_id=0, bos_token_id=2, eos_token_id=1,
        )  # fmt: skip

    torch.manual_seed(0)
    student, teacher = _llava(config)().eval(), MistralForCausalLM(config()).eval()
    randomise_(student, seed=1)
    randomise_(teacher, seed=2)
    scale_logits_(teacher, {"input_ids": torch.randint(5, 150, (2, 24))})
    return student, teacher


# `inputs` needs a teacher of the student's width: see test_sharing_inputs.py
@pytest.mark.parametrize(
    ("model", "padding", "mode"),
    [
        *itertools.product(["window"], ["none", "left", "right"], ["full", "prompt", "vision", "none"]),
        *itertools.product(["llama"], ["none", "left", "right"], ["prompt"]),
    ],
)
def test_the_teacher_reads_the_same_as_under_sdpa(
    mistral: tuple[PreTrainedModel, PreTrainedModel], model: str, padding: str, mode: str
) -> None:
    family = build_family("llava")
    student, teacher = mistral if model == "window" else (family.student, family.make_teacher(identical=False))
    inputs = family.make_inputs(padding, seed=0)
    of = (inputs, mode, family.text_vocab_size, family.image_token_ids)
    expected, _ = read(student, teacher, "sdpa", *of)
    actual, shared = read(student, teacher, FLASH, *of)
    assert set(CALLS) == {"plain" if padding == "none" else "varlen"}
    assert all(layer.mask is None or layer.mask.ndim == 2 for layer in shared.masks.values())
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    # the control: another student's keys and values, where any are shared, move it
    if mode != "none":
        other, _ = read(
            family.fresh_student(), teacher, "sdpa", {**inputs, "pixel_values": -inputs["pixel_values"]}, *of[1:]
        )
        assert (other - expected).abs().max() > 0.05


@pytest.mark.parametrize("mode", ["full", "prompt"])
def test_a_window_that_is_forgotten_is_found(mistral: tuple[PreTrainedModel, PreTrainedModel], mode: str) -> None:
    family, (student, teacher) = build_family("llava"), mistral
    inputs = family.make_inputs("right", seed=0)
    of = (inputs, mode, family.text_vocab_size, family.image_token_ids)
    expected, _ = read(student, teacher, "sdpa", *of)
    under(student, FLASH)
    plan = plan_queries(
        inputs["input_ids"], inputs["labels"], kv_sharing=mode, shared_vocab_size=of[2], unreadable_token_ids=of[3],
        attention_mask=inputs["attention_mask"],
    )  # fmt: skip
    with torch.no_grad(), recording(student) as shared:
        student(**{name: value for name, value in inputs.items() if name != "labels"})
    under(student, "sdpa")
    for layer, mask in shared.masks.items():
        shared.masks[layer] = type(mask)(mask.mask, mask.is_causal, None, mask.cu_seq_lens)
    assert (teacher_pass(teacher, shared, plan) - expected).abs().max() > 0.05


def packed(how: str) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Three documents in one row, told by lengths or by positions alone -> (inputs, the documents)."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(10, 300, (size,), generator=generator) for size in (7, 5, 9)]
    ends = torch.tensor([0, 7, 12, 21], dtype=torch.int32)
    inputs = {
        "input_ids": torch.cat(documents)[None],
        "labels": torch.cat([torch.cat([torch.full((3,), -100), ids[3:]]) for ids in documents])[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in documents])[None],
    }
    if how == "lengths":
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    return inputs, documents


@pytest.mark.parametrize("mode", ["full", "prompt"])
@pytest.mark.parametrize("how", ["lengths", "positions"])
def test_packed_documents_do_not_see_each_other(how: str, mode: str) -> None:
    """Each document as the teacher would answer it alone; also where only the positions tell where one begins."""
    student, teacher = tiny.make_vlm(0), tiny.make_lm(1)
    vocab = len(tiny.make_tokenizer(extra=False))
    inputs, documents = packed(how)
    actual, _ = read(student, teacher, FLASH, inputs, mode, vocab, ())
    assert set(CALLS) == {"varlen"}
    alone = []
    for ids in documents:
        labels = torch.cat([torch.full((3,), -100), ids[3:]])[None]
        alone.append(read(student, teacher, "sdpa", {"input_ids": ids[None], "labels": labels}, mode, vocab, ())[0])
    torch.testing.assert_close(actual, torch.cat(alone), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["full", "prompt"])
def test_a_leak_between_documents_is_found(mode: str) -> None:
    """The control: the same record without the boundaries gives something else."""
    student, teacher = tiny.make_vlm(0), tiny.make_lm(1)
    vocab = len(tiny.make_tokenizer(extra=False))
    inputs, _ = packed("positions")
    expected, _ = read(student, teacher, FLASH, inputs, mode, vocab, ())
    under(student, FLASH)
    plan = plan_queries(inputs["input_ids"], inputs["labels"], kv_sharing=mode, shared_vocab_size=vocab)  # type: ignore[arg-type]
    with torch.no_grad(), recording(student) as shared:
        student(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"])
    for layer, mask in shared.masks.items():
        assert mask.cu_seq_lens is not None and mask.cu_seq_lens.tolist() == [0, 7, 12, 21]
        shared.masks[layer] = type(mask)(mask.mask, mask.is_causal, mask.sliding_window, None)
    assert (teacher_pass(teacher, shared, plan) - expected).abs().max() > 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_the_real_kernel(monkeypatch: pytest.MonkeyPatch, padding: str) -> None:
    """bf16, as the kernel takes no other; sdpa in bf16 beside it."""
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    monkeypatch.undo()
    family = build_family("llava")
    student = family.fresh_student().to("cuda", torch.bfloat16)
    teacher = family.make_teacher(identical=False).to("cuda", torch.bfloat16)
    inputs = {name: value.cuda() for name, value in family.make_inputs(padding, seed=0).items()}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    of = (inputs, "full", family.text_vocab_size, family.image_token_ids)
    expected, _ = read(student, teacher, "sdpa", *of)
    actual, _ = read(student, teacher, FLASH, *of)
    assert (actual.float() - expected.float()).norm() < 0.03 * expected.float().norm()

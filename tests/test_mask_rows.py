"""The student's mask rows at the queries: every form in which a model passes its mask, against a mask built by loops.

The masks come from transformers' own mask functions, as the families' models call them: sdpa (boolean, or None), eager
(additive), flash (the padding mask, or None, with windows and documents as arguments) and flex (a rule).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from planning import plan_queries, teacher_pass
from torch.nn.attention.flex_attention import create_block_mask
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, masking_utils
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from hf_lingudistill.replay import attend, mask_rows
from hf_lingudistill.student_kv import LayerMask, recording

B, T = 3, 10
WINDOW = 3
PADDING = {
    "none": [[1] * T] * B,
    "right": [[1] * T, [1] * 7 + [0] * 3, [1] * 4 + [0] * 6],
    "left": [[1] * T, [0] * 3 + [1] * 7, [0] * 6 + [1] * 4],
}


@pytest.fixture(autouse=True)
def _flex_masks_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers compiles each block mask for the GPU's sake: a minute here, and the rule in it is the same."""

    def uncompiled(*args: Any, _compile: bool, **kwargs: Any) -> Any:
        return create_block_mask(*args, **kwargs)

    monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled)


def visible(
    query: int, key: int, *, causal: bool = True, window: int | None = None, documents: Sequence[int] | None = None
) -> bool:
    """Whether a query sees a key, by the meaning of the words. documents: which document each position is of."""
    if causal and key > query:
        return False
    if window is not None and query - key >= window:  # a window of 1 sees itself only
        return False
    return documents is None or documents[query] == documents[key]


def dense(padding: Sequence[Sequence[int]] = PADDING["none"], **rules: Any) -> torch.Tensor:
    """(B, T, T) bool, cell by cell."""
    cells = [[[bool(row[k]) and visible(q, k, **rules) for k in range(T)] for q in range(T)] for row in padding]
    return torch.tensor(cells)


# R = 2 of the B rows, Q = 4 queries; the second row has three, so that its last slot repeats the first.
ROWS = torch.tensor([0, 2])
QUERIES = {
    "none": torch.tensor([[1, 4, 5, 9], [0, 2, 7, 0]]),
    "right": torch.tensor([[1, 4, 5, 9], [0, 2, 3, 0]]),
    "left": torch.tensor([[1, 4, 5, 9], [6, 7, 9, 6]]),
}


def layer(
    mask: Any = None,
    is_causal: bool = True,
    sliding_window: int | None = None,
    cu_seq_lens: torch.Tensor | None = None,
) -> LayerMask:
    return LayerMask(mask, is_causal, sliding_window, cu_seq_lens)


def rows_of(full: torch.Tensor, rows: torch.Tensor = ROWS, queries: torch.Tensor = QUERIES["none"]) -> torch.Tensor:
    """(B, T, T) -> (R, 1, Q, T), by loops."""
    picked = [[full[int(row), int(q)] for q in positions] for row, positions in zip(rows, queries, strict=True)]
    return torch.stack([torch.stack(row) for row in picked])[:, None]


def as_visible(mask: torch.Tensor) -> torch.Tensor:
    """Boolean from a mask that is boolean or additive."""
    if mask.dtype == torch.bool:
        return mask
    assert ((mask == 0) | (mask <= torch.finfo(mask.dtype).min)).all()
    return mask == 0


def assert_rows(recorded: LayerMask, full: torch.Tensor, rows: torch.Tensor = ROWS, padding: str = "none") -> None:
    queries = QUERIES[padding]
    actual = mask_rows(recorded, rows, queries, T)
    expected = rows_of(full, rows, queries)
    assert actual.shape == expected.shape
    assert torch.equal(as_visible(actual), expected)
    # Control: the neighbouring queries have other rows, so that an offset by one would be seen.
    assert not torch.equal(as_visible(actual), rows_of(full, rows, (queries + 1) % T))


def model_mask(
    implementation: str, padding: str, window: int | None = None, documents: Sequence[int] | None = None
) -> Any:
    """The mask that a model with this attention implementation builds."""
    config = MistralConfig(sliding_window=window, num_hidden_layers=1)
    config._attn_implementation = implementation
    batch = 1 if documents is not None else B
    position_ids = None
    if documents is not None:
        position_ids = torch.tensor([[t - documents.index(documents[t]) for t in range(T)]])
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    attention_mask = None if documents is not None else torch.tensor(PADDING[padding])
    return make(config, torch.zeros(batch, T, 8), attention_mask, None, position_ids)


# --------------------------------------------------------------------------------------------------------------------
# As models pass them
# --------------------------------------------------------------------------------------------------------------------
KINDS = {
    "sdpa": (torch.Tensor, 4, torch.bool),
    "eager": (torch.Tensor, 4, torch.float32),
    "flash_attention_2": (torch.Tensor, 2, torch.bool),
    "flex_attention": (object, None, None),
}


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("implementation", KINDS)
def test_rows_equal_those_of_the_dense_mask(implementation: str, padding: str, window: int | None) -> None:
    mask = model_mask(implementation, padding, window)
    kind, ndim, dtype = KINDS[implementation]
    if mask is None:  # what sdpa and flash pass for "causal, no padding"
        assert padding == "none" and implementation in ("sdpa", "flash_attention_2")
    else:
        assert isinstance(mask, kind)
        assert ndim is None or (mask.ndim == ndim and mask.dtype == dtype)
    assert_rows(layer(mask, sliding_window=window), dense(PADDING[padding], window=window), padding=padding)


def test_the_dense_masks_differ_from_one_another() -> None:
    """Control of the test above: no form of mask would pass for another."""
    masks = [dense(PADDING[p], window=w) for p in PADDING for w in (None, WINDOW)]
    for first in range(len(masks)):
        for second in range(first):
            assert not torch.equal(masks[first], masks[second])


@pytest.mark.parametrize("row", range(B))
def test_each_row_of_the_batch_gets_its_own_mask(row: int) -> None:
    """One distilled row of three: the mask is indexed by batch row, not by its place among the distilled."""
    queries = torch.tensor([[6, 9]])
    for implementation in KINDS:
        mask = model_mask(implementation, "left")
        actual = as_visible(mask_rows(layer(mask), torch.tensor([row]), queries, T))
        assert torch.equal(actual, rows_of(dense(PADDING["left"]), torch.tensor([row]), queries)), implementation
        other = rows_of(dense(PADDING["left"]), torch.tensor([(row + 1) % B]), queries)
        assert not torch.equal(actual, other)  # control


# --------------------------------------------------------------------------------------------------------------------
# Forms that only some models have
# --------------------------------------------------------------------------------------------------------------------
def test_a_4d_mask_of_batch_one_serves_every_row() -> None:
    full = dense(window=4)
    for mask in (full[:1, None], torch.zeros(1, 1, T, T).masked_fill(~full[:1, None], torch.finfo(torch.float32).min)):
        assert_rows(layer(mask), full)


def test_additive_masks_keep_their_values() -> None:
    """Position biases added to the mask are more than visible or not."""
    mask = torch.randn(B, 1, T, T)
    assert torch.equal(mask_rows(layer(mask), ROWS, QUERIES["none"], T), rows_of(mask[:, 0]))


def test_a_mask_with_a_head_dimension_keeps_its_heads() -> None:
    heads = torch.stack([dense(window=w) for w in (1, 2, 5)], dim=1)  # (B, heads, T, T)
    actual = mask_rows(layer(heads), ROWS, QUERIES["none"], T)
    assert actual.shape == (2, 3, 4, T)
    for head in range(3):
        assert torch.equal(actual[:, head : head + 1], rows_of(heads[:, head]))


def test_a_mask_over_more_keys_than_there_are_is_cut() -> None:
    full = dense(window=4)
    longer = torch.cat([full, torch.ones(B, T, 6, dtype=torch.bool)], dim=2)[:, None]
    assert_rows(layer(longer), full)


def test_no_mask_and_not_causal_sees_everything() -> None:
    everything = mask_rows(layer(is_causal=False), ROWS, QUERIES["none"], T)
    assert everything.shape == (2, 1, 4, T) and everything.all()
    assert not mask_rows(layer(is_causal=True), ROWS, QUERIES["none"], T).all()  # control


def test_a_padding_mask_without_causality_hides_padding_only() -> None:
    padding = torch.tensor(PADDING["right"])
    actual = mask_rows(layer(padding, is_causal=False), ROWS, QUERIES["right"], T)
    assert torch.equal(actual, rows_of(dense(PADDING["right"], causal=False), ROWS, QUERIES["right"]))


def test_a_flex_rule_that_reads_per_row_data_is_evaluated_at_the_queries() -> None:
    """A bidirectional block (an image) in another place in every row, as Gemma3's rule has it."""
    block = torch.full((B, T), -1)
    block[0, 2:5], block[1, 0:3], block[2, 6:9] = 0, 0, 0

    def rule(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) | ((block[b, q] == block[b, k]) & (block[b, q] >= 0))

    mask = create_block_mask(rule, B, None, T, T, device="cpu")
    full = torch.tensor(
        [
            [[k <= q or (bool(block[b, q] == 0) and bool(block[b, k] == 0)) for k in range(T)] for q in range(T)]
            for b in range(B)
        ]
    )
    assert not torch.equal(full, dense())  # control: the block is seen
    actual = mask_rows(layer(mask), torch.tensor([0, 1, 2]), torch.tensor([[2, 4], [0, 9], [6, 7]]), T)
    assert torch.equal(actual, rows_of(full, torch.tensor([0, 1, 2]), torch.tensor([[2, 4], [0, 9], [6, 7]])))


# --------------------------------------------------------------------------------------------------------------------
# Packed documents
# --------------------------------------------------------------------------------------------------------------------
DOCUMENTS = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
CU_SEQ_LENS = torch.tensor([0, 4, 6, 10], dtype=torch.int32)
PACKED_ROW, PACKED_QUERIES = torch.tensor([0]), torch.tensor([[1, 3, 4, 5, 6, 9]])


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
@pytest.mark.parametrize("implementation", KINDS)
def test_packed_documents_do_not_see_each_other(implementation: str, window: int | None) -> None:
    mask = model_mask(implementation, "none", window, DOCUMENTS)
    full = dense([[1] * T], documents=DOCUMENTS, window=window)
    recorded = layer(mask, sliding_window=window, cu_seq_lens=CU_SEQ_LENS)
    actual = as_visible(mask_rows(recorded, PACKED_ROW, PACKED_QUERIES, T))
    assert torch.equal(actual, rows_of(full, PACKED_ROW, PACKED_QUERIES))


def test_flash_leaks_across_documents_without_their_lengths() -> None:
    """Control of the test above: flash's mask says nothing of documents, the lengths do."""
    mask = model_mask("flash_attention_2", "none", None, DOCUMENTS)
    leaky = mask_rows(layer(mask), PACKED_ROW, PACKED_QUERIES, T)
    assert torch.equal(leaky, rows_of(dense([[1] * T]), PACKED_ROW, PACKED_QUERIES))
    assert (leaky & ~rows_of(dense([[1] * T], documents=DOCUMENTS), PACKED_ROW, PACKED_QUERIES)).any()


@pytest.fixture(scope="module")
def tiny_lm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.ndim == 1 else 8.0)  # attention must be peaked for a leak to show
    return model.requires_grad_(False)


def packed_hidden(
    model: LlamaForCausalLM, input_ids: torch.Tensor, mode: Any, packed: bool
) -> tuple[Any, torch.Tensor]:
    """(student's, teacher's) hidden states of a model that teaches itself, at the loss positions of one packed row."""
    arguments: dict[str, Any] = {"input_ids": input_ids}
    if packed:
        arguments["position_ids"] = torch.tensor([[t - DOCUMENTS.index(DOCUMENTS[t]) for t in range(T)]])
        arguments |= {"cu_seq_lens_q": CU_SEQ_LENS, "cu_seq_lens_k": CU_SEQ_LENS, "max_length_q": 4, "max_length_k": 4}
    labels = input_ids.clone()
    labels[:, [0, 4, 6]] = -100  # no document predicts the next one's first token
    plan = plan_queries(input_ids, labels, kv_sharing=mode, shared_vocab_size=32)
    with recording(model) as shared:
        model(**arguments, use_cache=False)
    student = shared.last_hidden_state[plan.loss_rows, plan.loss_positions]
    return student, teacher_pass(model, shared, plan)


@pytest.mark.parametrize("mode", ["full", "prompt", "vision"])
def test_a_teacher_of_packed_rows_reads_one_document_at_a_time(tiny_lm: LlamaForCausalLM, mode: str) -> None:
    input_ids = torch.randint(1, 32, (1, T))
    other = input_ids.clone()
    other[:, :4] = (other[:, :4] + 7) % 31 + 1  # another first document
    student, teacher = packed_hidden(tiny_lm, input_ids, mode, packed=True)
    torch.testing.assert_close(teacher, student, atol=1e-4, rtol=0)
    _, after_other = packed_hidden(tiny_lm, other, mode, packed=True)
    later = slice(3, None)  # loss positions 0, 1, 2 are of the first document
    torch.testing.assert_close(after_other[later], teacher[later], atol=1e-4, rtol=0)
    assert (after_other[:3] - teacher[:3]).abs().max() > 1e-2
    # Control: as one document, the later text depends on the first.
    _, joined = packed_hidden(tiny_lm, input_ids, mode, packed=False)
    _, joined_other = packed_hidden(tiny_lm, other, mode, packed=False)
    assert (joined_other[later] - joined[later]).abs().max() > 1e-2


@pytest.mark.parametrize("folded", [False, True], ids=["a mask per query", "heads folded into queries"])
def test_a_kernel_may_lay_its_answer_out_in_any_order(folded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's fp32 kernel answers (R, H, W, D) that lies in memory as (R, W, H, D); a CPU's does not."""
    functional = torch.nn.functional
    plain = functional.scaled_dot_product_attention
    R, H, kv_heads, W, T, D = 2, 4, 2, 3, 5, 8
    query, key, value = (torch.randn(R, heads, n, D) for heads, n in ((H, W), (kv_heads, T), (kv_heads, T)))
    mask = torch.zeros(R, 1, W, T).masked_fill_(torch.rand(R, 1, W, T) < 0.3, -torch.inf)
    mask[..., 0] = 0.0
    if folded:
        mask = mask.repeat(1, 1, H // kv_heads, 1)
    expected = attend(query, key, value, mask)

    def as_on_cuda(*args: Any, **kwargs: Any) -> torch.Tensor:
        answer = plain(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)
        assert not answer.is_contiguous()
        return answer

    monkeypatch.setattr(functional, "scaled_dot_product_attention", as_on_cuda)
    assert torch.equal(attend(query, key, value, mask), expected)

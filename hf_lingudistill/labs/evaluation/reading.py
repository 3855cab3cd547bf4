"""How a model reads an answer that is given, and how it writes one of its own: batches in, hidden states or token ids out.

B rows, T positions, n tokens of one answer, H hidden size, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image as PILImage
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..._internals import Head, head_of
from ..statistics import OVERFLOW, NotFiniteScore
from .models import Scored, user_turn

Images = Sequence[PILImage.Image]


@dataclass(frozen=True)
class Written:
    """An answer of a model's own. ids: its tokens, the one that ends its turn included if it wrote one (`stopped`)."""

    ids: tuple[int, ...]
    stopped: bool


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------
def answer_inputs(
    scored: Scored, prompts: Sequence[str], images: Sequence[Images], ids: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], torch.Tensor]:
    """Model inputs of rendered prompts with their images, followed by answers. -> (inputs, labels (B, T_answer)).

    Prompts end at the same column (left padding), so the answers start at the same one; labels are -100 behind an answer's end.
    """
    inputs = dict(scored.with_images(prompts, images))
    longest = max(map(len, ids))
    padded = [[*row, *[-100] * (longest - len(row))] for row in ids]
    labels = torch.tensor(padded, dtype=torch.long, device=scored.model.device)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], labels.clamp(min=0)], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], (labels != -100).long()], dim=1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            # Text is of type 0, except in a prefix LM, where 0 would let each answer token see those after it
            kind = int(scored.model.config.model_type == "paligemma")
            inputs[name] = torch.cat([inputs[name], torch.full_like(labels, kind)], dim=1)
    return inputs, labels


def text_types(model: Any, ids: torch.Tensor, starts: Sequence[int]) -> dict[str, torch.Tensor]:
    """What a prefix LM (PaliGemma) needs beside rows of text, ids (B, T), to read them onward from `starts` on: without it, every token sees
    all of its row, padding included. Nothing for other models."""
    if model.config.model_type != "paligemma":
        return {}
    columns = torch.arange(ids.size(1), device=ids.device)
    return {"token_type_ids": (columns >= torch.tensor(starts, device=ids.device)[:, None]).long()}


@torch.inference_mode()
def answer_states(
    scored: Scored, prompts: Sequence[str], images: Sequence[Images], ids: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """The last hidden states from which each answer's tokens are predicted, (n, H) per row, on the model's device.

    prompts: B rendered prompts. images: B lists, all empty for a plain LM. ids: B answers of at least one token.
    """
    backbone: Any = scored.model.base_model
    if any(map(len, images)):
        inputs, labels = answer_inputs(scored, prompts, images, ids)
        start = inputs["input_ids"].size(1) - labels.size(1)
        starts = [start] * len(ids)
        states = backbone(**inputs, use_cache=False).last_hidden_state
    else:
        heads = [scored.ids(prompt) for prompt in prompts]
        starts = [len(head) for head in heads]
        rows = [[*head, *answer] for head, answer in zip(heads, ids, strict=True)]
        longest, device = max(map(len, rows)), scored.model.device
        # On the right: positions start at 0 in every row, which models with absolute positions need
        inputs = {
            "input_ids": torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device),
            "attention_mask": torch.tensor(
                [[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device
            ),
        }
        types = text_types(scored.model, inputs["input_ids"], starts)
        states = backbone(**inputs, **types, use_cache=False).last_hidden_state
    return [states[row, first - 1 : first - 1 + len(ids[row])] for row, first in enumerate(starts)]


@torch.inference_mode()
def answering_head(scored: Scored) -> Head:
    """The head with which the model answers, in fp32: held against the logits that its own forward gives.

    A family's VLM may leave out the logit scale that its LM applies; its config still names it.

    Raises:
        ValueError: if neither with nor without scale and soft-capping it gives the model's own logits.
    """
    ids = torch.tensor([scored.ids(scored.render(user_turn("Hello"))) or [0]], device=scored.model.device)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "use_cache": False,
        **text_types(scored.model, ids, [0]),
    }
    state = scored.model.base_model(**inputs).last_hidden_state[:, -1]
    own = scored.model(**inputs).logits[:, -1].float()
    declared = head_of(scored.model)
    for head in (declared, Head(declared.weight, declared.bias)):
        whole = Head(head.matrix.float(), None if head.bias is None else head.bias.float(), head.scale, head.softcap)
        error = (logits(state, whole) - own).abs().max()
        if error <= 0.02 * own.abs().max() + 1e-3:  # bf16 keeps three digits
            return whole
    raise ValueError(
        f"{scored.name}: its output head does not give its own logits (they differ by {float(error):.3g}), so that its distributions "
        "cannot be compared; leave `fidelity` out of the suite."
    )


def logits(states: torch.Tensor, head: Head) -> torch.Tensor:
    """(n, H) -> (n, V) in fp32, with logit scale and soft-capping. head: in fp32."""
    found = torch.nn.functional.linear(states.float(), head.matrix, head.bias) * head.scale
    return found if head.softcap is None else head.softcap * torch.tanh(found / head.softcap)


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------
def end_of_turn(scored: Scored) -> int | None:
    """The id of the token with which the chat template ends an assistant's turn; the eos token where it writes none."""
    marker = "lighthouse"
    turns = [*user_turn("What is it?"), {"role": "assistant", "content": marker}]
    tail = scored.ids(scored.render(turns, answer=False).rpartition(marker)[2])
    special = set(scored.tokenizer.all_special_ids) | set(scored.tokenizer.added_tokens_decoder)
    return next((token for token in tail if token in special), scored.tokenizer.eos_token_id)


def stop_ids(scored: Scored) -> set[int]:
    """Every id that ends the model's answer: what its generation config says, and its template's end of turn."""
    eos = getattr(scored.model.generation_config, "eos_token_id", None)
    found = set(eos) if isinstance(eos, list | tuple) else {eos}
    return {int(token) for token in (*found, end_of_turn(scored), scored.tokenizer.eos_token_id) if token is not None}


def check_logits(logits: torch.Tensor, name: str) -> None:
    """Raise NotFiniteScore for a distribution over tokens that is none: an answer picked from NaN would be scored like any other.

    logits: (..., V). A token that is ruled out may have minus infinity.
    """
    if not torch.isfinite(logits.amax(dim=-1)).all():
        raise NotFiniteScore(f"{name}: its logits are not finite. {OVERFLOW}")


class FiniteLogits(LogitsProcessor):
    """`check_logits` at every token that is written."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        check_logits(scores, self.name)
        return scores


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Inside, the model's generation config holds its special tokens alone; afterwards it is the checkpoint's own again.

    `generate` fills in every field that it is not given from there: suppressed tokens, a least length, biases, penalties.
    """
    own = model.generation_config
    tokens = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    try:
        yield
    finally:
        model.generation_config = own


class _Drawn(LogitsProcessor):
    """Makes greedy decoding a sample: all but one token per row are ruled out. A row's draws are its own, so that a sample does not
    depend on what it is batched with: one number in [0, 1) per step, and the token at which the summed probabilities pass it."""

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = torch.stack([torch.rand(1, generator=generator) for generator in self.generators]).to(scores.device)
        passed = (scores.float() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        # The sum ends a rounding beside 1; `right`: a token of probability 0 passes nothing
        token = torch.searchsorted(passed, drawn * passed[:, -1:], right=True).clamp(max=scores.size(1) - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


@torch.inference_mode()
def write_answers(
    scored: Scored,
    prompts: Sequence[str],
    images: Sequence[Images],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
) -> list[Written]:
    """Continue rendered prompts, batched and with a KV cache, from the model's plain distribution: greedy at temperature 0, else
    sampled with one seed per row. Of the model's generation config only the stops count."""
    if any(map(len, images)):
        inputs = dict(scored.with_images(prompts, images))
    else:
        rows = [scored.ids(prompt) for prompt in prompts]
        longest, device = max(map(len, rows)), scored.model.device
        inputs = {
            "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device),
            "attention_mask": torch.tensor(
                [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device
            ),
        }
    stops = stop_ids(scored)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(stops),
        pad_token_id=next(iter(sorted(stops))),
    )
    drawn = [_Drawn(temperature, seeds)] if temperature > 0 else []
    processors = LogitsProcessorList([FiniteLogits(scored.name), *drawn])
    with plain_generation(scored.model):
        output = scored.model.generate(**inputs, generation_config=config, logits_processor=processors)
    found = []
    for row in output[:, inputs["input_ids"].size(1) :].tolist():
        end = next((position for position, token in enumerate(row) if token in stops), None)
        found.append(Written(tuple(row if end is None else row[: end + 1]), end is not None))
    return found

"""Two cheap measurements: perplexity on text, and the accuracy of short answers about an image.

Each takes an LM or a VLM as it is; a VLM's text path is the VLM called without an image.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

Processing = PreTrainedTokenizerBase | ProcessorMixin


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _tokenizer(processing: Any) -> Any:
    return processing.tokenizer if isinstance(processing, ProcessorMixin) else processing


def _padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> torch.Tensor:
    """(B, T) long, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=device)


def text_perplexity(
    model: PreTrainedModel,
    processing: Processing,
    texts: Sequence[str],
    *,
    max_tokens: int = 160,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Next-token loss on running text, no image and no chat template.

    Every token but a text's first is scored, up to `max_tokens` tokens per text. Returns

    - `perplexity`: exp of `nll_per_token`;
    - `nll_per_token`: mean over all tokens, nats;
    - `bits_per_byte`: the same loss over the UTF-8 bytes of the scored text, comparable between tokenizers;
    - `nll`, `tokens`: per text, sum of nats and number of scored tokens (to resample texts from);
    - `n_texts`, `n_tokens`.

    Raises:
        ValueError: if there is no text, or a text has fewer than two tokens.
    """
    tokenizer = _tokenizer(processing)
    if not texts:
        raise ValueError("No text to measure perplexity on; pass at least one.")
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens] for text in texts]
    if short := [index for index, row in enumerate(rows) if len(row) < 2]:
        raise ValueError(
            f"Text {short[0]} has fewer than two tokens, so there is no next token to score; leave it out."
        )
    scored_bytes = sum(len(tokenizer.decode(row).encode()) - len(tokenizer.decode(row[:1]).encode()) for row in rows)
    nll: list[float] = []
    with _evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            input_ids = _padded(batch, 0, model.device)
            attention_mask = _padded([[1] * len(row) for row in batch], 0, model.device)
            labels = _padded(batch, -100, model.device)[:, 1:]
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
            nll.extend(loss.double().sum(dim=1).tolist())
    tokens = [len(row) - 1 for row in rows]
    per_token = sum(nll) / sum(tokens)
    return {
        "perplexity": math.exp(per_token),
        "nll_per_token": per_token,
        "bits_per_byte": sum(nll) / math.log(2) / scored_bytes,
        "nll": nll,
        "tokens": tokens,
        "n_texts": len(rows),
        "n_tokens": sum(tokens),
    }


def shuffled_images(n: int, seed: int) -> list[int]:
    """A permutation of range(n) that leaves no item in place: which item's image each item gets.

    Raises:
        ValueError: if n < 2.
    """
    if n < 2:
        raise ValueError(f"Shuffling images needs at least 2 items; got {n}.")
    order = list(range(n))
    random.Random(seed).shuffle(order)
    # One cycle through all items, in random order, has no fixed point.
    image_of = [0] * n
    for position, item in enumerate(order):
        image_of[item] = order[(position + 1) % n]
    return image_of


def what_accuracy(
    vlm: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Dataset,
    *,
    shuffled: bool = False,
    batch_size: int = 50,
    seed: int = 0,
) -> dict[str, Any]:
    """Share of rows whose greedy answer is the row's completion, exactly.

    Greedy decoding writes the completion if and only if each of its tokens, the end of the turn included, is the most
    likely one after those before it. One forward pass per batch decides that, with nothing generated.
    With `shuffled`, every question is asked about another row's image: what is left is what can be guessed blind.
    Returns `accuracy`, `correct` (per row), `n`, and `by_answer` ({answer: [correct, asked]}).

    rows: the columns of `vqa.vqa_rows`, one image each.
    """
    image_of = shuffled_images(len(rows), seed) if shuffled else list(range(len(rows)))
    images = rows["images"]
    tokenizer = _tokenizer(processor)
    correct: list[bool] = []
    answers = [completion[0]["content"] for completion in rows["completion"]]
    with _evaluating(vlm):
        for start in range(0, len(rows), batch_size):
            indices = range(start, min(start + batch_size, len(rows)))
            prompts, completions = [], []
            for index in indices:
                prompt = _render(processor, rows[index]["prompt"][0]["content"], with_image=True)
                turn = [*_messages(rows[index]["prompt"][0]["content"], True), *rows[index]["completion"]]
                whole = processor.apply_chat_template(turn, tokenize=False)
                prompts.append(prompt)
                completions.append(whole[len(prompt) :].rstrip("\n"))
            inputs = processor(
                text=prompts,
                images=[list(images[image_of[index]]) for index in indices],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
            )
            targets = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
            labels = _padded(targets, -100, torch.device("cpu"))
            # Prompts end at the same column (left padding), so the answers start at the same one.
            inputs["input_ids"] = torch.cat([inputs["input_ids"], labels.clamp(min=0)], dim=1)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], (labels != -100).long()], dim=1)
            logits = vlm(**inputs.to(vlm.device), logits_to_keep=labels.size(1) + 1, use_cache=False).logits
            hit = (logits[:, :-1].argmax(dim=-1).cpu() == labels) | (labels == -100)
            correct.extend(hit.all(dim=1).tolist())
    by_answer: dict[str, list[int]] = {}
    for answer_text, right in zip(answers, correct, strict=True):
        tally = by_answer.setdefault(answer_text, [0, 0])
        tally[0] += right
        tally[1] += 1
    return {"accuracy": sum(correct) / len(correct), "correct": correct, "n": len(correct), "by_answer": by_answer}


def _messages(prompt: str, with_image: bool) -> list[dict[str, Any]]:
    if not with_image:
        return [{"role": "user", "content": prompt}]
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]


def _render(processing: Any, prompt: str, with_image: bool) -> str:
    return str(
        processing.apply_chat_template(_messages(prompt, with_image), tokenize=False, add_generation_prompt=True)
    )

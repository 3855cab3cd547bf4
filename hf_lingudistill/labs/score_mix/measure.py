"""What one row says: the student reads its answer with and without the image, the teacher reads it as text.

n tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...progress import progress_bar
from ..diagnose.prompts import Prompt
from ..evaluation.cache import ItemCache
from ..evaluation.grounded import answer_scores
from ..evaluation.models import Scored
from ..evaluation.reading import answer_states, answering_head, logits

Record = Mapping[str, Any]
Read = Callable[[Sequence[Prompt]], list[Record]]


def student_reader(student: Scored, max_answer_tokens: int) -> Read:
    """Reads rows, all with images or all without, as {"tokens": of the whole answer, "with", "without": n nats each}; rows without an
    image have no "without"."""

    def read(batch: Sequence[Prompt]) -> list[Record]:
        whole = [student.ids(prompt.answer) for prompt in batch]
        ids = [row[:max_answer_tokens] for row in whole]
        shown = _nats(student, [prompt.messages for prompt in batch], [prompt.images for prompt in batch], ids)
        found = [{"tokens": len(row), "with": nats} for row, nats in zip(whole, shown, strict=True)]
        if batch[0].images:
            blind = _nats(student, [without_images(prompt.messages) for prompt in batch], [()] * len(batch), ids)
            found = [{**record, "without": nats} for record, nats in zip(found, blind, strict=True)]
        return list(found)

    return read


def teacher_reader(teacher: Scored, max_answer_tokens: int) -> Read:
    """Reads rows as {"tokens": read, "entropy", "nats": sums over them}: the teacher reads the text alone, by its own chat template."""
    head = answering_head(teacher)

    @torch.inference_mode()
    def read(batch: Sequence[Prompt]) -> list[Record]:
        ids = [teacher.ids(prompt.answer)[:max_answer_tokens] for prompt in batch]
        asked = [teacher.render(as_texts(prompt.messages)) for prompt in batch]
        found: list[Record] = []
        for states, row in zip(answer_states(teacher, asked, [()] * len(batch), ids), ids, strict=True):
            log_probs = logits(states, head).log_softmax(dim=-1)
            entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
            said = log_probs.gather(1, torch.tensor(row, device=log_probs.device)[:, None])
            found.append(
                {"tokens": len(row), "entropy": float(entropy.double().sum()), "nats": float(-said.double().sum())}
            )
        return found

    return read


def read_all(
    prompts: Sequence[Prompt], read: Read, cache: ItemCache, *, batch_size: int, bar: str | None
) -> dict[str, Record]:
    """{key: record} of every row; those that the cache holds are not read again. bar: what a progress bar says; None for none."""
    todo = [prompt for prompt in prompts if prompt.key not in cache]
    shown = progress_bar(
        total=len(prompts), initial=len(prompts) - len(todo), desc=bar, unit="row", disable=bar is None
    )
    for batch in _batches(todo, batch_size):
        cache.add({prompt.key: record for prompt, record in zip(batch, read(batch), strict=True)})
        shown.update(len(batch))
    shown.close()
    return {prompt.key: cache.records[prompt.key] for prompt in prompts}


def _nats(
    student: Scored, turns: Sequence[Any], images: Sequence[Any], ids: Sequence[Sequence[int]]
) -> list[list[float]]:
    rows = answer_scores(student, [student.render(list(t)) for t in turns], images, ids)
    return [[-log_prob for log_prob, _ in row] for row in rows]


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Rows with images, then rows without: a processor takes one kind at a time."""
    for seeing in (True, False):
        kind = [prompt for prompt in prompts if bool(prompt.images) is seeing]
        yield from (kind[start : start + size] for start in range(0, len(kind), size))


def without_images(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with no image shown and no place for one."""
    return [{**turn, "content": _parts_of_text(turn["content"])} for turn in messages]


def as_texts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same for a chat template that takes texts alone."""
    return [
        {**turn, "content": "".join(part["text"] for part in _parts_of_text(turn["content"]))} for turn in messages
    ]


def _parts_of_text(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part for part in content if part["type"] == "text"]

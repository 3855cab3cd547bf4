"""What one row says: the student reads its answer with its image and with a grey one, the teacher reads it as text.

n tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...progress import progress_bar
from ..diagnose.prompts import Prompt
from ..evaluation.cache import ItemCache
from ..evaluation.data import grey
from ..evaluation.grounded import answer_scores
from ..evaluation.models import Scored
from ..evaluation.reading import answer_states, answering_head, logits

Record = Mapping[str, Any]
Read = Callable[[Sequence[Prompt]], list[Record]]


def student_reader(student: Scored, max_answer_tokens: int) -> Read:
    """Reads rows, all with images or all without, as {"tokens": of the whole answer, "own", "grey": n nats each}. "grey": behind even grey
    images of the same sizes, so that a student that does not see has the same nats; rows without an image have none."""

    def read(batch: Sequence[Prompt]) -> list[Record]:
        whole = [student.answer_ids(prompt.answer) for prompt in batch]
        ids = [row[:max_answer_tokens] for row in whole]
        asked = [student.render(list(prompt.messages)) for prompt in batch]
        own = _nats(student, asked, [prompt.images for prompt in batch], ids)
        found = [{"tokens": len(row), "own": nats} for row, nats in zip(whole, own, strict=True)]
        if batch[0].images:
            blank = _nats(student, asked, [tuple(map(grey, prompt.images)) for prompt in batch], ids)
            found = [{**record, "grey": nats} for record, nats in zip(found, blank, strict=True)]
        return list(found)

    return read


def teacher_reader(teacher: Scored, max_answer_tokens: int) -> Read:
    """Reads rows as {"tokens": read, "entropy", "nats": sums over them}: the teacher reads the text alone, by its own chat template."""
    head = answering_head(teacher)

    @torch.inference_mode()
    def read(batch: Sequence[Prompt]) -> list[Record]:
        ids = [teacher.answer_ids(prompt.answer)[:max_answer_tokens] for prompt in batch]
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
    student: Scored, prompts: Sequence[str], images: Sequence[Any], ids: Sequence[Sequence[int]]
) -> list[list[float]]:
    return [[-log_prob for log_prob, _ in row] for row in answer_scores(student, prompts, images, ids)]


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Rows with images, then rows without: a processor takes one kind at a time."""
    for seeing in (True, False):
        kind = [prompt for prompt in prompts if bool(prompt.images) is seeing]
        yield from (kind[start : start + size] for start in range(0, len(kind), size))


def as_texts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation without its images, for a chat template that takes texts alone."""
    return [
        {**turn, "content": "".join(part["text"] for part in _parts_of_text(turn["content"]))} for turn in messages
    ]


def _parts_of_text(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part for part in content if part["type"] == "text"]

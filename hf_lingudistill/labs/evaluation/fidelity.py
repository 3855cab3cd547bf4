"""Fidelity: is the original's language back? KL(original || model) and top-1 agreement, per token of the original's own answers.

    answers = original_answers(original, questions)                 # written once; by the original
    reference = Reference.of(original, questions, answers)          # its states on them: the original may now leave memory
    found = fidelity(reference, model)                              # {key: per-token KL and agreement} of any number of models
    Bootstrap().score(text_measures(found)["kl"])                   # nats per token, with its interval

*Text.* Original and model read the same instruction. *Images.* The original, which cannot see, is **told the caption**; the model is
**shown the image**. Tokens of an answer that depend on the picture (`dependence`: exchanging the caption moves the original's
log-probability by more than 1 nat) are measured apart from the rest.

The original scores 0 by definition. Each model is asked in its own chat template; where the LM's differs from the VLM's (a system
prompt), `replace(original, template=chat_template_of(vlm))` asks it in the VLM's, so that equal weights are at 0. Nothing is sampled in the comparison: the KL is over the whole vocabulary, in fp32, from exact
hidden states. N tokens, H hidden size, V vocabulary entries; logits exist for `CHUNK_ELEMENTS` entries at a time.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image as PILImage

from ..._internals import Head
from ...progress import progress_bar
from ..statistics import Items
from .cache import ItemCache
from .models import Scored, user_turn
from .reading import Written, answer_states, answering_head, end_of_turn, logits, write_answers

CHUNK_ELEMENTS = 2**24  # logits held per model: 64 MiB in fp32
TOLD = "Here is what a picture shows: {caption}\n\n{instruction}"
FIRST_WORD = 8  # tokens of it at most
LEFT_OUT = 0.01  # of the original's probability, on tokens that the model does not have

Record = dict[
    str, list[Any]
]  # of one answer: {"kl": [nats], "top1": [0 or 1]}, a value per token; None where it was not compared


@dataclass(frozen=True)
class Question:
    """What is asked. instruction: to both models. caption: what the original is told instead of seeing. images: what the model is
    shown."""

    key: str
    instruction: str
    caption: str | None = None
    images: tuple[PILImage.Image, ...] = ()

    def told(self, caption: str | None = None) -> str:
        """What the original reads. caption: another one in place of its own."""
        if self.caption is None:
            return self.instruction
        return TOLD.format(caption=self.caption if caption is None else caption, instruction=self.instruction)


def original_answers(
    original: Scored,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    cache: ItemCache | None = None,
    progress: str | None = None,
) -> dict[str, Written]:
    """The original's own answers, by key: greedy at temperature 0 (the default), else sampled.

    A sample depends on `seed` and the question's place in the list, not on the batch. cache: what is there is not written again.
    """
    known = cache.records if cache is not None else {}
    answers = {
        q.key: Written(tuple(known[q.key]["ids"]), known[q.key]["stopped"]) for q in questions if q.key in known
    }
    todo = [index for index, question in enumerate(questions) if question.key not in answers]
    todo.sort(key=lambda index: len(questions[index].told()))  # alike in length: little padding
    bar = progress_bar(
        total=len(questions), initial=len(answers), desc=progress, unit="answer", disable=progress is None
    )
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        prompts = [original.render(user_turn(questions[i].told())) for i in batch]
        written = write_answers(
            original,
            prompts,
            [()] * len(batch),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seeds=[seed * 1_000_003 + i for i in batch],
        )
        new = {questions[i].key: answer for i, answer in zip(batch, written, strict=True)}
        answers |= new
        if cache is not None:
            cache.add({key: {"ids": answer.ids, "stopped": answer.stopped} for key, answer in new.items()})
        bar.update(len(batch))
    bar.close()
    return {question.key: answers[question.key] for question in questions}


@dataclass(frozen=True)
class Reference:
    """What the original says of its own answers, on the CPU. states: (n, H) by key. head: (V, H). tokens: its vocabulary, by id.
    end: its end-of-turn id. lead: what its template writes before an answer, see `Scored.answer_lead`."""

    questions: tuple[Question, ...]
    answers: Mapping[str, Written]
    states: Mapping[str, torch.Tensor]
    head: Head
    tokens: tuple[str | None, ...]
    end: int | None
    lead: str = ""

    def head_on(self, device: torch.device) -> Head:
        """The original's head, copied to a device."""
        bias = None if self.head.bias is None else self.head.bias.to(device)
        return Head(self.head.matrix.to(device), bias, self.head.scale, self.head.softcap)

    @classmethod
    def of(
        cls,
        original: Scored,
        questions: Sequence[Question],
        answers: Mapping[str, Written],
        *,
        batch_size: int = 16,
        progress: str | None = None,
    ) -> Reference:
        """Read the answers once with the original; afterwards it may leave memory."""
        asked = [_Asked(q.told(), (), answers[q.key].ids) for q in questions]
        states = {
            questions[index].key: found.cpu().clone()  # a view would keep the prompts' states
            for batch in _read(original, asked, batch_size, progress)
            for index, found in batch.items()
        }
        head = answering_head(original)
        return cls(
            tuple(questions),
            dict(answers),
            states,
            # Copies: a view would keep the model's weights in memory
            Head(
                head.matrix.cpu().clone(),
                None if head.bias is None else head.bias.cpu().clone(),
                head.scale,
                head.softcap,
            ),
            _tokens(original, head.matrix.size(0)),
            end_of_turn(original),
            original.answer_lead,
        )


@torch.inference_mode()
def fidelity(
    reference: Reference,
    model: Scored,
    *,
    images: Mapping[str, Sequence[PILImage.Image]] | None = None,
    batch_size: int = 8,
    cache: ItemCache | None = None,
    progress: str | None = None,
) -> dict[str, Record]:
    """{key: {"kl": n values in nats, "top1": n values 0 or 1}}: KL(original || model) and whether both have the same most likely
    token, at every token of the original's answers. The original itself gives 0 and 1.

    Args:
        images: other images than the questions' own (a control), by key.
        cache: what is there is not measured again.

    The two need the same tokens under the same ids. A model may have more, whose probability is counted against it. The two
    models' ends of turn are one event, whatever their ids. Where one's chat template writes a space before an answer and the other's does not, an
    answer's first tokens are different ones: there both values are None.

    Raises:
        ValueError: if more than 1 % of the original's probability lies on tokens that the model does not have.
    """
    found: dict[str, Record] = dict(cache.records) if cache is not None else {}
    todo = [question for question in reference.questions if question.key not in found]
    if todo:
        shown = [question.images if images is None else images[question.key] for question in todo]
        ids = [reference.answers[question.key].ids for question in todo]
        asked = [
            _Asked(q.instruction, tuple(i), *_as_written(model, reference.lead, a))
            for q, i, a in zip(todo, shown, ids, strict=True)
        ]
        pair = _Pair(reference, model)
        for batch in _read(model, asked, batch_size, progress):
            new = {todo[i].key: pair.record(reference.states[todo[i].key], states) for i, states in batch.items()}
            found |= new
            if cache is not None:
                cache.add(new)
    return {question.key: found[question.key] for question in reference.questions}


@torch.inference_mode()
def dependence(
    reference: Reference, original: Scored, *, threshold: float = 1.0, seed: int = 0, batch_size: int = 16
) -> dict[str, list[bool]]:
    """Which tokens of the answers depend on the picture: {key: n flags}.

    A token does if the original, told another question's caption, gives it a log-probability that differs by more than
    `threshold` nats. The split is the same for every model.

    Raises:
        ValueError: if all captions are the same, or exchanging them moves no token so far.
    """
    questions = reference.questions
    others = _other_captions([str(question.caption) for question in questions], seed)
    ids = [reference.answers[question.key].ids for question in questions]
    asked = [_Asked(q.told(other), (), answer) for q, other, answer in zip(questions, others, ids, strict=True)]
    head = reference.head_on(original.model.device)
    found: dict[str, list[bool]] = {}
    for batch in _read(original, asked, batch_size, None):
        for index, states in batch.items():
            key, answer = questions[index].key, torch.tensor(ids[index], device=states.device)
            own = _log_probs(reference.states[key].to(states.device), head, answer)
            found[key] = ((own - _log_probs(states, head, answer)).abs() > threshold).tolist()
    if not any(map(any, found.values())):
        raise ValueError(
            f"Exchanging the captions moves no token of the original's answers by {threshold} nats: it does not use them. Ask about "
            "the picture in the instructions, or lower `threshold`."
        )
    return {question.key: found[question.key] for question in questions}


def text_measures(found: Mapping[str, Record]) -> dict[str, Items]:
    """{"kl": nats, "top1": share}, each {key: (sum over the answer's tokens, number of tokens)}."""
    return {measure: {key: _sum(record[measure]) for key, record in found.items()} for measure in ("kl", "top1")}


def _sum(values: Iterable[float | None]) -> tuple[float, float]:
    """-> (sum, number) of the values that are there."""
    there = [value for value in values if value is not None]
    return float(sum(there)), float(len(there))


def image_measures(found: Mapping[str, Record], depends: Mapping[str, Sequence[bool]]) -> dict[str, Items]:
    """`text_measures`, and "kl_dependent" and "kl_rest": the KL on the tokens that depend on the picture, and on the others."""

    def part(wanted: bool) -> Items:
        return {
            key: _sum(kl for kl, flag in zip(record["kl"], depends[key], strict=True) if flag == wanted)
            for key, record in found.items()
        }

    return {**text_measures(found), "kl_dependent": part(True), "kl_rest": part(False)}


# --------------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Asked:
    """ids: the answer's. unlike: how many of the first are not the original's tokens, and give no states."""

    instruction: str
    images: tuple[PILImage.Image, ...]
    ids: tuple[int, ...]
    unlike: int = 0


def _as_written(model: Scored, lead: str, ids: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The original's answer as the model's template writes it. lead: of the original's. -> (ids, how many of the first are other tokens)"""
    if model.answer_lead == lead:
        return ids, 0
    written = model.answer_ids(model.tokenizer.decode(ids).removeprefix(lead))
    alike = len(os.path.commonprefix([written[::-1], list(ids)[::-1]]))
    if (
        len(ids) - alike > FIRST_WORD
    ):  # a sample, which nobody would write in these tokens: what is before it is all that changes
        written, alike = [*model.ids(model.answer_lead), *ids], len(ids) - 1
    return tuple(written), len(written) - alike


def _read(
    scored: Scored, asked: Sequence[_Asked], batch_size: int, progress: str | None
) -> Iterator[dict[int, torch.Tensor]]:
    """{index: (n, H) states of its answer} of one batch after the other, alike in length: little padding."""
    order = sorted(range(len(asked)), key=lambda index: len(asked[index].instruction) + 4 * len(asked[index].ids))
    bar = progress_bar(total=len(asked), desc=progress, unit="answer", disable=progress is None)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        prompts = [scored.render(user_turn(asked[i].instruction, len(asked[i].images))) for i in batch]
        found = answer_states(scored, prompts, [asked[i].images for i in batch], [asked[i].ids for i in batch])
        yield {i: states[asked[i].unlike :] for i, states in zip(batch, found, strict=True)}
        bar.update(len(batch))
    bar.close()


def _other_captions(captions: Sequence[str], seed: int) -> list[str]:
    """Another caption for each, drawn from those that differ."""
    rng, found = random.Random(seed), []
    distinct = sorted(set(captions))
    if len(distinct) < 2:
        raise ValueError(
            f"Exchanging captions needs at least two that differ; all {len(captions)} say {distinct[0]!r}."
        )
    for caption in captions:
        other = distinct[rng.randrange(len(distinct) - 1)]
        found.append(other if other != caption else distinct[-1])
    return found


# --------------------------------------------------------------------------------------------------------------------
# Distributions
# --------------------------------------------------------------------------------------------------------------------
def _log_probs(states: torch.Tensor, head: Head, ids: torch.Tensor) -> torch.Tensor:
    """(n,) log-probabilities of tokens."""
    parts = [
        logits(states[rows], head).log_softmax(dim=-1).gather(1, ids[rows, None])[:, 0]
        for rows in _chunks(states.size(0), head.matrix.size(0))
    ]
    return torch.cat(parts)


def _chunks(count: int, vocab: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // vocab)
    return [slice(start, start + step) for start in range(0, count, step)]


def _tokens(scored: Scored, size: int) -> tuple[str | None, ...]:
    """Token strings by id, None where the head has a row that the tokenizer does not use."""
    known = min(size, len(scored.tokenizer))
    names = scored.tokenizer.convert_ids_to_tokens(list(range(known)))
    return (*names, *[None] * (size - known))


class _Pair:
    """Original and model over the same events: tokens with the same string under the same id, and one end of turn."""

    def __init__(self, reference: Reference, model: Scored) -> None:
        device = model.model.device
        self.name = model.name
        self.ours, self.theirs = answering_head(model), reference.head_on(device)
        names = _tokens(model, self.ours.matrix.size(0))
        size = min(len(names), len(reference.tokens))
        self.shared = torch.tensor(
            [a == b is not None for a, b in zip(reference.tokens[:size], names[:size], strict=True)], device=device
        )
        self.ends = (reference.end, end_of_turn(model))

    def record(self, reference: torch.Tensor, states: torch.Tensor) -> Record:
        """`compare` for (n, H_o) states of the original, and those of the model at the last of these tokens: None at the first, where it read others."""
        missing = len(reference) - len(states)
        found = self.compare(reference[missing:], states) if len(states) else {"kl": [], "top1": []}
        return {name: [*[None] * missing, *values] for name, values in found.items()}

    def compare(self, reference: torch.Tensor, states: torch.Tensor) -> Record:
        """(n, H_o) states of the original and (n, H_m) of the model -> a record, to six digits."""
        parts: tuple[list[torch.Tensor], ...] = ([], [], [])
        reference = reference.to(states.device)
        for rows in _chunks(states.size(0), self.ours.matrix.size(0) + self.theirs.matrix.size(0)):
            for part, values in zip(parts, self._compare(reference[rows], states[rows]), strict=True):
                part.append(values)
        kl, top1, lost = map(torch.cat, parts)
        if (left := lost.mean().item()) > LEFT_OUT:
            raise ValueError(
                f"{self.name} has not the original's tokens: {left:.0%} of the original's probability lies on tokens that have no "
                "counterpart under the same id. Fidelity compares a VLM with the LM that it was built from."
            )
        return {
            "kl": [round(value, 6) for value in kl.tolist()],
            "top1": top1.int().tolist(),
        }

    def _compare(
        self, reference: torch.Tensor, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> (n,) KL in nats, (n,) agreement, (n,) the original's probability on tokens that the model does not have."""
        log_o, log_m = (
            logits(reference, self.theirs).log_softmax(dim=-1),
            logits(states, self.ours).log_softmax(dim=-1),
        )
        size, (end, other) = self.shared.numel(), self.ends
        shared = self.shared.clone()
        if end is not None and other is not None and end != other and end < size:
            # The model ends its turn with another token: what it gives to both is its probability of ending it
            merged = torch.logaddexp(log_m[:, end], log_m[:, other]) if shared[end] else log_m[:, other].clone()
            log_m[:, other] = -torch.inf
            log_m[:, end] = merged
            shared[end] = True
            if other < size and shared[other]:
                log_o[:, end] = torch.logaddexp(log_o[:, end], log_o[:, other])
                log_o[:, other] = -torch.inf
        inside = log_o[:, :size].masked_fill(~shared, -torch.inf)
        kept = inside.logsumexp(dim=-1, keepdim=True)
        inside = inside - kept
        gap = torch.where(inside > -torch.inf, inside - log_m[:, :size], 0.0)
        # fp32 sums over a large vocabulary round to about -1e-5 where the two agree
        kl = (inside.exp() * gap).sum(dim=-1).clamp(min=0)
        return kl, inside.argmax(dim=-1) == log_m.argmax(dim=-1), 1 - kept[:, 0].exp()

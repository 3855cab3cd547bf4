"""Answers of several models to one question, streamed side by side.

for answers in stream(checkpoints, "what color is the shape?", picture, max_new_tokens=48):
    print(answers["before"].text, answers["after"].text)
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from checkpoints import Checkpoint
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList
from visitor import BadInput

MAX_NEW_TOKENS = 128

State = Literal["waiting", "writing", "done", "cut", "stopped", "failed", "blind"]


@dataclass(frozen=True)
class Answer:
    """An answer so far. state: "cut" at the longest length, "stopped" by the visitor, "blind": cannot see the image.

    seconds: the model's own computing time. tokens: the number of tokens so far.
    """

    text: str = ""
    seconds: float = 0.0
    tokens: int = 0
    state: State = "waiting"


def encode(checkpoint: Checkpoint, question: str, image: Image.Image | None, max_new_tokens: int) -> Any:
    """The model's inputs for one question, through its own chat template.

    Raises:
        BadInput: if question, image and answer do not fit into the model's context.
    """
    content: Any = [{"type": "text", "text": question}]
    if image is not None:
        content = [{"type": "image", "image": image}, *content]
    if not checkpoint.sees:
        content = question  # the templates of language models want a string
    if checkpoint.processing.chat_template is None and image is not None and checkpoint.sees:
        text = checkpoint.processing.image_token + question
        inputs = checkpoint.processing(text=text, images=image, return_tensors="pt")
    elif checkpoint.processing.chat_template is None:
        inputs = checkpoint.tokenizer(question, return_tensors="pt")
    else:
        inputs = checkpoint.processing.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    length, room = inputs["input_ids"].shape[1], checkpoint.context - max_new_tokens
    if length > room:
        raise BadInput(
            f"Your question is {length:,} tokens long to {checkpoint.label}, and {room:,} is the most that leaves room "
            "for an answer; please shorten it."
        )
    return inputs


def check_fits(
    checkpoints: Mapping[str, Checkpoint], question: str, image: Image.Image | None, max_new_tokens: int
) -> None:
    """Raise the BadInput that `stream` would, before a queue or a GPU is asked for."""
    for checkpoint in _asked(checkpoints, image).values():
        encode(checkpoint, question, image, max_new_tokens)


def _asked(checkpoints: Mapping[str, Checkpoint], image: Image.Image | None) -> dict[str, Checkpoint]:
    return {name: checkpoint for name, checkpoint in checkpoints.items() if image is None or checkpoint.sees}


def stopped(answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """The answers with the unfinished ones marked as stopped."""
    unfinished = ("waiting", "writing")
    return {name: replace(one, state="stopped") if one.state in unfinished else one for name, one in answers.items()}


class Turns:
    """One model computes at a time, one token each in turn.

    On two cores, models that write at the same time slow each other down, and the seconds would measure that.
    """

    def __init__(self, names: list[str]) -> None:
        self._order = deque(names)
        self._changed = threading.Condition()
        self.stopped = False

    def wait(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.stopped or self._order[0] == name)

    def next(self) -> None:
        with self._changed:
            self._order.rotate(-1)
            self._changed.notify_all()

    def leave(self, name: str) -> None:
        with self._changed:
            self._order.remove(name)
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()


class Writer(StoppingCriteria):
    """Writes one model's answer in a thread; `generate` calls it after every token."""

    def __init__(self, name: str, checkpoint: Checkpoint, turns: Turns, out: queue.SimpleQueue) -> None:
        self.name, self.checkpoint, self.turns, self.out = name, checkpoint, turns, out
        self.answer = Answer()
        self._prompt_length = 0
        self._start = 0.0

    def write(self, inputs: Any, options: dict[str, Any]) -> None:
        self._prompt_length = inputs["input_ids"].shape[1]
        self.turns.wait(self.name)
        self._start = time.perf_counter()
        model = self.checkpoint.model
        try:
            # Gradients are switched off per thread.
            with torch.inference_mode():
                output = model.generate(
                    **_moved(inputs, model), **options, stopping_criteria=StoppingCriteriaList([self])
                )
            ended = int(output[0, -1]) in _end_tokens(model)
            self._say(replace(self.answer, state="done" if ended else "cut"))
        except Exception:
            logging.exception("The model %s failed to answer.", self.name)
            self._say(replace(self.answer, state="failed"))
        finally:
            self.turns.leave(self.name)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids[0, self._prompt_length :]
        text = self.checkpoint.tokenizer.decode(new, skip_special_tokens=True)
        seconds = self.answer.seconds + time.perf_counter() - self._start
        # A character of several bytes may lack its last ones so far.
        self._say(Answer(text.strip().rstrip("\ufffd"), seconds, len(new), "writing"))
        self.turns.next()
        self.turns.wait(self.name)
        self._start = time.perf_counter()
        return torch.full((len(input_ids),), self.turns.stopped, dtype=torch.bool, device=input_ids.device)

    def _say(self, answer: Answer) -> None:
        self.answer = answer
        self.out.put((self.name, answer))


def _moved(inputs: Any, model: Any) -> dict[str, torch.Tensor]:
    # Pixels take the model's precision, ids and masks stay integers.
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def _end_tokens(model: Any) -> set[int]:
    end = model.generation_config.eos_token_id
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def stream(
    checkpoints: Mapping[str, Checkpoint], question: str, image: Image.Image | None, max_new_tokens: int
) -> Iterator[dict[str, Answer]]:
    """The greedy answers of all models as they grow, a token each in turn. -> {name: answer so far}, again and again.

    Closing the iterator stops the models. A model that fails says so in its state; the others go on.

    Raises:
        BadInput: before any model starts, if the question does not fit into one of them.
    """
    max_new_tokens = min(max(int(max_new_tokens), 1), MAX_NEW_TOKENS)
    asked = _asked(checkpoints, image)
    inputs = {name: encode(checkpoint, question, image, max_new_tokens) for name, checkpoint in asked.items()}
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "repetition_penalty": 1.0,  # whatever the checkpoint's habit is: a penalty turns a right answer into a wrong one
    }
    turns, out = Turns(list(asked)), queue.SimpleQueue()
    writers = [Writer(name, checkpoint, turns, out) for name, checkpoint in asked.items()]
    threads = [threading.Thread(target=one.write, args=(inputs[one.name], options), daemon=True) for one in writers]
    answers = {name: Answer(state="waiting" if name in asked else "blind") for name in checkpoints}
    yield dict(answers)
    try:
        for thread in threads:
            thread.start()
        while any(answer.state in ("waiting", "writing") for answer in answers.values()):
            name, answers[name] = out.get()
            while not out.empty():  # a fast model writes faster than a page redraws
                name, answers[name] = out.get()
            yield dict(answers)
    finally:
        turns.stop()
        for thread in threads:
            if thread.ident is not None:
                thread.join()

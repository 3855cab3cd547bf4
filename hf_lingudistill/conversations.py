"""A row's conversation as the student's processor reads it: the text of the chat template, and which of it is trained on."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import ProcessorMixin
from trl import apply_chat_template, prepare_multimodal_messages

from .answers import Span, answer_spans, trained_tokens
from .bad_rows import BadRow, Row
from .formats import as_trl_row
from .row_checks import BESIDE_TEXT, check_answer, says_nothing_else
from .turns import CONVERSATION_COLUMNS, in_parts_alike, text_alone, without_nulls

logger = logging.getLogger(__name__)

NO_ANSWERS = (
    "The chat template of the student's processor does not tell the assistant's turns from the others (a conversation is not written as "
    "its longer form begins): `messages` are trained on whole, the user's turns among them. Give a template with "
    "{% generation %} marks (chat_template_path), or rows of `prompt` and `completion`."
)


# Of a chat template's arguments, those that say what is rendered
_OURS = ("add_generation_prompt", "continue_final_message", "tokenize", "chat_template", "return_dict")


@dataclass(frozen=True)
class Rendered:
    """What the processor is given for a row: `text`, or `prompt` and `completion`, and `images` where the row has them.

    spans: the characters of `text` that are trained on; None = all.
    """

    row: Row
    spans: list[Span] | None = None


@dataclass
class Conversations:
    """Reads rows for one processor.

    Args:
        processor: the student's processor, or its tokenizer.
        chat_template: another than the processor's own.
        answers_only: train on the assistant's turns of `messages` alone, where the template allows.
        completion_only: train on the completion of a `prompt` alone.
        image_ids: tokens that an image is made of.
    """

    processor: Any
    chat_template: str | None = None
    answers_only: bool = True
    image_ids: Collection[int] = ()
    completion_only: bool = True
    _warned: bool = field(default=False, init=False, repr=False)
    _takes: str | None = field(default=None, init=False, repr=False)

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def read(self, row: Row, name: str) -> Row:
        """The row in TRL's shape, see `as_trl_row`.

        Raises:
            BadRow: if it has another, or an empty answer.
        """
        # The check comes before as well: a row without any turn has no answer, rather than another shape
        check_answer(row, name)
        if taken := next((key for key in _OURS if key in _of_template(row)), None):
            raise BadRow(
                "not a conversation",
                f"{name}: its chat_template_kwargs set {taken!r}, which training sets itself. Leave it out.",
            )
        new = self._as_trl_row(row, name)
        check_answer(new, name)
        return new

    def _as_trl_row(self, row: Row, name: str) -> Row:
        return as_trl_row(
            row,
            name,
            getattr(self.processor, "image_token", None),
            chat=bool(self.chat_template or getattr(self.processor, "chat_template", None)),
        )

    def render(self, row: Row, name: str = "A row", *, as_text: bool) -> Rendered:
        """The texts of a row that is in TRL's shape, its images decoded.

        as_text: a prompt and its completion become one text as well, trained on after the prompt.

        Raises:
            BadRow: if a turn says something that the chat template does not write.
        """
        more = {"images": row["images"]} if "images" in row else {}
        images = more.get("images")
        if images and self.contents == "texts" and not isinstance(row.get("prompt", row.get("text")), str):
            raise BadRow(
                "processor failed",
                f"{name} has an image, and the chat template reads texts alone: it has no place for one. Pass a template that writes a turn's "
                "parts (chat_template_path), or leave it out for the student's own.",
            )
        if "messages" in row:
            turns, options = self._for_template(row["messages"], images), self._options(row)
            self._check_written(turns, options, name)
            text = self.processor.apply_chat_template(
                turns, tokenize=False, chat_template=self.chat_template, **options
            )
            return Rendered({**more, "text": text}, self._spans(turns, options))
        # A text beside pictures ends as it does among texts alone
        ended = str if images else self._ended
        if "prompt" not in row:
            return Rendered({**more, "text": ended(row["text"])})
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            completion = ended(completion)
        else:
            self._check_written(
                [*self._for_template(prompt, images), *self._for_template(completion)], self._options(row), name
            )
            texts = apply_chat_template(
                {"prompt": self._for_template(prompt, images), "completion": self._for_template(completion)},
                self.processor,
                chat_template=self.chat_template,
                **self._options(row),
            )
            prompt, completion = texts["prompt"], texts["completion"]
        if as_text:
            spans = [(len(prompt), len(prompt + completion))] if self.completion_only else None
            return Rendered({**more, "text": prompt + completion}, spans)
        return Rendered({**more, "prompt": prompt, "completion": completion})

    def say_what_is_labelled(self, row: Row) -> None:
        """Log once what of a conversation is trained on. row: the first of the training set."""
        if (
            not self.answers_only
            or next((key for key in CONVERSATION_COLUMNS if row.get(key) is not None), None) is None
        ):
            return
        try:
            turns = self.read(row, "")["messages"]
        except BadRow:  # named when its turn comes
            return
        texts = [
            {**turn, "content": [part for part in turn["content"] if part["type"] == "text"]}
            if isinstance(turn.get("content"), list)
            else turn
            for turn in turns
        ]
        try:
            spans = self._spans(self._for_template(texts), self._options(row))
        except Exception:  # the template's; the row is named when its turn comes
            return
        if spans is not None:
            logger.warning(
                "Of `messages`, the assistant's turns alone are trained on (answers_only=False: all turns)."
            )

    def mask(self, labels: torch.Tensor, ids: torch.Tensor, rendered: Rendered, name: str) -> None:
        """Set the labels (L,) of all tokens outside of the row's spans to -100, in place. ids: (L,), without padding.

        Raises:
            BadRow: if a fast tokenizer's answers cannot be found among the row's tokens.
        """
        if rendered.spans is None:
            return
        trained = trained_tokens(ids.tolist(), rendered.row["text"], rendered.spans, self.tokenizer, self.image_ids)
        if trained is None and getattr(self.tokenizer, "is_fast", False):
            raise BadRow(
                "no label",
                f"{name}: its answers cannot be found among its tokens, which the processor has changed beyond what stands around an image. Give "
                "it as prompt and completion, or pass --skip_bad_rows.",
            )
        if trained is None:
            self._warn()
        else:
            labels[~torch.tensor(trained, dtype=torch.bool)] = -100

    def tokens(self, row: Row, name: str) -> Row:
        """`input_ids` and `labels` of a row of text, as TRL tokenises it.

        Raises:
            BadRow: if the row has another shape, an empty answer or an image, or the chat template does not take it.
        """
        row = self.read({k: v for k, v in row.items() if v is not None}, name)
        if row.get("images"):
            raise BadRow("image column missing", f"{name} has an image, and the first rows of the dataset have none.")
        try:
            if "messages" in row:
                options = self._options(row)
                ids = self._ids(row["messages"], **options)
                labels = torch.tensor(ids)
                rendered = self.render(row, name, as_text=True)
                if rendered.spans == []:
                    raise BadRow("no label", f"{name} has no assistant's turn to train on.")
                self.mask(labels, labels.clone(), rendered, name)
                return {"input_ids": ids, "labels": labels.tolist()}
            if "prompt" not in row:
                ids = self._ids(self._ended(row["text"]))
                return {"input_ids": ids, "labels": ids}
            options = self._options(row)
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str):
                asked, ids = self._ids(prompt), self._ids(prompt + self._ended(completion))
            else:
                self._check_written([*self._for_template(prompt), *self._for_template(completion)], options, name)
                asked = self._ids(prompt, add_generation_prompt=True, **options)
                ids = self._ids(prompt + completion, **options)
        except BadRow:
            raise
        except Exception as error:
            raise cannot_be_processed(name, error) from error
        # The prompt alone may end otherwise than before its answer
        start = len(os.path.commonprefix([asked, ids])) if self.completion_only else 0
        return {"input_ids": ids, "labels": [-100] * start + ids[start:]}

    def _ids(self, content: Any, **options: Any) -> list[int]:
        if isinstance(content, str):
            ids = self.processor(text=content)["input_ids"]
        else:
            ids = self.processor.apply_chat_template(
                self._for_template(content),
                tokenize=True,
                return_dict=True,
                chat_template=self.chat_template,
                **options,
            )["input_ids"]
        # A processor gives a batch also for a single row
        return list(ids[0] if isinstance(self.processor, ProcessorMixin) else ids)

    def _ended(self, text: str) -> str:
        end = self.tokenizer.eos_token
        return text if text.endswith(end) else text + end

    def _for_template(self, turns: list[Row], images: list[Any] | None = None) -> list[Row]:
        if self.contents == "texts":
            return [{**turn, "content": text_alone(turn)} if "content" in turn else turn for turn in turns]
        return prepare_multimodal_messages(in_parts_alike(turns), images=images)

    @property
    def contents(self) -> str:
        """What the chat template reads of a turn: `texts`, or `parts`; where it reads both, what TRL gives it: a processor's has parts. Of one
        that does not take a turn on trial, the same."""
        if self._takes is None:
            usual, other = self._usual, "texts" if self._usual == "parts" else "parts"
            self._takes = usual if self._writes(usual) or not self._writes(other) else other
        return self._takes

    @property
    def _usual(self) -> str:
        return "parts" if isinstance(self.processor, ProcessorMixin) else "texts"

    @property
    def reads_as_trl(self) -> bool:
        """Whether the chat template reads what TRL gives it."""
        return self.contents == self._usual

    def _writes(self, contents: str) -> bool:
        """Whether the chat template writes what a turn of texts or of parts says, and no more of it than the text."""
        said = "trial"
        turn = {"role": "user", "content": said if contents == "texts" else [{"type": "text", "text": said}]}
        try:
            written = self.processor.apply_chat_template([turn], tokenize=False, chat_template=self.chat_template)
        except Exception:  # templates raise what they like
            return False
        return said in written and not re.search("['\"]type['\"]", written)

    def _options(self, row: Row) -> Row:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
        # Arrow gives each row the fields of all others, as nulls. `or None`: some templates write an empty list of tools out
        return {"tools": without_nulls(tools) or None, **_of_template(row)}

    def _check_written(self, turns: list[Row], options: Row, name: str) -> None:
        """Raise BadRow where a turn calls a tool or thinks, and says nothing else, and the template writes nothing of it: a student would
        learn to say nothing there."""
        silent = [index for index, turn in enumerate(turns) if says_nothing_else(turn)]
        if not silent:
            return

        def rendered(turns: list[Row]) -> str:
            return str(
                self.processor.apply_chat_template(turns, tokenize=False, chat_template=self.chat_template, **options)
            )

        whole = rendered(turns)
        for index in silent:
            turn = {key: value for key, value in turns[index].items() if key not in BESIDE_TEXT}
            empty: Any = turns[index].get("content", "")
            try:
                without = rendered([*turns[:index], {**turn, "content": empty}, *turns[index + 1 :]])
            except Exception:  # which a template may not take
                continue
            if without == whole:
                raise BadRow(
                    "empty answer",
                    f"{name}: of its turn {index} (counted from 0), which has {' and '.join(key for key in BESIDE_TEXT if turns[index].get(key))} "
                    "and no text, the chat template writes nothing. Pass a template that does (--chat_template_path), or leave the row out.",
                )

    def _spans(self, turns: list[Row], options: Row) -> list[Span] | None:
        if not self.answers_only:
            return None
        spans = answer_spans(self.processor, turns, self.chat_template, **options)
        if spans is None:
            self._warn()
        return spans

    def _warn(self) -> None:
        if not self._warned:
            logger.warning(NO_ANSWERS)
        self._warned = True


def _of_template(row: Row) -> Row:
    """What a row gives its chat template beside turns and tools; a mapping, or JSON text of one."""
    given = row.get("chat_template_kwargs")
    given = json.loads(given) if isinstance(given, str) and given.strip() else given
    found: Row = without_nulls(given or {})
    return found


def no_label_within(name: str, first_label: int, needed: int, limit: int) -> BadRow:
    """What is raised for a row whose answer begins behind `max_length`. needed: the least that it could be."""
    return BadRow(
        "no label",
        f"{name} has no token to train on within max_length={limit}: all labels are masked there (its answer begins at token "
        f"{first_label + 1}). Set max_length to at least {needed} (more for the whole answer), or to null for no truncation.",
    )


def cannot_be_processed(name: str, error: Exception) -> BadRow:
    """What is raised for a row over which the processor failed."""
    why = " ".join(str(error).split())
    if re.search("chat[ _]template", why) and not re.search("[Jj]inja|[Tt]emplateError", type(error).__name__):
        return BadRow(
            "processor failed",
            f"{name} is a conversation, and the student has no chat template: pass --chat_template_path FILE.jinja, or train "
            "on running text.",
        )
    return BadRow("processor failed", f"{name} cannot be processed ({type(error).__name__}: {why[:300]}).")

"""Which tokens of a conversation are the assistant's: the labels of `messages`.

TRL masks the rest of a conversation where the chat template marks its answers (`{% generation %}`); few templates of VLMs do, and its
collator for images masks padding alone. Any template tells where an answer begins and ends, though, if the conversation up to
there is written as the whole conversation begins: then the answer is the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ._internals import has_generation_markers, render_jinja_template

Row = dict[str, Any]
Span = tuple[int, int]  # characters, end not included
Render = Callable[..., str]


def answer_spans(
    processor: Any, turns: Sequence[Row], chat_template: str | None = None, **kwargs: Any
) -> list[Span] | None:
    """Where the assistant's turns stand in the text of a conversation; None if its chat template does not allow to tell.

    Args:
        processor: a processor or tokenizer with a chat template.
        turns: as the template takes them, images as places.
        chat_template: another than the processor's own. kwargs: for the template (`tools`, ...).
    """
    template = chat_template or processor.chat_template
    if isinstance(template, dict):
        template = template["default"]
    if has_generation_markers(template):
        tokenizer = getattr(processor, "tokenizer", processor)
        rendered: Any = render_jinja_template(
            conversations=[list(turns)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **kwargs},
        )
        return [(int(start), int(end)) for start, end in rendered[1][0]]

    def render(count: int, **more: Any) -> str:
        return str(
            processor.apply_chat_template(
                list(turns[:count]), tokenize=False, chat_template=chat_template, **more, **kwargs
            )
        )

    return _spans_by_prefix(turns, render)


def _spans_by_prefix(turns: Sequence[Row], render: Render) -> list[Span] | None:
    whole = render(len(turns))
    spans = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        try:
            before = render(index) if index else ""
            asked = render(index, add_generation_prompt=True) if index else ""
            after = render(index + 1)
        except Exception:  # templates raise what they like for a conversation that they do not take
            return None
        if not (whole.startswith(before) and whole.startswith(after)):
            return None
        if not index:  # no question whose end would be where the answer begins: behind what is written before one
            header = render(1, add_generation_prompt=True).removeprefix(after)
            place = after.find(header) if header != after else -1
            spans.append((place + len(header) if place >= 0 else 0, len(after)))
            continue
        # Some prompt the answer with more than the whole conversation has there (an empty thought): both agree up to its start
        start = max(len(os.path.commonprefix([asked, whole])), len(before))
        spans.append((start, len(after)))
    return spans


def trained_tokens(
    ids: Sequence[int], text: str, spans: Sequence[Span], tokenizer: Any, image_ids: Collection[int] = ()
) -> list[bool] | None:
    """For each token of a row whether it lies in a span; None if the row's tokens cannot be found in its text.

    Args:
        ids: the row as the processor made it, without padding: where `text` names an image, tokens of its own stand here.
        text: what the processor was given. spans: of characters in it.
        tokenizer: the processor's; only fast ones tell where a token comes from.
        image_ids: tokens that an image is made of.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    written = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    in_span = [any(start < e and end > s for s, e in spans) for start, end in written["offset_mapping"]]
    known = [
        (token, inside) for token, inside in zip(written["input_ids"], in_span, strict=True) if token not in image_ids
    ]
    places = [position for position, token in enumerate(ids) if token not in image_ids]
    found = _aligned([token for token, _ in known], [ids[position] for position in places])
    trained = [False] * len(ids)
    for (_, inside), match in zip(known, found, strict=True):
        if inside and match is None:
            return None
        if inside and match is not None:
            trained[places[match]] = True
    return trained


def _aligned(written: list[int], seen: list[int]) -> list[int | None]:
    """For each token of the text, its index in the row. The two differ by what stands around an image: behind it, the row goes on where the
    next tokens of the text stand first. Always onward: a question that is asked again is not taken for its first asking.
    """
    found: list[int | None] = [None] * len(written)
    here = there = 0
    while here < len(written) and there < len(seen):
        if written[here] == seen[there]:
            found[here] = there
            here, there = here + 1, there + 1
        elif (ahead := _resumed(written, seen, here, there)) is not None:
            here, there = ahead
        else:
            return _from_the_end(written, seen, found, here, there)
    return found


def _from_the_end(
    written: list[int], seen: list[int], found: list[int | None], here: int, there: int
) -> list[int | None]:
    """What stands behind the last image, where images stand too near to one another to go on between them: from the last token on, back to
    where the two differ, at most to what is found already."""
    back = 1
    while len(written) - back >= here and len(seen) - back >= there and written[-back] == seen[-back]:
        found[-back] = len(seen) - back
        back += 1
    return found


def _resumed(written: list[int], seen: list[int], here: int, there: int) -> tuple[int, int] | None:
    """Where text and row go on together, as early in the row as can be: at the next token of the text or, where an image beside it has
    changed a few (line breaks that became one), behind those. Where the next image is near, fewer tokens must do, and none is left out."""
    for alike, left_out in ((6, 4), (3, 0)):
        for place in range(there, len(seen)):
            for start in range(here, min(here + left_out + 1, len(written))):
                run = written[start : start + alike]
                # The end of a text may be shorter
                if (len(run) == alike or start == here) and seen[place : place + len(run)] == run:
                    return start, place
    return None

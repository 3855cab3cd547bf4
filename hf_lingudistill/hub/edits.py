"""A card that people edit: rendered again, what is ours is renewed, and what somebody changed by hand stays.

A rendered card says, in a comment at its end, what it was: one digest for each metadata key, for each section between
`<!-- lingudistill:NAME -->` marks, and for what is around and between the sections. Whatever no longer has its digest was edited.
A section that was deleted stays deleted; a card without any marks is somebody's own, and ours comes after it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from ..yaml_text import read_yaml
from .escape import markdown

OWN_TEXT = "text outside the sections"
_SECTION = re.compile(
    r"^<!-- lingudistill:(?P<name>\w+) -->[ \t]*\n(?P<body>.*?)^<!-- /lingudistill:(?P=name) -->[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
_PLACE = re.compile(r"^<!-- lingudistill-place (\w+) -->$", re.MULTILINE)
_STATE = re.compile(r"\n*^<!-- lingudistill-state\n[^{]*(?P<state>\{.*\})\n-->[ \t]*$\n?", re.MULTILINE)
_COMMENT = re.compile(r"(?:^|(?<=\s))#.*$", re.MULTILINE)
_NOTE = (
    "Edit this card as you like. What you change, add or delete stays as it is when the model is published again;\n"
    "the rest is renewed. The digests below tell the two apart."
)


class UnreadableCard(ValueError):
    """A card whose metadata cannot be read. The message says what is wrong with it."""


@dataclass(frozen=True)
class _Card:
    """metadata: values, and lines: the same as they are written, by key. layout: the text with a place in it for each section. state: the
    digests that it came with, if any."""

    metadata: dict[str, Any]
    lines: dict[str, str]
    layout: str
    sections: dict[str, str]
    state: dict[str, Any]

    def written(self) -> dict[str, str]:
        """The digests at the time of rendering, by part: `metadata KEY`, `section NAME`, `layout`."""
        return {str(part): str(digest) for part, digest in self.state.items()}

    def parts(self) -> dict[str, str]:
        """The digests of what it holds now."""
        return {
            **{
                f"metadata {key}": _digest(json.dumps(value, default=str) + _comments(self.lines[key], value))
                for key, value in self.metadata.items()
            },
            **{f"section {name}": _digest(body) for name, body in self.sections.items()},
            "layout": _digest(self.layout),
        }


def sealed(text: str) -> str:
    """The card with the digests of all that it holds, in place of any that it had."""
    card = _parsed(text)
    return _text(card.lines, card.layout, card.sections, card.parts())


def is_ours(text: str) -> bool:
    """Whether a card was rendered here, however much it was edited since."""
    return _STATE.search(_lines(text)) is not None


def merged(ours: str, theirs: str) -> tuple[str, tuple[str, ...]]:
    """Our newly rendered card, with what was edited in the card that is there.

    ours: `sealed`. -> (the card, names of what was kept: metadata keys, sections, `OWN_TEXT`)

    Raises:
        UnreadableCard: if the metadata of the card that is there is no YAML mapping.
    """
    new, old = _parsed(ours), _parsed(theirs)
    _name_licence(new, old)
    written, found, rendered = old.written(), old.parts(), new.parts()
    edited = {part for part in written | found if written.get(part) != found.get(part)}
    state = {part: digest for part, digest in rendered.items() if part not in edited}
    state |= {part: written.get(part, "") for part in sorted(edited)}  # in one order: the same card is not sent twice
    metadata = {
        key: (old if f"metadata {key}" in edited else new).lines[key]
        for key in {**new.lines, **old.lines}
        if key in (old if f"metadata {key}" in edited else new).lines
    }
    sections = {
        name: (old if f"section {name}" in edited else new).sections[name]
        for name in {**new.sections, **old.sections}
        if name in (old if f"section {name}" in edited else new).sections
    }
    layout = old.layout if "layout" in edited else new.layout
    lost = [name for name in sections if f"<!-- lingudistill-place {name} -->" not in layout]
    for name in lost:  # new ones, and an edited one that a later version no longer renders
        layout = f"{layout.rstrip()}\n\n<!-- lingudistill-place {name} -->\n"
    held = set(_PLACE.findall(layout))
    kept = [part.partition(" ")[2] or OWN_TEXT for part in sorted(edited) if part != "layout" or old.layout.strip()]
    return _text(metadata, layout, {n: s for n, s in sections.items() if n in held}, state), tuple(kept)


def _name_licence(new: _Card, old: _Card) -> None:
    """Where somebody set the licence in the metadata by hand, the section on it says so, and not ours beside theirs."""
    code, name = (old.metadata.get(key) for key in ("license", "license_name"))
    by_hand = old.written().get("metadata license") != old.parts().get("metadata license")
    if by_hand and code and code != new.metadata.get("license") and "licence" in new.sections:
        shown = markdown(str(name if code == "other" and name else code))
        new.sections["licence"] = (
            f"## Licence\n\n`{shown}`, set by hand at the top of this card. Read the terms of both models and of the data.\n"
        )


def _parsed(text: str) -> _Card:
    text = _lines(text)
    front = REGEX_YAML_BLOCK.search(text)
    written = f"{front[2]}\n" if front else ""
    try:
        metadata = read_yaml(written) or {}
    except yaml.YAMLError as error:
        raise UnreadableCard(f"its metadata is not valid YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(metadata, dict):
        raise UnreadableCard(f"its metadata must be a mapping, and is a {type(metadata).__name__}")
    body = text[front.end() :] if front else text
    said = _STATE.search(body)
    try:
        state = json.loads(said["state"]) if said else {}
    except ValueError:
        state = {}  # damaged by hand: all of it counts as edited
    body = _STATE.sub("\n", body)
    sections: dict[str, str] = {}

    def place(found: re.Match[str]) -> str:
        if found["name"] in sections:  # a copy: words of their own
            return found["body"]
        sections[found["name"]] = found["body"]
        return f"<!-- lingudistill-place {found['name']} -->"

    layout = _SECTION.sub(place, body)
    return _Card(metadata, _by_key(written, metadata), layout, sections, state)


def _by_key(text: str, metadata: Mapping[str, Any]) -> dict[str, str]:
    """The lines of each key, with the comments above it: written again they are what they were, where a value may be another (`no`, `1:30`).
    A mapping in braces, or of anchors, has no lines of its own for a key: they are made."""
    made = {key: yaml_dump({key: value}, sort_keys=False) for key, value in metadata.items()}
    node = yaml.compose(text, yaml.SafeLoader)
    shared = any(isinstance(token, yaml.AnchorToken | yaml.AliasToken) for token in yaml.scan(text))
    if not isinstance(node, yaml.MappingNode) or node.flow_style or shared:
        return made
    lines = text.splitlines()
    starts = []
    for key, _ in node.value:
        start = key.start_mark.line
        while start > 0 and (not lines[start - 1].strip() or lines[start - 1].startswith("#")):
            start -= 1
        starts.append(start)
    ends = [*starts[1:], len(lines)]
    own = ["\n".join(lines[start:end]).strip("\n") + "\n" for start, end in zip(starts, ends, strict=True)]
    same = len(own) == len(made) and all(
        yaml.safe_load(part) == {key: metadata[key]} for part, key in zip(own, metadata, strict=True)
    )
    return dict(zip(metadata, own, strict=True)) if same else made


def _comments(lines: str, value: Any) -> str:
    """What stands in these lines beside the value; a `#` of the value's own is none."""
    try:
        bare = yaml.safe_load(_COMMENT.sub("", lines))
    except yaml.YAMLError:
        return ""
    return "".join(_COMMENT.findall(lines)) if isinstance(bare, dict) and value in bare.values() else ""


def _text(metadata: Mapping[str, str], layout: str, sections: Mapping[str, str], state: Mapping[str, str]) -> str:
    def put(place: re.Match[str]) -> str:
        name = place[1]
        if name not in sections:
            return ""
        # Blank lines, or a table before the closing mark would go on into it
        return f"<!-- lingudistill:{name} -->\n\n{sections[name].strip()}\n\n<!-- /lingudistill:{name} -->"

    body = _PLACE.sub(put, layout).strip()
    front = f"---\n{''.join(metadata.values()).strip()}\n---\n\n" if metadata else ""
    return f"{front}{body}\n\n<!-- lingudistill-state\n{_NOTE}\n{json.dumps(dict(state))}\n-->\n"


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n")  # the Hub's editor may write either


def _digest(text: str) -> str:
    """Of the words alone: blank lines and blanks at a line's end are no edit."""
    lines = (line.rstrip() for line in text.splitlines())
    return hashlib.sha256("\n".join(line for line in lines if line).encode()).hexdigest()[:12]

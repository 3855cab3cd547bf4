"""Anybody's text (names, titles, answers of models) as part of a page: it cannot become markup, metadata or another heading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

HUB = "https://huggingface.co"


def plain(text: Any, limit: int = 200) -> str:
    """One line without control, direction or other invisible characters, cut at `limit` characters."""
    line = " ".join(str(text).split())
    line = "".join(character for character in line if character.isprintable())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def markdown(text: Any, limit: int = 200) -> str:
    """Text as Markdown shows it letter by letter: no emphasis, link, image, table cell, HTML or heading of its own."""
    escaped = re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", plain(text, limit))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fenced(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def check_repo_id(name: Any) -> None:
    """Raise HFValidationError unless it is a valid `ORG/NAME` (or a legacy `NAME`)."""
    validate_repo_id(name)
    if isinstance(name, str) and "\n" in name:  # which huggingface_hub before 1.33 lets pass at the end
        raise HFValidationError(f"a repository's name has no line break: {name!r}.")


def repo_or_none(name: Any) -> str | None:
    """The name, if it is a valid `ORG/NAME` (or a legacy `NAME`)."""
    try:
        check_repo_id(name)
    except HFValidationError:
        return None
    return name if isinstance(name, str) else None


def linked(fact: Mapping[str, Any], fallback: str) -> str:
    """A model or dataset as a link to the Hub where it has an id, else its escaped name."""
    if identity := repo_or_none(fact.get("id")):  # a Hub id counts more than any description
        prefix = "datasets/" if fact.get("kind") == "dataset" else ""
        return f"[{markdown(identity)}]({HUB}/{prefix}{identity})"
    if prose := fact.get("prose"):
        return markdown(prose)
    name = fact.get("name")
    return f"the unpublished model {markdown(name)}" if name else fallback


def pinned(fact: Mapping[str, Any]) -> str:
    """`linked`, with the commit where it is known."""
    revision = fact.get("revision")
    text = linked(fact, "")
    return f"{text} at `{revision}`" if isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision) else text

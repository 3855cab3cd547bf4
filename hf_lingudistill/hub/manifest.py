"""What is to be sent to the Hub: files listed and checked, and nothing sent. `model.py` lists a model's, `space.py` a Space's.

A manifest is made without the network, so that it can be read first (`lingudistill publish --dry_run`). Nothing in the model's folder
is changed: what has to be rendered or cleaned is content of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ..sentences import typed
from . import escape

# Plots that lie beside a report, in the order in which a card shows them: {file name without its suffix: caption}.
PLOTS = {
    "scores": "Before and after, with 95 % intervals",
    "trade_off": "Language against vision",
    "training": "Training",
    "report": "What the report measured, before and after, with 95 % intervals",
}
SCORES = ".eval_results/lingudistill.yaml"  # what the Hub shows on a benchmark's leaderboard
# Weights of an earlier push, which transformers would read beside (or before) the new ones.
WEIGHTS = re.compile(
    r"(adapter_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?|pytorch_model.*\.bin.*|adapter_config\.json"
)
TOKEN = re.compile(r"\b(hf_|api_org_)[A-Za-z0-9]{16,}")
_SETTINGS = re.compile(r"config\.json$|^lingudistill\.json$|^recipe\.yaml$")
_HOME = re.compile(r"(/home/|/Users/|\\Users\\)[\w.-]+[/\\]")


class PublishError(RuntimeError):
    """Something keeps a model from being published; the model itself is as it was. The message says what to do."""


@dataclass(frozen=True)
class Item:
    """One file to send. source: a local file, or the content itself."""

    path: str
    source: Path | bytes

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @property
    def origin(self) -> str:
        return "rendered" if isinstance(self.source, bytes) else "as it is"

    def oids(self) -> set[str]:
        """What the Hub calls this content: the git blob's hash, and for a large file its SHA-256."""
        if isinstance(self.source, bytes):
            return {git_hash(self.source), hashlib.sha256(self.source).hexdigest()}
        with self.source.open("rb") as file:
            large = sha_fileobj(file).hex()
        # Weights are always large, and not read into memory for a hash that they will not have
        return {large} if self.source.suffix == ".safetensors" else {large, git_hash(self.source.read_bytes())}


@dataclass(frozen=True)
class Manifest:
    """What is to be sent where. command: what goes on after a failure. repo_type: `model` or `space`."""

    repo_id: str
    items: tuple[Item, ...]
    command: str
    repo_type: str = "model"
    private: bool = False
    revision: str | None = None
    tag: str | None = None
    message: str = "Publish with hf_lingudistill"
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        visibility = "private" if self.private else "public"
        width = max(len(item.path) for item in self.items)
        lines = [
            f"{visibility} {self.repo_type} {self.repo_id}: {len(self.items)} files, {sum(i.size for i in self.items):,} bytes"
        ]
        lines += [f"  {item.path:<{width}}  {item.size:>13,}  {item.origin}" for item in self.items]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def text(self, path: str) -> str:
        """The content of a text that is sent; empty if there is no such file."""
        source = next((item.source for item in self.items if item.path == path), b"")
        return (source if isinstance(source, bytes) else source.read_bytes()).decode()


def command_for(output_dir: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """What publishes a saved model, at first or after a failure."""
    options = [*(["--private"] if private else []), *(["--revision", revision] if revision else [])]
    return typed("publish", str(output_dir), "--repo_id", repo_id, *options)


def check_repo_id(*names: str | None) -> None:
    """Raise PublishError for a name that the Hub would not take as `ORG/NAME`."""
    for name in names:
        try:
            if name is not None:
                escape.check_repo_id(name)
        except HFValidationError as error:
            raise PublishError(f"Expected a Hub id such as ORG/NAME: {one_line(error)}") from None


def json_bytes(value: Any) -> bytes:
    """JSON as it lies on the Hub: indented, with a newline at its end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def refuse_secrets(item: Item, folder: Path) -> None:
    """Raise PublishError if a text holds a Hub token or a path of this machine, or a setting somebody's home folder."""
    if item.path.endswith((".safetensors", ".png", ".jpg", ".jpeg", ".model")):
        return
    content = item.source if isinstance(item.source, bytes) else item.source.read_bytes()
    text = content.decode("utf-8", errors="replace")
    token = get_token()
    if TOKEN.search(text) or (token and token in text):
        raise PublishError(
            f"{item.path} holds what looks like a Hub token: take it out (and revoke it), then publish again."
        )
    places = {"the model's folder": str(folder.resolve()), "your home folder": str(Path.home()).rstrip("/") + "/"}
    found = next((kind for kind, place in places.items() if len(place) > 1 and place in text), None)
    if found is None and _SETTINGS.search(item.path) and _HOME.search(text):
        found = "somebody's home folder"  # trained on another machine
    if found:
        raise PublishError(f"{item.path} holds the path of {found}: take it out, then publish again.")


def one_line(error: object) -> str:
    """An error as part of a sentence."""
    text = " ".join(str(error).split())
    return text[:300].rstrip(".")

"""Repositories that may not be read: what is said tells a gated one, a private one and none apart, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hub import Blob, Hub, Repo, git_hash
from pushed import TOKEN

from hf_lingudistill.compatibility import UnreadableModelError
from hf_lingudistill.compatibility.configs import load_config
from hf_lingudistill.labs.evaluation.models import read_config as read_to_score

READERS: dict[str, Callable[[str], object]] = {
    "check and training": lambda name: load_config("student", name, False, None),
    "evaluate": lambda name: read_to_score("before", name),
}
EXPECTED = {
    ("gated", False): "it is gated: ask for access on .*/ann/gated, and sign in with `hf auth login`",
    ("gated", True): "it is gated, and the token in use has no access: ask for it on .*/ann/gated",
    ("private", False): "no such repository, or it is private: then sign in with `hf auth login`",
    ("private", True): "no such repository, or it is private and the token in use may not read it",
    ("none", False): "no such repository, or it is private: then sign in",
    ("none", True): "no such repository, or it is private and the token",
}


@pytest.fixture
def closed(hub: Hub, saved_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """ann's repositories, of which bob may read none."""
    hub.add_user("bob", token=BOB)
    files = {file.name: file.read_bytes() for file in saved_pair[0].iterdir()}
    for name in ("ann/gated", "ann/private"):
        repo = Repo(name, "model", gated=name == "ann/gated", private=name == "ann/private")
        repo.add("first", {path: Blob(len(content), git_hash(content), content) for path, content in files.items()})
        hub.repos["model", name] = repo
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    return hub


BOB = "hf_" + "b" * 30


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("kind", "signed_in"), EXPECTED)
def test_what_may_not_be_read_is_told_apart(
    closed: Hub, monkeypatch: pytest.MonkeyPatch, reader: str, kind: str, signed_in: bool
) -> None:
    assert closed.repos
    if signed_in:
        monkeypatch.setenv("HF_TOKEN", BOB)
    with pytest.raises(UnreadableModelError, match=EXPECTED[kind, signed_in]) as caught:
        READERS[reader](f"ann/{kind}")
    assert BOB not in str(caught.value)
    if kind != "none":  # control: its owner reads it
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        READERS[reader](f"ann/{kind}")

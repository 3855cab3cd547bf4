"""What `guess_teacher` finds in a VLM's config and card. Configs and tokenizers only, no weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from pairs import Tokenizers, llama, save, vlm
from transformers import AutoModelForImageTextToText

from hf_lingudistill.compatibility import check_compatibility, guess_teacher

LM, VISION = {"model_type": "llama"}, {"model_type": "siglip", "vision_config": {}, "text_config": {}}
Repositories = dict[str, dict[str, Any]]


def card(*base_model: str) -> str:
    names = "".join(f"\n- {name}" for name in base_model)
    return f"---\nlicense: apache-2.0\nbase_model:{names}\n---\n# A model\n"


def vlm_files(text_config: dict[str, Any] | None = None, readme: str | None = None, **other: Any) -> dict[str, Any]:
    config = {
        "model_type": "llava",
        "vision_config": {},
        "text_config": {"model_type": "llama", **(text_config or {})},
    }
    return {"config.json": {**config, **other}, "README.md": readme}


class Hub:
    """Stands in for the Hub: repositories by name, each a mapping of file names to content."""

    def __init__(self, root: Path, repositories: Repositories) -> None:
        self.root, self.requests, self.down = root, 0, False
        for repository, files in repositories.items():
            write(root / repository, files)

    def download(self, repo_id: str, filename: str, **_: Any) -> str:
        self.requests += 1
        if self.down:
            raise LocalEntryNotFoundError("cannot connect")
        path = self.root / repo_id / filename
        if not path.is_file():
            raise EntryNotFoundError(filename)
        return str(path)


def write(folder: Path, files: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Repositories], Hub]:
    def build(repositories: Repositories) -> Hub:
        hub = Hub(tmp_path / "hub", repositories)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        return hub

    return build


@pytest.mark.parametrize(
    "student",
    [
        vlm_files({"_name_or_path": "org/lm"}),
        vlm_files(readme=card("org/lm")),
        vlm_files(readme=card("org/encoder", "org/lm")),
        vlm_files(readme="---\nbase_model: org/lm\n---\n"),
        {"config.json": {"lm_model_type": "org/lm", "vit_model_type": "org/encoder", "lm_tokenizer": "org/other"}},
        {"config.json": {"model_type": "llava_llama", "mm_vision_tower": "org/encoder", "_name_or_path": "org/lm"}},
        vlm_files(readme=card("org/other-vlm")),
        vlm_files({"_name_or_path": "/fsx/run_7/checkpoint"}, readme=card("org/lm")),
        vlm_files({"_name_or_path": "None"}, readme=card("org/lm")),
        vlm_files({"_name_or_path": "org/encoder"}, readme=card("org/lm")),
    ],
    ids=[
        "text-config",
        "card-list-of-one",
        "card-list",
        "card-string",
        "nanovlm",
        "llava",
        "through-another-vlm",
        "path-of-a-cluster",
        "the-string-none",
        "wrong-kind",
    ],
)
@pytest.mark.parametrize("where", ["hub", "folder"])
def test_the_lm_is_found(
    student: dict[str, Any], where: str, hub: Callable[[Repositories], Hub], tmp_path: Path
) -> None:
    hub(
        {
            "org/lm": {"config.json": LM},
            "org/other": {"config.json": LM},
            "org/encoder": {"config.json": VISION},
            "org/other-vlm": vlm_files({"_name_or_path": "org/lm"}),
            "me/vlm": student,
        }
    )
    assert guess_teacher("me/vlm" if where == "hub" else write(tmp_path / "vlm", student)) == "org/lm"


@pytest.mark.parametrize(
    "student",
    [
        vlm_files(),
        vlm_files({"_name_or_path": "me/vlm"}),
        vlm_files(readme=card("me/vlm")),
        vlm_files(readme=card("me/VLM")),
        vlm_files(readme=card("org/circle")),
        vlm_files(readme=card("org/encoder")),
        vlm_files(readme="---\nbase_model: [org/lm\n---\n"),
        vlm_files(readme="no front matter, base_model: org/lm"),
        vlm_files(_name_or_path="me/vlm"),
        {"config.json": "{"},
        {},
    ],
    ids=[
        "nothing",
        "itself",
        "itself-in-card",
        "other-case",
        "circle",
        "encoder",
        "bad-yaml",
        "no-yaml",
        "own-name",
        "bad-json",
        "empty",
    ],
)
def test_where_no_lm_is_named_none_is_guessed(student: dict[str, Any], hub: Callable[[Repositories], Hub]) -> None:
    hub(
        {
            "org/lm": {"config.json": LM},
            "org/encoder": {"config.json": VISION},
            "org/circle": vlm_files({"_name_or_path": "me/vlm"}),
            "me/vlm": student,
        }
    )
    assert guess_teacher("me/vlm") is None


def test_a_local_lm_is_found(tmp_path: Path) -> None:
    lm = write(tmp_path / "lm", {"config.json": LM})
    folder = write(tmp_path / "vlm", vlm_files({"_name_or_path": lm}))
    assert guess_teacher(folder) == lm
    assert guess_teacher(Path(folder)) == lm


def test_a_config_or_model_names_its_lm_too(tmp_path: Path) -> None:
    lm = write(tmp_path / "lm", {"config.json": LM})
    config = vlm(llama(name_or_path=lm))
    assert guess_teacher(config) == lm
    with torch.device("meta"):
        assert guess_teacher(AutoModelForImageTextToText.from_config(config)) == lm
    assert guess_teacher(vlm()) is None


def test_the_only_name_that_is_no_vision_encoder_is_taken(hub: Callable[[Repositories], Hub], tmp_path: Path) -> None:
    """Neither config can be read (a gated LM, say): names decide, if they leave exactly one."""
    hub({})
    folder = tmp_path / "vlm"
    write(folder, vlm_files(readme=card("google/siglip-base-patch16-512", "org/gated-lm")))
    assert guess_teacher(folder) == "org/gated-lm"
    write(folder, vlm_files(readme=card("org/gated-lm", "org/something-else")))
    assert guess_teacher(folder) is None
    write(folder, vlm_files(readme=card("org/perhaps-a-vlm")))
    assert guess_teacher(folder) is None


def test_without_network_there_is_no_guess_and_one_attempt(hub: Callable[[Repositories], Hub], tmp_path: Path) -> None:
    stand_in = hub({"org/lm": {"config.json": LM}, "me/vlm": vlm_files(readme=card("org/lm"))})
    assert guess_teacher("me/vlm") == "org/lm"  # control: the same question with a network

    stand_in.down, stand_in.requests = True, 0
    assert guess_teacher("me/vlm") is None
    assert stand_in.requests == 1
    stand_in.requests = 0
    assert guess_teacher(write(tmp_path / "vlm", vlm_files(readme=card("org/lm")))) is None
    assert stand_in.requests == 1


def test_the_guess_is_what_the_check_takes(tmp_path: Path, tokenizers: Tokenizers) -> None:
    lm = save(tmp_path / "lm", llama(), tokenizers["teacher_tokenizer"])
    folder = save(tmp_path / "vlm", vlm(), tokenizers["student_tokenizer"])
    write(Path(folder), {"README.md": f"---\nbase_model: {lm}\n---\n"})
    guess = guess_teacher(folder)
    assert guess is not None
    assert check_compatibility(folder, guess).fits

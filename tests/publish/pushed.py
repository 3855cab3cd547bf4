"""What the tests of publishing share: users, a run's facts and report, and what lies where."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub import Hub
from huggingface_hub import HfApi, constants

from hf_lingudistill.hub.manifest import Manifest
from hf_lingudistill.hub.run_facts import SCHEMA

TOKEN, READ_TOKEN, OLD_TOKEN = ("hf_" + letter * 30 for letter in "wro")
MakeTrainer = Callable[..., Any]

FACTS = {
    "schema": SCHEMA,
    "student": {"id": "ORG/VLM", "name": "ORG/VLM", "license": "mit"},
    "teacher": {"id": "ORG/LM", "name": "ORG/LM"},
    "datasets": [],
    "recipe": {"model_name_or_path": "ORG/VLM", "kv_sharing": "full"},
}
REPORT = {
    "schema": "lingudistill-evaluation/1",
    "models": {"before": {"path": "/home/ann/vlm"}, "after": {"path": "/home/ann/out"}},
    "tasks": [
        {
            "name": "bits_per_byte/xsum/plain",
            "group": "language",
            "title": "News",
            "metric": "bits_per_byte",
            "higher_is_better": False,
            "scores": {"before": {"value": 1.5}, "after": {"value": 1.2}},
        }
    ],
}


def point_to(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def planned(manifest: Manifest) -> dict[str, bytes]:
    return {i.path: i.source if isinstance(i.source, bytes) else i.source.read_bytes() for i in manifest.items}


def on_the_hub(hub: Hub, name: str = "ann/model", kind: str = "model") -> dict[str, bytes]:
    """What was pushed, without what the Hub itself puts into a new repository."""
    return {path: content for path, content in hub.files(name, kind).items() if path != ".gitattributes"}


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """Of a fresh process with an empty cache, to which this Hub is the Hub."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }


def write_data(folder: Path) -> Path:
    tiny.make_dataset(8).save_to_disk(str(folder))
    return folder


def script_arguments(pair: tuple[Path, Path], tmp_path: Path, **more: Any) -> list[str]:
    settings = {
        "model_name_or_path": pair[0],
        "teacher_model_name_or_path": pair[1],
        "dataset_name": write_data(tmp_path / "data"),
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "teacher_quantization": "none",
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "dtype": "float32",
        "push_to_hub": True,
        "hub_token": TOKEN,
        **more,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def edit_card(old: str, new: str, name: str = "ann/model", kind: str = "model") -> None:
    """As somebody does it in the browser."""
    api = HfApi(token=TOKEN)
    text = Path(api.hf_hub_download(name, "README.md", repo_type=kind, force_download=True)).read_text()
    assert text.count(old) == 1
    content = text.replace(old, new).encode()
    api.upload_file(path_or_fileobj=content, path_in_repo="README.md", repo_id=name, repo_type=kind)

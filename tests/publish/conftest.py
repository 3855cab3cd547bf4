"""The Hub of these tests is `tests/hub.py`, its client the real one."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub
from huggingface_hub.utils import _http as hub_http
from huggingface_hub.utils import close_session
from PIL import Image
from pushed import FACTS, READ_TOKEN, REPORT, TOKEN, point_to

from hf_lingudistill.hub import publish as publishing


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub where `ann` may write, and this process's client set to it as HF_ENDPOINT would at its start."""
    with Hub() as server:
        server.add_user("ann", token=TOKEN)
        server.add_user("ann", token=READ_TOKEN, role="read")
        point_to(server, monkeypatch)
        yield server
        close_session()
        assert server.unknown == []


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, of huggingface_hub and of ours, noted instead of waited."""
    noted: list[float] = []
    clock = types.SimpleNamespace(sleep=noted.append)
    monkeypatch.setattr(hub_http, "time", clock)
    monkeypatch.setattr(publishing, "time", clock)
    return noted


@pytest.fixture
def model(saved_pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A saved model with a record, a report and a plot."""
    folder = tmp_path / "model"
    shutil.copytree(saved_pair[0], folder)
    (folder / "lingudistill.json").write_text(json.dumps(FACTS))
    (folder / "report.json").write_text(json.dumps(REPORT))
    Image.new("RGB", (8, 8)).save(folder / "scores.png")
    return folder

"""The Space that shows a model is filled and sent beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hub import Hub
from pushed import FACTS, TOKEN, edit_card, on_the_hub, planned

from hf_lingudistill.cli import main as cli
from hf_lingudistill.hub.manifest import PublishError
from hf_lingudistill.hub.model import model_manifest
from hf_lingudistill.hub.space import space_manifest


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "app.py").write_text("print('hello')\n")
    (folder / "requirements.txt").write_text("gradio\n")
    (folder / "README.md").write_text("---\ntitle: Before and after\nsdk: gradio\napp_file: app.py\n---\n\n# Hello\n")
    (folder / "__pycache__/app.pyc").write_bytes(b"x")
    (folder / ".env").write_text("HF_TOKEN=" + TOKEN)
    return folder


def test_the_space_is_filled_with_the_repositories(
    hub: Hub, model: Path, app: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    command = ["publish", str(model), "--repo_id", "ann/model", "--space", "ann/space", "--space_files", str(app)]
    assert cli(command) == 0, capsys.readouterr().err
    files = on_the_hub(hub, "ann/space", "space")
    assert files.keys() == {"app.py", "requirements.txt", "README.md", "config.json", "report.json"}
    assert json.loads(files["config.json"]) == {
        "before": "ORG/VLM",
        "after": "ann/model",
        "original": "ORG/LM",
        "report": "report.json",
    }
    front = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert front["models"] == ["ORG/VLM", "ann/model", "ORG/LM"] and front["title"] == "Before and after"
    assert hub.repos["space", "ann/space"].sdk == "gradio"
    assert "(https://huggingface.co/spaces/ann/space)" in on_the_hub(hub)["README.md"].decode()
    edit_card("title: Before and after", "title: Mine\nemoji: 🦙", "ann/space", "space")
    edit_card("# Hello", "# Good morning", "ann/space", "space")
    (app / "README.md").write_text((app / "README.md").read_text() + "\nNews.\n")
    assert cli(command) == 0
    text = on_the_hub(hub, "ann/space", "space")["README.md"].decode()
    assert "title: Mine" in text and "emoji: 🦙" in text and "# Good morning" in text
    assert "kept as edited on the Hub, in README.md: emoji, title, about" in capsys.readouterr().out


def test_the_real_space_is_sent_with_all_modules_that_it_imports(model: Path) -> None:
    """Two of them are the library's own, links in a clone."""
    manifest = space_manifest(model_manifest(model, "ann/model"), "ann/space", before="ann/before")
    sent = planned(manifest)
    folder = Path(__file__).parents[2] / "examples/space"
    for path, content in sent.items():
        if path.endswith(".py"):
            names = re.findall(r"^(?:from|import) (\w+)", content.decode(), re.MULTILINE)
            assert {f"{name}.py" for name in names if (folder / f"{name}.py").exists()} <= sent.keys(), path
    for name in ("machine.py", "rgb.py", "weights.py"):
        assert (folder / name).is_symlink()  # control: a plain copy of the folder would lack them
        assert sent[name] == (folder.parents[1] / "hf_lingudistill" / name).read_bytes()


def test_a_space_needs_the_model_before_on_the_hub(model: Path, app: Path) -> None:
    (model / "lingudistill.json").write_text(json.dumps({**FACTS, "student": {"id": None, "name": "before"}}))
    manifest = model_manifest(model, "ann/model")
    with pytest.raises(PublishError, match="pass --before ORG/BEFORE"):
        space_manifest(manifest, "ann/space", files=app)
    items = {item.path for item in space_manifest(manifest, "ann/space", before="ann/before", files=app).items}
    assert "config.json" in items


def test_a_missing_app_says_where_to_find_it(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="Clone the repository of hf_lingudistill and pass --space_files"):
        space_manifest(model_manifest(model, "ann/model"), "ann/space", files=tmp_path / "nowhere")

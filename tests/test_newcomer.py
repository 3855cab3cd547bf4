"""A newcomer's first hour: a fresh clone, a fresh virtual environment, and the commands of docs/install.md as they stand there.

`make newcomer` runs it (minutes: it installs torch). The Hub is the one on loopback, where tiny models bear the names of the page.
NEWCOMER_VENV=PATH takes an environment that is there in place of a fresh one, for whoever works on the commands alone.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from hub import Hub
from huggingface_hub import HfApi, constants

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "install.md"
STUDENT, TEACHER, DATA = "HuggingFaceTB/SmolVLM-256M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "ORG/DATA"


def blocks(page: Path = PAGE) -> list[str]:
    """The shell blocks of a page, as text."""
    return re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def test_the_page_has_what_the_hour_needs() -> None:
    install, hour = blocks()
    assert any(line.startswith("pip install .") for line in commands(install))
    assert [line.split()[1] for line in commands(hour)] == [
        *("--help", "check", "plan", "diagnose", "distill", "distill", "publish"),
    ]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The models and the dataset of the page, tiny."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with Hub() as server:
        for owner in ("HuggingFaceTB", "ORG"):
            server.add_user(owner, token=f"hf_{owner}")
        student, teacher = tiny.save_pair(tmp_path / "pair")
        (tmp_path / "rows").mkdir()
        tiny.make_dataset(12).to_parquet(tmp_path / "rows" / "train-00000-of-00001.parquet")
        for name, kind, folder in (
            (STUDENT, "model", student),
            (TEACHER, "model", teacher),
            (DATA, "dataset", tmp_path / "rows"),
        ):
            api = HfApi(endpoint=server.url, token=f"hf_{name.split('/')[0]}")
            api.create_repo(name, repo_type=kind)
            api.upload_folder(repo_id=name, folder_path=folder, repo_type=kind)
        yield server


@pytest.mark.slow
def test_a_newcomers_hour(hub: Hub, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(clone)], check=True)
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "PIP_CACHE_DIR", "PIP_INDEX_URL") if name in os.environ
    }
    environment = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}
    install, hour = blocks(clone / "docs" / "install.md")
    if ready := os.environ.get("NEWCOMER_VENV"):
        environment |= {"PATH": f"{Path(ready) / 'bin'}:{kept['PATH']}", "PYTHONPATH": str(clone)}
    else:
        environment["PATH"] = f"{clone / '.venv' / 'bin'}:{kept['PATH']}"
        run(f"set -e\n{install}", clone, environment)
    outputs = {command: run(command, clone, environment) for command in commands(hour)}
    closing = next(text for command, text in outputs.items() if "--output_dir smolvlm-fluent" in command)
    (shared,) = re.findall(r"^To share it: (.*)$", closing, flags=re.MULTILINE)
    assert "ORG/NAME" in run(shared, clone, environment)  # what a command prints runs as it is printed
    written = {path.name for path in clone.iterdir()} - {path.name for path in ROOT.iterdir()}
    assert {"drift", "smolvlm-fluent"} <= written
    again = run(commands(hour)[5], clone, environment, code=2)  # a second time into the same folder
    assert "error: output_dir 'smolvlm-fluent' holds a run's files" in again


def run(command: str, folder: Path, environment: dict[str, str], *, code: int = 0) -> str:
    """What a command prints; it must end with `code`, print no traceback and draw no bar over itself."""
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert done.returncode == code, f"{command}\n{text[-4000:]}"
    assert "Traceback" not in text, text[-4000:]
    assert done.stderr.count("\r") < 20 or command.startswith("set -e"), command
    return text

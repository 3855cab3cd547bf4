"""The commands, in processes of their own, against a Hub that HF_ENDPOINT names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from hub import Hub
from huggingface_hub import HfApi, snapshot_download
from pushed import TOKEN, environment, on_the_hub, planned, script_arguments

from hf_lingudistill.cli import main
from hf_lingudistill.hub.model import model_manifest
from hf_lingudistill.hub.publish import publish


def test_the_whole_repository_can_be_taken_home(hub: Hub, model: Path, tmp_path: Path) -> None:
    manifest = model_manifest(model, "ann/model")
    publish(manifest, token=TOKEN)
    home = Path(snapshot_download("ann/model", cache_dir=tmp_path / "cache"))
    held = {str(p.relative_to(home)): p.read_bytes() for p in home.rglob("*") if p.is_file()}
    assert {path: content for path, content in held.items() if path != ".gitattributes"} == planned(manifest)


def test_the_command_publishes_through_hf_endpoint(hub: Hub, model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hf_lingudistill.cli", "publish", str(model), "--repo_id", "model"]
    env = {**environment(hub, tmp_path / "home"), "HF_TOKEN": TOKEN}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert on_the_hub(hub) == planned(model_manifest(model, "ann/model"))  # the user's namespace was found
    assert TOKEN not in done.stdout + done.stderr
    assert str(hub.url) + "/ann/model" in done.stdout


def test_files_of_a_space_need_their_space(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["publish", str(model), "--repo_id", "ann/model", "--dry_run", "--space_files", str(model)]
    assert main(command) == 2
    assert "--space_files are of --space, which is not given" in capsys.readouterr().err


@pytest.mark.slow
def test_from_hub_ids_to_a_published_model(hub: Hub, saved_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """One command, everything on the Hub: the commits of student, teacher and data are in the card of the result."""
    api = HfApi(token=TOKEN)
    (tmp_path / "card.md").write_text("---\nlicense: gemma\nlanguage:\n- en\n- de\n---\n# VLM\n")
    tiny.make_dataset(8).to_parquet(tmp_path / "train.parquet")
    for name, kind, source in (
        ("ann/vlm", "model", saved_pair[0]),
        ("ann/lm", "model", saved_pair[1]),
        ("ann/data", "dataset", tmp_path / "train.parquet"),
    ):
        api.create_repo(name, repo_type=kind)
        if source.is_dir():
            api.upload_folder(repo_id=name, folder_path=source)
        else:
            api.upload_file(path_or_fileobj=source, path_in_repo="train.parquet", repo_id=name, repo_type=kind)
    api.upload_file(path_or_fileobj=tmp_path / "card.md", path_in_repo="README.md", repo_id="ann/vlm")

    arguments = script_arguments(saved_pair, tmp_path, hub_model_id="ann/out")
    for flag, value in (
        ("--model_name_or_path", "ann/vlm"),
        ("--teacher_model_name_or_path", "ann/lm"),
        ("--dataset_name", "ann/data"),
    ):
        arguments[arguments.index(flag) + 1] = value
    command = [sys.executable, "-m", "hf_lingudistill.cli", "distill", *arguments]
    done = subprocess.run(
        command, env=environment(hub, tmp_path / "home"), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    files = on_the_hub(hub, "ann/out")
    head = {name: hub.repos[kind, name].branches["main"] for kind, name in hub.repos}
    record = json.loads(files["lingudistill.json"])
    assert (record["student"]["id"], record["student"]["revision"]) == ("ann/vlm", head["ann/vlm"])
    assert (record["teacher"]["id"], record["teacher"]["revision"]) == ("ann/lm", head["ann/lm"])
    assert [(d["id"], d["revision"]) for d in record["datasets"]] == [("ann/data", head["ann/data"])]
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "ann/vlm" and front["base_model_relation"] == "finetune"
    assert front["license"] == "gemma" and front["language"] == ["en", "de"] and front["datasets"] == ["ann/data"]
    assert all(f"`{head[name]}`" in card for name in ("ann/vlm", "ann/lm", "ann/data"))
    assert str(tmp_path) not in b"".join(files.values()).decode("utf-8", "ignore")
    assert len(hub.repos["model", "ann/out"].commits) == 2  # one push, not one at every step of the end

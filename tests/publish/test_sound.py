"""What is published is a whole model, and the card's scores are its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pushed import REPORT
from safetensors.torch import load_file, save_file

from hf_lingudistill.cli import main as cli
from hf_lingudistill.hub.manifest import PublishError
from hf_lingudistill.hub.model import model_manifest
from hf_lingudistill.weights import fingerprint

NORM = "model.text_model.norm.weight"


def change_weights(folder: Path, **changes: Any) -> None:
    """Take out a tensor (None), or give all of it another value."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name].fill_(value)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def report_of(**prints: str | None) -> dict[str, Any]:
    """A report with a score for each of these models: 1, 2, ... in their order."""
    task = REPORT["tasks"][0]
    scores = {name: {"value": float(number)} for number, name in enumerate(prints, 1)}
    models = {name: {"path": f"out/{name}", "fingerprint": print_} for name, print_ in prints.items()}
    return {**REPORT, "models": models, "tasks": [{**task, "scores": scores, "differences": []}]}


def shown(folder: Path, report: dict[str, Any]) -> tuple[str | None, float]:
    """(the report's name for the published model, the score that goes into the Hub's metadata)."""
    (folder / "report.json").write_text(json.dumps(report))
    manifest = model_manifest(folder, "ann/model")
    found = json.loads(manifest.text("report.json"))
    return found.get("main"), found["tasks"][0]["scores"][found["main"]]["value"]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, f"lacks {NORM}, which its config asks for"),
        (torch.nan, f"weights that are not finite .* in float32\\): {NORM}"),
        (-torch.inf, f"weights that are not finite .* in float32\\): {NORM}"),
    ],
)
def test_weights_that_are_missing_or_not_finite_are_not_sent(model: Path, value: float | None, sentence: str) -> None:
    model_manifest(model, "ann/model")  # control
    change_weights(model, **{NORM: value})
    with pytest.raises(PublishError, match=sentence):
        model_manifest(model, "ann/model")


def test_the_command_refuses_them_on_a_dry_run(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_weights(model, **{NORM: None})
    assert cli(["publish", str(model), "--repo_id", "ann/model", "--dry_run"]) == 2
    assert f"lacks {NORM}" in capsys.readouterr().err


def test_a_model_that_cannot_be_built_here_is_sent_with_a_note(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "of_somebodys_own_code"}))
    notes = model_manifest(model, "ann/model").notes
    assert any("holds all of its weights is not known" in note for note in notes)
    change_weights(model, **{NORM: torch.nan})
    with pytest.raises(PublishError, match="not finite"):
        model_manifest(model, "ann/model")


def test_the_scores_are_those_of_the_weights_in_the_folder(model: Path) -> None:
    mine = fingerprint(model)
    assert shown(model, report_of(before="1", after=mine)) == ("after", 2.0)
    # Whatever it is called there: not those of `after`, which is another model
    assert shown(model, report_of(before=mine, after="2")) == ("before", 1.0)
    assert shown(model, report_of(after="1", mine=mine)) == ("mine", 2.0)
    assert shown(model, report_of(mine=mine, after=mine)) == ("after", 2.0)


def test_a_report_about_another_model_is_refused(model: Path) -> None:
    with pytest.raises(
        PublishError, match=r"about other weights .* it knows before \(out/before\), after \(out/after\)"
    ):
        shown(model, report_of(before="1", after="2"))


def test_weights_that_were_replaced_after_the_evaluation_are_refused(model: Path) -> None:
    report = report_of(after=fingerprint(model))
    shown(model, report)
    change_weights(model, **{NORM: 3.0})
    with pytest.raises(PublishError, match="none of which has this folder's fingerprint"):
        shown(model, report)


def test_a_report_without_fingerprints_is_taken(model: Path) -> None:
    assert shown(model, report_of(before=None, after=None)) == ("after", 2.0)
    report = report_of(before=None, after=None)
    report["models"]["before"]["path"] = str(model)  # told by its path, as before
    assert shown(model, report) == ("before", 1.0)


def test_an_adapter_is_evaluated_merged_and_the_note_says_so(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "ORG/VLM"}))
    shutil.copy(model / "model.safetensors", folder / "adapter_model.safetensors")
    (folder / "report.json").write_text(json.dumps(report_of(before="1", after="2")))
    notes = model_manifest(folder, "ann/model").notes
    assert any("scores are those of 'after' in the report (out/after)" in note for note in notes)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[NORM][0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(PublishError, match="not finite"):
        model_manifest(folder, "ann/model")

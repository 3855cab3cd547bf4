"""A card that was edited by hand stays so (`test_card_edits.py` has the rules)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub import Blob, Hub, git_hash
from huggingface_hub import HfApi
from pushed import REPORT, TOKEN, MakeTrainer, edit_card

from hf_lingudistill.hub.manifest import PublishError
from hf_lingudistill.hub.model import model_manifest
from hf_lingudistill.hub.publish import publish


def change_report(model: Path, value: float) -> None:
    report = json.loads(json.dumps(REPORT))
    report["tasks"][0]["scores"]["after"]["value"] = value
    (model / "report.json").write_text(json.dumps(report))


def test_what_was_edited_on_the_hub_stays_and_the_scores_are_renewed(hub: Hub, model: Path) -> None:
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    edit_card("## Limits", "## Thanks\n\nTo Ann.\n\n## Limits")
    edit_card("license: mit", "license: gemma")
    change_report(model, 1.125)
    done = publish(model_manifest(model, "ann/model"), token=TOKEN)
    text = hub.files("ann/model")["README.md"].decode()
    assert "To Ann." in text and "license: gemma" in text and "**1.125**" in text and "**1.200**" not in text
    assert set(done.kept) == {"license", "limits"} and "README.md" in done.sent
    assert publish(model_manifest(model, "ann/model"), token=TOKEN).sent == ()
    # control: without an edit, all of it is ours
    assert publish(model_manifest(model, "ann/other"), token=TOKEN).kept == ()


def test_an_edit_from_a_moment_ago_is_not_lost(
    hub: Hub, model: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody saves the card after we have read it and before our commit arrives."""
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    change_report(model, 1.125)
    create_commit, attempts = HfApi.create_commit, []

    def late(self: HfApi, *args: Any, **kwargs: Any) -> Any:
        attempts.append(kwargs["commit_message"])
        if len(attempts) == 1:
            edit_card("## Limits", "## Thanks\n\n## Limits")
        return create_commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    assert publish(model_manifest(model, "ann/model"), token=TOKEN).kept == ("limits",)
    text = hub.files("ann/model")["README.md"].decode()
    assert "## Thanks" in text and "**1.125**" in text and waits


def test_a_card_that_was_there_before_stays_above_ours(hub: Hub, model: Path) -> None:
    api = HfApi(token=TOKEN)
    api.create_repo("ann/model")
    story = b"---\nlicense: gemma\n---\n\n# My model\n\nIts story.\n"
    api.upload_file(path_or_fileobj=story, path_in_repo="README.md", repo_id="ann/model")
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    text = hub.files("ann/model")["README.md"].decode()
    assert text.index("Its story.") < text.index("## Use it") and "license: gemma" in text
    unreadable = b"---\nlicense: [\n---\n# My model\n"
    hub.repos["model", "ann/model"].add("edit", {"README.md": Blob(len(unreadable), git_hash(unreadable), unreadable)})
    with pytest.raises(PublishError, match="README.md on ann/model cannot be read: its metadata is not valid YAML"):
        publish(model_manifest(model, "ann/model"), token=TOKEN)
    assert hub.files("ann/model")["README.md"] == unreadable


def test_edits_in_the_folder_are_published_and_survive_the_next_save(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer()
    trainer.save_model()
    trainer.create_model_card()
    readme = tmp_path / "out/README.md"
    readme.write_text(readme.read_text().replace("## Limits", "## Thanks\n\n## Limits"))
    trainer.create_model_card()
    assert "## Thanks" in readme.read_text()
    manifest = model_manifest(tmp_path / "out", "ann/model")
    assert "## Thanks" in manifest.text("README.md") and "kept as edited in README.md: limits" in str(manifest)
    assert 'source = "ann/model"' in manifest.text("README.md")  # the rest is of this publication
    # unreadable, it stops neither a training nor is it replaced; a publication says so
    readme.write_text(readme.read_text().replace("library_name:", "library_name: ["))
    trainer.create_model_card()
    assert "library_name: [" in readme.read_text()
    with pytest.raises(PublishError, match="README.md cannot be read"):
        model_manifest(tmp_path / "out", "ann/model")


def test_a_later_edit_in_the_folder_replaces_the_one_that_was_published(hub: Hub, model: Path) -> None:
    readme = model / "README.md"
    readme.write_text(model_manifest(model, "ann/model").text("README.md"))
    for old, new in (("## Limits", "## Thanks\n\n## Limits"), ("## Thanks", "## Many thanks")):
        readme.write_text(readme.read_text().replace(old, new))
        publish(model_manifest(model, "ann/model"), token=TOKEN)
        assert new in hub.files("ann/model")["README.md"].decode()


def test_a_readme_of_somebody_else_stays_at_home(model: Path) -> None:
    (model / "README.md").write_text("# The base model's card, copied along\n")
    manifest = model_manifest(model, "ann/model")
    assert "copied along" not in manifest.text("README.md")
    assert "was not rendered by hf_lingudistill: it is not sent" in str(manifest)

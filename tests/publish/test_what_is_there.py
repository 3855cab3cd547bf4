"""What lies in the folder or on the Hub already, of another run or of other weights, is no part of what is published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub import Hub
from peft import LoraConfig, get_peft_model
from pushed import FACTS, REPORT, TOKEN, on_the_hub
from transformers import AutoModelForImageTextToText

from hf_lingudistill.cli import main
from hf_lingudistill.hub.manifest import PublishError
from hf_lingudistill.hub.model import model_manifest
from hf_lingudistill.hub.publish import publish
from hf_lingudistill.hub.run_facts import recipe_of
from hf_lingudistill.hub.space import space_manifest


def an_adapter(folder: Path, base: str) -> Path:
    model = get_peft_model(tiny.make_vlm(0), LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("first", ["adapter", "whole"])
def test_one_folder_holds_one_kind_of_model(
    saved_pair: tuple[Path, Path], tmp_path: Path, first: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Both, transformers would load one on top of the other."""
    student, teacher = map(str, saved_pair)
    tiny.make_dataset(4).save_to_disk(tmp_path / "data")
    out = tmp_path / "out"
    command = ["distill", "--student", student, "--teacher", teacher, "--dataset_name", str(tmp_path / "data")]
    command += ["--output_dir", str(out), "--report_to", "none", "--bf16", "false", "--teacher_quantization", "none"]
    command += ["--max_steps", "1", "--save_strategy", "no", "--overwrite_output_dir", "true"]
    lora = ["--use_peft", "--lora_target_modules", "q_proj"]
    assert main([*command, *(lora if first == "adapter" else [])]) == 0
    was = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    assert main([*command, *([] if first == "adapter" else lora)]) == 0
    assert (out / "adapter_config.json").exists() is (first == "whole")
    assert (out / "config.json").exists() is (first == "adapter")
    for name, content in was.items():  # nothing is lost
        assert (out / f"earlier-{name}").read_bytes() == content
    model_manifest(out, "ann/model", base_model="ORG/VLM")
    if first == "adapter":
        AutoModelForImageTextToText.from_pretrained(out)
    shutil.copy(
        out / ("earlier-adapter_config.json" if first == "adapter" else "earlier-config.json"),
        out / ("adapter_config.json" if first == "adapter" else "config.json"),
    )
    shutil.copy(
        next(out.glob("earlier-*.safetensors")),
        out / next(out.glob("earlier-*.safetensors")).name.removeprefix("earlier-"),
    )
    with pytest.raises(PublishError, match="holds whole weights and an adapter"):
        model_manifest(out, "ann/model", base_model="ORG/VLM")


def test_scores_of_the_weights_before_do_not_stay(hub: Hub, model: Path) -> None:
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    assert {"report.json", "scores.png"} <= on_the_hub(hub).keys()
    for name in ("report.json", "scores.png"):
        (model / name).unlink()
    done = publish(model_manifest(model, "ann/model"), token=TOKEN)
    assert set(done.removed) == {"report.json", "scores.png"} and not set(done.removed) & on_the_hub(hub).keys()
    assert publish(model_manifest(model, "ann/model"), token=TOKEN).removed == ()


def test_a_strangers_report_stays_where_nothing_was_published_from_here(hub: Hub, model: Path) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=TOKEN)
    api.create_repo("ann/model")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="report.json", repo_id="ann/model")
    (model / "report.json").unlink()
    assert publish(model_manifest(model, "ann/model"), token=TOKEN).removed == ()
    assert on_the_hub(hub)["report.json"] == b"{}"


def test_a_report_that_does_not_say_what_it_is_about_is_taken_from_beside_the_model_alone(
    model: Path, tmp_path: Path
) -> None:
    unnamed = json.loads(json.dumps(REPORT))
    for fact in unnamed["models"].values():
        fact.pop("fingerprint", None)
    (model / "report.json").unlink()
    other = tmp_path / "other.json"
    other.write_text(json.dumps(unnamed))
    with pytest.raises(PublishError, match="does not say which weights it is about"):
        model_manifest(model, "ann/model", report=other)
    (model / "report.json").write_text(json.dumps(unnamed))
    assert any(item.path == "report.json" for item in model_manifest(model, "ann/model").items)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_is_not_published_over_the_one_that_it_was_made_of(model: Path, role: str) -> None:
    facts = {**FACTS, role: {**FACTS[role], "id": "ann/model"}}
    with pytest.raises(PublishError, match=r"ann/model is (the VLM before|the teacher) itself"):
        model_manifest(model, "ann/model", run_facts=facts)
    model_manifest(model, "ann/another", run_facts=facts)


def test_an_adapter_without_a_record_names_its_base(tmp_path: Path) -> None:
    folder = an_adapter(tmp_path / "adapter", "ORG/VLM")
    card = model_manifest(folder, "ann/adapter").text("README.md")
    assert card is not None and "base_model: ORG/VLM" in card
    with pytest.raises(PublishError, match="ORG/VLM is the VLM before itself"):
        model_manifest(folder, "ORG/VLM")


BROKEN: dict[str, dict[str, Any]] = {
    "tasks": {"tasks": {"a": 1}},
    "models": {"models": ["a"]},
    "prompts": {"prompts": ["hi"]},
    "a task": {"tasks": ["hi"]},
    "scores": {"tasks": [{"name": "t", "scores": [1]}]},
    "differences": {"tasks": [{"name": "t", "differences": [None]}]},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_report_of_another_shape_is_refused_in_a_sentence(model: Path, kind: str) -> None:
    (model / "report.json").write_text(json.dumps({**REPORT, **BROKEN[kind]}))
    with pytest.raises(PublishError, match="is no whole report: its "):
        model_manifest(model, "ann/model")


def test_a_readme_in_another_encoding_is_refused_in_a_sentence(model: Path) -> None:
    (model / "README.md").write_text("# Mine", encoding="utf-16")
    with pytest.raises(PublishError, match="is no text in UTF-8"):
        model_manifest(model, "ann/model")


def test_folders_of_a_report_stay_at_home_and_its_texts_as_they_are(model: Path) -> None:
    report = json.loads(json.dumps(REPORT))
    report["models"]["after"]["path"] = "../../../home/jane/secret/vlm"
    report["prompts"] = [
        {"prompt": "~3/4 of people", "after": "and/or", "before": "a /b", "original": "/home/jane/own file/x"}
    ]
    (model / "report.json").write_text(json.dumps(report))
    sent = json.loads(model_manifest(model, "ann/model").text("report.json") or "")
    assert sent["models"]["after"]["path"] == "vlm"
    assert sent["prompts"][0] == {"prompt": "~3/4 of people", "after": "and/or", "before": "a /b", "original": "x"}


def test_where_a_run_sampled_and_logged_is_no_part_of_its_recipe(tmp_path: Path) -> None:
    from hf_lingudistill import OnPolicyLinguDistillConfig

    config = OnPolicyLinguDistillConfig(output_dir=str(tmp_path), report_to="none", beta=0.25)
    config.vllm_server_base_url, config.vllm_server_host = "http://gpu17.corp:8000", "10.20.30.40"
    config.trackio_space_id = "acme/private-board"
    recipe = json.dumps(recipe_of(config))
    assert "beta" in recipe and not any(secret in recipe for secret in ("corp", "10.20", "acme"))


def test_a_space_says_what_its_models_need(model: Path) -> None:
    facts = {**FACTS, "student": {**FACTS["student"], "id": "ORG/VLM"}}
    private = space_manifest(model_manifest(model, "ann/model", run_facts=facts, private=True), "ann/space")
    assert "give it a token as the secret HF_TOKEN" in str(private)
    assert "peft" in (private.text("requirements.txt") or "")
    with pytest.raises(PublishError, match="The Space loads models from their main branch"):
        space_manifest(model_manifest(model, "ann/model", run_facts=facts, revision="dev"), "ann/space")
    assert "HF_TOKEN" not in str(space_manifest(model_manifest(model, "ann/model", run_facts=facts), "ann/space"))

"""What is sent of a saved model, what is not, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub import Hub
from pushed import TOKEN, contents, on_the_hub, planned
from safetensors.torch import load_file, save_file

from hf_lingudistill.cli import main as cli
from hf_lingudistill.hub.manifest import PublishError
from hf_lingudistill.hub.model import model_manifest
from hf_lingudistill.hub.publish import publish


def test_what_is_listed_is_what_is_sent(hub: Hub, model: Path) -> None:
    manifest = model_manifest(model, "ann/model")
    published = publish(manifest, token=TOKEN)
    assert on_the_hub(hub) == planned(manifest)
    assert set(published.sent) == planned(manifest).keys()
    assert {"README.md", "report.json", "recipe.yaml", "scores.png", "lingudistill.json", "model.safetensors"} <= set(
        published.sent
    )
    # control: the comparison sees a single byte
    assert {**on_the_hub(hub), "config.json": b"{}"} != planned(manifest)


def test_a_dry_run_lists_what_a_push_sends_and_sends_nothing(
    hub: Hub, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(model)
    assert cli(["publish", str(model), "--repo_id", "ann/model", "--dry_run"]) == 0
    assert hub.requests == []
    listing = capsys.readouterr().out
    listed = set(re.findall(r"^  (\S+)  +[\d,]+  (?:rendered|as it is)$", listing, re.MULTILINE))
    assert "\n# model\n" in listing  # the card
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert cli(["publish", str(model), "--repo_id", "ann/model"]) == 0
    assert listed == on_the_hub(hub).keys()
    assert contents(model) == before  # nothing is written beside the model


def test_nothing_else_in_the_folder_is_sent(hub: Hub, model: Path) -> None:
    expected = planned(model_manifest(model, "ann/model")).keys()
    secret = b"a secret that stays at home"
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "pytorch_model.bin",
        "scheduler.pt",
        "trainer_state.json",
        "notes.txt",
        ".env",
        "modeling_evil.py",
        "model-00001-of-00002.safetensors",
        "checkpoint-10/model.safetensors",
        ".cache/huggingface/token",
        "runs/events.out",
        "wandb/debug.log",
        "adapter/adapter_model.safetensors",
    ):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(secret)
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    assert on_the_hub(hub).keys() == expected
    assert not any(secret in content for content in on_the_hub(hub).values())


def test_local_paths_are_taken_out(hub: Hub, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    nested = config["text_config"] | {"_name_or_path": f"{model}/text"}  # transformers writes it there, too
    config |= {
        "_name_or_path": str(model),
        "text_config": nested,
        "vision_config": config["vision_config"] | {"_name_or_path": "ORG/TOWER"},
    }
    (model / "config.json").write_text(json.dumps(config))
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    everything = b"".join(on_the_hub(hub).values())
    assert str(model).encode() not in everything and b"/home/ann" not in everything
    sent = json.loads(on_the_hub(hub)["config.json"])
    assert "_name_or_path" not in sent["text_config"] and sent["vision_config"]["_name_or_path"] == "ORG/TOWER"
    assert str(model).encode() in (model / "config.json").read_bytes()  # the local file is as it was
    report = json.loads(on_the_hub(hub)["report.json"])
    assert report["models"]["after"]["path"] == "out"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: (f / "chat_template.jinja").write_text("{# " + TOKEN + " #}"), "chat_template.jinja holds what looks like a Hub token"),
        (lambda f: (f / "chat_template.jinja").write_text(str(f.resolve())), "chat_template.jinja holds the path of the model's folder"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"not json"), "is not a whole safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "is not a whole safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no saved model"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"vocab": "/home/jane/vocab"}'), "holds the path of somebody's home folder"),
        (lambda f: (f / "report.json").write_text("{"), "report.json must be JSON"),
        (lambda f: (f / "report.json").write_text("{}"), "must be a report of `lingudistill evaluate` or of the demo"),
        (lambda f: (f / "generation_config.json").write_text("[]"), "generation_config.json must be a JSON object, found list"),
        (lambda f: (f / "lingudistill.json").write_text("[]"), "must have the schema 'lingudistill-record/1'"),
    ],
)  # fmt: skip
def test_a_folder_that_must_not_be_published_is_refused(
    model: Path, spoil: Callable[[Path], Any], sentence: str
) -> None:
    model_manifest(model, "ann/model")  # control: it can be published as it is
    spoil(model)
    with pytest.raises(PublishError, match=re.escape(sentence)):
        model_manifest(model, "ann/model")


def test_a_language_model_is_not_published_as_a_restored_vlm(saved_pair: tuple[Path, Path]) -> None:
    model_manifest(saved_pair[0], "ann/model")  # control: the VLM of the same pair
    with pytest.raises(
        PublishError, match=r"holds a language model \(its config.json, of type 'llama', has no vision"
    ):
        model_manifest(saved_pair[1], "ann/model")


def test_a_link_out_of_the_folder_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text('{"root": "secret"}')
    (model / "added_tokens.json").symlink_to(tmp_path / "passwd")
    with pytest.raises(PublishError, match="added_tokens.json is a link out of the folder"):
        model_manifest(model, "ann/model")


def test_an_index_cannot_name_files_outside_the_folder(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "stolen.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../stolen.safetensors"}}))
    with pytest.raises(PublishError, match="names '../stolen.safetensors', which is not in"):
        model_manifest(model, "ann/model")


@pytest.mark.parametrize("name", ["a/b/c", "ann/..", "ann/mo del", "ann/model\n", "../x", "ann/" + "x" * 120])
def test_a_name_that_is_no_hub_id_is_refused(model: Path, name: str) -> None:
    with pytest.raises(PublishError, match="Expected a Hub id such as ORG/NAME"):
        model_manifest(model, name)


@pytest.mark.parametrize("name", ["v 1", "-v1", "v1..2", "v1/", "v1.", "v1\n", "", "v1~2", "v:1"])
@pytest.mark.parametrize("what", ["tag", "revision"])
def test_a_name_that_no_tag_or_branch_has_is_refused_before_anything_is_sent(
    model: Path, what: str, name: str
) -> None:
    with pytest.raises(PublishError, match=f"{what} .* is no name for one on the Hub"):
        model_manifest(model, "ann/model", **{what: name})
    for good in ("v1.0", "release/2026-11", "a_b"):
        model_manifest(model, "ann/model", **{what: good})


def test_a_licence_is_a_code(model: Path) -> None:
    assert "license: cc-by-4.0" in model_manifest(model, "ann/model", license="cc-by-4.0").text("README.md")
    with pytest.raises(
        PublishError, match="license must be a licence's code on the Hub, such as apache-2.0; got 'MIT"
    ):
        model_manifest(model, "ann/model", license="MIT License")


def test_an_adapter_on_a_local_folder_needs_its_bases_hub_id(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"lora_A": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path), "r": 2}))
    with pytest.raises(PublishError, match="The adapter was trained on a local folder"):
        model_manifest(folder, "ann/adapter")
    manifest = model_manifest(folder, "ann/adapter", base_model="ORG/VLM")
    assert json.loads(manifest.text("adapter_config.json"))["base_model_name_or_path"] == "ORG/VLM"
    front = yaml.safe_load(manifest.text("README.md").split("---")[1])
    assert (front["library_name"], front["base_model"], front["base_model_relation"]) == ("peft", "ORG/VLM", "adapter")


def test_a_relative_folder_is_no_hub_id_wherever_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`models/vlm` reads as somebody's repository from every other working directory: the run facts know better."""
    monkeypatch.chdir(tmp_path)  # where there is no models/vlm
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"lora_A": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "models/vlm", "r": 2}))
    facts = {"student": {"id": None, "name": "vlm"}}
    with pytest.raises(PublishError, match="The adapter was trained on a local folder"):
        model_manifest(folder, "ann/adapter", run_facts=facts)
    manifest = model_manifest(folder, "ann/adapter", run_facts=facts, base_model="ORG/VLM")
    assert json.loads(manifest.text("adapter_config.json"))["base_model_name_or_path"] == "ORG/VLM"
    # Control: what the facts name as a repository stays
    same = model_manifest(folder, "ann/adapter", run_facts={"student": {"id": "models/vlm", "name": "models/vlm"}})
    assert json.loads(same.text("adapter_config.json"))["base_model_name_or_path"] == "models/vlm"


def test_weights_of_an_earlier_push_are_removed(hub: Hub, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    shards = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, model / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = (model / "model.safetensors").rename(model.parent / "whole")
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    assert shards.keys() < on_the_hub(hub).keys()
    whole.rename(model / "model.safetensors")
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    assert {path for path in on_the_hub(hub) if path.startswith("model")} == {"model.safetensors"}

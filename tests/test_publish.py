"""Publishing: what is sent, what is not, and what happens when the Hub fails. The Hub is `tests/hub.py`, the client the real one."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
import yaml
from hub import Blob, Fault, Hub, git_hash
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.utils import _http as hub_http
from huggingface_hub.utils import close_session
from PIL import Image
from safetensors.torch import load_file, save_file
from trl import SFTConfig, SFTTrainer

from hf_lingudistill.cli import main as cli
from hf_lingudistill.hub import publish as publishing
from hf_lingudistill.hub.manifest import Manifest, PublishError, command_for
from hf_lingudistill.hub.mixin import PublishingMixin
from hf_lingudistill.hub.model import model_manifest
from hf_lingudistill.hub.publish import publish
from hf_lingudistill.hub.run_facts import SCHEMA
from hf_lingudistill.hub.space import space_manifest
from hf_lingudistill.scripts.distill import main as distill
from hf_lingudistill.scripts.distill import parse

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


def point_to(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)


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


# --------------------------------------------------------------------------------------------------------------------
# From training to a stranger's machine
# --------------------------------------------------------------------------------------------------------------------
STRANGER = """
import json, re, sys
sys.modules["hf_lingudistill"] = None  # importing it raises ImportError
from huggingface_hub import hf_hub_download
from PIL import Image

Image.new("RGB", (40, 40), "red").save("picture.jpg")
card = open(hf_hub_download(sys.argv[1], "README.md"), encoding="utf-8").read()
printed, print_ = [], print
for block in re.findall(r"```python\\n(.*?)```", card, re.DOTALL):  # every one of the card, as it is printed there
    exec(block.replace("print(", "printed.append("), globals())
import torch
question = [{"type": "image", "image": Image.open("picture.jpg")}, {"type": "text", "text": "What is in this picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
with torch.no_grad():
    logits = model(**inputs).logits[0, -1]
print_(json.dumps({"logits": logits.tolist(), "printed": printed, "trl": "trl" in sys.modules}))
"""


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


def test_a_trained_model_is_loaded_from_the_hub_without_this_library(
    hub: Hub, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(push_to_hub=True, hub_model_id="ann/model", hub_token=TOKEN, max_steps=2)
    trainer.train()
    assert "ann/model" not in {name for _, name in hub.repos}  # nothing is sent before there is a model to send
    published = trainer.push_to_hub(dataset_name="ORG/DATA")
    assert hub.repos["model", "ann/model"].tags[published.tag] == published.commit
    out = Path(trainer.args.output_dir)
    assert (out / "training_args.bin").exists() and "training_args.bin" not in hub.files("ann/model")

    command = [sys.executable, "-c", STRANGER, "ann/model"]
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        command,
        env=environment(hub, tmp_path / "home"),
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stranger = json.loads(done.stdout.splitlines()[-1])
    processor, picture = trainer.processing_class, Image.open(tmp_path / "elsewhere/picture.jpg")
    question = [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=[picture], return_tensors="pt")
    with torch.no_grad():
        ours = trainer.model.eval()(**inputs).logits[0, -1]
        before = tiny.make_vlm(0)(**inputs).logits[0, -1]
    theirs = torch.tensor(stranger["logits"])
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert not torch.allclose(theirs, before, atol=1e-4)  # control: it is the trained model that arrived
    about_a_picture, text_alone, in_one_call = stranger["printed"]
    assert about_a_picture and text_alone and in_one_call == about_a_picture and not stranger["trl"]


def test_a_push_in_the_background_is_a_future(hub: Hub, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(hub_model_id="ann/model", hub_token=TOKEN)
    published = trainer.push_to_hub(blocking=False, private=True, tags="mine").result(timeout=60)
    assert hub.repos["model", "ann/model"].branches["main"] == published.commit
    assert hub.repos["model", "ann/model"].private
    front = yaml.safe_load(hub.files("ann/model")["README.md"].decode().split("---")[1])
    assert "mine" in front["tags"]


def test_merged_lora_weights_are_published_without_the_adapter(
    hub: Hub, saved_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = script_arguments(
        saved_pair, tmp_path, hub_model_id="ann/model", use_peft=True, lora_r=2, merge_adapter=True
    )
    assert distill([*arguments, "--lora_target_modules", "q_proj", "v_proj"]) == 0
    files = on_the_hub(hub)
    assert files["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()
    assert not [path for path in files if "adapter" in path]
    record = json.loads(files["lingudistill.json"])
    assert 0 < record["training"]["trained_parameters"] < record["student"]["parameters"]
    assert record["recipe"]["lora_r"] == 2


def test_the_record_says_how_the_model_was_trained(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=2, kv_sharing="full", hub_token=TOKEN, ce_weight=0.25)
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "out/lingudistill.json").read_text()
    record = json.loads(text)
    assert record["training"]["steps"] == 2 and record["training"]["seconds"] > 0 and record["training"]["tokens"] > 0
    assert record["training"]["distilled_rows_share"] == 0.5
    assert 0 < record["training"]["distilled_tokens_share"] <= 1
    assert record["settings"]["kv_sharing"] == "full" and record["recipe"]["ce_weight"] == 0.25
    assert record["student"]["parameters"] == sum(p.numel() for p in trainer.model.parameters())
    assert record["teacher"]["mib"] > 0 and record["hardware"]["precision"] == "fp32"
    assert record["versions"].keys() >= {"torch", "transformers", "trl", "hf_lingudistill"}
    assert TOKEN not in text and str(tmp_path) not in text and str(Path.home()) + "/" not in text


def test_the_record_and_the_card_name_the_second_parent(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    said = {}
    for anchor in ("none", "before"):
        folder = tmp_path / anchor
        trainer = make_trainer(anchor=anchor, anchor_weight=0.25, output_dir=str(folder))
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        said[anchor] = json.loads((folder / "lingudistill.json").read_text()), (folder / "README.md").read_text()
    record, card = said["before"]
    assert record["anchor"] == {"model": "before", "mib": round(trainer.before.footprint / 2**20, 2)}
    assert record["anchor"]["mib"] > 0 and record["settings"]["anchor_weight"] == 0.25
    assert 0 < record["training"]["anchored_tokens_share"] < 1
    loss = "0.75 x CE + 0.25 x KL(VLM before || student) on unmarked rows, CE elsewhere"
    assert loss in card.replace("\\", "") and "the VLM before is a second teacher" in card
    without, plain = said["none"]
    assert without["anchor"] is None and without["training"]["anchored_tokens_share"] == 0.0
    assert "KL(VLM before" not in plain and "second teacher" not in plain


def test_the_card_of_the_trainer_replaces_trls(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.create_model_card(model_name="näme")
    text = (tmp_path / "out/README.md").read_text()
    assert text.count("# näme") == 1 and "LinguDistill" in text and "lingudistill" in text
    assert "Quick start" not in text  # TRL's


def test_any_trainer_with_a_teacher_can_carry_the_mixin(hub: Hub, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """It relies on `Trainer` and on what it states, on nothing of ours: here plain SFT with a name and a size for the teacher."""
    ours = make_trainer()

    class Other(PublishingMixin, SFTTrainer):
        pass

    args = SFTConfig(
        str(tmp_path / "other"), hub_model_id="ann/model", hub_token=TOKEN, report_to="none", use_cpu=True
    )
    trainer = Other(tiny.make_vlm(0), args, train_dataset=tiny.make_dataset(4), processing_class=ours.processing_class)
    trainer.teacher_name_or_path, trainer.teacher = "ORG/LM", types.SimpleNamespace(footprint=2**20)
    published = trainer.push_to_hub(dataset_name="ORG/DATA")
    files = on_the_hub(hub)
    assert published.commit and {"model.safetensors", "lingudistill.json", "README.md"} <= files.keys()
    facts = json.loads(files["lingudistill.json"])
    assert (
        facts["teacher"]["id"] == "ORG/LM"
        and facts["teacher"]["mib"] == 1
        and facts["datasets"][0]["id"] == "ORG/DATA"
    )
    assert "kv_sharing" not in facts["settings"] and facts["settings"]["learning_rate"] == args.learning_rate
    assert "| `kv_sharing` |" not in files["README.md"].decode()


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


def test_a_failing_upload_does_not_fail_the_training(
    hub: Hub, saved_pair: tuple[Path, Path], tmp_path: Path, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("commit", Fault(status=500, times=1000))
    arguments = script_arguments(saved_pair, tmp_path, hub_model_id="ann/model", hub_private_repo=True)
    assert distill(arguments) == 3
    told = capsys.readouterr()
    error = told.err.strip().splitlines()[-1]
    out = tmp_path / "out"
    assert error.startswith("Trained and saved, but not published. Could not send the files: the Hub answered 500")
    assert error.endswith(f"To go on: {command_for(out, 'ann/model', private=True)}")
    assert TOKEN not in told.out + told.err
    assert load_file(out / "model.safetensors")  # the run is whole
    hub.heal()
    os.environ["HF_TOKEN"] = TOKEN
    try:
        assert cli(error.split("lingudistill ")[-1].split()) == 0  # the command that was told
    finally:
        del os.environ["HF_TOKEN"]
    assert hub.files("ann/model")["model.safetensors"] == (out / "model.safetensors").read_bytes()
    (tmp_path / "recipe.yaml").write_bytes(hub.files("ann/model")["recipe.yaml"])
    _, again, models, _ = parse(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "again")])
    assert (again.max_steps, again.teacher_quantization, models.dtype) == (1, "none", "float32")
    recipe = yaml.safe_load(hub.files("ann/model")["recipe.yaml"])
    assert recipe["teacher_quantization"] == "none" and recipe["dataset_name"] == "data"
    assert not {"output_dir", "hub_token", "push_to_hub"} & recipe.keys()
    assert hub.repos["model", "ann/model"].private


def test_a_hub_that_cannot_be_reached_does_not_stop_a_training(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with Hub() as closed:
        point_to(closed, monkeypatch)
    trainer = make_trainer(push_to_hub=True, hub_model_id="ann/model", hub_token=TOKEN)
    trainer.train()
    trainer.save_model()  # does not raise
    assert "Saved, but not published. Could not sign in: the Hub could not be reached" in caplog.text
    with pytest.raises(PublishError, match="To go on: .*lingudistill publish"):  # control: asked for by name, it does
        trainer.push_to_hub()


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_are_never_pushed(make_trainer: MakeTrainer, strategy: str) -> None:
    with pytest.raises(ValueError, match=f"hub_strategy must be 'end' or left out; got '{strategy}'"):
        make_trainer(push_to_hub=True, hub_model_id="ann/model", hub_strategy=strategy)


def test_a_name_that_the_hub_would_not_take_stops_before_the_training(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="hub_model_id .* Expected a Hub id such as ORG/NAME"):
        make_trainer(push_to_hub=True, hub_model_id="no such/name")


def test_saving_while_training_sends_nothing(hub: Hub, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        push_to_hub=True, hub_model_id="ann/model", hub_token=TOKEN, save_strategy="steps", save_steps=1, max_steps=2
    )
    trainer.train()
    assert hub.requests == []


# --------------------------------------------------------------------------------------------------------------------
# What is sent
# --------------------------------------------------------------------------------------------------------------------
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
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": str(model)}))
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    everything = b"".join(on_the_hub(hub).values())
    assert str(model).encode() not in everything and b"/home/ann" not in everything
    assert b"_name_or_path" in (model / "config.json").read_bytes()  # the local file is as it was
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


# --------------------------------------------------------------------------------------------------------------------
# A card that was edited by hand (`test_card_edits.py` has the rules)
# --------------------------------------------------------------------------------------------------------------------
def edit_card(old: str, new: str, name: str = "ann/model", kind: str = "model") -> None:
    """As somebody does it in the browser."""
    api = HfApi(token=TOKEN)
    text = Path(api.hf_hub_download(name, "README.md", repo_type=kind, force_download=True)).read_text()
    assert text.count(old) == 1
    content = text.replace(old, new).encode()
    api.upload_file(path_or_fileobj=content, path_in_repo="README.md", repo_id=name, repo_type=kind)


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


# --------------------------------------------------------------------------------------------------------------------
# Faults
# --------------------------------------------------------------------------------------------------------------------
STEPS = (
    "whoami",
    "create_repo",
    "repo_info",
    "tree",
    "validate_yaml",
    "preupload",
    "lfs_batch",
    "lfs_put",
    "lfs_verify",
    "commit",
    "create_tag",
)
FAULTS = {
    "500": Fault(status=500),
    "429": Fault(status=429, retry_after=7),
    "cut before": Fault(cut="before"),
    "cut after": Fault(cut="after"),
    "cut in the answer": Fault(cut="middle"),
    "slow": Fault(slow=0.02),
}


def test_the_steps_below_are_all_that_a_push_takes(hub: Hub, model: Path) -> None:
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    assert set(hub.steps()) - {"agents"} == set(STEPS)


# Which step is tried again does not depend on the kind of fault, nor the other way round. So: every step suffers one kind, and every kind
# hits one step that we try again and one that huggingface_hub does. A lost answer is apart: the step may have been done.
ONCE = [(step, "500") for step in STEPS]
ONCE += [(step, kind) for step in ("commit", "lfs_put") for kind in FAULTS if kind != "500"]
ONCE += [(step, "cut after") for step in ("create_repo", "create_tag")]


@pytest.mark.parametrize(("step", "kind"), ONCE)
def test_one_fault_is_survived(hub: Hub, model: Path, waits: list[float], step: str, kind: str) -> None:
    hub.fail(step, FAULTS[kind])
    manifest = model_manifest(model, "ann/model")
    publish(manifest, token=TOKEN)
    assert on_the_hub(hub) == planned(manifest)
    assert hub.faults[step] == []  # control: it did happen
    if kind == "429":
        assert waits == [8.0]  # what the Hub asked for, and a second more
    # a slow answer is waited for, and so is one without a body that is "cut in the middle"
    assert waits or kind == "slow" or (step, kind) == ("lfs_put", "cut in the answer")


DONE_ALREADY = [("lfs_put", "cut after"), ("commit", "cut after"), ("create_tag", "cut after"), ("lfs_verify", "500")]


@pytest.mark.parametrize(("step", "kind"), DONE_ALREADY)
def test_what_was_done_before_the_answer_was_lost_is_not_done_again(
    hub: Hub, model: Path, waits: list[float], step: str, kind: str
) -> None:
    """However often the answer is lost: the work is there, and the next attempt finds it."""
    fault = FAULTS[kind]
    hub.fail(step, Fault(fault.status, fault.retry_after, fault.cut, times=1000))
    manifest = model_manifest(model, "ann/model")
    publish(manifest, token=TOKEN)
    assert on_the_hub(hub) == planned(manifest)
    assert len(hub.repos["model", "ann/model"].commits) == 2  # the Hub's own first one, and ours, once


FOR_GOOD = [(step, "500") for step in STEPS if step != "lfs_verify"]
FOR_GOOD += [("commit", "429"), ("commit", "cut before"), ("lfs_put", "cut before"), ("create_repo", "cut after")]


@pytest.mark.parametrize(("step", "kind"), FOR_GOOD)
def test_after_a_failure_the_same_command_goes_on(
    hub: Hub, model: Path, waits: list[float], step: str, kind: str
) -> None:
    fault, before = FAULTS[kind], contents(model)
    hub.fail(step, Fault(fault.status, fault.retry_after, fault.cut, times=1000))
    manifest = model_manifest(model, "ann/model")
    with pytest.raises(PublishError) as failure:
        publish(manifest, token=TOKEN)
    assert str(failure.value).endswith(f"The local files are whole. To go on: {command_for(model, 'ann/model')}")
    assert "\n" not in str(failure.value) and contents(model) == before
    hub.heal()
    already = list(hub.uploads)
    publish(manifest, token=TOKEN)
    assert on_the_hub(hub) == planned(manifest)
    assert not set(hub.uploads[len(already) :]) & set(already)  # what had arrived is not sent again


def test_a_second_push_uploads_nothing(hub: Hub, model: Path) -> None:
    manifest = model_manifest(model, "ann/model")
    first = publish(manifest, token=TOKEN)
    uploads = list(hub.uploads)
    hub.requests.clear()
    second = publish(manifest, token=TOKEN)
    assert hub.uploads == uploads and not {"lfs_put", "commit"} & set(hub.steps())
    assert (second.commit, second.tag, second.sent) == (first.commit, first.tag, ())
    # control: one changed file makes a commit of that file, and the weights are not sent again
    (model / "generation_config.json").write_text('{"do_sample": true}')
    third = publish(model_manifest(model, "ann/model"), token=TOKEN)
    assert third.sent == ("generation_config.json",) and third.commit != first.commit and hub.uploads == uploads


def test_what_arrived_is_compared_with_what_was_sent(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_commit = HfApi.create_commit

    def lossy(self: HfApi, *args: Any, operations: list[Any], **kwargs: Any) -> Any:
        kept = [operation for operation in operations if operation.path_in_repo != "config.json"]
        return create_commit(self, *args, operations=kept, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", lossy)
    with pytest.raises(PublishError, match="config.json on ann/model is not what was sent \\(1 files differ\\)"):
        publish(model_manifest(model, "ann/model"), token=TOKEN)


def test_large_files_go_in_parts(model: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    with Hub(multipart_bytes=50_000) as hub:
        hub.add_user("ann", token=TOKEN)
        point_to(hub, monkeypatch)
        hub.fail("lfs_put", Fault(status=500))
        publish(model_manifest(model, "ann/model"), token=TOKEN)
        assert "lfs_complete" in hub.steps()
        assert hub.files("ann/model")["model.safetensors"] == (model / "model.safetensors").read_bytes()
        close_session()


def test_a_download_that_is_cut_goes_on_where_it_stopped(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    monkeypatch.setattr(huggingface_hub.file_download, "time", types.SimpleNamespace(sleep=lambda _: None))
    hub.fail("storage_get", Fault(cut="middle"))
    path = hf_hub_download("ann/model", "model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == (model / "model.safetensors").read_bytes()
    assert hub.steps().count("storage_get") == 2


# --------------------------------------------------------------------------------------------------------------------
# Who may
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("token", "repo_id", "sentence"),
    [
        (
            OLD_TOKEN,
            "ann/model",
            "Could not sign in: the Hub does not accept the token (expired, revoked or mistyped)",
        ),
        (READ_TOKEN, "ann/model", "The token of ann can read only: make one that may write"),
        (None, "ann/model", "Could not sign in: there is no Hub token; run `hf auth login`, or set HF_TOKEN."),
        (TOKEN, "bob/model", "Could not create the repository: the token may not write to bob/model"),
    ],
)
def test_a_token_that_does_not_do_is_said_in_one_sentence(
    hub: Hub, model: Path, token: str | None, repo_id: str, sentence: str
) -> None:
    with pytest.raises(PublishError) as failure:
        publish(model_manifest(model, repo_id), token=token)
    assert sentence in str(failure.value) and "\n" not in str(failure.value)
    assert "lingudistill publish" in str(failure.value)
    assert hub.repos == {}


def test_a_name_of_another_type_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub(shared_names=True) as hub:
        hub.add_user("ann", token=TOKEN)
        point_to(hub, monkeypatch)
        HfApi(token=TOKEN).create_repo("ann/model", repo_type="space", space_sdk="gradio")
        with pytest.raises(PublishError, match="the Hub has no model ann/model .* a repository of another type"):
            publish(model_manifest(model, "ann/model"), token=TOKEN)
        assert list(hub.repos) == [("space", "ann/model")]
        close_session()


def test_private_is_not_made_public_by_accident(hub: Hub, model: Path) -> None:
    publish(model_manifest(model, "ann/public"), token=TOKEN)
    with pytest.raises(PublishError, match="ann/public exists and is public: make it private in its settings"):
        publish(model_manifest(model, "ann/public", private=True), token=TOKEN)
    publish(model_manifest(model, "ann/private", private=True), token=TOKEN)
    assert hub.repos["model", "ann/private"].private and not hub.repos["model", "ann/public"].private


def test_a_branch_is_made_and_main_stays(hub: Hub, model: Path) -> None:
    manifest = model_manifest(model, "ann/model", revision="dev")
    published = publish(manifest, token=TOKEN)
    assert hub.repos["model", "ann/model"].branches["dev"] == published.commit
    assert hub.files("ann/model", revision="dev").keys() - {".gitattributes"} == planned(manifest).keys()
    assert on_the_hub(hub) == {}  # main
    assert publish(manifest, token=TOKEN).sent == ()


def test_a_tag_is_not_moved(hub: Hub, model: Path) -> None:
    publish(model_manifest(model, "ann/model", tag="v1"), token=TOKEN)
    (model / "generation_config.json").write_text('{"do_sample": true}')
    with pytest.raises(PublishError, match="its tag 'v1' names another commit"):
        publish(model_manifest(model, "ann/model", tag="v1"), token=TOKEN)
    assert publish(model_manifest(model, "ann/model", tag="v2"), token=TOKEN).tag == "v2"


def test_offline_by_choice_is_said(model: Path) -> None:
    with pytest.raises(PublishError, match="Could not sign in: HF_HUB_OFFLINE is set; unset it"):
        publish(model_manifest(model, "ann/model"), token=TOKEN)


def test_an_interruption_says_how_to_go_on(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_commit", interrupt)  # where Ctrl-C would come: an upload takes long
    with pytest.raises(PublishError, match="Interrupted at: send the files. To go on: .*lingudistill publish"):
        publish(model_manifest(model, "ann/model"), token=TOKEN)


def test_the_token_is_in_no_log_and_no_traceback(
    hub: Hub, model: Path, waits: list[float], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx2", "httpcore2", "httpx", "httpcore")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
    hub.fail("commit", Fault(status=500, times=1000))
    shown = ""
    try:
        publish(model_manifest(model, "ann/model"), token=TOKEN)
    except PublishError:
        shown = traceback.format_exc()
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            logger.removeHandler(handler)
    told = capsys.readouterr()
    assert "PublishError" in shown and "commit" in stream.getvalue()
    for text in (shown, stream.getvalue(), caplog.text, told.out, told.err):
        assert TOKEN not in text
    assert any(request.authorization == f"Bearer {TOKEN}" for request in hub.requests)  # control: it was used
    # a server that echoes it is not repeated either
    echo = publishing._Steps("ann/model", "model", "lingudistill publish", TOKEN)._sentence(
        "x", ValueError(f"bad {TOKEN}")
    )
    assert TOKEN not in echo and "hf_***" in echo
    # nor is one of another shape than the Hub's
    other = publishing._Steps("ann/model", "model", "lingudistill publish", "a-secret-of-ours")
    assert "a-secret-of-ours" not in other._sentence("x", ValueError("bad a-secret-of-ours"))


@pytest.mark.parametrize(("private", "gated"), [(True, False), (False, True), (False, False)])
def test_a_repository_that_may_not_be_read_is_one_line(
    hub: Hub,
    saved_pair: tuple[Path, Path],
    model: Path,
    capsys: pytest.CaptureFixture[str],
    private: bool,
    gated: bool,
) -> None:
    if private or gated:
        publish(model_manifest(model, "ann/model", private=private), token=TOKEN)
        hub.repos["model", "ann/model"].gated = gated
    capsys.readouterr()
    assert cli(["check", "ann/model", str(saved_pair[1])]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("lingudistill: ") and "\n" not in told and "ann/model" in told


# --------------------------------------------------------------------------------------------------------------------
# The Space
# --------------------------------------------------------------------------------------------------------------------
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
    folder = Path(__file__).parents[1] / "examples/space"
    for path, content in sent.items():
        if path.endswith(".py"):
            names = re.findall(r"^(?:from|import) (\w+)", content.decode(), re.MULTILINE)
            assert {f"{name}.py" for name in names if (folder / f"{name}.py").exists()} <= sent.keys(), path
    for name in ("machine.py", "rgb.py"):
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


# --------------------------------------------------------------------------------------------------------------------
# The Hub of these tests
# --------------------------------------------------------------------------------------------------------------------
def test_the_hub_is_as_strict_as_the_real_one(hub: Hub, model: Path) -> None:
    """Controls: the checks above could not fail if this Hub took everything."""
    publish(model_manifest(model, "ann/model"), token=TOKEN)
    session, oid = hub_http.get_session(), hashlib.sha256(b"right").hexdigest()
    assert session.put(f"{hub.storage_url}/storage/{oid}", content=b"wrong").status_code == 400
    with_token = {"Authorization": f"Bearer {TOKEN}"}
    assert session.put(f"{hub.storage_url}/storage/{oid}", content=b"right", headers=with_token).status_code == 400
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "lfsFile", "value": {"path": "x.bin", "oid": oid, "size": 5}},
    ]
    body = "\n".join(map(json.dumps, lines)).encode()
    answer = session.post(f"{hub.url}/api/models/ann/model/commit/main", content=body, headers=with_token)
    assert answer.status_code == 400  # never uploaded
    assert session.post(f"{hub.url}/api/models/ann/model/commit/main", content=body).status_code == 401
    ranged = session.get(f"{hub.url}/ann/model/resolve/main/config.json", headers={"Range": "bytes=1-3"})
    assert (ranged.status_code, ranged.content) == (206, (model / "config.json").read_bytes()[1:4])


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

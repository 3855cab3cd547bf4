"""From a training to a stranger's machine: what a run publishes, and that a Hub that fails costs no training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from hub import Fault, Hub
from peft import LoraConfig
from PIL import Image
from pushed import TOKEN, MakeTrainer, environment, on_the_hub, point_to, script_arguments
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from hf_lingudistill.cli import main as cli
from hf_lingudistill.hub.card import render_card
from hf_lingudistill.hub.manifest import PublishError, command_for
from hf_lingudistill.hub.mixin import PublishingMixin
from hf_lingudistill.hub.model import model_manifest
from hf_lingudistill.hub.run_facts import gather_run_facts
from hf_lingudistill.scripts.distill import main as distill
from hf_lingudistill.scripts.distill import parse

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
).to(model.device)
with torch.no_grad():
    logits = model(**inputs).logits[0, -1]
print_(json.dumps({"logits": logits.tolist(), "printed": printed, "trl": "trl" in sys.modules}))
"""


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


def test_the_card_of_an_adapter_does_not_name_the_folder_that_it_was_trained_on(
    saved_pair: tuple[Path, Path], tmp_path: Path, hub: Hub
) -> None:
    """PEFT writes the base's folder into whatever card is there when it saves; that is not somebody's edit."""
    arguments = script_arguments(
        saved_pair, tmp_path, use_peft=True, lora_r=2, push_to_hub=False, save_strategy="steps", save_steps=1
    )
    arguments += ["--lora_target_modules", "q_proj", "v_proj"]
    assert distill(arguments) == 0
    out = tmp_path / "out"
    assert (out / "adapter_model.safetensors").is_file()
    manifest = model_manifest(out, "ann/adapter", base_model="ann/vlm")
    card = manifest.text("README.md")
    assert str(saved_pair[0]) not in card and "Framework versions" not in card and "base_model: ann/vlm" in card
    assert not any("kept as edited" in note for note in manifest.notes)


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["adapters", "adapters and head"])
def test_an_adapters_parameters_are_not_the_models(make_trainer: MakeTrainer, saved: list[str] | None) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    trainer = make_trainer(model=tiny.make_vlm(0, tie_word_embeddings=False), peft_config=lora)
    facts = gather_run_facts(trainer)
    assert facts["student"]["parameters"] == sum(
        p.numel() for p in tiny.make_vlm(0, tie_word_embeddings=False).parameters()
    )
    added = sum(
        p.numel() for name, p in trainer.model.named_parameters() if "lora_" in name or "modules_to_save" in name
    )
    assert facts["training"]["trained_parameters"] == added > 0


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


def test_a_resumed_run_does_not_give_its_last_part_for_the_whole(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Steps and tokens are of the whole run; its clock knows what came after the checkpoint."""
    first = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    first.save_model()
    whole = json.loads((tmp_path / "out/lingudistill.json").read_text())["training"]
    assert whole["seconds"] > 0  # control
    shutil.rmtree(tmp_path / "out/checkpoint-2")
    resumed = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    resumed.save_model()
    facts = json.loads((tmp_path / "out/lingudistill.json").read_text())
    assert (facts["training"]["steps"], facts["training"]["tokens"]) == (whole["steps"], whole["tokens"])
    assert facts["training"]["seconds"] is None and "| seconds |" not in render_card(facts, {}).content


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


def test_a_push_that_nobody_is_signed_in_for_is_refused_before_the_training(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="nobody is signed in to the Hub. Run `hf auth login`.*publish .* later"):
        make_trainer(push_to_hub=True, hub_model_id="ann/model")
    make_trainer()  # controls: not asked to push; a token of the environment
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    make_trainer(push_to_hub=True, hub_model_id="ann/model")


def test_saving_while_training_sends_nothing(hub: Hub, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        push_to_hub=True, hub_model_id="ann/model", hub_token=TOKEN, save_strategy="steps", save_steps=1, max_steps=2
    )
    trainer.train()
    assert hub.requests == []

"""What a run leaves on disk, and the command that makes it: plain models, loadable without this library."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from datasets import DatasetDict
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_lingudistill.hub.run_facts import read_run_facts
from hf_lingudistill.scripts.distill import main

MakeTrainer = Callable[..., Any]
Pair = tuple[Path, Path]

# Runs in a fresh process. Prints one JSON object.
LOAD_AND_GENERATE = """
import json, sys
sys.modules["hf_lingudistill"] = None  # importing it raises ImportError
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what shape is in the image?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=text, images=[Image.new("RGB", (40, 40), "red")], return_tensors="pt")
generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
with torch.no_grad():
    logits = model(**inputs).logits[0, -1]
try:
    import hf_lingudistill
    blocked = False
except ImportError:
    blocked = True
print(json.dumps({
    "class": type(model).__name__,
    "processor": type(processor).__name__,
    "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
    "new_tokens": generated.shape[1] - inputs["input_ids"].shape[1],
    "logits": logits.tolist(),
    "attention": model.config._attn_implementation,
    "ours": sorted(name for name in sys.modules if name.startswith("hf_lingudistill.") or name == "trl"),
    "blocked": blocked,
}))
"""


def in_fresh_process(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", LOAD_AND_GENERATE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def logits_of(model: torch.nn.Module, processor: Any) -> torch.Tensor:
    """Last-position logits of the question that the fresh process asks."""
    from PIL import Image

    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what shape is in the image?"}]}
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.new("RGB", (40, 40), "red")], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits[0, -1]


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows"
    tiny.make_dataset(8).save_to_disk(path)
    return str(path)


@pytest.fixture
def flags(saved_pair: Pair, dataset_path: str, tmp_path: Path) -> list[str]:
    """A complete command line: two steps in fp32."""
    return [
        *("--model_name_or_path", str(saved_pair[0]), "--teacher_model_name_or_path", str(saved_pair[1])),
        *("--dataset_name", dataset_path, "--output_dir", str(tmp_path / "out")),
        *("--teacher_quantization", "none", "--max_steps", "2", "--per_device_train_batch_size", "4"),
        *("--learning_rate", "0.05", "--lr_scheduler_type", "constant", "--logging_steps", "1"),
        *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--bf16", "false"),
        *("--save_strategy", "no"),
    ]


# --------------------------------------------------------------------------------------------------------------------
# The saved model
# --------------------------------------------------------------------------------------------------------------------
def test_saved_model_is_the_plain_student_and_loads_without_this_library(
    make_trainer: MakeTrainer, saved_pair: Pair, tmp_path: Path
) -> None:
    student, teacher = map(str, saved_pair)
    trainer = make_trainer(model=student, teacher_model=teacher, max_steps=2)
    trainer.train()
    out = tmp_path / "out"
    trainer.save_model(str(out))

    loaded = in_fresh_process(out)
    assert loaded["blocked"] and loaded["ours"] == []
    before = AutoModelForImageTextToText.from_pretrained(student)
    assert loaded["class"] == type(before).__name__
    assert loaded["processor"] == type(AutoProcessor.from_pretrained(student)).__name__
    assert loaded["shapes"] == {name: list(p.shape) for name, p in before.named_parameters()}
    assert loaded["new_tokens"] == 4
    assert loaded["attention"] == before.config._attn_implementation
    processor = AutoProcessor.from_pretrained(student)
    expected = logits_of(trainer.model, processor)
    assert torch.allclose(torch.tensor(loaded["logits"]), expected, atol=1e-5)
    assert (logits_of(before, processor) - expected).abs().max() > 1e-2, "training must show"

    state = trainer.model.state_dict()
    saved = load_file(out / "model.safetensors")
    assert set(saved) == set(load_file(saved_pair[0] / "model.safetensors"))
    for name, tensor in saved.items():
        assert torch.equal(tensor, state[name]), name
    for path in out.rglob("*.json"):
        assert "lingudistill_" not in path.read_text(encoding="utf-8"), f"{path.name} names our attention function"
    config, config_before = (json.loads((Path(folder) / "config.json").read_text()) for folder in (out, student))
    assert config["architectures"] == config_before["architectures"]
    assert config["text_config"] | {"dtype": None} == config_before["text_config"] | {"dtype": None}


def test_checkpoint_is_the_plain_student_too(make_trainer: MakeTrainer, saved_pair: Pair, tmp_path: Path) -> None:
    student, teacher = map(str, saved_pair)
    trainer = make_trainer(model=student, teacher_model=teacher, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    reloaded = AutoModelForImageTextToText.from_pretrained(checkpoint)
    for (name, ours), theirs in zip(reloaded.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert type(AutoProcessor.from_pretrained(checkpoint)) is type(trainer.processing_class)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "2604.00829" in card and "lingudistill" in card


def test_adapter_of_a_lora_run_loads_on_the_student(flags: list[str], saved_pair: Pair, tmp_path: Path) -> None:
    assert main([*flags, "--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]) == 0
    out = tmp_path / "out"
    assert (out / "adapter_model.safetensors").is_file() and not (out / "model.safetensors").exists()
    student = AutoModelForImageTextToText.from_pretrained(saved_pair[0])
    processor = AutoProcessor.from_pretrained(out)
    before = logits_of(student, processor)
    assert not torch.allclose(logits_of(PeftModel.from_pretrained(student, out), processor), before, atol=1e-4)


def test_merged_adapter_is_a_plain_model_with_the_logits_of_the_adapter(
    flags: list[str], saved_pair: Pair, tmp_path: Path
) -> None:
    lora = ("--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--merge_adapter")
    assert main([*flags, *lora]) == 0
    out = tmp_path / "out"
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert (out / "model.safetensors").is_file() and not (out / "adapter_model.safetensors").exists()
    processor = AutoProcessor.from_pretrained(out)
    merged = AutoModelForImageTextToText.from_pretrained(out)
    student = AutoModelForImageTextToText.from_pretrained(saved_pair[0])
    assert {n: p.shape for n, p in merged.named_parameters()} == {n: p.shape for n, p in student.named_parameters()}
    before = logits_of(student, processor)
    with_adapter = logits_of(PeftModel.from_pretrained(student, out / "adapter"), processor)
    assert torch.allclose(logits_of(merged, processor), with_adapter, atol=1e-4)
    assert (with_adapter - before).abs().max() > 1e-2, "the adapter must have learnt something"
    assert "lingudistill_" not in (out / "config.json").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------
def test_flags_train_save_and_say_what_ran_and_what_came_out(
    flags: list[str], saved_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--kv_sharing", "vision", "--ce_weight", "0.25"]) == 0
    said = capsys.readouterr().out
    for part in (
        f"Student  {saved_pair[0]}",
        f"Teacher  {saved_pair[1]} (none, ",
        "kv_sharing=vision",
        "0.25 x CE",
        "Rows     8; marked for distillation: 50%",
        "Device   cpu, 1 process, fp32",
        "Done: 2 steps",
        f"Saved to {tmp_path / 'out'}",
        "AutoModelForImageTextToText.from_pretrained",
    ):
        assert part in said, part
    assert said.index("Student  ") < said.index("Done: 2 steps")
    before = load_file(saved_pair[0] / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(after[name], before[name]) for name in after)


def test_recipe_with_a_mixture_distils_the_marked_source_only(
    saved_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], cpu_mode: str
) -> None:
    """The precision is left to the machine, and the log and the record say what came of it for the teacher."""
    tiny.make_dataset(8).select([0, 2, 4, 6]).remove_columns("distill").save_to_disk(tmp_path / "visual")
    tiny.make_dataset(6, images=False).remove_columns("distill").save_to_disk(tmp_path / "text")
    recipe = {
        "model_name_or_path": str(saved_pair[0]),
        "teacher_model_name_or_path": str(saved_pair[1]),
        "teacher_quantization": "nf4",
        "output_dir": str(tmp_path / "out"),
        "datasets": [
            {"path": str(tmp_path / "visual"), "distill": False},
            {"path": str(tmp_path / "text"), "distill": True},
        ],
        "per_device_train_batch_size": 5,
        "max_steps": 2,
        "logging_steps": 2,
        "distill_tokens": "all",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["--config", str(path), "--kv_sharing", "none"]) == 0
    said = capsys.readouterr().out
    assert "Rows     10; marked for distillation: 60%" in said and "kv_sharing=none" in said
    arithmetic = read_run_facts(tmp_path / "out")["teacher"]["arithmetic"]
    assert f"(nf4, computed in {arithmetic}, " in said and "Done: 2 steps" in said
    assert arithmetic.split(",")[0] == ("bf16" if cpu_mode == "bf16=1" else "fp32")
    assert (tmp_path / "out" / "model.safetensors").is_file()


# --------------------------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------------------------
def _without(flags: list[str], name: str) -> list[str]:
    at = flags.index(name)
    return flags[:at] + flags[at + 2 :]


def _fails_in_a_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, "one line, no traceback"
    return errors[0].removeprefix("error: ")


def test_missing_dataset_is_one_sentence_and_exit_code_2(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "no-such-data")
    assert missing in _fails_in_a_sentence([*_without(flags, "--dataset_name"), "--dataset_name", missing], capsys)
    hub_id = _fails_in_a_sentence([*_without(flags, "--dataset_name"), "--dataset_name", "nobody/nothing"], capsys)
    assert "nobody/nothing" in hub_id
    assert "--dataset_name" in _fails_in_a_sentence(_without(flags, "--dataset_name"), capsys)
    DatasetDict({"held_out": tiny.make_dataset(2)}).save_to_disk(tmp_path / "splits")
    other_split = [*_without(flags, "--dataset_name"), "--dataset_name", str(tmp_path / "splits")]
    assert "train" in _fails_in_a_sentence(other_split, capsys)
    assert not (tmp_path / "out").exists()


def test_missing_teacher_is_one_sentence_and_exit_code_2(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "no-such-teacher")
    teacherless = _without(flags, "--teacher_model_name_or_path")
    said = _fails_in_a_sentence([*teacherless, "--teacher_model_name_or_path", missing], capsys)
    assert missing in said and "teacher" in said.lower()
    assert "name no language model. Pass the LM that it was built from as --teacher" in _fails_in_a_sentence(
        teacherless, capsys
    )


def test_missing_student_is_one_sentence_and_exit_code_2(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "no-such-student")
    arguments = [*_without(flags, "--model_name_or_path"), "--model_name_or_path", missing]
    assert missing in _fails_in_a_sentence(arguments, capsys)


def test_weights_as_pickles_only_are_one_sentence_and_exit_code_2(
    flags: list[str], saved_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(saved_pair[1], pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    arguments = [*_without(flags, "--teacher_model_name_or_path"), "--teacher_model_name_or_path", str(pickled)]
    assert "safetensors" in _fails_in_a_sentence(arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--beta", "2"), "beta must be in [0.0, 1.0]"),
        (("--temperature", "0"), "temperature must be a positive number; got 0.0."),
        (("--distill_weight", "0", "--ce_weight", "0"), "distill_weight and ce_weight are both 0"),
        (("--max_length", "20"), "no token to train on within max_length=20"),
    ],
    ids=["beta", "temperature", "weights", "max_length"],
)
def test_bad_value_is_one_sentence_and_exit_code_2(
    flags: list[str], arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in _fails_in_a_sentence([*flags, *arguments], capsys)


def test_unknown_key_of_a_source_is_one_sentence_and_exit_code_2(
    tmp_path: Path, saved_pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"model_name_or_path": str(saved_pair[0]), "datasets": [{"path": "x", "distil": True}], "use_cpu": True}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert "unknown ['distil']" in _fails_in_a_sentence(["--config", str(path)], capsys)


@pytest.mark.parametrize("text", ["datasets: [", "- a list"], ids=["malformed", "no mapping"])
def test_unreadable_recipe_is_one_sentence_and_exit_code_2(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    assert str(path) in _fails_in_a_sentence(["--config", str(path)], capsys)
    path.write_text(text, encoding="utf-8")
    assert str(path) in _fails_in_a_sentence(["--config", str(path)], capsys)


def test_evaluation_does_not_read_the_training_rows(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with one unnamed dataset has no test split."""
    assert "test" in _fails_in_a_sentence([*flags, "--eval_strategy", "steps", "--eval_steps", "1"], capsys)
    splits = DatasetDict({"train": tiny.make_dataset(4), "test": tiny.make_dataset(4, seed=1)})
    splits.save_to_disk(tmp_path / "splits")
    evaluated = ("--dataset_name", str(tmp_path / "splits"), "--eval_strategy", "steps", "--eval_steps", "1")
    assert main([*_without(flags, "--dataset_name"), *evaluated]) == 0
    assert "'eval_kd_loss'" in capsys.readouterr().out


def test_output_dir_of_another_run_is_one_sentence_and_exit_code_2(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 0
    assert "holds a run's files (model.safetensors)" in _fails_in_a_sentence(flags, capsys)
    assert main([*flags, "--overwrite_output_dir", "true"]) == 0


def test_traceback_is_there_for_whoever_asks(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINGUDISTILL_DEBUG", "1")
    with pytest.raises(ValueError, match="beta must be in"):
        main([*flags, "--beta", "2"])

"""`lingudistill distill` and examples/distill.py: what is refused, in which words, and what is left alone."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import yaml
from datasets import Dataset
from peft.tuners.tuners_utils import check_target_module_exists
from trl import get_peft_config

from hf_lingudistill import LinguDistillTrainer
from hf_lingudistill.labs.demo import recipe
from hf_lingudistill.options import DistillOptions
from hf_lingudistill.pace import Pace
from hf_lingudistill.scripts import distill as script
from hf_lingudistill.scripts import preflight
from hf_lingudistill.scripts.distill import main, parse
from hf_lingudistill.scripts.unread import check_unread

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "examples" / "recipes"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of the user's with the names that the demo writes."""
    for name in ("original", "before", "after"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "model.safetensors").write_text(name)
    (tmp_path / "models" / "report.json").write_text("mine")
    return tmp_path / "models"


def held(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("flags", [[], ["--max_steps", "1"], ["--output_dir", "models"]])
def test_without_a_model_nothing_starts_and_nothing_is_touched(
    precious: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(precious.parent)
    before = held(precious.parent)
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: No student: pass ") and "--demo" in error
    assert held(precious.parent) == before


@pytest.mark.parametrize("flags", [["--demo"], ["--demo", "true"], ["--demo=yes"]])
def test_the_demo_refuses_a_folder_that_it_did_not_make(
    precious: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = held(precious)
    assert main([*flags, "--output_dir", str(precious)]) == 2
    assert f"error: {str(precious)!r} holds 'after' and was not made by this command" in capsys.readouterr().err
    assert held(precious) == before


def test_the_recipe_of_the_demo_is_read_for_its_flag_and_not_for_a_word_elsewhere(tmp_path: Path) -> None:
    steps = yaml.safe_load(recipe().read_text())["max_steps"]
    own = tmp_path / "own.yaml"
    own.write_text("demo: true\nseed: 3\n")
    for flags in (
        ["--demo"],
        ["--run_name", "real", "--demo"],
        ["--demo", "--seed=1"],
        ["--demo", "true"],
        ["--demo=yes"],
        ["--config", str(own)],
    ):
        script, config, *_ = parse(flags)
        assert (script.demo, config.max_steps) == (True, steps)
    assert parse(["--demo", "--max_steps", "3"])[1].max_steps == 3
    for flags in (["--run_name", "demo"], ["--demo", "false"], ["--config", str(own), "--demo", "no"]):  # the control
        script, config, *_ = parse([*flags, "--output_dir", str(tmp_path)])
        assert not script.demo and config.max_steps != steps


def test_the_demo_takes_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--demo", "--model_name_or_path", "some/vlm"]) == 2
    assert "--demo makes its own models" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# Before the first step: one sentence, exit code 2, nothing written
# --------------------------------------------------------------------------------------------------------------------
QUIET = ("--report_to", "none", "--bf16", "false", "--teacher_quantization", "none", "--save_strategy", "epoch")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets by name: `whole` (8 rows), `four`, `empty`, `long` (rows that no short max_length holds), and broken ones."""
    folder = tmp_path_factory.mktemp("data")
    rows, texts = tiny.make_dataset(8), tiny.make_dataset(4, images=False)
    # datasets 5.0 cannot save an empty table that has images
    for name, part in (("whole", rows), ("four", rows.select(range(4))), ("empty", texts.select([]))):
        part.save_to_disk(folder / name)
    texts.save_to_disk(folder / "texts")
    texts.map(lambda row: {"messages": [{"speaker": "user", "says": "hello"}]}).save_to_disk(folder / "roleless")
    (folder / "parquet").mkdir()
    (folder / "parquet" / "train.parquet").write_bytes(b"PAR1 and no more")
    (folder / "json").mkdir()
    (folder / "json" / "train.jsonl").write_text('{"messages": [}\n' * 3)
    return folder


def run(saved_pair: tuple[Path, Path], data: Path, out: Path, *flags: str, dataset: str = "whole") -> int:
    pair = ["--student", str(saved_pair[0]), "--teacher", str(saved_pair[1])]
    return main([*pair, "--dataset_name", str(data / dataset), "--output_dir", str(out), *QUIET, *flags])


NO_STEP: dict[str, tuple[str, tuple[str, ...], str]] = {
    "a batch larger than the data, for an epoch": (
        "four",
        ("--per_device_train_batch_size", "16", "--dataloader_drop_last", "true", "--max_steps", "-1"),
        "Not one batch: the training set has 4 rows, a batch takes per_device_train_batch_size=16",
    ),
    "a batch larger than the data": (
        "four",
        ("--per_device_train_batch_size", "16", "--dataloader_drop_last", "true", "--max_steps", "10"),
        "Not one batch: the training set has 4 rows, a batch takes per_device_train_batch_size=16",
    ),
    "no steps": ("whole", ("--max_steps", "0"), "max_steps must be above 0"),
    "no epochs": ("whole", ("--num_train_epochs", "0"), "num_train_epochs must be above 0"),
    "no rows": ("empty", (), "empty"),
    "no rows that fit": ("texts", ("--max_length", "3"), "Row 0 has no token to train on within max_length=3"),
    "an empty stream": ("empty", ("--dataset_streaming", "true", "--max_steps", "2"), ""),
    "roles without names": ("roleless", (), ""),
    "a table that is cut off": ("parquet", (), "parquet: cannot be read (ArrowInvalid: Parquet magic bytes"),
    "JSON that is none": ("json", (), "json: cannot be read ("),
    "no dataset": ("absent", (), "absent"),
    "a dataset out of reach": ("whole", ("--dataset_name", "nobody/nothing"), "nobody/nothing"),
    "no evaluation split": ("whole", ("--eval_strategy", "epoch"), "has no split 'test', found ['train']"),
    "an unknown logger": ("whole", ("--report_to", "paper"), "paper"),
    "a logger that is not installed": ("whole", ("--report_to", "wandb"), "report_to=wandb needs the package wandb"),
    "an optimizer that is not installed": ("whole", ("--optim", "lomo"), "optim=lomo needs the package lomo-optim"),
    "a checkpoint that is none": (
        "whole",
        ("--resume_from_checkpoint", "true"),
        "No complete checkpoint to resume from",
    ),
    "an unknown scheduler": ("whole", ("--lr_scheduler_type", "steep"), "steep"),
}


@pytest.mark.parametrize("case", NO_STEP)
def test_what_keeps_a_training_from_its_first_step_is_one_sentence(
    saved_pair: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    case: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # datasets logs to a stream that pytest has closed
    dataset, flags, sentence = NO_STEP[case]
    out = tmp_path / "out"
    assert run(saved_pair, data, out, *flags, dataset=dataset) == 2
    printed, errors = capfd.readouterr()
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and sentence in said[0] and len(said[0]) < 700, errors
    assert "Traceback" not in errors and "Done" not in printed
    assert not out.exists() or list(out.rglob("*")) == []


def test_debug_shows_the_traceback(
    saved_pair: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINGUDISTILL_DEBUG", "1")
    with pytest.raises(ValueError, match="max_steps must be above 0"):
        run(saved_pair, data, tmp_path / "out", "--max_steps", "0")


def test_an_error_in_the_middle_says_where_the_run_stands(
    saved_pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that cannot be used, and an error that nobody foresaw. The control is the same run without either."""
    rows = tiny.make_rows(48)
    good, bad = tmp_path / "good", tmp_path / "bad"
    tiny.make_dataset(48).save_to_disk(good)
    rows[44]["images"] = [{"bytes": b"no picture", "path": None}]
    Dataset.from_list(rows, features=tiny.make_dataset(2).features).save_to_disk(bad)
    flags = ("--per_device_train_batch_size", "8", "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "6")
    flags += ("--train_sampling_strategy", "sequential")
    assert run(saved_pair, tmp_path, tmp_path / "whole", *flags, dataset="good") == 0
    capsys.readouterr()
    out = tmp_path / "out"
    assert run(saved_pair, tmp_path, out, *flags, dataset="bad") == 2
    stands = f"the last complete checkpoint is '{out / 'checkpoint-4'}': go on with --resume_from_checkpoint true."
    assert re.search(r"error: Row 44.* Stopped in step [56]; " + re.escape(stands), capsys.readouterr().err)
    assert (
        run(saved_pair, tmp_path, out, *flags, "--resume_from_checkpoint", "true", "--skip_bad_rows", dataset="good")
        == 0
    )

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise RuntimeError("CUDA out of memory")
        return compute_loss(self, *args, **kwargs)

    compute_loss = LinguDistillTrainer.compute_loss
    monkeypatch.setattr(LinguDistillTrainer, "compute_loss", fails)
    with pytest.raises(RuntimeError) as caught:
        run(saved_pair, tmp_path, tmp_path / "third", *flags, dataset="good")
    assert "Stopped in step 4; the last complete checkpoint is" in caught.value.__notes__[0]


def test_a_finished_run_that_is_resumed_says_so_and_stays(
    saved_pair: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control is the run itself, which ends well; with more steps it goes on."""
    out, steps = (
        tmp_path / "out",
        ("--per_device_train_batch_size", "4", "--save_steps", "1", "--save_strategy", "steps"),
    )
    assert run(saved_pair, data, out, *steps, "--max_steps", "1") == 0
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert run(saved_pair, data, out, *steps, "--max_steps", "1", "--resume_from_checkpoint", "true") == 2
    assert "error: The checkpoint is at step 1 of 1: nothing is left to train." in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == stamps
    assert run(saved_pair, data, out, *steps, "--max_steps", "2", "--resume_from_checkpoint", "true") == 0


def test_a_run_that_was_killed_before_its_model_was_saved_is_resumed_without_a_step(
    saved_pair: tuple[Path, Path], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of the run as it would have been. The control: a model of fewer steps, of a run that was lengthened."""
    out, other = tmp_path / "out", tmp_path / "other"
    steps = (
        "--per_device_train_batch_size",
        "4",
        "--save_steps",
        "1",
        "--save_strategy",
        "steps",
        "--lr_scheduler_type",
        "constant",
    )
    assert run(saved_pair, data, out, *steps, "--max_steps", "2") == 0
    whole = (out / "model.safetensors").read_bytes()
    for lost in (("model.safetensors", "lingudistill.json", "config.json"), ("lingudistill.json",)):
        for name in lost:
            (out / name).unlink()
        caplog.clear()
        assert run(saved_pair, data, out, *steps, "--max_steps", "2", "--resume_from_checkpoint", "true") == 0
        assert "holds no model of that step: the run ends here without another step" in caplog.text
        assert (out / "model.safetensors").read_bytes() == whole
        assert json.loads((out / "lingudistill.json").read_text())["training"]["steps"] == 2
    assert run(saved_pair, data, other, *steps, "--max_steps", "1") == 0
    shorter = {name: (other / name).read_bytes() for name in ("model.safetensors", "lingudistill.json")}
    assert run(saved_pair, data, other, *steps, "--max_steps", "2", "--resume_from_checkpoint", "true") == 0
    longer = (other / "model.safetensors").read_bytes()
    for name, content in shorter.items():
        (other / name).write_bytes(content)
    assert run(saved_pair, data, other, *steps, "--max_steps", "2", "--resume_from_checkpoint", "true") == 0
    assert (other / "model.safetensors").read_bytes() == longer != shorter["model.safetensors"]


def test_resuming_into_another_runs_folder_is_refused_before_data_and_weights_are_loaded(
    saved_pair: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = ("--per_device_train_batch_size", "4", "--save_strategy", "steps", "--save_steps", "1")
    steps += ("--save_total_limit", "1", "--max_steps")
    mine, other = tmp_path / "mine", tmp_path / "other"
    assert run(saved_pair, data, mine, *steps, "1") == run(saved_pair, data, other, *steps, "2") == 0
    stamps = {path: path.stat().st_mtime_ns for path in other.rglob("*") if path.is_file()}
    asked: list[str] = []
    monkeypatch.setattr(script, "load_data", lambda *arguments: asked.append("data"))
    resume = ("--resume_from_checkpoint", str(mine / "checkpoint-1"))
    assert run(saved_pair, data, other, *steps, "3", *resume) == 2
    assert f"error: output_dir {str(other)!r} holds a run's files" in capsys.readouterr().err and asked == []
    assert {path: path.stat().st_mtime_ns for path in other.rglob("*") if path.is_file()} == stamps
    for out in (mine, tmp_path / "new"):  # the control
        run(saved_pair, data, out, *steps, "3", *resume)
        assert asked.pop() == "data"


# --------------------------------------------------------------------------------------------------------------------
# Ctrl-C
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["checkpoints", "no checkpoint", "resumed elsewhere", "another's", "on-policy"])
def test_an_interrupted_training_says_where_it_stood_and_how_it_goes_on(
    saved_pair: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    kind: str,
    ctrl_c: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, steps = tmp_path / "out", ("--per_device_train_batch_size", "4", "--max_steps", "4", "--save_steps", "1")
    saving = ("--save_strategy", "no" if kind in ("no checkpoint", "resumed elsewhere", "another's") else "steps")
    more: tuple[str, ...] = {
        "on-policy": ("--on_policy", "--max_completion_length", "4"),
        "another's": ("--overwrite_output_dir", "true"),
    }.get(kind, ())
    if kind in ("resumed elsewhere", "another's"):
        folder = tmp_path / "first" if kind == "resumed elsewhere" else out
        assert run(saved_pair, data, folder, *steps, "--save_strategy", "steps", "--max_steps", "1") == 0
    if kind == "resumed elsewhere":
        more = ("--resume_from_checkpoint", str(tmp_path / "first" / "checkpoint-1"))

    def interrupt(self: Pace, args: object, state: object, control: object, **kwargs: object) -> None:
        self.started = True
        if state.global_step == 2:  # type: ignore[attr-defined]
            ctrl_c()

    with monkeypatch.context() as patch:
        patch.setattr(Pace, "on_step_begin", interrupt)
        assert run(saved_pair, data, out, *steps, *saving, *more) == 130
    (*_, said) = capsys.readouterr().err.strip().splitlines()
    found = {"checkpoints": out / "checkpoint-2", "on-policy": out / "checkpoint-2"}
    found["resumed elsewhere"] = tmp_path / "first" / "checkpoint-1"
    if kind not in found:  # without one, or with one that another run left there
        assert said == "Interrupted at step 2; there is no complete checkpoint: start again."
        return
    value = found[kind] if kind == "resumed elsewhere" else "true"
    assert said == (
        f"Interrupted at step 2; the last complete checkpoint is {str(found[kind])!r}: go on with --resume_from_checkpoint {value}."
    )
    assert run(saved_pair, data, out, *steps, *saving, *more[:3], "--resume_from_checkpoint", str(value)) == 0


@pytest.mark.parametrize("of", ["load_data", "save"])
def test_ctrl_c_before_and_after_the_steps_is_a_sentence_too(
    saved_pair: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    of: str,
    ctrl_c: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, of, ctrl_c)
    steps = ("--per_device_train_batch_size", "4", "--max_steps", "1", "--save_steps", "1", "--save_strategy", "steps")
    assert run(saved_pair, data, tmp_path / "out", *steps) == 130
    error = capsys.readouterr().err
    said = {
        "load_data": "Interrupted before the first step: nothing was trained",
        "save": "Interrupted at step 1; the",
    }
    assert error.strip().splitlines()[-1].startswith(said[of]) and "Traceback" not in error


EARLY: dict[str, tuple[tuple[str, ...], str]] = {
    "swapped models": (("--student", "TEACHER", "--teacher", "STUDENT"), "look swapped"),
    "a student that is a folder of something else": (("--student", "DATA"), "holds no config.json"),
    "an output_dir in use": (("--output_dir", "USED"), "holds a run's files (model.safetensors)"),
    "merging into four bits": (
        ("--use_peft", "--merge_adapter", "true", "--load_in_4bit", "true"),
        "would round the adapter away, into the few bits that load_in_4bit=True",
    ),
    "the student's own folder": (("--output_dir", "STUDENT"), "is the folder of the student, or lies in it"),
    "the student's, to be overwritten": (
        ("--output_dir", "STUDENT", "--overwrite_output_dir", "true"),
        "is the folder of the student, or lies in it",
    ),
    "a folder in the student's": (("--output_dir", "IN_STUDENT"), "is the folder of the student, or lies in it"),
    "the teacher's, to be overwritten": (
        ("--output_dir", "TEACHER", "--overwrite_output_dir", "true"),
        "is the folder of the teacher, or lies in it",
    ),
    "a fraction of a step": (("--config", "RECIPE"), "max_steps must be a whole number; got 1.5."),
    "steps below none": (
        ("--max_steps", "-5"),
        "max_steps must be above 0, or -1 to train for num_train_epochs; got -5.",
    ),
    "nothing to resume": (
        ("--output_dir", "EMPTY", "--resume_from_checkpoint", "true"),
        "empty': train without --resume_from_checkpoint.",
    ),
    "something else to resume": (
        ("--output_dir", "USED", "--resume_from_checkpoint", "true"),
        "train without --resume_from_checkpoint and with --overwrite_output_dir.",
    ),
    "one source that is no list": (
        ("--config", "ONE_SOURCE"),
        "expected a list of sources (`- path: ...`), found 'foo'.",
    ),
    "a learning rate that is no number": (
        ("--learning_rate", "nan"),
        "learning_rate must be a finite number; got nan.",
    ),
    "batches of nothing": (
        ("--per_device_train_batch_size", "0"),
        "per_device_train_batch_size must be at least 1; got 0.",
    ),
    "an adapter of rank 0": (("--use_peft", "--lora_r", "0"), "lora_r must be at least 1; got 0."),
    "an option that nobody reads": (("--lora_r", "4"), "lora_r=4 has no effect without use_peft"),
    "a package that is missing": (("--use_liger_kernel", "true"), "liger-kernel"),
}


@pytest.mark.parametrize("case", EARLY)
def test_what_can_be_known_is_said_before_data_and_weights_are_loaded(
    saved_pair: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(script, "load_data", lambda *arguments: asked.append("data"))
    flags, sentence = EARLY[case]
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "model.safetensors").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "recipe.yaml").write_text("max_steps: 1.5")
    (tmp_path / "one.yaml").write_text("datasets: foo")
    names = {"STUDENT": saved_pair[0], "TEACHER": saved_pair[1], "DATA": data, "USED": tmp_path / "used"}
    names |= {"IN_STUDENT": saved_pair[0] / "distilled", "RECIPE": tmp_path / "recipe.yaml"}
    names |= {"EMPTY": tmp_path / "empty", "ONE_SOURCE": tmp_path / "one.yaml"}
    assert run(saved_pair, data, tmp_path / "out", *(str(names.get(flag, flag)) for flag in flags)) == 2
    assert sentence in capsys.readouterr().err and asked == []
    run(saved_pair, data, tmp_path / "out")
    assert asked == ["data"]  # the control


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("revision", ["v2", "main"])
def test_a_revision_of_a_folder_is_said_to_be_of_no_use(
    saved_pair: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    role: str,
    revision: str,
) -> None:
    """A recipe pins what is on the Hub, and may be run on a copy of it. `main` is TRL's default."""
    monkeypatch.setattr(script, "load_data", lambda *arguments: None)
    option = {"student": "--model_revision", "teacher": "--teacher_model_revision"}[role]
    run(saved_pair, data, tmp_path / "out", option, revision)
    assert (f"The {role} {saved_pair[role == 'teacher']} is a folder, and is read as it is" in caplog.text) == (
        revision == "v2"
    )


# --------------------------------------------------------------------------------------------------------------------
# Options that nobody reads
# --------------------------------------------------------------------------------------------------------------------
PAIR = ("--student", "a/vlm", "--teacher", "a/lm")
ONE = (*PAIR, "--dataset_name", "a/set")
MIXTURE = {"student": "a/vlm", "teacher": "a/lm", "datasets": [{"path": "a/set"}]}
# What is given and not read, the sentence, what it takes to be read
UNREAD: list[tuple[tuple[str, ...], str, tuple[str, ...]]] = [
    (("--lora_r", "4"), "lora_r=4 has no effect without use_peft: pass --use_peft true, or leave", ("--use_peft",)),
    (("--lora_target_modules", "q_proj"), "lora_target_modules=['q_proj'] has no effect", ("--use_peft",)),
    (("--use_dora",), "use_dora=True has no effect without use_peft", ("--use_peft",)),
    (("--merge_adapter", "true"), "merge_adapter=True has no effect without use_peft", ("--use_peft",)),
    (("--use_bnb_nested_quant",), "use_bnb_nested_quant=True has no effect without load_in_4bit", ("--load_in_4bit",)),
    (
        ("--distill_margin", "0.5"),
        "distill_margin=0.5 has no effect with distill_tokens='all': pass --distill_tokens confident",
        ("--distill_tokens", "confident"),
    ),
    (("--anchor_weight", "1"), "anchor_weight=1.0 has no effect without anchor", ("--anchor", "before")),
    (
        ("--anchor", "before", "--anchor_cache_k", "8"),
        "anchor_cache_k=8 has no effect without anchor_cache",
        ("--anchor_cache", "true", "--kv_sharing", "none"),
    ),
    (("--cache_dir", "kept"), "cache_dir='kept' has no effect without anchor_cache or", ("--teacher_cache", "true")),
    (
        ("--dataset_test_split", "val"),
        "dataset_test_split='val' has no effect with eval_strategy='no'",
        ("--eval_strategy", "epoch"),
    ),
    (("--on_policy", "--lora_r", "4"), "lora_r=4 has no effect without use_peft", ("--use_peft",)),
]
UNREAD_BESIDE_A_MIXTURE = {
    "dataset_name": "a/set",
    "dataset_config": "en",
    "dataset_train_split": "half",
    "dataset_test_split": "half",
    "dataset_streaming": "true",
    "image_folder": "pictures",
}


@pytest.mark.parametrize(("flags", "sentence", "needed"), UNREAD, ids=lambda value: " ".join(value)[:30])
def test_an_option_that_nobody_reads_is_refused(
    flags: tuple[str, ...], sentence: str, needed: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        check_unread(*parse([*ONE, *flags]))
    check_unread(*parse([*ONE, *flags, *needed]))  # the control


@pytest.mark.parametrize("name", UNREAD_BESIDE_A_MIXTURE)
def test_an_option_of_one_dataset_beside_a_mixture_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(MIXTURE))
    given = (f"--{name}", UNREAD_BESIDE_A_MIXTURE[name], "--eval_strategy", "epoch")
    with pytest.raises(ValueError, match=rf"^{name}=.* has no effect beside `datasets:`: .*, or leave {name} out\.$"):
        check_unread(*parse(["--config", str(tmp_path / "recipe.yaml"), *given]))
    check_unread(*parse(["--config", str(tmp_path / "recipe.yaml")]))  # the control
    check_unread(*parse([*ONE, *given]))


@pytest.mark.parametrize("line", ["streaming: true", "test_split_size: 0.5"])
def test_an_option_of_a_mixture_beside_one_dataset_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "recipe.yaml").write_text(line)
    with pytest.raises(ValueError, match=rf"^{line.split(':')[0]}=.* has no effect without `datasets:`"):
        check_unread(*parse(["--config", str(tmp_path / "recipe.yaml"), *ONE]))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(MIXTURE) + line)
    check_unread(*parse(["--config", str(tmp_path / "recipe.yaml"), "--eval_strategy", "epoch"]))
    if "test_split_size" in line:
        message = "test_split_size=0.5 has no effect with eval_strategy='no' but to keep rows from the training: pass"
        with pytest.raises(ValueError, match=message):
            check_unread(*parse(["--config", str(tmp_path / "recipe.yaml")]))


def test_a_default_that_is_spelt_out_is_no_option_that_nobody_reads() -> None:
    defaults = ("--merge_adapter", "false", "--distill_margin", "0", "--anchor_weight", "0.5")
    check_unread(*parse([*ONE, *defaults, "--dataset_test_split", "test", "--use_bnb_nested_quant", "false"]))
    with pytest.raises(ValueError, match="^lora_r=16 has no effect without use_peft"):  # it trained the whole model
        check_unread(*parse([*ONE, "--lora_r", "16"]))
    check_unread(*parse([*ONE, "--lora_r", "16", "--use_peft"]))


def test_a_run_says_where_it_is_saved_before_it_begins(
    saved_pair: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    pair = ("--student", str(saved_pair[0]), "--teacher", str(saved_pair[1]), "--dataset_name", str(data))
    assert main(pair) == 2
    assert capsys.readouterr().err == "error: No output folder: pass --output_dir OUT, a new or an empty folder.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path", sorted([*RECIPES.glob("*/[fl]*.yaml"), *RECIPES.glob("*.yaml")]), ids=lambda path: path.parent.name
)
def test_every_option_of_the_recipes_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {**os.environ})
    check_unread(*parse(["--config", str(path), "--bf16", "false", "--output_dir", "out"]))


@pytest.mark.parametrize("flags", [("--use_peft",), ("--merge_adapter", "true"), ("--dataset_streaming", "true")])
def test_the_demo_reads_no_option_of_student_and_data(
    tmp_path: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--demo", "--output_dir", str(tmp_path), *flags]) == 2
    assert f"--demo makes its own models and data, and {flags[0][2:]}=True has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["one dataset", "a stream", "a mixture", "on-policy"])
def test_a_flag_column_that_is_named_must_be_there(
    saved_pair: tuple[Path, Path], data: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control: the default name may be missing, and the column of another name is found."""
    rows = tiny.make_dataset(4, images=False)
    rows.rename_column("distill", "is_long").save_to_disk(tmp_path / "named")
    flags = {"a stream": ("--dataset_streaming", "true"), "on-policy": ("--on_policy",)}.get(kind, ())
    if kind == "a mixture":
        recipe = {"datasets": [{"path": str(tmp_path / "named")}]}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        flags = ("--config", str(tmp_path / "recipe.yaml"))
    source = ("--dataset_name", str(tmp_path / "named")) if kind != "a mixture" else ()

    def prepared(*more: str) -> object:
        pair = [
            "--student",
            str(saved_pair[0]),
            "--teacher",
            str(saved_pair[1]),
            "--output_dir",
            str(tmp_path / "out"),
        ]
        given = [*pair, *source, *QUIET, *flags, "--max_steps", "1", "--self_check", "false", "--kv_source", "student"]
        return script.prepare(*parse([*given, *more]))

    with pytest.raises(ValueError, match="^distill_column='is_lng' names no column of the data .*, found .*is_long"):
        prepared("--distill_column", "is_lng")
    assert prepared("--distill_column", "is_long").has_distill_column  # type: ignore[attr-defined]
    if kind != "a mixture":  # which gives every row the flag of its source
        assert prepared().has_distill_column is False  # type: ignore[attr-defined]


def test_a_missing_library_is_named_with_the_option_that_asks_for_it(
    saved_pair: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = preflight.find_spec
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    assert run(saved_pair, data, tmp_path / "out", "--teacher_quantization", "nf4") == 2
    assert "teacher_quantization=nf4 needs the package bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "package"),
    [
        ("report_to", "wandb", "wandb"),
        ("report_to", "tensorboard", "tensorboard"),
        ("report_to", "flyte", "flytekit"),
        ("report_to", "dagshub", "dagshub"),
        ("use_liger_kernel", True, "liger-kernel"),
        ("attn_implementation", "flash_attention_2", "flash-attn"),
        ("attn_implementation", "paged|flash_attention_2", "flash-attn"),
        ("attn_implementation", "flash_attention_4", "kernels"),
        ("attn_implementation", "kernels-community/flash-attn2", "kernels"),
        ("optim", "lion_32bit", "bitsandbytes"),
        ("optim", "ademamix", "bitsandbytes"),
        ("optim", "paged_adamw_8bit", "bitsandbytes"),
        ("load_in_4bit", True, "bitsandbytes"),
        ("use_vllm", True, "vllm"),
        ("deepspeed", "zero2.json", "deepspeed"),
    ],
)
def test_each_option_names_the_package_that_it_asks_for(
    monkeypatch: pytest.MonkeyPatch, option: str, value: Any, package: str
) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as error:
        preflight.check_packages(SimpleNamespace(**{option: value}))
    assert str(error.value).startswith(
        f"{option}={value} needs the package {package}, which is not installed: `pip install {package}`"
    )
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    preflight.check_packages(SimpleNamespace(**{option: value}))  # the control


def test_what_needs_no_package_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    for option, values in {
        "report_to": ("all", "none", "kubeflow"),
        "attn_implementation": (None, "sdpa", "eager", "paged|eager", "flex_attention"),
        "optim": ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"),
        "deepspeed": (None,),
    }.items():
        for value in values:
            preflight.check_packages(SimpleNamespace(**{option: value}))


# --------------------------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------------------------
def test_the_pair_has_two_names_on_the_command_line_and_in_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("student: a/vlm\nteacher: a/lm\n")
    long = ["--model_name_or_path", "a/vlm", "--teacher_model_name_or_path", "a/lm"]
    for flags in (
        ["--student", "a/vlm", "--teacher", "a/lm"],
        long,
        ["--config", str(recipe)],
        [f"--config={recipe}"],
    ):
        _, config, student, _ = parse(flags)
        assert (student.model_name_or_path, config.teacher_model_name_or_path) == ("a/vlm", "a/lm")
    assert parse(["--config", str(recipe), "--student", "b/vlm"])[2].model_name_or_path == "b/vlm"


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["q_proj"], ["q_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["all-linear"], "all-linear"),
        ([r".*layers\.0\..*q_proj"], r".*layers\.0\..*q_proj"),
    ],
)
def test_one_name_of_a_layer_is_a_name_and_a_pattern_a_pattern(given: list[str], taken: list[str] | str) -> None:
    student = parse(["--student", "a/vlm", "--teacher", "a/lm", "--use_peft", "--lora_target_modules", *given])[2]
    assert student.lora_target_modules == taken
    peft = get_peft_config(student)
    found = [
        key for key in ("model.layers.0.q_proj", "model.layers.1.q_proj") if check_target_module_exists(peft, key)
    ]
    assert len(found) == (
        2 if isinstance(taken, list) else 1 if "layers" in taken else 0
    )  # all-linear is spelt out later


BAD_NAMES = {
    "student: a\nmodel_name_or_path: b": "gives model_name_or_path under two names, 'model_name_or_path' the second",
    "learning_rte: 1": "has an unknown key 'learning_rte', did you mean 'learning_rate'?",
    "studnt: a": "has an unknown key 'studnt', did you mean 'student'?",
    "zzz: a": "has an unknown key 'zzz'.",
    "a: [": "is not valid YAML",
    "seed: 1\nkv_sharing: none\nseed: 2": "is not valid YAML: the key 'seed' stands twice, in lines 1 and 3: keep one.",
    "datasets:\n- {path: a, distill: true, distill: false}": "the key 'distill' stands twice, in lines 2 and 2",
    "env: 3": "env must be a mapping, VARIABLE: value; got 3.",
    "merge_adapter: 3": "merge_adapter must be true or false; got 3.",
    "demo: 3": "demo must be true or false; got 3.",
    "model_name_or_path: 3": "model_name_or_path must be a name, or left out; got 3.",
}


@pytest.mark.parametrize("text", BAD_NAMES)
def test_a_bad_key_in_a_recipe_is_named_with_the_file(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert main(["--config", str(recipe)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert BAD_NAMES[text] in error and (str(recipe) in error or "must be" in error)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--config"], "argument --config: expected one argument"),
        (["--config", "absent.yaml"], "The recipe 'absent.yaml' does not exist."),
        (["--config", "."], "The recipe '.' cannot be read: "),
        (["--learning_rte", "1"], "Unknown option '--learning_rte', did you mean '--learning_rate'?"),
        (["--kv-shraing=full"], "Unknown option '--kv-shraing', did you mean '--kv_sharing'?"),
        (["--max_step", "1"], "Unknown option '--max_step', did you mean '--max_steps'?"),  # no guess at what is meant
        (["some/vlm"], "'some/vlm' belongs to no option"),
    ],
)
def test_a_bad_flag_is_named(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and sentence in error


def test_the_help_is_our_own_options_and_needs_no_torch() -> None:
    code = (
        "import sys\nfrom hf_lingudistill.scripts.distill import main\ntry:\n    main(['--help'])\nexcept SystemExit as stop:\n"
        "    print([stop.code, sorted({'torch', 'transformers', 'datasets'} & set(sys.modules))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    *lines, last = done.stdout.splitlines()
    assert last == "[0, []]" and len(lines) < 180
    text = "\n".join(lines)
    for option in dataclasses.fields(DistillOptions):
        assert f"--{option.name}" in text
    assert "--help_all" in text and "--adam_beta1" not in text


def test_all_options_are_listed_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["--help_all"])
    text = capsys.readouterr().out
    assert leave.value.code == 0 and "--adam_beta1" in text and "--kv_sharing" in text and "--lora_r " in text


def test_a_run_that_is_done_leaves_its_process_group_and_one_that_failed_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where one process has failed, the others are still in it."""
    from torch import distributed

    left: list[str] = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: left.append("left"))
    given = ["--student", str(tmp_path), "--teacher", str(tmp_path), "--dataset_name", "d", "--output_dir", "o"]

    def fails(*_: Any) -> None:
        raise ValueError("on purpose")

    monkeypatch.setattr(script, "distill", fails)
    assert main(given) == 2 and not left and "on purpose" in capsys.readouterr().err
    monkeypatch.setattr(script, "distill", lambda *_: None)
    assert main(given) == 0 and left == ["left"]


GLOO_AT_THE_END = """
import os, sys, time
import torch
import torch.distributed as dist
from hf_lingudistill.scripts import distill
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
others = set(os.listdir("/proc/self/task"))
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
held = dist.group.WORLD  # as DeepSpeed does
for thread in set(os.listdir("/proc/self/task")) - others:
    os.setpriority(os.PRIO_PROCESS, int(thread), 19)  # a busy machine
sys.setswitchinterval(1000)
tensor, gathered = torch.ones(1000), [torch.zeros(1000)]
for _ in range(50):
    dist.all_gather(gathered, tensor)
if "trainer" in sys.argv[2]:  # transformers' has left already, when it has trained
    os.environ["WORLD_SIZE"] = "2"
    dist.destroy_process_group()
if "awake" in sys.argv[2]:
    distill.time.sleep = lambda _: None
if sys.argv[2] != "nothing":
    distill._leave_the_others()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_of_gloo_waits_for_the_gil_when_python_ends(tmp_path: Path) -> None:
    """Control: without a rest, and without leaving at all, such a thread aborts a run that is done. Seen in ZeRO-3 runs."""

    def ends(how: str, index: int) -> int:
        command = [sys.executable, "-c", GLOO_AT_THE_END, str(tmp_path / f"{how}{index}"), how]
        return subprocess.run(command, capture_output=True, cwd=ROOT, timeout=120).returncode

    for control in ("awake", "awake after a trainer", "nothing"):
        assert any(ends(control, index) == -signal.SIGABRT for index in range(8)), control
    for way in ("asleep", "asleep after a trainer"):
        assert [ends(way, index) for index in range(6)] == [0] * 6, way

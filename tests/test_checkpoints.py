"""A checkpoint is whole or not there; what resumes from it ends where the run that was never stopped does."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from hf_lingudistill import checkpoints
from hf_lingudistill.checkpoints import (
    BY,
    STAGING,
    STATE,
    CheckpointError,
    check_output_dir,
    flaw,
    keep_best,
    newest,
    put_back,
    read_measured,
    rotate,
    staged,
    start_afresh,
    to_resume,
)
from hf_lingudistill.folders import MARKER, NotOurs, record

MakeTrainer = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 2,
}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 2 and 4. Read-only: tests copy it."""
    from hf_lingudistill import LinguDistillConfig, LinguDistillTrainer

    folder = tmp_path_factory.mktemp("run")
    LinguDistillTrainer(
        model=tiny.make_vlm(0),
        processing_class=tiny.make_processor(),
        teacher_model=tiny.make_lm(1),
        teacher_tokenizer=tiny.make_tokenizer(extra=False),
        train_dataset=tiny.make_dataset(8),
        args=LinguDistillConfig(
            output_dir=str(folder), teacher_quantization="none", report_to="none", bf16=False, use_cpu=True, **SETTINGS
        ),
    ).train()
    return folder


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


# --------------------------------------------------------------------------------------------------------------------
# What is complete
# --------------------------------------------------------------------------------------------------------------------
def test_checkpoints_lie_in_their_places_and_nothing_beside_them(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["checkpoint-2", "checkpoint-4"]
    assert flaw(run / "checkpoint-2") is None and newest(run) == run / "checkpoint-4"
    assert to_resume(True, run) == to_resume("true", run) == str(run / "checkpoint-4")
    assert to_resume(str(run / "checkpoint-2"), run) == str(run / "checkpoint-2")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "no state": (lambda folder: (folder / STATE).unlink(), "it has no trainer_state.json, which is written last"),
    "half a state": (lambda folder: cut(folder / STATE), "its trainer_state.json is cut off"),
    "half the weights": (lambda folder: cut(folder / "model.safetensors"), "its model.safetensors is cut off"),
    "no optimizer": (
        lambda folder: (folder / "optimizer.pt").unlink(),
        "it holds no optimizer state (save_only_model?)",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_incomplete_checkpoint_is_not_resumed_from(run: Path, how: str) -> None:
    spoil, reason = SPOILT[how]
    spoil(run / "checkpoint-4")
    assert flaw(run / "checkpoint-4") == reason
    assert get_last_checkpoint(str(run)) == str(run / "checkpoint-4")  # what transformers would take
    assert to_resume(True, run) == str(run / "checkpoint-2")
    with pytest.raises(ValueError) as caught:
        to_resume(str(run / "checkpoint-4"), run)
    assert str(caught.value) == (
        f"Checkpoint {str(run / 'checkpoint-4')!r} cannot be resumed from: {reason}; resume from {str(run / 'checkpoint-2')!r}."
    )


def test_without_a_complete_checkpoint_it_is_said(run: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        (run / f"checkpoint-{step}" / STATE).unlink()
    with pytest.raises(
        ValueError, match=r"^No complete checkpoint .*\(checkpoint-4 is not complete: it has no trainer_state"
    ):
        to_resume(True, run)
    with pytest.raises(ValueError, match="no other checkpoint of this run is complete.$"):
        to_resume(str(run / "checkpoint-4"), run)
    with pytest.raises(ValueError, match="^No complete checkpoint to resume from in '.*absent': train without"):
        to_resume(True, tmp_path / "absent")
    with pytest.raises(ValueError, match="it does not exist"):
        to_resume(str(tmp_path / "absent" / "checkpoint-1"), run)


def test_shards_that_an_index_names_must_be_there(run: Path) -> None:
    folder = run / "checkpoint-4"
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert flaw(folder) == "it lacks model-00002-of-00002.safetensors"


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------
def test_folder_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    with staged(str(tmp_path), "checkpoint-3", Accelerator(cpu=True)) as folder:
        written = Path(folder) / "checkpoint-3"
        written.mkdir()
        (written / "file").write_text("new")
        assert get_last_checkpoint(str(tmp_path)) is None and newest(tmp_path) is None
    assert (tmp_path / "checkpoint-3" / "file").read_text() == "new" and not (tmp_path / STAGING).exists()


def test_checkpoint_that_is_there_is_replaced_and_one_that_is_not_the_runs_own_is_kept(tmp_path: Path) -> None:
    for name in ("mine", "first", "second"):
        if name == "mine":
            (tmp_path / "checkpoint-3").mkdir()
            (tmp_path / "checkpoint-3" / name).touch()
            continue
        with staged(str(tmp_path), "checkpoint-3", Accelerator(cpu=True)) as folder:
            (Path(folder) / "checkpoint-3").mkdir()
            (Path(folder) / "checkpoint-3" / name).touch()
    assert [path.name for path in (tmp_path / "checkpoint-3").iterdir()] == ["second"]
    assert [path.name for path in (tmp_path / "earlier-checkpoint-3").iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARKER, "checkpoint-3", "earlier-checkpoint-3"]


def test_what_a_killed_run_left_is_cleared_and_what_it_had_put_aside_comes_back(tmp_path: Path) -> None:
    for name in ("checkpoint-6", "replaced-checkpoint-4", "replaced-checkpoint-2"):
        (tmp_path / STAGING / name).mkdir(parents=True)
    (tmp_path / STAGING / MARKER).touch()
    (tmp_path / "checkpoint-2").mkdir()  # its replacement had got there
    (tmp_path / "checkpoint-2" / "new").touch()
    put_back(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "checkpoint-2" / "new").exists()


def test_a_checkpoint_that_was_put_aside_is_found_before_anything_is_loaded(run: Path) -> None:
    """A run that was killed between the two moves that replace its only checkpoint."""
    shutil.rmtree(run / "checkpoint-2")
    (run / STAGING).mkdir(exist_ok=True)
    (run / STAGING / MARKER).touch()
    (run / "checkpoint-4").rename(run / STAGING / "replaced-checkpoint-4")
    assert newest(run) is None  # control
    assert to_resume(True, run) == str(run / "checkpoint-4")


def test_folder_that_only_bears_the_name_of_a_half_written_checkpoint_is_left(tmp_path: Path) -> None:
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING / "mine").write_text("precious")
    with pytest.raises(NotOurs, match="in the way and was not made by this library"):
        with staged(str(tmp_path), "checkpoint-3", Accelerator(cpu=True)):
            pass
    assert (tmp_path / STAGING / "mine").read_text() == "precious"


@pytest.mark.parametrize("step", [2, 4])
def test_full_disk_keeps_the_last_good_checkpoint_and_says_so(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int
) -> None:
    trainer, save = make_trainer(**SETTINGS), torch.save

    def full(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == step and str(path).endswith("optimizer.pt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError) as caught:
        trainer.train()
    out, message = tmp_path / "out", str(caught.value)
    assert message.startswith(f"checkpoint-{step} could not be written ([Errno 28] No space left on device")
    kept = f"The last complete one is {str(out / 'checkpoint-2')!r}: resume from it when there is room."
    assert message.endswith(kept if step == 4 else "There is none before it: start again when there is room.")
    assert [path.name for path in out.glob("checkpoint-*")] == (["checkpoint-2"] if step == 4 else [])
    assert not (out / STAGING).exists()
    monkeypatch.undo()
    if step == 4:
        resumed = make_trainer(**SETTINGS)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 4


def test_older_checkpoints_are_removed_after_the_new_one_is_there(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(**{**SETTINGS, "max_steps": 6}, save_total_limit=1)
    trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]


def test_only_the_runs_own_checkpoints_are_removed(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Three that stay: one of an earlier run, one that only had the name, one that the user has changed since."""
    out = tmp_path / "out"
    make_trainer(**{**SETTINGS, "max_steps": 2}).train()
    (out / "checkpoint-1").mkdir()
    (out / "checkpoint-1" / "mine").write_text("precious")
    (out / "checkpoint-2").rename(out / "checkpoint-9")
    again = make_trainer(**{**SETTINGS, "save_steps": 1}, overwrite_output_dir=True, save_total_limit=10)
    again.train()
    (out / "checkpoint-3" / "notes.txt").write_text("the best so far")
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3, 4, 9)]
    rotate(out, 1, None)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-4",
        "checkpoint-9",
    ]
    assert (out / "earlier-checkpoint-1" / "mine").read_text() == "precious"


def test_the_end_of_a_run_that_keeps_its_best_alone_removes_no_others(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """transformers removes all that is called like a checkpoint then."""
    out = tmp_path / "out"
    make_trainer(**{**SETTINGS, "max_steps": 3, "save_steps": 1}).train()
    (out / "checkpoint-77").mkdir()
    (out / "checkpoint-77" / "mine").write_text("precious")
    settings = {**SETTINGS, "max_steps": 2, "save_steps": 1, "overwrite_output_dir": True, "learning_rate": 3.0}
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(**settings, **best, eval_dataset=tiny.make_dataset(4))
    trainer.train()
    own = Path(trainer.state.best_model_checkpoint).name
    assert sorted(path.name for path in out.glob("checkpoint-*")) == sorted({own, "checkpoint-3", "checkpoint-77"})
    assert (out / "checkpoint-77" / "mine").read_text() == "precious" and trainer.args.save_total_limit == 1


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_a_stream_that_has_gone_round_is_resumed(make_trainer: MakeTrainer, tmp_path: Path, step: int) -> None:
    """transformers skips the steps that were made within one pass: of a stream that is shorter, the whole pass."""
    settings = {**SETTINGS, "max_steps": 6, "save_steps": 1, "per_device_train_batch_size": 4}
    make_trainer(**settings, train_dataset=tiny.make_dataset(8).to_iterable_dataset()).train()
    resumed = make_trainer(**settings, train_dataset=tiny.make_dataset(8).to_iterable_dataset())
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
    assert resumed.state.global_step == 6


@pytest.mark.parametrize("edited", [True, False])
def test_settings_that_were_edited_outlast_a_run_that_is_resumed(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture, edited: bool
) -> None:
    make_trainer(**SETTINGS).train()
    out = tmp_path / "out"
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy2(out / "checkpoint-4" / name, out / name)
    mine = (out / "chat_template.jinja").read_text() + "{# mine #}"
    if edited:
        (out / "chat_template.jinja").write_text(mine)
    for copies in (1, 1):  # it is written anew the first time, and is no edit then
        resumed = make_trainer(**SETTINGS)
        resumed.train(resume_from_checkpoint=str(out / "checkpoint-2"))
        resumed.save_model()
        assert len(list(out.glob("earlier-*"))) == (copies if edited else 0)
    assert not edited or (out / "earlier-chat_template.jinja").read_text() == mine
    assert ("have been changed since they were saved" in caplog.text) == edited
    assert "mine" not in (out / "chat_template.jinja").read_text()


@pytest.mark.parametrize(("best", "stay"), [("checkpoint-1", [1, 4]), (None, [3, 4])])
def test_the_best_and_the_newest_stay_whatever_the_limit(tmp_path: Path, best: str | None, stay: list[int]) -> None:
    for step in range(1, 5):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        record(tmp_path, folder.name, by=BY)
        os.utime(folder, (step, step))
    rotate(tmp_path, 2, None if best is None else str(tmp_path / best))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in stay]


@pytest.mark.parametrize("name", ["config.json", "README.md", "pytorch_model.bin", "model-00001-of-00002.safetensors"])
def test_output_dir_with_files_that_a_run_would_write_over_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.log").touch()
    (tmp_path / "recipe.yaml").touch()
    check_output_dir(tmp_path)  # the control: a run writes no such files
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"holds '{name}', which a run may write over: choose another folder"):
        check_output_dir(tmp_path)
    check_output_dir(tmp_path, overwrite=True)
    for place in (tmp_path / name, tmp_path / name / "below"):
        with pytest.raises(ValueError, match=f"{name}' is a file, expected a folder"):
            check_output_dir(place, overwrite=True)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("where", ["", "run"])
def test_a_run_never_writes_to_the_folder_of_a_model_that_it_reads(
    make_trainer: MakeTrainer, saved_pair: tuple[Path, Path], tmp_path: Path, role: str, where: str
) -> None:
    """Whatever may be overwritten. Control: the same models, and a folder beside theirs."""
    shutil.copytree(saved_pair[0], tmp_path / "student")
    shutil.copytree(saved_pair[1], tmp_path / "teacher")
    pair = {"model": str(tmp_path / "student"), "teacher_model": str(tmp_path / "teacher")}
    before = contents(tmp_path / role)
    trainer = make_trainer(**pair, output_dir=str(tmp_path / role / where), overwrite_output_dir=True)
    with pytest.raises(ValueError, match=f"is the folder of the {role}, or lies in it, and would be written over"):
        trainer.train()
    assert contents(tmp_path / role) == before
    make_trainer(**pair, output_dir=str(tmp_path / f"{role}-distilled"), overwrite_output_dir=True).train()


def test_best_checkpoint_is_named_where_it_lies(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(
        **SETTINGS, eval_dataset=tiny.make_dataset(4), eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path / "out" and best.is_dir()
    state = json.loads((tmp_path / "out" / "checkpoint-4" / STATE).read_text())
    assert state["best_model_checkpoint"] == str(best)
    stored, now = load_file(best / "model.safetensors"), trainer.model.state_dict()
    assert all(torch.equal(stored[name], now[name]) for name in stored)


# --------------------------------------------------------------------------------------------------------------------
# Resuming
# --------------------------------------------------------------------------------------------------------------------
def entries(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in log]


@pytest.mark.parametrize("forget", [False, True])
def test_log_between_whose_entries_a_checkpoint_fell_is_that_of_the_whole_run(
    make_trainer: MakeTrainer, tmp_path: Path, forget: bool
) -> None:
    settings = {**SETTINGS, "max_steps": 6, "logging_steps": 3, "train_dataset": tiny.make_dataset(12)}
    settings |= {"train_sampling_strategy": "sequential"}
    whole = make_trainer(**settings, output_dir=str(tmp_path / "whole"))
    whole.train()
    resumed = make_trainer(**settings, output_dir=str(tmp_path / "whole"))
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    if forget:  # the control
        (checkpoint / "lingudistill_measured_0.json").unlink()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    ours, theirs = entries(resumed.state.log_history), entries(whole.state.log_history)
    assert ours[0] == theirs[0]
    assert (ours[1] == theirs[1]) != forget
    assert resumed.state.log_history[-1]["train_loss"] > 0


def test_a_run_is_resumed_with_the_loss_and_the_rows_that_it_had(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """The control goes on: the same options, more steps, another batch, and a checkpoint of before the options were kept."""
    settings: dict[str, Any] = {**SETTINGS, "max_steps": 2, "save_steps": 1, "output_dir": str(tmp_path / "run")}
    settings |= {"train_dataset": tiny.make_dataset(12), "kv_sharing": "vision", "kv_source": "student"}
    make_trainer(**settings).train()
    before = contents(tmp_path / "run")
    for changed in (
        {"kv_sharing": "none"},
        {"kv_source": "before"},
        {"ce_weight": 0.25},
        {"distill_margin": 0.5},
        {"temperature": 2.0},
        {"anchor": "before"},
        {"learning_rate": 0.5},
        {"lr_scheduler_type": "cosine"},
        {"optim": "adamw_torch"},
        {"seed": 7},
        {"max_length": 64},
        {"completion_only_loss": False},
        {"answers_only": False},
    ):
        ((name, value),) = changed.items()
        trainer = make_trainer(**{**settings, "max_steps": 3, **changed})
        with pytest.raises(
            ValueError, match=f"was trained with {name}=.*; found {name}={value!r}. Resume it with the options"
        ):
            trainer.train(resume_from_checkpoint=True)
        assert contents(tmp_path / "run") == before
    make_trainer(**{**settings, "max_steps": 3, "per_device_train_batch_size": 2}).train(resume_from_checkpoint=True)
    (tmp_path / "run/checkpoint-3/lingudistill.json").unlink()
    trainer = make_trainer(**{**settings, "max_steps": 4, "learning_rate": 0.5})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("by", ["name", "link"])
def test_a_run_that_resumes_into_another_runs_folder_leaves_what_is_there(
    make_trainer: MakeTrainer, tmp_path: Path, on_policy: bool, by: str
) -> None:
    """Control: in its own folder and in a new one it goes on; told to overwrite, it removes no checkpoint of the other's."""
    from hf_lingudistill import LinguDistillTrainer, OnPolicyLinguDistillTrainer

    kind = {"trainer_class": OnPolicyLinguDistillTrainer if on_policy else LinguDistillTrainer}
    settings = {**kind, **SETTINGS, "save_steps": 1, "save_total_limit": 1, "optim": "adamw_torch"}
    settings["train_dataset"] = tiny.make_dataset(8)
    if on_policy:
        settings["train_dataset"] = settings["train_dataset"].remove_columns("completion")

    def run(folder: Path, steps: int, resume: Path | None = None, **more: Any) -> None:
        trainer = make_trainer(**{**settings, "max_steps": steps, **more}, output_dir=str(folder))
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        trainer.save_model(str(folder))

    mine, other = tmp_path / "mine", tmp_path / "other"
    run(mine, 1)
    run(other, 2)
    target = other
    if by == "link":
        target = tmp_path / "link"
        target.symlink_to(other)
    before = contents(other)
    with pytest.raises(
        ValueError, match="holds a run's files .*: choose another folder, continue the run that is there"
    ):
        run(target, 3, mine / "checkpoint-1")
    assert contents(other) == before
    run(tmp_path / "new", 2, mine / "checkpoint-1")
    run(target, 3, other / "checkpoint-2")
    assert [path.name for path in other.glob("checkpoint-*")] == ["checkpoint-3"]
    run(target, 2, mine / "checkpoint-1", overwrite_output_dir=True)
    assert sorted(path.name for path in other.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_sums_of_another_number_of_processes_are_left_alone(run: Path) -> None:
    accelerator = Accelerator(cpu=True)
    file = run / "checkpoint-4" / "lingudistill_measured_0.json"
    assert read_measured(file.parent, accelerator) is not None
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processes": 2}))
    assert read_measured(file.parent, accelerator) is None


# --------------------------------------------------------------------------------------------------------------------
# kill -9
# --------------------------------------------------------------------------------------------------------------------
STEPS, SAVE_STEPS, LOGGING_STEPS = 18, 4, 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two sources and a student with dropout: sampler, mixture and RNG all matter."""
    folder = tmp_path_factory.mktemp("kill")
    student, teacher = tiny.save_pair(folder)
    config = json.loads((student / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.2
    (student / "config.json").write_text(json.dumps(config))
    for name, seed in (("seen", 0), ("told", 1)):
        tiny.make_dataset(12, seed=seed).save_to_disk(folder / name)
    settings = {
        "model_name_or_path": str(student),
        "teacher_model_name_or_path": str(teacher),
        "datasets": [
            {"path": str(folder / "seen"), "fraction": 0.5, "distill": False},
            {"path": str(folder / "told"), "fraction": 0.5, "distill": True},
        ],
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "logging_steps": LOGGING_STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "teacher_quantization": "none",
        "activation_checkpointing": False,
        "save_total_limit": 2,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


def start(recipe: Path, out: Path, at: dict[str, int] | None = None, *, resume: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tests" / "kill_worker.py"), json.dumps(at or {}), "--config", str(recipe)]
    command += ["--output_dir", str(out), *(["--resume_from_checkpoint", "true"] if resume else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> None:
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    finished(start(recipe, out))
    return out


def same_end(ours: Path, theirs: Path) -> bool:
    weights = (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    states = [json.loads((folder / f"checkpoint-{STEPS}" / STATE).read_text()) for folder in (ours, theirs)]
    logs = [entries(state["log_history"]) for state in states]
    return weights and logs[0] == logs[1]


def resumable(out: Path) -> bool:
    """Before the first checkpoint, a run starts again (in an empty folder)."""
    if newest(out) is None:
        shutil.rmtree(out, ignore_errors=True)
        return False
    return True


@pytest.mark.parametrize("lost", ["nothing", "the random state"])
def test_run_killed_in_a_checkpoint_ends_as_if_it_had_not_been(
    recipe: Path, uninterrupted: Path, tmp_path: Path, lost: str
) -> None:
    """Half of the second checkpoint's optimizer is on disk. Control: a resume that forgets the random state ends elsewhere."""
    out = tmp_path / "out"
    process = start(recipe, out, {"torch_save": 6})
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    half = out / STAGING / "checkpoint-8" / "optimizer.pt"
    assert half.is_file() and [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]
    if lost == "the random state":
        (out / "checkpoint-4" / "rng_state.pth").unlink()
    finished(start(recipe, out, resume=True))
    assert same_end(out, uninterrupted) == (lost == "nothing")
    assert not (out / STAGING).exists()


@pytest.mark.slow
def test_run_killed_ten_times_ends_as_if_it_had_not_been(recipe: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Anywhere: while files of a checkpoint are opened, moved and removed, in a backward pass, and at random moments."""
    rng, out, kills = random.Random(0), tmp_path / "out", {"write": 0, "torch_save": 0, "step": 0, "moment": 0}
    plan = [{"write": rng.randint(1, 40)} for _ in range(3)] + [{"torch_save": rng.randint(1, 6)} for _ in range(2)]
    plan += [{"step": rng.randint(2, 20)} for _ in range(2)] + [{} for _ in range(3)]
    rng.shuffle(plan)
    progress: list[int] = []
    while sum(kills.values()) < 10 and len(progress) < 15:
        at = plan[len(progress)] if len(progress) < len(plan) else {}
        process = start(recipe, out, at, resume=resumable(out))
        if not at:
            watched = {path.name for path in out.glob("checkpoint-*")} if out.is_dir() else set()
            while process.poll() is None and {path.name for path in out.glob("checkpoint-*")} == watched:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.3)  # somewhere after the next checkpoint
            process.kill()
        process.communicate(timeout=300)
        kills[next(iter(at), "moment")] += process.returncode == -signal.SIGKILL
        last = newest(out)
        progress.append(int(last.name.rpartition("-")[2]) if last else 0)
        # It had ended before the kill, or was killed when all was saved, and finds nothing left: again from the start
        if process.returncode in (0, 2):
            shutil.rmtree(out)
    if (out / "lingudistill.json").is_file():
        shutil.rmtree(out)
    finished(start(recipe, out, resume=resumable(out)))
    print(f"kills: {kills}; last complete checkpoint after each: {progress}")
    assert sum(kills.values()) == 10
    assert same_end(out, uninterrupted)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, where the test may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_real_full_disk(recipe: Path, small_disk: Path) -> None:
    """Checkpoints of a third of a megabyte, and a disk for a few: one of them does not fit, and those before it are kept."""
    text = recipe.read_text().replace("save_total_limit: 2", "save_total_limit: 10")
    (recipe.parent / "full.yaml").write_text(text)
    process = start(recipe.parent / "full.yaml", small_disk / "out")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2, error[-2000:]
    told = next(line for line in error.splitlines() if line.startswith("error: "))
    assert " could not be written (" in told and "resume from it when there is room" in told
    last = newest(small_disk / "out")
    assert last is not None and str(last) in told and not (small_disk / "out" / STAGING).exists()


# --------------------------------------------------------------------------------------------------------------------
# Two runs, several machines, a rename that fails
# --------------------------------------------------------------------------------------------------------------------
def test_a_run_that_writes_is_not_cleared_by_another(tmp_path: Path) -> None:
    with staged(str(tmp_path), "checkpoint-2", Accelerator(cpu=True)) as folder:
        made = Path(folder) / "checkpoint-2"
        made.mkdir()
        (made / "weights").write_text("mine")
        for other in (lambda: put_back(tmp_path), lambda: start_afresh(tmp_path)):
            with pytest.raises(NotOurs, match="Another process is writing a checkpoint to"):
                other()
    assert (tmp_path / "checkpoint-2" / "weights").read_text() == "mine"
    put_back(tmp_path)  # control: it is done


@pytest.mark.parametrize("shared", [True, False], ids=["one disk", "a disk each"])
def test_machines_make_one_folder_where_they_share_a_disk(tmp_path: Path, shared: bool) -> None:
    """The second machine comes after the first has begun to write, and clears what a killed run left on a disk of its own."""
    disks = [tmp_path / "one", tmp_path / ("one" if shared else "two")]
    for disk in {*disks}:
        (disk / STAGING).mkdir(parents=True)
        (disk / STAGING / MARKER).touch()
        (disk / STAGING / "left").touch()
    waiting = threading.Barrier(2)

    def machine(index: int) -> None:
        accelerator = SimpleNamespace(
            is_main_process=index == 0, is_local_main_process=True, wait_for_everyone=waiting.wait
        )
        held = checkpoints._make_staging(str(disks[index]), disks[index] / STAGING, accelerator, token="0" * 16)
        (disks[index] / STAGING / f"of {index}").touch()
        waiting.wait()
        if held is not None:
            held.release()

    threads = [threading.Thread(target=machine, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    found = [sorted(path.name for path in (disk / STAGING).iterdir()) for disk in disks]
    assert found == ([[MARKER, "of 0", "of 1"]] * 2 if shared else [[MARKER, "of 0"], [MARKER, "of 1"]])


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(text: str) -> None:
        with staged(str(tmp_path), "checkpoint-2", Accelerator(cpu=True)) as folder:
            made = Path(folder) / "checkpoint-2"
            made.mkdir()
            (made / "weights").write_text(text)

    write("1")
    plain = os.rename

    def rename(path: Path, target: Path) -> None:
        if path.name == "whole-checkpoint-2":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        plain(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(CheckpointError, match="Disk quota exceeded"):
            write("2")
    assert (tmp_path / "checkpoint-2" / "weights").read_text() == "1" and not (tmp_path / STAGING).exists()
    write("3")
    assert (tmp_path / "checkpoint-2" / "weights").read_text() == "3"


def test_flaws_of_weights_and_their_index(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / STATE).write_text("{}")
    torch.save({"state": torch.zeros(100)}, folder / "optimizer.pt")
    assert flaw(folder) == "it holds no weights"
    for index in ('{"weight_map": {"a": "mod', "[]", "{}"):
        (folder / "model.safetensors.index.json").write_text(index)
        assert flaw(folder) == "its model.safetensors.index.json is cut off"
    (folder / "model.safetensors.index.json").unlink()
    for name in ("pytorch_model_fsdp_0", "global_step2"):  # controls: FSDP's and DeepSpeed's weights
        (folder / name).mkdir()
        assert flaw(folder) is None
        (folder / name).rmdir()
    (folder / "global_step2").mkdir()
    whole = (folder / "optimizer.pt").read_bytes()
    (folder / "optimizer.pt").write_bytes(whole[: len(whole) // 2])
    assert flaw(folder) == "its optimizer.pt is cut off"


def test_the_record_of_an_earlier_run_does_not_stand_for_a_new_one(tmp_path: Path) -> None:
    for steps in (1, 2):
        (tmp_path / "lingudistill.json").write_text(json.dumps({"steps": steps}))
        start_afresh(tmp_path)
    assert not (tmp_path / "lingudistill.json").exists()
    kept = {path.name: json.loads(path.read_text())["steps"] for path in tmp_path.glob("earlier-*")}
    assert kept == {"earlier-lingudistill.json": 1, "earlier-lingudistill.json-2": 2}


def test_the_best_checkpoint_stays_however_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        Path(f"out/checkpoint-{step}").mkdir(parents=True)
        record("out", f"checkpoint-{step}", by=BY)
    rotate(tmp_path / "out", 2, "out/checkpoint-1")
    assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    keep_best("out", "moved/checkpoint-1")  # which is there no more
    assert len(list(Path("out").glob("checkpoint-*"))) == 2
    keep_best("out", str(tmp_path / "out" / "checkpoint-1"))
    assert [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_checkpoint_whose_folder_is_removed_while_it_is_written_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was removed while it was written to"):
        with staged(str(tmp_path), "checkpoint-2", Accelerator(cpu=True)) as folder:
            shutil.rmtree(folder)


def test_true_means_the_newest_checkpoint_of_the_run_itself(run_folder: Path, tmp_path: Path) -> None:
    """Under `--overwrite_output_dir` an earlier run's may have more steps."""
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    (run / "checkpoint-4").rename(run / "checkpoint-100")
    start_afresh(run)
    assert to_resume(True, run) == str(run / "checkpoint-100")  # control: it has none of its own
    record(run, "checkpoint-2", by=BY)
    assert to_resume(True, run) == str(run / "checkpoint-2")


def test_a_checkpoint_that_a_callback_added_to_stays_and_that_is_said(tmp_path: Path, caplog: Any) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").touch()
        record(tmp_path, f"checkpoint-{step}", by=BY)
    (tmp_path / "checkpoint-1" / "ema").touch()
    (tmp_path / "checkpoint-0").mkdir()
    (tmp_path / "checkpoint-0" / "mine").touch()  # control: somebody else's
    for _ in range(2):
        rotate(tmp_path, 1, None)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-0",
        "checkpoint-1",
        "checkpoint-3",
    ]
    assert (
        caplog.text.count("checkpoint-1 holds files that the run did not write") == 1
        and "checkpoint-0" not in caplog.text
    )

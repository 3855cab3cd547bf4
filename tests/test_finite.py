"""A loss, a gradient or a teacher that is not finite never reaches the weights, and is traced to its rows."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from hf_lingudistill.finite import IN_A_ROW, NAMED_ROWS, FiniteWatch, NotFinite, Problem
from hf_lingudistill.scripts.distill import NOT_FINITE, main

MakeTrainer = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[1]
STEPS = 4
BAD_STEP = 2  # of 1 to STEPS
SETTINGS: dict[str, Any] = {
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": 2,
    "max_steps": STEPS,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
}


class Poisoned(TrainerCallback):
    """Makes the student's input embedding answer NaN for one row of the batches of chosen steps."""

    def __init__(self, model: torch.nn.Module, *, steps: tuple[int, ...] = (BAD_STEP,), row: int | None = 1) -> None:
        self.steps, self.row, self.now = steps, row, 0
        model.get_input_embeddings().register_forward_hook(self._spoil)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.now = state.global_step + 1

    def _spoil(self, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if self.now not in self.steps:
            return None
        spoilt = output.clone()
        spoilt[slice(None) if self.row is None else self.row] = math.nan
        return spoilt


class Weights(TrainerCallback):
    """The weights after each optimizer step."""

    def __init__(self) -> None:
        self.after: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.after.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))


def poisoned(make_trainer: MakeTrainer, steps: tuple[int, ...] = (BAD_STEP,), **settings: Any) -> tuple[Any, Weights]:
    weights, row = Weights(), settings.pop("row", 1)
    trainer = make_trainer(callbacks=[weights], **{**SETTINGS, **settings})
    trainer.add_callback(Poisoned(trainer._plain_student(), steps=steps, row=row))
    return trainer, weights


def test_poisoned_step_poisons_a_trainer_that_does_not_look(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of every test below."""
    monkeypatch.setattr(FiniteWatch, "verdict", lambda self, model, grad_norm=None: self._batches.clear())
    trainer, weights = poisoned(make_trainer)
    trainer.train()
    assert torch.isfinite(weights.after[0]).all() and not torch.isfinite(weights.after[-1]).all()


def test_run_stops_before_the_weights_change_and_names_the_row(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer, weights = poisoned(make_trainer, save_strategy="steps", save_steps=100)
    with pytest.raises(NotFinite) as caught:
        trainer.train()
    message = str(caught.value)
    # rows 0 and 1 make step 1; the second row of step 2 is row 3, a text about the sea
    assert message == (
        "Training stopped in step 2: the loss is not finite at row 3 ('user tell me about the sea assistant the sea is deep, wide a'"
        "). The weights are those of step 1, saved in checkpoint-1. Repair or remove what is named, or pass --on_nan skip to "
        "leave such steps out."
    )
    now = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert torch.equal(now, weights.after[0])
    saved = load_file(tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_run_goes_on_from_where_it_stopped(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer, _ = poisoned(make_trainer, save_strategy="steps", save_steps=100)
    with pytest.raises(NotFinite):
        trainer.train()
    mended = make_trainer(**SETTINGS)
    mended.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert mended.state.global_step == STEPS
    assert all(torch.isfinite(p).all() for p in mended.model.parameters())


@pytest.mark.parametrize("save_steps", [1, 100])
def test_what_a_stop_leaves_counts_nothing_of_the_step_that_was_dropped(
    make_trainer: MakeTrainer, tmp_path: Path, save_steps: int
) -> None:
    """A checkpoint that the run has written already stays as it is; one that the stop writes holds the sums of the steps before it. The
    gradient alone is spoilt, so that the dropped step's loss is a number."""
    whole = make_trainer(
        **SETTINGS, save_strategy="steps", save_steps=1, logging_steps=STEPS, output_dir=str(tmp_path / "whole")
    )
    whole.train()
    expected = json.loads((tmp_path / "whole/checkpoint-1/lingudistill_measured_0.json").read_text())
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": save_steps, "logging_steps": STEPS}
    trainer = make_trainer(**settings, output_dir=str(tmp_path / "stopped"))
    trainer.add_callback(SpoiltGradient(trainer.model))
    with pytest.raises(NotFinite, match="the gradient is not finite, .* saved in checkpoint-1"):
        trainer.train()
    found = json.loads((tmp_path / "stopped/checkpoint-1/lingudistill_measured_0.json").read_text())
    assert found == expected and found["loss"] > 0 and found["tokens"] > 0
    resumed = make_trainer(**settings, output_dir=str(tmp_path / "stopped"))
    resumed.train(resume_from_checkpoint=True)
    ours, theirs = (run.state.log_history[0] for run in (resumed, whole))
    assert {name: ours[name] for name in ("loss", "num_tokens", "ce_loss")} == {
        name: theirs[name] for name in ("loss", "num_tokens", "ce_loss")
    }


class SpoiltGradient(TrainerCallback):
    """Makes a gradient of the second step infinite."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.now = 0
        next(p for p in model.parameters() if p.requires_grad).register_hook(
            lambda gradient: gradient * math.inf if self.now == BAD_STEP else gradient
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.now = state.global_step + 1


class BreaksOff(TrainerCallback):
    """Ends the first training between the micro-batches of a step, of which one was not finite."""

    def __init__(self) -> None:
        self.done = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == BAD_STEP and not self.done:
            self.done = True
            raise RuntimeError("out of memory, say")


@pytest.mark.parametrize("resume", [False, True])
def test_a_training_after_one_that_broke_off_counts_and_judges_its_own_batches(
    make_trainer: MakeTrainer, tmp_path: Path, resume: bool
) -> None:
    """The broken step's first batch was not finite; the same trainer is then trained again, and logs what a new one does."""
    settings = {
        **SETTINGS,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": STEPS,
    }
    # What an optimizer and a schedule remember stays with a trainer
    settings |= {"train_dataset": tiny.make_dataset(16), "optim": "sgd", "lr_scheduler_type": "constant"}

    def make(name: str, **more: Any) -> Any:
        return make_trainer(**settings, output_dir=str(tmp_path / name), overwrite_output_dir=True, **more)

    trainer, broken = make("again"), BreaksOff()
    poison = Poisoned(trainer._plain_student())
    trainer.add_callback(poison)
    trainer.add_callback(broken)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(RuntimeError, match="out of memory, say"):
        trainer.train()
    poison.steps = ()
    if not resume:
        trainer.model.load_state_dict(start)
    trainer.train(resume_from_checkpoint=resume or None)
    whole = make("whole")
    whole.train()
    ours, theirs = (run.state.log_history[0] for run in (trainer, whole))
    for name in ("loss", "num_tokens", "ce_loss", "answer_tokens", "distilled_tokens", "entropy"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_skipped_step_leaves_weights_and_moments_alone(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, max_grad_norm: float, accumulation: int
) -> None:
    trainer, weights = poisoned(
        make_trainer,
        on_nan="skip",
        max_grad_norm=max_grad_norm,
        gradient_accumulation_steps=accumulation,
        train_dataset=tiny.make_dataset(8 * accumulation),
    )
    counts = []

    class Moments(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            counts.append({int(entry["step"]) for entry in optimizer.state.values()})

    trainer.add_callback(Moments())
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert torch.equal(weights.after[0], weights.after[1])  # the skipped step
    assert not torch.equal(weights.after[1], weights.after[2]) and torch.isfinite(weights.after[-1]).all()
    assert counts == [{1}, {1}, {2}, {3}]
    assert trainer.skipped_steps == 1 and trainer.state.global_step == STEPS
    skipped = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(skipped) == 1 and skipped[0].startswith("Step 2 skipped: the loss is not finite at row ")
    assert trainer.state.log_history[-2]["skipped_steps"] == 1


def test_skipped_step_is_as_if_it_had_not_been(make_trainer: MakeTrainer) -> None:
    """Weights and metrics are those of a run whose data never had the poisoned batch."""
    rows = tiny.make_dataset(8)
    trainer, weights = poisoned(
        make_trainer, on_nan="skip", train_dataset=rows, logging_steps=STEPS, lr_scheduler_type="constant"
    )
    trainer.train()
    clean_weights = Weights()
    clean = make_trainer(
        **{**SETTINGS, "max_steps": STEPS - 1, "logging_steps": STEPS - 1, "lr_scheduler_type": "constant"},
        train_dataset=rows.select([0, 1, 4, 5, 6, 7]),
        callbacks=[clean_weights],
    )
    clean.train()
    torch.testing.assert_close(weights.after[-1], clean_weights.after[-1], rtol=0, atol=0)
    ours, theirs = (next(log for log in t.state.log_history if "ce_loss" in log) for t in (trainer, clean))
    for name in ("ce_loss", "kd_loss", "teacher_ce", "student_ce", "entropy", "mean_token_accuracy", "answer_tokens"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("filtered", [True, False], ids=["filter", "no filter"])
def test_a_skipped_step_is_in_no_loss_and_no_count_of_tokens(
    make_trainer: MakeTrainer, every: int, filtered: bool
) -> None:
    settings = {"on_nan": "skip", "logging_steps": every, "logging_nan_inf_filter": filtered}
    trainer, _ = poisoned(make_trainer, **settings)  # step 2 of four
    output = trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    losses = {log["step"]: (log["loss"], log["ce_loss"]) for log in logged}
    assert sorted(losses) == ([1, 3, 4] if every == 1 else [2, 4])
    assert all(math.isfinite(loss) for loss, _ in losses.values()) and math.isfinite(output.training_loss)
    each, _ = poisoned(make_trainer, on_nan="skip", logging_steps=1, overwrite_output_dir=True)
    each.train()
    own = {log["step"]: log for log in each.state.log_history if "loss" in log}
    # The oldest transformers divides by all steps there are
    count = 3 if "_initial_global_step" in inspect.getsource(Trainer._finalize_training) else 4
    assert output.training_loss == pytest.approx(sum(own[step]["loss"] for step in (1, 3, 4)) / count, rel=1e-4)
    if every == 2:
        assert losses[2][0] == pytest.approx(own[1]["loss"], rel=1e-4)  # of the step that took place
        assert losses[4][0] == pytest.approx((own[3]["loss"] + own[4]["loss"]) / 2, rel=1e-4)
    assert logged[-1]["num_tokens"] == own[4]["num_tokens"]
    clean = make_trainer(**{**SETTINGS, "max_steps": STEPS, "overwrite_output_dir": True})
    clean.train()
    whole = next(log for log in reversed(clean.state.log_history) if "num_tokens" in log)["num_tokens"]
    assert logged[-1]["num_tokens"] < whole  # control: without the poison, the tokens of four steps


def test_ten_skipped_steps_in_a_row_stop_the_run(make_trainer: MakeTrainer) -> None:
    trainer, _ = poisoned(make_trainer, tuple(range(2, 100)), on_nan="skip", max_steps=40)
    with pytest.raises(
        NotFinite,
        match="The 10 steps before it were skipped as well. Lower learning_rate, or use bf16 in place of fp16.$",
    ):
        trainer.train()
    assert trainer.skipped_steps == IN_A_ROW and trainer.state.global_step == 1 + IN_A_ROW
    # scattered, as many do not
    trainer, _ = poisoned(make_trainer, tuple(range(2, 40, 2)), on_nan="skip", max_steps=24, overwrite_output_dir=True)
    trainer.train()
    assert trainer.skipped_steps == 12


def test_broken_student_is_not_blamed_on_rows(make_trainer: MakeTrainer) -> None:
    student = tiny.make_vlm(0)
    with torch.no_grad():
        student.get_input_embeddings().weight[7] = math.nan
    trainer = make_trainer(model=student, on_nan="skip", save_strategy="steps", **SETTINGS)
    with pytest.raises(NotFinite, match="the student's weights are not finite: they were broken before this step"):
        trainer.train()
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))


@pytest.mark.parametrize("distill_tokens", ["all", "confident"])
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_teacher_that_returns_nan_is_found(make_trainer: MakeTrainer, distill_tokens: str, on_nan: str) -> None:
    """Also with the gate, which would take a teacher of NaN for one that is never confident, and train on without it."""
    teacher = tiny.make_lm(1)
    with torch.no_grad():
        teacher.model.norm.weight[0] = math.nan
    trainer = make_trainer(
        teacher_model=teacher,
        distill_tokens=distill_tokens,
        on_nan=on_nan,
        self_check=False,  # which finds it before the first step
        **SETTINGS | {"max_steps": 30},
    )
    with pytest.raises(
        NotFinite, match="the teacher's probabilities are not a number at row .*Try teacher_quantization='none'"
    ):
        trainer.train()
    assert trainer.skipped_steps == (IN_A_ROW if on_nan == "skip" else 0)


def test_gradient_that_is_not_finite_under_a_finite_loss_is_found(make_trainer: MakeTrainer) -> None:
    trainer, weights = poisoned(make_trainer, steps=())
    parameter = trainer._plain_student().get_input_embeddings().weight
    parameter.register_hook(lambda grad: grad * (math.inf if trainer.state.global_step == BAD_STEP - 1 else 1.0))
    with pytest.raises(
        NotFinite, match="the gradient is not finite, although every loss is, in the step of row 2 .*, row 3 "
    ):
        trainer.train()
    assert len(weights.after) == 1 and torch.isfinite(weights.after[0]).all()


def test_rows_without_numbers_are_named_by_their_beginning(make_trainer: MakeTrainer) -> None:
    trainer, _ = poisoned(make_trainer, train_dataset=tiny.make_dataset(8, images=False))
    with pytest.raises(NotFinite, match="at the row that begins 'user tell me about the sea"):
        trainer.train()


def test_evaluation_does_not_judge(make_trainer: MakeTrainer) -> None:
    """Nothing changes the weights there: its NaN is reported as it is."""
    trainer, _ = poisoned(make_trainer, steps=(), eval_dataset=tiny.make_dataset(4))
    student = trainer._plain_student()
    hook = student.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output * math.nan)
    assert math.isnan(trainer.evaluate()["eval_loss"])
    hook.remove()
    trainer.train()
    assert trainer.state.global_step == STEPS


# --------------------------------------------------------------------------------------------------------------------
# The watch alone
# --------------------------------------------------------------------------------------------------------------------
def make_watch() -> FiniteWatch:
    return FiniteWatch(Accelerator(cpu=True), tiny.make_tokenizer(extra=True))


def look(watch: FiniteWatch, student_ce: list[list[float]], teacher_log_prob: list[list[float]] | None = None) -> None:
    """Let the watch see a batch: (B, M) cross-entropies, and what the teacher gives the first labels of each row."""
    ce, log_prob = torch.tensor(student_ce), torch.tensor(teacher_log_prob or [[] for _ in student_ce])
    rows = [torch.arange(len(of))[:, None].expand_as(of).flatten() for of in (ce, log_prob)]
    plan = types.SimpleNamespace(label_rows=rows[0], loss_rows=rows[1])
    scores = types.SimpleNamespace(cross_entropy=ce.flatten(), loss=ce.flatten(), teacher_log_prob=log_prob.flatten())
    watch.scored({}, plan, None, scores, True)  # type: ignore[arg-type]


def test_overflow_is_left_to_a_scaler_that_can_still_go_down(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, model = make_watch(), torch.nn.Linear(1, 1)
    ids = torch.full((1, 4), 7)
    for scale, is_problem in ((2.0**16, False), (0.5, True)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(1))  # the scale is made on first use
        monkeypatch.setattr(watch.accelerator, "scaler", scaler)
        watch.open(ids, None)
        assert (watch.verdict(model, torch.tensor(math.inf)) is not None) == is_problem
        # a forward that overflows is no matter of the scale
        watch.open(ids, None)
        look(watch, [[0.0, math.inf, 1.0]])
        problem = watch.verdict(model, torch.tensor(math.nan))
        assert problem is not None and problem.loss
    monkeypatch.setattr(watch.accelerator, "scaler", None)
    watch.open(ids, None)
    assert watch.verdict(model, torch.tensor(math.inf)) is not None


def test_rows_are_judged_in_each_batch_of_the_step() -> None:
    watch, model = make_watch(), torch.nn.Linear(1, 1)
    ids = torch.full((2, 4), 7)
    watch.open(ids, torch.tensor([10, 11]))
    look(watch, [[0.0, 1.0, 2.0], [0.0, math.nan, 2.0]])
    watch.open(ids, torch.tensor([12, 13]))
    look(watch, [[0.0] * 3] * 2, [[-1.0, -math.inf], [-2.0, -1.0]])  # impossible, not broken
    problem = watch.verdict(model, torch.tensor(1.0))
    assert problem is not None and (problem.loss, problem.teacher, problem.gradient) == (True, False, False)
    assert len(problem.rows) == 1 and problem.rows[0].startswith("row 11 ")
    assert watch.starts_step and watch.verdict(model, torch.tensor(1.0)) is None


def test_message_counts_the_rows_that_it_does_not_name() -> None:
    rows = tuple(f"row {index}" for index in range(NAMED_ROWS + 3))
    text = str(Problem(loss=True, teacher=False, gradient=False, rows=rows, in_weights=False))
    assert text.endswith(f"row {NAMED_ROWS - 1} and 3 more")


# --------------------------------------------------------------------------------------------------------------------
# As a user meets it
# --------------------------------------------------------------------------------------------------------------------
def test_script_says_it_in_a_sentence(
    saved_pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = saved_pair
    tiny.make_dataset(8).save_to_disk(tmp_path / "data")
    arguments = ["--model_name_or_path", str(student), "--teacher_model_name_or_path", str(teacher)]
    arguments += [
        "--dataset_name",
        str(tmp_path / "data"),
        "--output_dir",
        str(tmp_path / "out"),
        "--report_to",
        "none",
    ]
    arguments += [
        "--learning_rate",
        "1e30",
        "--optim",
        "sgd",
        "--max_steps",
        "6",
        "--per_device_train_batch_size",
        "4",
    ]
    arguments += ["--bf16", "false", "--use_cpu", "--teacher_quantization", "none", "--lr_scheduler_type", "constant"]
    assert main(arguments) == NOT_FINITE
    error = capsys.readouterr().err
    assert "error: Training stopped in step 2: " in error and "Traceback" not in error


@pytest.mark.gpu
def test_fp16_overflows_until_the_scale_fits_and_trains_on(make_trainer: MakeTrainer) -> None:
    """The scaler starts at 2^16, skips its first steps and goes down; none of them stops the run."""
    trainer = make_trainer(fp16=True, use_cpu=False, learning_rate=1e-2, max_steps=40, optim="adamw_torch")
    trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() < 2.0**40 and trainer.skipped_steps == 0
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_two_processes_decide_alike(tmp_path: Path, on_nan: str) -> None:
    """The poisoned row is on the second process alone; the first one stops, or skips, with it and names the row."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    command += [str(ROOT / "examples/accelerate_configs/ddp.yaml"), "--num_processes", "2"]
    command += [str(ROOT / "tests" / "finite_worker.py"), str(tmp_path), on_nan]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [entry["finite"] for entry in told] == [True, True], run.stderr[-2000:]
    if on_nan == "stop":
        assert told[0]["error"] == told[1]["error"]
        assert told[0]["error"].startswith("Training stopped in step 2: the loss is not finite at row ")
        assert told[0]["steps"] == told[1]["steps"] == 1
    else:
        assert [entry["skipped"] for entry in told] == [1, 1] and [entry["steps"] for entry in told] == [STEPS, STEPS]
    assert told[0]["sum"] == told[1]["sum"]

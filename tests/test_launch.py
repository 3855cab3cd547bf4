"""`accelerate launch examples/distill.py` itself, on two CPU processes: what a user starts, to the end.

(On CPUs accelerate runs DDP whatever the config's engine; `test_engines.py` has FSDP2.)
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from engine_worker import mixed
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_lingudistill.checkpoints import STAGING, STATE, newest

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("launch")
    student, teacher = tiny.save_pair(folder)
    tiny.make_dataset(24).save_to_disk(folder / "data")
    given = {
        "model_name_or_path": student,
        "teacher_model_name_or_path": teacher,
        "dataset_name": folder / "data",
        "max_steps": STEPS,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",  # a step is proportional to the gradient; Adam blows rounding up to the learning rate
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "teacher_quantization": "none",
        "activation_checkpointing": "false",
        "bf16": "false",
        "disable_tqdm": "true",
        "report_to": "none",
    }
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def launch(
    arguments: list[str], out: Path, *more: str, processes: int, script: list[str] | None = None, config: str = "ddp"
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    name = config if processes > 1 else "single"
    command += [
        "--config_file",
        name if name.endswith(".yaml") else str(ROOT / f"examples/accelerate_configs/{name}.yaml"),
    ]
    command += ["--num_processes", str(processes)] + (["--cpu"] if processes == 1 else [])
    command += script or [str(ROOT / "examples" / "distill.py")]
    batch = ["--per_device_train_batch_size", str(4 // processes)]
    return subprocess.run(
        [*command, *arguments, *batch, "--output_dir", str(out), *more],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def alone(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    run = launch(arguments, out, processes=1)
    assert run.returncode == 0, run.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def together(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("together") / "out"
    run = launch(arguments, out, processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    return out, run.stdout


def gap(ours: Path, theirs: Path) -> float:
    a, b = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    for one in (a, b):  # ZeRO-3 writes a tied head a second time
        head = one.pop("lm_head.weight", None)
        assert head is None or torch.equal(head, one["model.text_model.embed_tokens.weight"])
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-2)) for name in b)


def test_two_processes_save_the_student_that_one_does(alone: Path, together: tuple[Path, str]) -> None:
    out, _ = together
    assert gap(out, alone) < 1e-5
    assert gap(out, out / "checkpoint-2") > 1e-3  # the control: training moves it
    logs = [json.loads((folder / "checkpoint-6" / STATE).read_text())["log_history"] for folder in (out, alone)]
    for ours, theirs in zip(*logs, strict=True):
        for name in ("loss", "ce_loss", "kd_loss", "teacher_ce", "answer_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_one_process_speaks(together: tuple[Path, str]) -> None:
    _, said = together
    for line in ("LinguDistill\n", "Done: 6 steps", "Saved to "):
        assert said.count(line) == 1, said[-2000:]
    assert "2 processes" in said


def test_what_is_saved_is_a_plain_model(together: tuple[Path, str]) -> None:
    out, _ = together
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(out)
    inputs = processor(text="tell me about the sea", return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()
    assert not (out / STAGING).exists()


def test_two_processes_killed_in_a_checkpoint_go_on_to_the_same_end(
    arguments: list[str], together: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed = launch(
        arguments, out, processes=2, script=[str(ROOT / "tests" / "kill_worker.py"), json.dumps({"torch_save": 5})]
    )
    assert killed.returncode != 0 and str(-signal.SIGKILL) in killed.stderr
    last = newest(out)
    assert last is not None and last.name == "checkpoint-2"
    resumed = launch(arguments, out, "--resume_from_checkpoint", "true", processes=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert (out / "model.safetensors").read_bytes() == (together[0] / "model.safetensors").read_bytes()
    # As if it had been killed once more, after its last checkpoint and while its model was saved
    (out / "lingudistill.json").unlink()
    (out / "model.safetensors").write_bytes(b"half")
    ended = launch(arguments, out, "--resume_from_checkpoint", "true", processes=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (out / "model.safetensors").read_bytes() == (together[0] / "model.safetensors").read_bytes()


def test_a_bad_row_on_one_process_ends_both_with_its_name(arguments: list[str], tmp_path: Path) -> None:
    rows = tiny.make_rows(8)
    rows[6]["completion"] = [{"role": "assistant", "content": " "}]
    from datasets import Dataset

    Dataset.from_list(rows, features=tiny.make_dataset(1).features).save_to_disk(tmp_path / "data")
    given = [*arguments]
    given[given.index("--dataset_name") + 1] = str(tmp_path / "data")
    run = launch(given, tmp_path / "out", processes=2)
    assert run.returncode != 0
    assert "Row 6 has an empty completion" in run.stderr


def test_the_demo_under_two_processes_ends(tmp_path: Path) -> None:
    """It is made for one process; with two it must not hang or write its files twice over."""
    shutil.rmtree(tmp_path / "demo", ignore_errors=True)
    run = launch(["--demo", "--max_steps", "2"], tmp_path / "demo", processes=2)
    assert run.returncode != 0 and "The demo runs in one process, found 2" in run.stderr


# --------------------------------------------------------------------------------------------------------------------
# DeepSpeed, which runs on CPUs where it is installed (it compiles an operator: minutes at its first start)
# --------------------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["zero2", "zero3"])
def deepspeed_config(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    config = (ROOT / f"examples/accelerate_configs/{request.param}.yaml").read_text()
    path = tmp_path / f"{request.param}.yaml"
    path.write_text(config + "use_cpu: true\n")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return path


@pytest.mark.parametrize("teacher", ["none", "nf4"])
def test_deepspeed_saves_the_student_that_one_process_does_and_resumes(
    arguments: list[str], alone: Path, deepspeed_config: Path, tmp_path: Path, teacher: str
) -> None:
    """The unquantised teacher is sharded by ZeRO-3, the quantised one replicated."""
    given = [*arguments, "--teacher_quantization", teacher]
    run = launch(given, tmp_path / "out", processes=2, config=str(deepspeed_config))
    assert run.returncode == 0, run.stderr[-3000:]
    assert "2 processes" in run.stdout
    expected = alone
    if teacher == "nf4":
        expected = tmp_path / "alone"
        single = launch(given, expected, processes=1)
        assert single.returncode == 0, single.stderr[-3000:]
        assert gap(expected, alone) > 1e-5  # the control: another teacher, other weights
    assert gap(tmp_path / "out", expected) < 1e-5
    first = tmp_path / "out" / "checkpoint-4"
    resumed = launch(
        given, tmp_path / "again", "--resume_from_checkpoint", str(first), processes=2, config=str(deepspeed_config)
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert gap(tmp_path / "again", expected) < 1e-5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_under_deepspeed_a_step_of_text_does_not_move_the_tower(
    arguments: list[str], deepspeed_config: Path, tmp_path: Path, accumulation: int
) -> None:
    """Steps with images and steps without in turns. ZeRO-3 keeps the gradient of a weight that is not used, and applies it again."""
    mixed("split, marked").save_to_disk(tmp_path / "data")
    given = [*arguments, "--blind_weight", "0.4"]
    given[given.index("--dataset_name") + 1] = str(tmp_path / "data")
    given[given.index("--max_steps") + 1] = str(STEPS // accumulation)
    given += ["--gradient_accumulation_steps", str(accumulation)]
    for out, config, processes in (("alone", "single", 1), ("out", str(deepspeed_config), 2)):
        run = launch(given, tmp_path / out, processes=processes, config=config)
        assert run.returncode == 0, run.stderr[-3000:]
    assert gap(tmp_path / "out", tmp_path / "alone") < 1e-5


def test_skipping_steps_is_refused_under_deepspeed(
    arguments: list[str], deepspeed_config: Path, tmp_path: Path
) -> None:
    run = launch([*arguments, "--on_nan", "skip"], tmp_path / "out", processes=2, config=str(deepspeed_config))
    assert run.returncode != 0 and "on_nan='skip' cannot be held under DeepSpeed" in run.stderr


@pytest.mark.parametrize("what", ["anchored", "anchored lora", "on-policy"])
def test_deepspeed_asks_the_vlm_before_and_samples_as_one_process_does(
    arguments: list[str], deepspeed_config: Path, tmp_path: Path, what: str
) -> None:
    """ZeRO-3 splits the student, and with it the VLM before: a frozen copy, or what is under the adapter."""
    given = [*arguments]
    given += {
        "anchored": ["--anchor", "before", "--kv_source", "before", "--kv_sharing", "prompt"],
        "anchored lora": ["--anchor", "before", "--use_peft", "true", "--lora_r", "4"]
        + ["--lora_target_modules", "q_proj", "v_proj"],
        "on-policy": ["--on_policy", "--max_completion_length", "6", "--generation_kwargs", '{"do_sample": false}']
        + [
            "--shuffle_dataset",
            "false",
            "--learning_rate",
            "0.01",
        ],  # its gradients are large: a step keeps rounding small
    }[what]
    if what == "on-policy":
        dropped = given.index("--train_sampling_strategy")
        del given[dropped : dropped + 2]
    outs = [tmp_path / "alone", tmp_path / "out"]
    for out, config, processes in zip(outs, ("single", str(deepspeed_config)), (1, 2), strict=True):
        run = launch(given, out, processes=processes, config=config)
        assert run.returncode == 0, run.stderr[-3000:]
    theirs, ours = (
        [entry for entry in json.loads((out / "checkpoint-6" / STATE).read_text())["log_history"] if "loss" in entry]
        for out in outs
    )
    compared = ours if what != "anchored lora" else ours[:1]  # each engine draws the adapter in its own order
    for one, other in zip(compared, theirs, strict=False):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["anchor_kl"] == pytest.approx(other["anchor_kl"], rel=1e-4, abs=1e-6)
    assert ours[0]["anchor_kl"] < 1e-5 < ours[-1]["anchor_kl"]  # the VLM before stands still, the student does not
    if what != "anchored lora":
        assert gap(outs[1], outs[0]) < 1e-5

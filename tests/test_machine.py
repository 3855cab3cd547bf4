"""`hf_lingudistill.machine`: what is found, what `LINGUDISTILL_MACHINE` forces, and that nothing else asks."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lingudistill.cli import main
from hf_lingudistill.config import LocalSFTConfig
from hf_lingudistill.machine import VARIABLE, device_of, machine, take_threads

ROOT = Path(__file__).resolve().parent.parent
ON_CPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="about a machine without an accelerator")


def in_a_process(forced: str, program: str, **environment: str) -> Any:
    """What a fresh Python prints as JSON, with the variable set before anything is imported."""
    clean = {
        key: value for key, value in os.environ.items() if key not in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
    }
    run = subprocess.run(
        [sys.executable, "-c", f"import json\n{program}"],
        env={**clean, "PYTHONPATH": str(ROOT), VARIABLE: forced, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


# --------------------------------------------------------------------------------------------------------------------
# What is found, and what is forced
# --------------------------------------------------------------------------------------------------------------------
def test_what_is_found_is_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    here = machine()
    assert here.accelerated is torch.accelerator.is_available()
    assert here.device == (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    assert 1 <= here.threads <= (os.cpu_count() or 1)
    if not here.accelerated:
        assert here.bf16 is bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def test_a_device_is_one_of_this_machines() -> None:
    here = machine()
    assert device_of(None) == here.device and device_of("cpu") == torch.device("cpu")
    for wrong in ("gpu", "cuda:99", "cpu:1", "meta", "", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match=rf"^device must be one of this machine's, cpu.*; got '{wrong}'\.$"):
            device_of(wrong)
    if here.gpus:  # the control
        assert device_of(f"{here.device.type}:{here.gpus - 1}").index == here.gpus - 1


COMMANDS = {
    "evaluate": ["--before", "a/vlm", "--output_dir", "out"],
    "diagnose": ["--student", "a/vlm", "--teacher", "a/lm"],
    "score-mix": ["a/set", "--student", "a/vlm", "--teacher", "a/lm", "--output_dir", "out"],
    "blend": ["--before", "a/vlm", "--after", "b/vlm", "--keep", "vision >= 0", "--output_dir", "out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_device_that_is_not_there_is_said_before_anything_is_read(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control: with a device that is there, what is said is that there are no such models or data."""
    monkeypatch.chdir(tmp_path)
    for device, said in (("gpu", "device must be one of"), ("cuda:99", "device must be one of"), ("cpu", "a/")):
        assert main([command, *COMMANDS[command], "--device", device]) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert error.startswith("lingudistill: ") and said in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0, 1])
def test_bf16_is_forced_either_way(monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    monkeypatch.setenv(VARIABLE, f" bf16 = {value} ,")
    assert machine().bf16 is bool(value)


@ON_CPU
def test_a_plain_sft_config_is_told_what_a_cpu_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpu_mode: str
) -> None:
    from trl import SFTConfig

    config = LocalSFTConfig(output_dir=str(tmp_path), report_to="none")
    assert config.use_cpu and config.bf16 is (cpu_mode == "bf16=1")
    with pytest.raises(ValueError, match="bf16"):  # control: what a recipe for such a CPU says without it
        SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=True)


def test_threads_are_forced_in_a_new_process_and_in_a_running_one(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import hf_lingudistill, torch\nprint(json.dumps(torch.get_num_threads()))"
    assert in_a_process("threads=1", program, OMP_NUM_THREADS="2", MKL_NUM_THREADS="2") == 1
    assert in_a_process("", program, OMP_NUM_THREADS="2", MKL_NUM_THREADS="2") == min(2, machine().threads)  # control
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv(VARIABLE, "threads=2")
        assert machine().threads == 2
        take_threads()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@ON_CPU
def test_a_single_launched_process_takes_every_core_and_one_of_several_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.delenv(VARIABLE, raising=False)
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    take_threads()
    assert taken == [machine().threads]
    for name, value in {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "4"}.items():
        with monkeypatch.context() as other:
            other.setenv(name, value)
            take_threads()
    assert len(taken) == 1


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a CPU with AVX512")
def test_without_avx512_torch_and_bitsandbytes_take_the_kernels_of_avx2() -> None:
    program = (
        "import hf_lingudistill\nfrom hf_lingudistill.machine import machine\nimport torch\n"
        "from bitsandbytes.backends.cpu import ops\n"
        "print(json.dumps([machine().avx512, torch.backends.cpu.get_cpu_capability(), ops._has_avx512]))"
    )
    assert in_a_process("avx512=0", program) == [False, "AVX2", False]
    assert in_a_process("", program) == [True, "AVX512", True]  # control


def test_devices_in_sight_are_the_first_so_many() -> None:
    program = "import hf_lingudistill, os\nprint(json.dumps(os.environ.get('CUDA_VISIBLE_DEVICES')))"
    assert in_a_process("gpus=2", program, CUDA_VISIBLE_DEVICES="5,3,1") == "5,3"
    assert in_a_process("gpus=0", program, CUDA_VISIBLE_DEVICES="5,3,1") == ""
    assert in_a_process("", program, CUDA_VISIBLE_DEVICES="5,3,1") == "5,3,1"  # control


# --------------------------------------------------------------------------------------------------------------------
# What cannot be forced
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("forced", "sentence"),
    [
        ("bf16=yes", "bf16 must be 0 or 1, once; got 'yes'"),
        ("bf16", "bf16 must be 0 or 1, once; got ''"),
        ("bf16=0,bf16=1", "bf16 must be 0 or 1, once; got a second value"),
        ("threads=0", "threads must be a whole number of at least 1, once; got '0'"),
        ("threads=-1", "threads must be a whole number of at least 1, once; got '-1'"),
        ("threads=²", "threads must be a whole number of at least 1, once; got '²'"),
        ("gpus=two", "gpus must be a whole number of at least 0, once; got 'two'"),
        ("tpu=1", "knows bf16, avx512, threads, gpus, mps; got 'tpu=1'"),
        ("gpus=99", "says gpus=99, and this machine has gpus="),
    ],
)
def test_a_wrong_value_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, forced: str, sentence: str
) -> None:
    monkeypatch.setenv(VARIABLE, forced)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        machine()
    assert main(["distill", "--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert sentence in shown and len(shown.splitlines()) == 1


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a CPU with AVX512")
def test_what_comes_too_late_is_said_and_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "avx512=0")
    with pytest.raises(
        ValueError, match="after torch had started with avx512=1: set it before hf_lingudistill is imported"
    ):
        machine()


# --------------------------------------------------------------------------------------------------------------------
# Nobody else asks
# --------------------------------------------------------------------------------------------------------------------
PROBES = re.compile(
    r"torch\.accelerator\.(is_available|current_accelerator|device_count)|torch\.cuda\.(is_available|device_count|is_bf16_supported)"
    r"|is_torch_bf16_gpu_available|_is_avx512_bf16_supported|_is_amx_tile_supported|get_cpu_capability|get_capabilities"
    r"|os\.cpu_count|sched_getaffinity|backends\.mps"
)


def probes(file: Path) -> list[str]:
    """What the code asks torch or the system; a snippet in a text, such as a card's, is not ours to run."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    names = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute | ast.alias)]
    return [name for name in names if PROBES.search(name)]


def test_only_one_module_probes_the_machine() -> None:
    files = [*ROOT.glob("hf_lingudistill/**/*.py"), *ROOT.glob("examples/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    asking = {str(file.relative_to(ROOT)): probes(file) for file in files if file.name != "machine.py"}
    assert {name: found for name, found in asking.items() if found} == {}
    assert len(probes(ROOT / "hf_lingudistill/machine.py")) > 5  # control

"""What the benchmarks share: libraries that keep quiet, and what is written about the machine."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from hf_lingudistill.labs.json_text import as_json
from hf_lingudistill.machine import machine


def be_quiet() -> None:
    """Leave the output to the benchmark's own lines."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def write_result(result: Mapping[str, Any], path: Path | None) -> None:
    """Write a benchmark's figures to the file that was asked for, if one was."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_json(result) + "\n", encoding="utf-8")


def machine_facts(*, bf16: bool, load: tuple[float, float]) -> dict[str, Any]:
    """Where a time was measured. load: the system's over one minute, before and after."""
    return {
        "device": torch.cuda.get_device_name()
        if machine().accelerated
        else f"CPU, {machine().threads} core{'s' * (machine().threads != 1)}",
        "dtype": "bf16" if bf16 else "fp32",
        "threads": torch.get_num_threads(),
        "load_before": round(load[0], 2),
        "load_after": round(load[1], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }

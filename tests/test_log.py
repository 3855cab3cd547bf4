"""The log of every command is the command's own: no notice of a library to another, no deprecation of ours."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from hf_lingudistill._quiet import drop

ROOT = Path(__file__).resolve().parents[1]
Pair = tuple[Path, Path]


# Runs commands in one process, as a user who runs each in its own would see them, and marks where the log of each begins.
PROGRAM = """
import json, sys
from hf_lingudistill.cli import main
for name, arguments in json.load(sys.stdin).items():
    print(f"\\n=== {name}", file=sys.stderr, flush=True)
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code or 0
    print(f"\\n=== ended {code}", file=sys.stderr, flush=True)
"""


def logs(commands: dict[str, list[str]], folder: Path) -> dict[str, tuple[str, str]]:
    """name -> (how it ended, stderr without progress bars)."""
    tiny.make_dataset(4).save_to_disk(folder / "data")
    tiny.make_dataset(4).remove_columns("distill").save_to_disk(folder / "unmarked")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(commands),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for part in done.stderr.split("\n=== ")[1::2]:
        name, _, said = part.partition("\n")
        lines = [line for line in re.split(r"[\r\n]+", said) if line.strip() and "%|" not in line]
        found[name] = "\n".join(lines)
    ends = re.findall("\n=== (ended .*)", done.stderr)
    return {name: (end, said) for (name, said), end in zip(found.items(), ends, strict=True)}


def training(pair: Pair, out: str, *more: str) -> list[str]:
    models = ["--model_name_or_path", str(pair[0]), "--teacher_model_name_or_path", str(pair[1])]
    rest = [
        "--dataset_name",
        "data",
        "--max_steps",
        "1",
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
        "--output_dir",
        out,
    ]
    return ["distill", *models, *rest, *more]


def test_what_the_commands_write_to_stderr_is_theirs(saved_pair: Pair, tmp_path: Path) -> None:
    student, teacher = map(str, saved_pair)
    lora = ["--load_in_4bit", "--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]
    found = logs(
        {
            "help": ["--help"],
            "version": ["--version"],
            "check": ["check", student, teacher],
            "plan": ["plan", "--student", student, "--teacher", teacher],
            "distill --help": ["distill", "--help"],
            "distill": training(saved_pair, "out", "--teacher_quantization", "none"),
            "publish": ["publish", "out", "--repo_id", "ORG/NAME", "--dry_run"],
            "qlora": training(saved_pair, "qlora", "--teacher_quantization", "int8", *lora),
            # control: what the user asked for, and what is missing, still comes through
            "warned": training(saved_pair, "warned", "--pad_token", "<|endoftext|>", "--dataset_name", "unmarked"),
        },
        tmp_path,
    )
    warned = found.pop("warned")
    assert found == dict.fromkeys(found, ("ended 0", "")) and len(found) == 8
    assert (
        warned[0] == "ended 0"
        and "'distill': every row is distilled" in warned[1]
        and "`pad_token` is deprecated" in warned[1]
    )


def test_a_script_is_as_quiet_as_a_command(tmp_path: Path) -> None:
    """bitsandbytes speaks when it is imported, which a trainer does on its own."""
    program = "import hf_lingudistill, bitsandbytes, hf_lingudistill.config as c; c.LinguDistillConfig('out', report_to='none')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_only_the_message_that_is_named_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    drop("some.library", "Failed to load x")
    drop("some.library", "Failed to load x")
    logger = logging.getLogger("some.library")
    logger.warning("Failed to load x from y: %s", "why")
    logger.warning("Failed to load the weights")
    assert [record.getMessage() for record in caplog.records] == ["Failed to load the weights"]
    assert len(logger.filters) == 1

"""Does the suite find a fault? Plants each of a table in a copy of the repository and runs the tests that must fail.

    python tests/planted_faults.py                  # the named tests of every fault
    python tests/planted_faults.py --only NAME ...  # those faults alone
    python tests/planted_faults.py --all            # the whole suite for every fault: hours

A fault is caught where a test fails that passes without it: the control, run last. The libraries are loaded once, and each fault runs in a
fork of this process. Results: benchmarks/results/planted_faults.json and docs/planted_faults.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True  # a fault of the same length within the same second would run from the cache
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from faults import FAULTS, Fault  # noqa: E402

PACKAGE = "hf_lingudistill"
RESULTS, PAGE = "benchmarks/results/planted_faults.json", "docs/planted_faults.md"
# Loaded before the forks: no module of ours among them
LIBRARIES = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.smolvlm.modeling_smolvlm",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
    "peft",
    "datasets",
    "bitsandbytes",
    "hypothesis",
    "scipy.stats",
)


def copied(into: Path) -> None:
    """What git tracks or would track, as it lies here."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.check_output(command, cwd=ROOT, text=True).split("\0")):
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, into / name)


def run(copy: Path, tests: list[str], *, options: tuple[str, ...] = ("-x",)) -> tuple[int, str]:
    """Run tests of the copy in a fork of this process. -> exit code of pytest, what it printed."""
    with tempfile.TemporaryFile("w+") as output:
        if (child := os.fork()) == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.chdir(copy)
            sys.path[:0] = [str(copy), str(copy / "tests")]
            os.environ["PYTHONPATH"] = str(copy)
            for name in [name for name in sys.modules if name.partition(".")[0] == "faults"]:
                del sys.modules[name]  # a test that imports them gets those of the copy
            import pytest

            code = 99
            with contextlib.suppress(BaseException):
                code = int(pytest.main(["-q", "-p", "no:cacheprovider", *options, *tests]))
                assert sys.modules["hf_lingudistill"].__file__.startswith(str(copy))
            sys.stdout.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


def failed(output: str) -> list[str]:
    """The node ids that pytest names in its summary."""
    lines = (line.partition(" ") for line in output.splitlines())
    return [rest.split(" - ")[0] for kind, _, rest in lines if kind in ("FAILED", "ERROR")]


def planted(fault: Fault, copy: Path) -> str:
    """Write the fault into the copy. -> the text before.

    Raises:
        ValueError: if its line is not there, or not once.
    """
    path = copy / PACKAGE / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.before) != 1:
        raise ValueError(f"{fault.name}: {fault.file} holds its text {text.count(fault.before)} times, expected once.")
    path.write_text(text.replace(fault.before, fault.after), encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of faults")
    parser.add_argument("--all", action="store_true", help="run the whole suite for each")
    args = parser.parse_args()
    chosen = [fault for fault in FAULTS if args.only is None or fault.name in args.only]
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = Path(folder)
        copied(copy)
        for fault in chosen:  # all lines are there before anything runs
            (copy / PACKAGE / fault.file).write_text(planted(fault, copy), encoding="utf-8")
        os.environ["HF_HOME"] = str(copy / ".hf")
        for library in LIBRARIES:
            importlib.import_module(library)
        import torch

        torch.set_num_threads(1)
        rows: list[dict[str, Any]] = []
        for fault in chosen:
            begun = time.monotonic()
            path = copy / PACKAGE / fault.file
            before = planted(fault, copy)
            code, output = run(copy, ["tests"] if args.all else list(fault.tests))
            path.write_text(before, encoding="utf-8")
            by = next(iter(failed(output)), None)
            # 2: it could not even be collected. Anything else (no test, a crash) shows nothing
            caught = code == 1 and by is not None
            rows.append({"name": fault.name, "file": fault.file, "why": fault.why, "caught": caught, "by": by})
            seconds = time.monotonic() - begun
            print(f"{'caught' if caught else 'MISSED'}  {fault.name}  {seconds:.0f} s  {by or code}", flush=True)
            if not caught:
                print(output[-1500:], flush=True)
        finders = sorted({row["by"] for row in rows if row["caught"]})
        code, output = run(copy, finders, options=()) if finders else (0, "")
        if code not in (0, 1):
            sys.exit(f"The control did not run:\n{output[-3000:]}")
        for row in rows:
            if row["caught"] and row["by"] in failed(output):
                print(f"MISSED  {row['name']}: {row['by']} fails without it too")
                row["caught"] = False
    if args.only is None:
        write(rows, whole_suite=args.all)
    missed = [row["name"] for row in rows if not row["caught"]]
    print(f"{len(rows) - len(missed)} of {len(rows)} caught" + (f"; missed: {', '.join(missed)}" if missed else ""))
    sys.exit(bool(missed))


def write(rows: list[dict[str, Any]], *, whole_suite: bool) -> None:
    """The results, as JSON and as a page of docs."""
    from hf_lingudistill.labs.json_text import as_json  # here, so that no fork has a module of ours before it begins

    facts = {"tests": "the whole suite" if whole_suite else "the named tests", "faults": rows}
    (ROOT / RESULTS).write_text(as_json(facts) + "\n", encoding="utf-8")
    lines = [
        "# Planted faults",
        "",
        f"{sum(bool(row['caught']) for row in rows)} of {len(rows)} faults in the core are found by {facts['tests']} "
        "(`make planted-faults`, which writes this page). They are listed in `tests/faults/`.",
        "",
        "| file | what is wrong | found by |",
        "|---|---|---|",
    ]
    for row in rows:
        found = f"`{row['by'].removeprefix('tests/').partition('[')[0]}`" if row["caught"] else "**missed**"
        lines.append(f"| `{row['file']}` | {row['why']} | {found} |")
    (ROOT / PAGE).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

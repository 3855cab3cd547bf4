"""Data flows one way; internals of the libraries are used in one place; the command line starts quickly."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "hf_lingudistill"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# What transformers and TRL document below their top level. All else down there moves between releases.
INTERNALS = (
    f"{PACKAGE}._internals",
    f"{PACKAGE}.rgb",  # the Space uses it as well, which has no `_internals`
    f"{PACKAGE}.labs.nanovlm.inputs",
    f"{PACKAGE}.labs.nanovlm.stock",
)  # the last two: processors that transformers keeps below its top level
PUBLIC_SUBMODULES = ("transformers.trainer_utils", "transformers.utils")


def dotted(path: Path) -> str:
    """`.../hf_lingudistill/labs/demo/models.py` -> `hf_lingudistill.labs.demo.models`; a package keeps its `.__init__`."""
    return ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts))


SOURCES = {dotted(path): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


def imported(module: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of each import in `source`, in functions and under `if TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package that holds the module, each further dot one level up.
            base = module.split(".")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield node.lineno, ".".join((*base, alias.name))


def ours(name: str) -> str | None:
    """The module of ours that a dotted name lies in, without the package; None for what is not ours."""
    top, _, rest = name.partition(".")
    return (rest.partition(".")[0] or "__init__") if top == PACKAGE else None


def internal_imports(module: str, source: str) -> list[str]:
    """Each import of a name that transformers or TRL do not document."""
    found = []
    for line, name in imported(module, source):
        library, *path = name.split(".")
        if library not in ("transformers", "trl") or f"{name}.".startswith(tuple(f"{m}." for m in PUBLIC_SUBMODULES)):
            continue
        if len(path) > 1 or any(step.startswith("_") for step in path):
            found.append(f"{module}:{line} imports {name}")
    return found


def foreign_packages(module: str, source: str) -> set[str]:
    """Top-level names of what `source` imports beyond the standard library, ours as `hf_lingudistill.PART`."""
    names = set()
    for _, name in imported(module, source):
        part = ours(name)
        names.add(f"{PACKAGE}.{part}" if part else name.partition(".")[0])
    return names - sys.stdlib_module_names


def loads_torch(module: str) -> bool:
    """Whether a fresh interpreter that imports `module` has torch in memory afterwards."""
    code = f"import sys, {module}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip() == "True"


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """The contracts of pyproject.toml, over the package below `root`."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_imports_go_one_way(tmp_path: Path) -> None:
    """Each module imports only what lies below it: pyproject.toml lists the layers. Control: what looks up is found."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT.parent / "pyproject.toml", copy)
    clean = lint(copy)
    assert clean.returncode == 0, clean.stdout
    for module, line in (
        ("losses", "from .trainer import LinguDistillTrainer"),
        ("hub/card", "from ..labs import plan"),
    ):
        path = copy / PACKAGE / f"{module}.py"
        before = path.read_text(encoding="utf-8")
        path.write_text(before.replace("import annotations\n", f"import annotations\n{line}\n", 1), encoding="utf-8")
        assert lint(copy).returncode == 1, module
        path.write_text(before, encoding="utf-8")
    (copy / PACKAGE / "new.py").write_text("", encoding="utf-8")
    assert lint(copy).returncode == 1, "a module without a place"


def test_internals_of_transformers_and_trl_are_used_in_one_module() -> None:
    found = [internal_imports(module, source) for module, source in SOURCES.items() if module not in INTERNALS]
    assert len(found) > 50 and not any(found), list(filter(None, found))


def test_the_use_of_an_internal_is_caught() -> None:
    """Control of the test above: the module that is left out of it, and three spellings."""
    internals = f"{PACKAGE}._internals"
    assert internal_imports(internals, SOURCES[internals]) != []
    spellings = "import trl.trainer.utils\nfrom transformers.models.llama import x\nfrom transformers import _y"
    assert len(internal_imports(f"{PACKAGE}.batch", spellings)) == 3
    documented = "from trl import SFTConfig\nfrom transformers.utils import logging"
    assert internal_imports(f"{PACKAGE}.batch", documented) == []


def test_losses_know_tensors_only() -> None:
    allowed = {"torch", f"{PACKAGE}._internals", f"{PACKAGE}.top_k"}  # of what a cache keeps
    assert foreign_packages(f"{PACKAGE}.losses", SOURCES[f"{PACKAGE}.losses"]) <= allowed
    # Control: a configuration is no tensor, though its module comes before.
    assert not foreign_packages(f"{PACKAGE}.losses", "from .config import LinguDistillConfig") <= allowed


@pytest.mark.parametrize("module", ["cli", "hub.publish", "labs.demo_report"])
def test_the_command_line_answers_without_loading_torch(module: str) -> None:
    assert not loads_torch(f"{PACKAGE}.{module}")


def test_loading_torch_is_noticed() -> None:
    """Control of the test above."""
    assert loads_torch(f"{PACKAGE}.losses")


def test_no_two_modules_that_tests_put_on_the_path_share_a_name() -> None:
    """Of two, the one that is imported first is found by all: which one that is depends on the order of the tests."""
    root = ROOT.parent
    folders = ("tests", "benchmarks", "examples/baselines", "examples/recipes/five_artists", "examples/space")
    names = [path.stem for folder in folders for path in (root / folder).glob("*.py")]
    assert "reproduce" in names and "tiny" in names  # control: they are read
    assert [name for name, times in Counter(names).items() if times > 1] == []

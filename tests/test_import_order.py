"""Data flows one way: each module of the package imports only from modules that come before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "hf_lingudistill"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# The order in which the library is read and built. Modules of one row know nothing of each other. `__init__` stands
# for the package itself: a module that imports a name from the top level closes a circle.
ORDER = (
    ("_version", "_moved", "_quiet", "machine", "folders"),
    ("_internals", "quantization"),
    ("config", "bad_rows", "answers"),
    ("images",),
    ("formats",),
    ("conversations", "opening"),
    ("batch", "compatibility"),
    ("teacher", "mixtures", "data_mixin"),
    ("kv_sharing",),
    ("losses", "engines", "finite", "checkpoints"),
    ("hub",),
    ("trainer",),
    ("labs",),
    ("scripts",),
    ("cli",),
    ("__init__",),
)
RANK = {part: rank for rank, row in enumerate(ORDER) for part in row}

# What transformers and TRL document below their top level. All else down there moves between releases.
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


def part_of(name: str) -> str | None:
    """The part of our package that a dotted name belongs to; None for what is not ours."""
    top, _, rest = name.partition(".")
    if top != PACKAGE:
        return None
    part = rest.partition(".")[0]
    return part if part in RANK else "__init__"


def backward_imports(module: str, source: str) -> list[str]:
    """Each import in `source` of a part that does not come before the module's own."""
    own = part_of(module)
    assert own is not None
    found = []
    for line, name in imported(module, source):
        part = part_of(name)
        if part is not None and part != own and RANK[part] >= RANK[own]:
            found.append(f"{module}:{line} imports {name}, which does not come before {own}")
    return found


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
        part = part_of(name)
        names.add(f"{PACKAGE}.{part}" if part else name.partition(".")[0])
    return names - sys.stdlib_module_names


def loads_torch(module: str) -> bool:
    """Whether a fresh interpreter that imports `module` has torch in memory afterwards."""
    code = f"import sys, {module}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip() == "True"


def test_every_module_has_a_place_in_the_order() -> None:
    parts = {name.split(".")[1] for name in SOURCES}
    assert parts - RANK.keys() == set(), "give the new module a row in ORDER"
    assert RANK.keys() - parts == set(), "ORDER names a module that does not exist"


@pytest.mark.parametrize("module", SOURCES)
def test_modules_import_only_what_comes_before_them(module: str) -> None:
    assert backward_imports(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("losses", "from .trainer import LinguDistillTrainer"),
        ("losses", "from . import trainer"),
        ("losses", "import hf_lingudistill.trainer as t"),
        ("losses", "from hf_lingudistill import trainer"),
        ("losses", "from hf_lingudistill.trainer import LinguDistillTrainer"),
        ("losses", "from hf_lingudistill import LinguDistillTrainer"),
        ("losses", "import hf_lingudistill"),
        ("losses", "def late():\n    from .trainer import LinguDistillTrainer"),
        ("losses", "if TYPE_CHECKING:\n    from .trainer import LinguDistillTrainer"),
        ("batch", "from .compatibility import check_compatibility"),
        ("labs.demo.__init__", "from ...cli import main"),
        ("labs.demo.models", "from ...cli import main"),
        ("scripts.distill", "from .. import cli"),
    ],
)
def test_a_backward_import_is_caught(module: str, source: str) -> None:
    """Control of the test above."""
    assert len(backward_imports(f"{PACKAGE}.{module}", source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trainer", "from .losses import divergence"),
        ("trainer", "import torch, trl"),
        (
            "labs.demo.models",
            "from .texts import corpus\nfrom . import images\nfrom ...trainer import LinguDistillTrainer",
        ),
        ("__init__", "from .cli import main"),
    ],
)
def test_a_forward_import_is_not_caught(module: str, source: str) -> None:
    assert backward_imports(f"{PACKAGE}.{module}", source) == []


@pytest.mark.parametrize("module", [name for name in SOURCES if name != f"{PACKAGE}._internals"])
def test_internals_of_transformers_and_trl_are_used_in_one_module(module: str) -> None:
    assert internal_imports(module, SOURCES[module]) == []


def test_the_use_of_an_internal_is_caught() -> None:
    """Control of the test above: the module that is left out of it, and three spellings."""
    internals = f"{PACKAGE}._internals"
    assert internal_imports(internals, SOURCES[internals]) != []
    spellings = "import trl.trainer.utils\nfrom transformers.models.llama import x\nfrom transformers import _y"
    assert len(internal_imports(f"{PACKAGE}.batch", spellings)) == 3
    documented = "from trl import SFTConfig\nfrom transformers.utils import logging"
    assert internal_imports(f"{PACKAGE}.batch", documented) == []


def test_losses_know_tensors_only() -> None:
    allowed = {"torch", f"{PACKAGE}._internals"}
    assert foreign_packages(f"{PACKAGE}.losses", SOURCES[f"{PACKAGE}.losses"]) <= allowed
    # Control: a configuration is no tensor, though its module comes before.
    assert not foreign_packages(f"{PACKAGE}.losses", "from .config import LinguDistillConfig") <= allowed


@pytest.mark.parametrize("module", ["cli", "hub.publish", "labs.demo_report"])
def test_the_command_line_answers_without_loading_torch(module: str) -> None:
    assert not loads_torch(f"{PACKAGE}.{module}")


def test_loading_torch_is_noticed() -> None:
    """Control of the test above."""
    assert loads_torch(f"{PACKAGE}.losses")

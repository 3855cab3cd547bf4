"""The supported releases: declared once, in both directions, and the same everywhere they are named."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def bounded() -> dict[str, Requirement]:
    """Our dependencies by name, those of the extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["eval"]]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def oldest() -> dict[str, str]:
    lines = (ROOT / ".ci/oldest.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


LIBRARIES = ("transformers", "trl", "accelerate", "peft", "datasets", "huggingface_hub", "bitsandbytes")


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_oldest_release_that_is_tested_is_the_oldest_that_is_allowed(library: str) -> None:
    bounds = bounded()[library].specifier
    pinned = oldest()[library]
    (lowest,) = [bound.version for bound in bounds if bound.operator == ">="]
    assert pinned in bounds and pinned.startswith(f"{lowest}.")
    assert any(bound.operator == "<" for bound in bounds), "no ceiling: an untested release would be installed"


@pytest.mark.parametrize("library", [*LIBRARIES, "lm-eval"])
def test_what_is_installed_is_supported(library: str) -> None:
    assert version(library) in bounded()[library].specifier


def test_lm_eval_has_a_ceiling() -> None:
    assert "99.0" not in bounded()["lm-eval"].specifier

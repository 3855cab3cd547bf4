"""The paths of 0.1 still import, and give the modules of today."""

from __future__ import annotations

import importlib
import sys

import pytest

from hf_lingudistill._moved import MOVED, NAMES, PACKAGE


def test_an_old_path_gives_the_module_of_the_new_one() -> None:
    for old in (*MOVED, "evaluation.vision", "diagnose.recommend"):
        first, _, rest = old.partition(".")
        new = ".".join(part for part in (PACKAGE, MOVED[first], rest) if part)
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{PACKAGE}.{first}.")]:
            del sys.modules[name]
        with pytest.warns(FutureWarning, match=new):
            found = importlib.import_module(f"{PACKAGE}.{old}")
        assert found is importlib.import_module(new)
        assert found.__name__ == new and found.__spec__ is not None and found.__spec__.name == new


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("old", "name"), [(old, name) for old, names in NAMES.items() for name in names])
def test_an_old_name_at_an_old_path_is_what_it_is_now(old: str, name: str) -> None:
    sys.modules.pop(f"{PACKAGE}.{old}", None)
    home, _, current = NAMES[old][name].rpartition(".")
    found = getattr(importlib.import_module(f"{PACKAGE}.{old}"), name)
    assert found is getattr(importlib.import_module(f"{PACKAGE}.{home}"), current)


def test_a_path_that_never_was_is_not_found() -> None:
    """Control of the test above."""
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{PACKAGE}.nothing")

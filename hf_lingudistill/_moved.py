"""Modules that moved in 0.2: the old paths still import, with a warning, and give the very modules of the new ones."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "hf_lingudistill"
MOVED = {
    "card": "hub.card",
    "data": "batch",
    "demo": "labs.demo",
    "diagnose": "labs.diagnose",
    "evaluation": "labs.evaluation",
    "manifest": "hub.manifest",
    "metrics": "labs.metrics",
    "plan": "labs.plan",
    "publish": "hub.publish",
    "record": "hub.run_facts",
    "report": "labs.demo_report",
    "results": "hub.results",
    "statistics": "labs.statistics",
}
# Names that an old module had and the new one has not, or has under another name: where they are now
NAMES = {
    "data": {
        name: f"mixtures.{name}" for name in ("DistillMixtureConfig", "DistillSource", "load_mixture", "load_source")
    },
    "manifest": {"model_manifest": "hub.model.model_manifest"},
    "record": {
        "read_record": "hub.run_facts.read_run_facts",
        "training_record": "hub.run_facts.gather_run_facts",
        "write_record": "hub.run_facts.write_run_facts",
    },
}


class _OldPath(Loader):
    """Loads one old path: as the module at its new one."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        first, _, rest = spec.name.removeprefix(f"{PACKAGE}.").partition(".")
        new = ".".join(part for part in (PACKAGE, MOVED[first], rest) if part)
        warnings.warn(f"{spec.name} has moved: import {new}.", FutureWarning, stacklevel=2)
        module = importlib.import_module(new)
        for name, place in NAMES.get(spec.name.removeprefix(f"{PACKAGE}."), {}).items():
            home, _, current = place.rpartition(".")
            setattr(module, name, getattr(importlib.import_module(f"{PACKAGE}.{home}"), current))
        # The import system writes the old name into what it gets: the module keeps its own
        self.own = (module.__spec__, module.__name__, module.__loader__, module.__package__)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__, module.__name__, module.__loader__, module.__package__ = self.own


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, below = name.partition(".")
        return ModuleSpec(name, _OldPath()) if package == PACKAGE and below.split(".")[0] in MOVED else None


def install() -> None:
    """Let the old paths be found: before other finders, which would load `evaluation.vision` a second time."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

"""Restore a vision-language model's language by distilling its original LM back into it (arXiv 2604.00829)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._moved import install as _install_old_paths
from ._quiet import hush_bitsandbytes as _hush_bitsandbytes
from ._version import __version__
from .machine import settle as _settle_machine

_install_old_paths()
_settle_machine()
_hush_bitsandbytes()

if TYPE_CHECKING:
    from .compatibility import CompatibilityReport, check_compatibility
    from .config import LinguDistillConfig, OnPolicyLinguDistillConfig
    from .on_policy import OnPolicyLinguDistillTrainer
    from .trainer import LinguDistillTrainer

__all__ = [
    "CompatibilityReport",
    "LinguDistillConfig",
    "LinguDistillTrainer",
    "OnPolicyLinguDistillConfig",
    "OnPolicyLinguDistillTrainer",
    "__version__",
    "check_compatibility",
]

_HOME = {
    "CompatibilityReport": "compatibility",
    "check_compatibility": "compatibility",
    "LinguDistillConfig": "config",
    "LinguDistillTrainer": "trainer",
    "OnPolicyLinguDistillConfig": "config",
    "OnPolicyLinguDistillTrainer": "on_policy",
}


def __getattr__(name: str) -> object:
    # Imported on first use, so that `lingudistill check` starts without loading the training stack.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Keeps what other libraries say to each other out of a user's log: nothing that the user could act on is dropped."""

from __future__ import annotations

import logging
import warnings


def drop(logger: str, beginning: str) -> None:
    """Drop the messages of one logger that begin so. Idempotent."""
    target = logging.getLogger(logger)
    if not any(isinstance(known, _Beginning) and known.beginning == beginning for known in target.filters):
        target.addFilter(_Beginning(beginning))


class _Beginning(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginning)


def hush_bitsandbytes() -> None:
    """On CPUs with native bf16 it looks for a faster kernel in an optional package when it is imported, and warns without it."""
    drop("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")


def hush_libraries() -> None:
    """For the commands, whose log is ours: deprecations that one library causes in another."""
    # TRL and PEFT call transformers' models by their old names
    warnings.filterwarnings(
        "ignore", "`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated", FutureWarning
    )

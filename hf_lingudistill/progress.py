"""Progress where nobody watches: in a log, one line per minute in place of a bar that is drawn anew."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

EVERY = 60.0  # seconds


def watched() -> bool:
    """Whether somebody sees a bar move: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def calm_other_bars() -> None:
    """In a log, let the bars of datasets, transformers and huggingface_hub move once a minute, and short ones not appear. Call it
    before tqdm is imported, which reads this then."""
    if not watched():
        os.environ.setdefault("TQDM_MININTERVAL", f"{EVERY:g}")
        os.environ.setdefault("TQDM_DELAY", f"{EVERY:g}")


class _Lines:
    """A file for tqdm that ends each state with a newline in place of overwriting it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(*args: Any, **kwargs: Any) -> tqdm[Any]:
    """A tqdm bar; in a log, a line per minute, and none for what takes less."""
    from tqdm.auto import tqdm

    if watched():
        return tqdm(*args, **kwargs)
    return tqdm(*args, **{"file": _Lines(sys.stderr), "mininterval": EVERY, "delay": EVERY, "ascii": True, **kwargs})

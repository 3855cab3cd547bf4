"""The sharing modes, by name. Source: arXiv 2604.00829 for `full`; the others share less of the student's drift."""

from __future__ import annotations

from .base import Full, Prompt, Sharing, Unshared, Vision
from .images import Images
from .inputs import Inputs

__all__ = ["MODES", "Sharing", "sharing"]

_ALL = (
    Full("full", "everywhere", "the response", "the student has drifted little"),
    Prompt("prompt", "at the prompt, text and image", "the response", "the text is right and its answers are not"),
    Vision("vision", "at image tokens only", "all text", "image tokens lie near the LM's word embeddings"),
    Unshared("none", "nowhere (images are left out)", "all text", "only text rows are distilled, or as a baseline"),
    Inputs(
        "inputs",
        "nowhere; its image features are the teacher's own inputs",
        "the whole row",
        "as a baseline for `vision`, where hidden sizes are equal",
    ),
    Images(
        "images",
        "nowhere; it is a VLM, and sees the images",
        "the whole row",
        "the teacher is the VLM before",
    ),
)
MODES: dict[str, Sharing] = {mode.name: mode for mode in _ALL}


def sharing(name: str) -> Sharing:
    """The mode of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in MODES:
        raise ValueError(f"kv_sharing must be one of {', '.join(MODES)}; got {name!r}.")
    return MODES[name]

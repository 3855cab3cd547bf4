"""`score-mix`: what of a mixture depends on its images, how much language it holds, and which sources the teacher should speak on."""

from .report import FILES, as_text, write_report
from .run import Limits, read_sources, score_mix

__all__ = ["FILES", "Limits", "as_text", "read_sources", "score_mix", "write_report"]

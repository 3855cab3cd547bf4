"""Diagnosis before distillation: how far a VLM's language model has drifted, and which sharing mode follows. `diagnose` is the
entry."""

from .prompts import Prompts, load_prompts
from .report import FILES, as_text, write_report
from .run import diagnose

__all__ = ["FILES", "Prompts", "as_text", "diagnose", "load_prompts", "write_report"]

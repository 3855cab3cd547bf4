"""The two or three models that the Space compares: where they are, and how they are loaded once."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import machine, settle, take_threads
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from weights import load_whole

CONFIG_VARIABLE = "LINGUDISTILL_SPACE_CONFIG"
NEEDED = ("before", "after")

settle()


@dataclass(frozen=True)
class Settings:
    """sources: {"before", "after" and, where there is one, "original": Hub id or folder}. report: of the evaluation.

    code: an https address of the code, for a link. examples: [(picture's file or None, question)] in place of the usual ones.
    """

    sources: dict[str, str]
    report: Path | None
    code: str | None = None
    examples: tuple[tuple[Path | None, str], ...] = ()


def read_settings(path: Path | None = None) -> Settings:
    """Settings from `config.json` beside this file, or from the file that `LINGUDISTILL_SPACE_CONFIG` names.

    Folders in it are relative to the file itself; what is no folder is a Hub id.

    Raises:
        ValueError: if the file is missing, is not JSON, names no model before or after, or has examples of another form.
    """
    path = path or Path(os.environ.get(CONFIG_VARIABLE) or Path(__file__).with_name("config.json"))
    example = '{"before": "ORG/VLM", "after": "ORG/VLM-restored", "original": "ORG/LM", "report": "report.json"}'
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"The Space reads its models from {path}, which is missing; write {example} there.") from None
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, and does not ({error}); write {example} there.") from None
    if not isinstance(config, dict) or not all(config.get(name) for name in NEEDED):
        raise ValueError(f"{path} must name the models before and after; write {example} there.")
    sources = {}
    for name in ("original", *NEEDED):
        if source := config.get(name):
            folder = path.parent / source
            sources[name] = str(folder.resolve()) if folder.is_dir() else str(source)
    report = config.get("report")
    code = config.get("code")
    return Settings(
        sources,
        path.parent / report if report else None,
        code if isinstance(code, str) and code.startswith("https://") else None,
        tuple(_example(entry, path) for entry in config.get("examples") or []),
    )


def _example(entry: Any, path: Path) -> tuple[Path | None, str]:
    question, name = (entry.get("question"), entry.get("picture")) if isinstance(entry, dict) else (None, None)
    picture = path.parent / name if isinstance(name, str) else None
    if not isinstance(question, str) or (name is not None and not (picture and picture.is_file())):
        raise ValueError(
            f'An example in {path} must be {{"question": "...", "picture": "FILE beside it"}}, the picture left out where there is '
            f"none; found {json.dumps(entry)[:200]}."
        )
    return picture, question


@dataclass(frozen=True)
class Checkpoint:
    """A model with what turns messages into its inputs: a processor (a VLM), or a tokenizer (an LM).

    source: Hub id or folder. seconds: what loading took.
    """

    source: str
    model: PreTrainedModel
    processing: Any
    seconds: float

    @property
    def sees(self) -> bool:
        """Whether it takes an image."""
        return not isinstance(self.processing, PreTrainedTokenizerBase)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processing.tokenizer if self.sees else self.processing

    @property
    def label(self) -> str:
        """The Hub id, or a folder's last part: a page says nothing about the machine's folders."""
        return Path(self.source).name if Path(self.source).is_dir() else self.source

    @property
    def url(self) -> str | None:
        """Its page on the Hub; None for a folder."""
        return None if Path(self.source).is_dir() else f"https://huggingface.co/{self.source}"

    @property
    def context(self) -> int:
        """The longest sequence in tokens: question, image and answer."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 2048))

    def control_tokens(self) -> set[str]:
        """Tokens that end a turn, stand for an image and the like: typed by a visitor, they would forge a prompt."""
        added = self.tokenizer.added_tokens_decoder.values()
        image_token = getattr(self.processing, "image_token", None)
        return {token.content for token in added if token.special} | ({str(image_token)} if image_token else set())


def best_device_and_dtype() -> tuple[str, torch.dtype]:
    """bf16 where the hardware multiplies in it; emulated on a CPU, it is slower than fp32."""
    here = machine()
    return here.device.type, torch.bfloat16 if here.bf16 else torch.float32


def load(source: str, *, sees: bool) -> Checkpoint:
    """Load one model, for good. source: a Hub id or a folder. sees: a VLM and not an LM."""
    device, dtype = best_device_and_dtype()
    start = time.perf_counter()
    if sees:
        model = load_whole(AutoModelForImageTextToText, source, dtype=dtype, use_safetensors=True)  # no pickles
        processing = AutoProcessor.from_pretrained(source)
        image_processor = getattr(processing, "image_processor", None)
        if device == "cpu" and hasattr(image_processor, "do_image_splitting"):
            # An image in 17 tiles is 17 images to the vision tower: half a minute on the free hardware.
            image_processor.do_image_splitting = False
    else:
        model = load_whole(AutoModelForCausalLM, source, dtype=dtype, use_safetensors=True)
        processing = AutoTokenizer.from_pretrained(source)
    return Checkpoint(source, model.to(device).eval(), processing, time.perf_counter() - start)


def load_all(settings: Settings) -> dict[str, Checkpoint]:
    """{"before", "after" and perhaps "original": checkpoint}, in the order in which the page shows them."""
    take_threads()
    logging.disable_progress_bar()
    order = [name for name in (*NEEDED, "original") if name in settings.sources]
    return {name: load(settings.sources[name], sees=name != "original") for name in order}

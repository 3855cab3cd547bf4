"""Models to score: a plain LM or a whole VLM, behind the few calls that scoring needs.

A VLM's text path is the full VLM called without an image, with its own tokenizer and chat template.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)

from ...compatibility import UnreadableModelError
from ...machine import device_of, machine
from ...quantization import choose_kernels
from ...sentences import no_access
from ...weights import BadWeights, check_finite, fingerprint, load_whole


@dataclass
class Scored:
    """A model in evaluation mode. kind: "lm" or "vlm". fingerprint: changes with its weights. template: a chat template to use in
    place of its own, such as that of the VLM it is compared with."""

    name: str
    path: str
    kind: str
    model: Any
    processing: Any  # a tokenizer, or a VLM's processor
    fingerprint: str
    template: str | None = None

    @property
    def tokenizer(self) -> Any:
        """The plain tokenizer."""
        return self.processing.tokenizer if isinstance(self.processing, ProcessorMixin) else self.processing

    @property
    def sees(self) -> bool:
        """Whether it takes images."""
        return self.kind == "vlm"

    def render(self, turns: Sequence[dict[str, Any]], *, answer: bool = True, **kwargs: Any) -> str:
        """Messages as the model's own chat template writes them; `answer`: up to where the assistant's turn begins.

        A processor's template reads a list of parts. Given a plain string, some of them write an empty turn without a word.
        """
        if self.template is not None:
            kwargs["chat_template"] = self.template
        if self.template is not None or isinstance(self.processing, ProcessorMixin):
            turns = [turn | {"content": _parts(turn["content"])} for turn in turns]
        text = self.processing.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer, **kwargs)
        return str(text)

    @cached_property
    def answer_lead(self) -> str:
        """The blanks that the chat template writes before what the assistant says, behind where `render` ends: SmolVLM's prompt ends in
        `Assistant:` and its answers begin with a space. Most write none."""
        marker, (asked, _) = "lighthouse", self._trial
        try:
            whole = self.render([*_TRIAL, {"role": "assistant", "content": marker}], answer=False)
        except Exception:  # a template that takes no answers
            return ""
        lead, said, _ = whole.removeprefix(asked).partition(marker)
        return lead if whole.startswith(asked) and said and not lead.strip() else ""

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of an answer, as they stand behind a rendered prompt: a tokenizer may put a space before a text of its own."""
        asked, head = self._trial
        whole = self.ids(asked + self.answer_lead + text)
        return whole[len(head) :] if whole[: len(head)] == head else self.ids(self.answer_lead + text)

    @cached_property
    def _trial(self) -> tuple[str, list[int]]:
        """A rendered prompt, and its token ids."""
        asked = self.render(_TRIAL)
        return asked, self.ids(asked)

    def ids(self, text: str) -> list[int]:
        """Token ids without special tokens added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def with_images(self, texts: Sequence[str], images: Sequence[Sequence[PILImage.Image]]) -> Any:
        """Model inputs of rendered prompts with their images, padded on the left.

        texts: n prompts. images: n lists of images.
        """
        flat = [list(group) for group in images]
        inputs = self.processing(
            text=list(texts),
            images=flat if any(flat) else None,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        return inputs.to(self.model.device)


@dataclass(frozen=True)
class Made:
    """A VLM that lies in no folder. fingerprint: changes with its weights; known before it is made. make: makes it, by its name."""

    fingerprint: str
    make: Callable[[str], Scored]


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def user_turn(text: str, images: int = 0) -> list[dict[str, Any]]:
    """One user message with `images` images before its text."""
    return [
        {
            "role": "user",
            "content": [{"type": "image"}] * images + [{"type": "text", "text": text}] if images else text,
        }
    ]


_TRIAL = user_turn("What is it?")


def read_config(name: str, path: str, *, trust_remote_code: bool = False) -> Any:
    """A model's config.

    Raises:
        UnreadableModelError: if there is none that transformers can read, or its folder has no weights.
    """
    if (problem := _folder_problem(path)) is not None:
        raise UnreadableModelError(f"{name}: {problem}")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _unreadable(name, path, error) from error


def _folder_problem(path: str) -> str | None:
    """What is wrong with a folder as far as its file names tell; None for a Hub id, or if nothing is."""
    folder = Path(path)
    if not folder.is_dir():
        hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) is not None
        return None if hub_id else f"there is no folder {path!r}. Expected the folder or Hub id of a saved model."
    names = {file.name for file in folder.iterdir()}
    if "config.json" not in names:
        if "adapter_config.json" in names:
            return f"{path!r} holds a LoRA adapter alone. Merge it into its model (`merge_and_unload`), save that, and pass the result."
        found = ", ".join(sorted(names)[:5]) or "nothing"
        return f"{path!r} has no config.json (found {found}). Expected the folder of a saved model."
    if not any(name.endswith(".safetensors") for name in names):
        return f"{path!r} has a config and no safetensors weights. Save the model there with `save_pretrained`."
    return None


def takes_images(config: Any) -> bool:
    """Whether a config is a VLM's."""
    return getattr(config, "vision_config", None) is not None


def _unreadable(name: str, path: str, error: Exception) -> UnreadableModelError:
    if (why := no_access(error, path)) is not None:
        return UnreadableModelError(f"{name}: {path!r} cannot be read: {why}")
    return UnreadableModelError(
        f"{name}: cannot load a model from {path!r} ({' '.join(str(error).split())[:300]}). Expected a folder or Hub id of a "
        "language model or a VLM with safetensors weights."
    )


def scoring_dtype(dtype: torch.dtype | None = None, device: str | None = None) -> torch.dtype:
    """dtype; left out, bf16 on an accelerator that multiplies in it, else fp32."""
    place = device_of(device)
    return dtype or (torch.bfloat16 if place.type != "cpu" and machine().bf16 else torch.float32)


def load_scored(
    name: str,
    path: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    fingerprint_: str | None = None,
) -> Scored:
    """Load an LM or a VLM, whichever the folder or Hub id holds.

    dtype: see `scoring_dtype`.

    Raises:
        UnreadableModelError: if there is no model that transformers can read, or some of its weights are missing or not finite.
    """
    place = device_of(device)
    dtype = scoring_dtype(dtype, device)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = read_config(name, path, trust_remote_code=trust_remote_code)
    sees = takes_images(config)
    try:
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model: Any = load_whole(auto, path, dtype=dtype, use_safetensors=True, **common)
        model = model.to(place).eval()
        check_finite(model.named_parameters(), path)
        choose_kernels(model)
    except BadWeights as error:
        raise UnreadableModelError(f"{name}: {error}") from error
    except (OSError, ValueError) as error:
        raise _unreadable(name, path, error) from error
    processing = _load_processing(name, path, sees=sees, **common)
    return Scored(name, path, "vlm" if sees else "lm", model, processing, fingerprint_ or fingerprint(path, config))


def without_weights(name: str, path: str, *, sees: bool, trust_remote_code: bool = False) -> Scored:
    """A saved model's tokenizer, processor and chat template, and no model: what its tokens are, in seconds. sees: whether it is a VLM.

    Raises:
        UnreadableModelError: if they cannot be read.
    """
    processing = _load_processing(name, path, sees=sees, trust_remote_code=trust_remote_code)
    return Scored(name, path, "vlm" if sees else "lm", None, processing, "")


def _load_processing(name: str, path: str, *, sees: bool, trust_remote_code: bool) -> Any:
    try:
        processing: Any = (AutoProcessor if sees else AutoTokenizer).from_pretrained(
            path, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _unreadable(name, path, error) from error
    if getattr(processing, "chat_template", None) is None and hasattr(processing, "tokenizer"):
        processing.chat_template = processing.tokenizer.chat_template
    return processing


def describe(scored: Scored) -> dict[str, Any]:
    """What a report says about a model. The last two parts of a local path only: it may be published."""
    folder = Path(scored.path)
    return {
        "path": "/".join(folder.parts[-2:]) if folder.is_dir() else scored.path,
        "kind": scored.kind,
        "parameters": sum(p.numel() for p in scored.model.parameters()),
        "dtype": str(scored.model.dtype).removeprefix("torch."),
        "fingerprint": scored.fingerprint,
    }


def chat_template_of(scored: Scored) -> str:
    """The chat template as text, which the prompts of a task depend on."""
    template = scored.template or getattr(scored.processing, "chat_template", None)
    return template if isinstance(template, str) else json.dumps(template)


def read_template(path: str, *, trust_remote_code: bool = False) -> str:
    """The chat template of a saved VLM, without its weights.

    Raises:
        UnreadableModelError: if it has none.
    """
    found = _saved_template("chat template", path, sees=True, trust_remote_code=trust_remote_code)
    if not isinstance(found, str):
        raise UnreadableModelError(f"{path!r} has no chat template in which the original could be asked.")
    return found


def require_template(
    name: str, path: str, *, sees: bool, trust_remote_code: bool = False, advice: str = "Save its tokenizer with one."
) -> None:
    """Refuse a saved model without a chat template, before its weights are read. sees: whether it is a VLM. advice: what to do.

    Raises:
        UnreadableModelError: if neither its processor nor its tokenizer has one.
    """
    if not _saved_template(name, path, sees=sees, trust_remote_code=trust_remote_code):
        raise UnreadableModelError(f"{name}: {path!r} has no chat template, in which it is asked here. {advice}")


def _saved_template(name: str, path: str, *, sees: bool, trust_remote_code: bool) -> Any:
    processing = _load_processing(name, path, sees=sees, trust_remote_code=trust_remote_code)
    return getattr(processing, "chat_template", None)


def release_memory() -> None:
    """After the last name of a model is gone: give back what it held, before the next one is loaded."""
    gc.collect()
    if machine().accelerated:
        torch.accelerator.empty_cache()

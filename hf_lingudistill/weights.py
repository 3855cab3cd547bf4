"""Weights that are loaded or sent: whole, finite, and which they are.

transformers fills what a checkpoint lacks with random numbers and says so in its log alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

# Beside the weights, what a model's answers depend on
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "adapter_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_PATTERNS = ("*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.py")  # .py: code of the model's own


class BadWeights(ValueError):
    """Weights of which some are missing or not finite. The message names them."""


def load_whole(auto: Any, name_or_path: Any, **kwargs: Any) -> Any:
    """`auto.from_pretrained`, of a checkpoint that holds every weight of the model.

    auto: a model class, or an Auto class. What a class makes by itself (a tied head, `_keys_to_ignore_on_load_missing`) is not
    missing.

    Raises:
        BadWeights: if some are missing, or a file is cut off.
    """
    with _named_if_cut_off(name_or_path):
        model, info = auto.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    check_whole(info["missing_keys"], name_or_path)
    return model


@contextmanager
def only_whole() -> Iterator[None]:
    """`load_whole` for models that somebody else loads, as TRL loads a student by its name."""
    models: Any = PreTrainedModel  # every class asks this one in the end
    plain = models.__dict__["from_pretrained"]

    def from_pretrained(
        cls: Any, /, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        with _named_if_cut_off(pretrained_model_name_or_path):
            model, info = plain.__get__(None, cls)(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        check_whole(info["missing_keys"], pretrained_model_name_or_path)
        return (model, info) if output_loading_info else model

    models.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        models.from_pretrained = plain


@contextmanager
def _named_if_cut_off(name: Any) -> Iterator[None]:
    """A file of weights that cannot be read is named, with its model. Raises BadWeights."""
    try:
        yield
    except SafetensorError as error:
        broken = next((file for file in sorted(Path(str(name)).glob("*.safetensors")) if _is_cut_off(file)), None)
        which = f"its {broken.name}" if broken else "a file of its weights"
        raise BadWeights(
            f"{str(name)!r} cannot be loaded: {which} is no whole safetensors file ({error}). Save or download the model again."
        ) from error


def _is_cut_off(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return False
    except SafetensorError:
        return True


def check_whole(missing: Collection[str], name: Any) -> None:
    """Raise BadWeights if anything is missing."""
    if missing:
        raise BadWeights(
            f"{str(name)!r} lacks {_some(missing)}, which its config asks for: random numbers would take their place. Pass a model that was "
            "saved whole (if nothing uses what is missing, load it in transformers and save it again)."
        )


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], name: Any) -> None:
    """Raise BadWeights for weights that hold NaN or infinity. tensors: by name; those that hold no floating-point numbers are fine."""
    bad = {key: weight.dtype for key, weight in tensors if not _is_finite(weight.detach())}
    if bad:
        dtype = str(next(iter(bad.values()))).removeprefix("torch.")
        raise BadWeights(
            f"{str(name)!r} holds weights that are not finite (NaN or infinite, in {dtype}): {_some(bad)}. Pass a model from before they "
            "broke, or load it in a dtype that holds its numbers."
        )


def _is_finite(weight: torch.Tensor) -> bool:
    if not weight.is_floating_point() or not weight.numel() or weight.is_meta:
        return True
    # Both ends are NaN if any number is; without a copy of the weight, but for the 8-bit types, which know no order
    ends = torch.aminmax(weight.float() if weight.element_size() == 1 else weight)
    return bool(torch.isfinite(ends.min) & torch.isfinite(ends.max))


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{min(names)}{more}"


def fingerprint(path: str | Path, config: Any = None) -> str:
    """A hash of a folder's weights and settings; for a Hub id, its commit. config: of the Hub's model."""
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{getattr(config, '_commit_hash', None)}"
    total = hashlib.sha256()
    files = [*(file for kind in _PATTERNS for file in folder.glob(kind)), *(folder / name for name in _SETTINGS)]
    for file in sorted(file for file in files if file.is_file()):
        total.update(file.name.encode())
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def glance(name: str, revision: str | None = None) -> str | None:
    """A short hash of a model's weight files, by their names, sizes and ends, wherever they lie; None if they are not on this machine.
    revision: of a repository on the Hub; default: main.

    Where `fingerprint` reads every byte, this reads two MiB per file: enough to tell models apart, not to vouch for one.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            config = try_to_load_from_cache(name, "config.json", revision=revision or "main")
        except HFValidationError:
            return None
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    files = sorted({file for kind in _PATTERNS for file in folder.glob(kind) if file.is_file()})
    if not files:
        return None
    total, end = hashlib.sha256(), 2**20
    for file in files:
        size = file.stat().st_size
        total.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            total.update(stream.read(end))
            stream.seek(max(0, size - end))
            total.update(stream.read(end))
    return total.hexdigest()[:8]

"""The LM that a VLM's config or model card names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .configs import UnreadableModelError, is_vision_key, load_config, looks_local, read_json

if TYPE_CHECKING:
    from .configs import ModelReference

_MAX_HOPS = 4  # a VLM fine-tuned from a VLM fine-tuned from ... an LM


def guess_teacher(student: ModelReference, *, token: str | None = None) -> str | None:
    """The LM that the student's config or model card names, or None.

    Looked at in this order: where the config's text part says it came from, fields that name an LM (`lm_model_type` in
    nanoVLM, for example), `base_model` in the card, where the whole config says it came from. A name counts if its own
    config is a text-only LM's; where that cannot be read, if the field can mean nothing but the LM, or if all other
    entries of `base_model` are vision encoders. A name that is itself a VLM is asked the same question.

    Args:
        student: folder, Hub id, config or model.
        token: for gated or private repositories.

    Returns:
        A folder or Hub id, never the student itself. None if nothing is named or the Hub cannot be reached.
    """
    if isinstance(student, (str, os.PathLike)):
        return _guess(os.path.expanduser(str(student)), None, _Files(token), set())
    config = load_config("student", student, trust_remote_code=False, revision=None)
    return _guess(str(config.name_or_path or ""), config.to_dict(), _Files(token), set())


def named_teacher(student: str, *, trust_remote_code: bool = False) -> str:
    """`guess_teacher`, where there has to be one.

    Raises:
        UnreadableModelError: if nothing is named; of a student that cannot be read, why.
    """
    if (teacher := guess_teacher(student)) is None:
        load_config("student", student, trust_remote_code=trust_remote_code, revision=None)
        raise UnreadableModelError(
            f"The config and card of {student!r} name no language model. Pass the LM that it was built from as --teacher, "
            "or, where there was none, the VLM that it was tuned from."
        )
    return teacher


class _Files:
    """Small files of folders and repositories. After one failure of the network it asks for no more."""

    def __init__(self, token: str | None) -> None:
        self.token = token
        self.offline = False

    def path(self, source: str, filename: str) -> Path | None:
        if not source:
            return None
        if looks_local(source):
            path = Path(source, filename)
            return path if path.is_file() else None
        if self.offline:
            return None
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(huggingface_hub.hf_hub_download(source, filename, token=self.token))
        except LocalEntryNotFoundError:  # neither cached nor reachable; raised after several retries
            self.offline = not _hub_is_offline_by_choice()
        except (EntryNotFoundError, OSError, ValueError):  # not there, not ours to read, or no Hub id
            pass
        return None

    def config(self, source: str) -> dict[str, Any] | None:
        path = self.path(source, "config.json")
        return read_json(path) if path else None

    def base_models(self, source: str) -> list[str]:
        """`base_model` of the model card: none, one or several."""
        path = self.path(source, "README.md")
        if path is None:
            return []
        import yaml
        from huggingface_hub import metadata_load

        try:
            named = (metadata_load(path) or {}).get("base_model")
        except (OSError, ValueError, yaml.YAMLError):
            return []
        return [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]


def _hub_is_offline_by_choice() -> bool:
    """With HF_HUB_OFFLINE each look-up is instant and says nothing about the next."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _guess(student: str, config: dict[str, Any] | None, files: _Files, seen: set[str]) -> str | None:
    """seen: models on the way here, none of which can be the answer."""
    seen.add(_identity(student))
    if len(seen) > _MAX_HOPS:
        return None
    if config is None:
        config = files.config(student) or {}
    named = [name for name in _named_language_models(config) if _identity(name) not in seen]
    bases = [name for name in files.base_models(student) if _identity(name) not in seen]
    origin = [name for name in _strings(config, "_name_or_path", "name_or_path") if _identity(name) not in seen]
    kinds = {}
    for name in _plausible([*named, *bases, *origin]):
        kinds[name] = _kind_of(name, files)
        if kinds[name] == "lm":
            return name
    for name, kind in kinds.items():
        if kind == "vlm" and (found := _guess(name, None, files, seen)):
            return found
    for name in named:
        if kinds.get(name) == "unknown":
            return name
    others = [name for name in bases if kinds.get(name) != "vision"]
    return others[0] if len(others) == 1 < len(bases) and kinds.get(others[0]) == "unknown" else None


def _named_language_models(config: dict[str, Any]) -> list[str]:
    """Values of the config's fields that can name nothing but the language model."""
    names = []
    for key, value in config.items():
        if is_vision_key(key) or not re.search(r"(^|_)(lm|llm|text|language)(_|$)", key):
            continue
        if isinstance(value, dict):
            names += _strings(value, "_name_or_path", "name_or_path")
        elif isinstance(value, str) and "tokenizer" not in key and ("/" in value or os.path.isdir(value)):
            names.append(value)
    return names


def _strings(config: dict[str, Any], *keys: str) -> list[str]:
    return [config[key] for key in keys if isinstance(config.get(key), str) and config[key]]


def _plausible(names: Iterable[str]) -> list[str]:
    """Folders that exist and `owner/name`, once each: not the paths of the machine that a model was trained on."""
    return [name for name in dict.fromkeys(names) if os.path.isdir(name) or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)]


def _identity(name: str) -> str:
    return os.path.realpath(name) if os.path.exists(name) else name.lower()


def _kind_of(name: str, files: _Files) -> Literal["lm", "vlm", "vision", "unknown"]:
    config = files.config(name)
    if config is None:
        vision = r"siglip|clip|dino|internvit|(^|[-_/])(vit|eva|sam|aimv2)\d*([-_]|$)"
        return "vision" if re.search(vision, name.lower()) else "unknown"
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    model_type = str(config.get("model_type"))
    known = model_type in CONFIG_MAPPING
    if any(is_vision_key(key) and value is not None for key, value in config.items()):
        # CLIP has a vision config too, and writes no text.
        return "vlm" if not known or CONFIG_MAPPING[model_type] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else "vision"
    own_code = "AutoModelForCausalLM" in (config.get("auto_map") or {})
    return "lm" if own_code or (known and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING) else "vision"

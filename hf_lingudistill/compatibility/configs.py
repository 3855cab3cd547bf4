"""What is read from a model: its config, the layers of its language model, and where its tokenizer is.

transformers is imported where it is used: it brings torch, and a wrong path should be reported without that wait.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..sentences import no_access

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    ModelReference = str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel


class UnreadableModelError(ValueError):
    """A student or teacher whose config cannot be read: no such folder or repository, broken or unknown config."""


@dataclass(frozen=True)
class Layer:
    """kind: as in `config.layer_types`. window: width of local attention, None where attention is global."""

    kind: str
    query_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    window: int | None


@dataclass
class Side:
    """One of the two models. text: the config of its language model. template: the chat template, as jinja source."""

    role: Literal["student", "teacher"]
    name: str
    config: PreTrainedConfig
    text: PreTrainedConfig
    layers: list[Layer]
    trust_remote_code: bool
    revision: str | None
    processing: Any = None  # tokenizer or processor
    tokenizer_error: str = ""
    given_template: str | None = None  # in place of its own

    @classmethod
    def load(
        cls,
        role: Literal["student", "teacher"],
        source: ModelReference,
        processing: Any,
        trust_remote_code: bool,
        revision: str | None,
    ) -> Side:
        config = load_config(role, source, trust_remote_code, revision)
        named = source if isinstance(source, (str, os.PathLike)) else config.name_or_path or ""
        name = os.path.expanduser(str(named))
        text = _text_config(config)
        return cls(role, name, config, text, _layers(text), trust_remote_code, revision, processing)

    @property
    def is_vlm(self) -> bool:
        return is_vlm(self.config)

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def title(self) -> str:
        language = [] if self.text.model_type == self.model_type else [f"language model {self.text.model_type}"]
        first, *rest = [name for name in (self.name, self.model_type, *language) if name]
        return f"{first} ({'; '.join(rest)})" if rest else first

    @property
    def subject(self) -> str:
        """How a sentence about its layers begins."""
        return "Teacher" if self.role == "teacher" else "Student's language model"

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processing, "tokenizer", self.processing)

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        return int(setting(self.text, "vocab_size") or setting(self.config, "vocab_size") or 0)

    @property
    def template(self) -> str | None:
        if self.given_template is not None:
            return self.given_template
        template = getattr(self.processing, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if template is None and self.name and os.path.isfile(legacy := os.path.join(self.name, "chat_template.json")):
            template = (read_json(Path(legacy)) or {}).get("chat_template")  # processors saved before v4.52
        return template if isinstance(template, str) else None

    def load_tokenizer(self) -> None:
        """Load the tokenizer where none was given. What goes wrong ends up in `tokenizer_error`."""
        if self.processing is None:
            self._find_tokenizer()
        if self.processing is not None and not self.tokenizer.get_vocab():
            self.processing, self.tokenizer_error = None, "its vocabulary is empty"

    def _find_tokenizer(self) -> None:
        if not self.name:
            self.tokenizer_error = "none was given, and the config does not say where it came from"
            return
        if os.path.isdir(self.name) and not _has_tokenizer_files(Path(self.name)):
            self.tokenizer_error = f"{self.name} holds none"
            return
        from transformers import AutoTokenizer

        try:
            self.processing = AutoTokenizer.from_pretrained(
                self.name, revision=self.revision or "main", trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # tokenizers raises bare Exceptions; whatever it is ends up in the report
            self.tokenizer_error = _first_sentence(error)


def load_config(role: str, source: Any, trust_remote_code: bool, revision: str | None) -> PreTrainedConfig:
    if not isinstance(source, (str, os.PathLike)):
        from transformers import PreTrainedConfig

        given = source if isinstance(source, PreTrainedConfig) else getattr(source, "config", None)
        if not isinstance(given, PreTrainedConfig):
            raise TypeError(f"{role} must be a path, a Hub id, a config or a model, got {type(source).__name__}.")
        return given

    path = os.path.expanduser(source)
    if looks_local(path):
        if not os.path.exists(path):
            raise UnreadableModelError(
                f"The {role} {str(source)!r} does not exist. Pass a folder that holds a config.json, or a Hub id."
            )
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
            if os.path.isfile(os.path.join(path, "adapter_config.json")):
                raise UnreadableModelError(
                    f"The {role} folder {str(source)!r} holds an adapter, not a model. Merge it into its base first (docs/lora.md shows how)."
                )
            raise UnreadableModelError(
                f"The {role} folder {str(source)!r} holds no config.json. Pass the folder that save_pretrained wrote."
            )
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # remote code, broken JSON, strict dataclasses and the network all raise their own
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UnreadableModelError(
                f"The {role} {str(source)!r} runs code from its repository. Read it, and pass trust_remote_code if "
                "you trust it."
            ) from error
        if (why := no_access(error, str(source))) is not None:
            raise UnreadableModelError(f"The {role} {str(source)!r} cannot be read: {why}") from error
        there = (
            ""
            if os.path.exists(path)
            else f"There is no folder {str(source)!r} here, and as a repository it cannot be read. "
        )
        raise UnreadableModelError(
            f"{there}The config of the {role} {str(source)!r} cannot be read: {_first_sentence(error)}. Pass a folder that "
            "holds a config.json of a model that transformers knows, or the id of a repository that you can reach."
        ) from error
    if not isinstance(config.name_or_path, str) or not config.name_or_path:
        config.name_or_path = str(path)
    return config


def looks_local(path: str) -> bool:
    """Hub ids are `name` or `owner/name`; anything else, or anything that is there, is a path."""
    return os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path


def _has_tokenizer_files(folder: Path) -> bool:
    # Without this check, some tokenizer classes come up empty rather than fail.
    patterns = ("tokenizer.json", "vocab.*", "tekken.json", "*.model", "*.tiktoken", "tokenization_*.py")
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def setting(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    """`getattr`, with the first layer's value where a config has one per layer (a RuntimeError in transformers)."""
    try:
        return getattr(config, name, default)
    except RuntimeError:
        return getattr(config.per_layer_config[0], name, default)


def nested_configs(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The configs that are attributes of this one, by name: `vision_config`, `text_config`, ..."""
    from transformers import PreTrainedConfig

    return {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:  # more than one candidate: not a VLM of the kind meant here, and the role check says so
        return config
    if isinstance(text, dict):  # code from the Hub that leaves its nested configs as they were read
        from transformers import PreTrainedConfig

        text = PreTrainedConfig(**text)
    if text is config and setting(config, "num_hidden_layers") is None:
        for name, nested in nested_configs(config).items():  # `llm_config` and the like of code from the Hub
            if not is_vision_key(name) and setting(nested, "vocab_size") and setting(nested, "num_hidden_layers"):
                return nested
    return text


def is_vision_key(name: str) -> bool:
    """`vision_config`, `vq_config`, `mm_vision_tower`, `vit_model_type`, `image_token_id`, ..."""
    part = r"(^|_)(vision|visual|vit|vq|image)(_\w+)?_(config|tower|encoder|model|model_type)$"
    return re.search(rf"{part}|^image_token_(id|index)$", name) is not None


def is_vlm(config: PreTrainedConfig) -> bool:
    """Whether a config names a vision tower."""
    names = {*config.sub_configs, *(name for name, value in vars(config).items() if value is not None)}
    return any(map(is_vision_key, names))


def _layers(text: PreTrainedConfig) -> list[Layer]:
    kinds = setting(text, "layer_types") or setting(text, "layers_block_type") or []
    layers = []
    for index in range(setting(text, "num_hidden_layers") or 0):
        config = text.per_layer_config[index]
        window = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", None) is False:
            window = None
        if index < len(kinds):
            kind = str(kinds[index])
        else:
            kind = "sliding_attention" if window else "full_attention"
        if kind == "chunked_attention":
            window = getattr(config, "attention_chunk_size", None)
        elif kind != "sliding_attention":
            window = None
        heads = getattr(config, "num_attention_heads", None)
        head_dim = getattr(config, "head_dim", None)
        if head_dim is None and heads:
            head_dim = getattr(config, "hidden_size", 0) // heads or None
        kv_heads = _kv_heads(config)
        if getattr(
            config, "kv_lora_rank", None
        ):  # latent attention: attended to, and shared, as one expanded key for each head
            kv_heads, head_dim = heads, config.qk_nope_head_dim + config.qk_rope_head_dim
        layers.append(Layer(kind, heads, kv_heads, head_dim, window))
    return layers


def _kv_heads(config: PreTrainedConfig) -> int | None:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    for name in ("num_key_value_heads", "num_kv_heads", "num_attention_heads"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    return None


def rope_of(text: PreTrainedConfig) -> dict[str, dict[str, Any]] | None:
    """RoPE parameters by layer type ("" where all layers share them), or None for another kind of positions."""
    parameters = setting(text, "rope_parameters")
    if not parameters or setting(text, "alibi", False) or setting(text, "position_embedding_type", "rope") != "rope":
        return None
    nested = {kind: value for kind, value in parameters.items() if isinstance(value, dict)}
    by_kind = nested or {"": parameters}
    default = {"rope_type": "default", "partial_rotary_factor": 1.0}
    return {
        kind: {**default, **{k: v for k, v in value.items() if v is not None and k != "type"}}
        for kind, value in by_kind.items()
    }


def modeling_source(text: PreTrainedConfig) -> str | None:
    """Source of the modeling file beside the config's own, as text: importing it would load what a check need not."""
    try:
        path = Path(inspect.getfile(type(text)))
    except (OSError, TypeError):
        return None
    path = path.with_name(path.name.replace("configuration_", "modeling_"))
    if not path.name.startswith("modeling_") or not path.is_file():
        return None
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _first_sentence(error: BaseException) -> str:
    """What an exception says, cut at its first line or sentence: the rest is usually advice for programmers."""
    text = str(error).strip() or type(error).__name__
    if re.match(r"Validation error for field", text):
        text = text.replace("\n", " ")  # the field is on the first line, the fault on the second
    text = text.splitlines()[0]
    return re.split(r"\.\s", " ".join(text.split()), maxsplit=1)[0].rstrip(".:")

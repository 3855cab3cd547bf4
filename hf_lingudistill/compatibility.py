"""Does a teacher fit a student? Answered from configs and tokenizers alone; no weights are read.

    report = check_compatibility("path/or/id/of/the/VLM", "path/or/id/of/its/LM")
    print(report)                # a table, 100 columns wide
    report.raise_for_misfit()    # ValueError with every misfit and its fix

KV sharing lets layer l of the teacher attend to the keys and values of layer l of the student, so both need softmax
self-attention in every layer and K/V of the same shape. Everything else may differ, and is noted where it matters.

`guess_teacher` finds the LM that a VLM's config or model card names.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    ModelReference = str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel

# transformers is imported where it is used: it brings torch, and a wrong path should be reported without that wait.

Status = Literal["fits", "note", "misfit"]
_Rope = dict[str, dict[str, Any]]  # parameters by layer type, "" where all layers share them
_Tokens = list[str | None]  # token string by id, None where there is none

USE_THE_ORIGINAL_LM = "Use the LM that the student was built from."
UNLESS_ORIGINAL = "If this is not the LM that the student was built from, use that one."
USE_SOFTMAX = "Use a VLM and LM with plain softmax self-attention in every layer (Llama, Qwen2, Qwen3, Gemma, ...)."
SOFTMAX_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
TABLE_WIDTH = 100


class UnreadableModelError(ValueError):
    """A student or teacher whose config cannot be read: no such folder or repository, broken or unknown config."""


@dataclass(frozen=True)
class Check:
    """One line of the report.

    student, teacher: the values compared, for display. reason: empty when it fits. fix: empty when there is nothing to
    do.
    """

    name: str
    status: Status
    student: str
    teacher: str
    reason: str = ""
    fix: str = ""

    @property
    def message(self) -> str:
        """The reason and the fix, as one line of text."""
        return f"{self.reason} {self.fix}".strip()


@dataclass(frozen=True)
class CompatibilityReport:
    """What `check_compatibility` found. `print(report)` shows a table.

    Attributes:
        student, teacher: names, for display.
        checks: in the order of the table.
        shared_vocab_size: ids below it have the same token string in both tokenizers (compared one by one) and a row
            in both embeddings. 0 if a tokenizer is missing.
        student_vocab_size, teacher_vocab_size: rows of the token embedding, as the config states them.
        image_token_ids: placeholders of images and videos in the student's input.
        aliases: (student id, teacher id) of tokens that mean the same under two names: what ends an assistant's turn.
    """

    student: str
    teacher: str
    checks: list[Check]
    shared_vocab_size: int = 0
    student_vocab_size: int = 0
    teacher_vocab_size: int = 0
    image_token_ids: tuple[int, ...] = field(default=())
    aliases: tuple[tuple[int, int], ...] = field(default=())

    @property
    def misfits(self) -> list[Check]:
        return [check for check in self.checks if check.status == "misfit"]

    @property
    def notes(self) -> list[Check]:
        return [check for check in self.checks if check.status == "note"]

    @property
    def fits(self) -> bool:
        return not self.misfits

    def raise_for_misfit(self) -> None:
        """Do nothing if the pair fits.

        Raises:
            ValueError: with every misfit, one sentence and its fix each.
        """
        messages = [check.message for check in self.misfits]
        if len(messages) == 1:
            raise ValueError(messages[0])
        if messages:
            raise ValueError(f"{len(messages)} reasons why the teacher does not fit:\n- " + "\n- ".join(messages))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, strings and numbers (JSON)."""
        return {
            "student": self.student,
            "teacher": self.teacher,
            "fits": self.fits,
            "shared_vocab_size": self.shared_vocab_size,
            "student_vocab_size": self.student_vocab_size,
            "teacher_vocab_size": self.teacher_vocab_size,
            "image_token_ids": list(self.image_token_ids),
            "aliases": [list(pair) for pair in self.aliases],
            "checks": [asdict(check) for check in self.checks],
        }

    def __str__(self) -> str:
        values = 36  # 16 + 6 + 2 * 36 and three gaps of two make TABLE_WIDTH
        lines = [*_wrap(f"Student: {self.student}"), *_wrap(f"Teacher: {self.teacher}"), ""]
        rows = [("check", "status", "student", "teacher"), ("-" * 16, "-" * 6, "-" * values, "-" * values)]
        lines += [_row(row, values) for row in rows]
        for check in self.checks:
            lines.append(_row((check.name, check.status, check.student, check.teacher), values))
            if check.reason:
                lines += _wrap(check.reason, indent="    ")
            if check.fix:
                lines += _wrap(f"Fix: {check.fix}" if check.status == "misfit" else check.fix, indent="    ")
        lines += ["", self._verdict()]
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.fits:
            return f"Does not fit: {_count(len(self.misfits), 'misfit')}, {_count(len(self.notes), 'note')}."
        return f"Fits, with {_count(len(self.notes), 'note')}." if self.notes else "Fits."


def check_compatibility(
    student: ModelReference,
    teacher: ModelReference,
    *,
    student_tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    trust_remote_code: bool = False,
    student_revision: str | None = None,
    teacher_revision: str | None = None,
) -> CompatibilityReport:
    """Check whether `teacher` can teach `student` with shared K/V.

    Args:
        student: the VLM, as folder, Hub id, config, or model (its config is used; no parameter is touched).
        teacher: the text-only LM, likewise.
        student_tokenizer: tokenizer or processor. By default loaded from where the config came from.
        teacher_tokenizer: likewise. Without tokenizers the vocabularies cannot be compared, which is a misfit.
        trust_remote_code: allow configs and tokenizers to run code from their repository.
        student_revision: branch, tag or commit on the Hub.
        teacher_revision: likewise.

    Raises:
        UnreadableModelError: if a config cannot be read.
    """
    s = _Side.load("student", student, student_tokenizer, trust_remote_code, student_revision)
    t = _Side.load("teacher", teacher, teacher_tokenizer, trust_remote_code, teacher_revision)

    roles = _check_roles(s, t)
    if not s.is_vlm:  # swapped, or no VLM at all: every other line would compare the wrong things
        return CompatibilityReport(s.title, t.title, roles)

    s.load_tokenizer()
    t.load_tokenizer()
    vocabulary, shared_vocab_size = _check_vocabulary(s, t)
    image_token_ids = _image_token_ids(s)
    checks = [
        *roles,
        *_check_architecture(s, t),
        *_check_layers(s, t),
        *_check_attention(s, t),
        *_check_sliding_window(s, t),
        *_check_rope(s, t),
        *_check_softcapping(s, t),
        *_check_sizes(s, t),
        *vocabulary,
        *_check_image_tokens(s, image_token_ids),
        *_check_chat_template(s, t),
        *_check_quantization(t),
    ]
    return CompatibilityReport(
        s.title,
        t.title,
        checks,
        shared_vocab_size=shared_vocab_size,
        student_vocab_size=s.vocab_size,
        teacher_vocab_size=t.vocab_size,
        image_token_ids=image_token_ids,
        aliases=_end_of_turn(s, t, shared_vocab_size),
    )


# --- what is read from a model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """kind: as in `config.layer_types`. window: width of local attention, None where attention is global."""

    kind: str
    query_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    window: int | None


@dataclass
class _Side:
    """One of the two models. text: the config of its language model. template: the chat template, as jinja source."""

    role: Literal["student", "teacher"]
    name: str
    config: PreTrainedConfig
    text: PreTrainedConfig
    layers: list[_Layer]
    trust_remote_code: bool
    revision: str | None
    processing: Any = None  # tokenizer or processor
    tokenizer_error: str = ""

    @classmethod
    def load(
        cls,
        role: Literal["student", "teacher"],
        source: ModelReference,
        processing: Any,
        trust_remote_code: bool,
        revision: str | None,
    ) -> _Side:
        config = load_config(role, source, trust_remote_code, revision)
        named = source if isinstance(source, (str, os.PathLike)) else config.name_or_path or ""
        name = os.path.expanduser(str(named))
        text = _text_config(config)
        return cls(role, name, config, text, _layers(text), trust_remote_code, revision, processing)

    @property
    def is_vlm(self) -> bool:
        return _is_vlm(self.config)

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
        return int(_get(self.text, "vocab_size") or _get(self.config, "vocab_size") or 0)

    @property
    def template(self) -> str | None:
        template = getattr(self.processing, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if template is None and self.name and os.path.isfile(legacy := os.path.join(self.name, "chat_template.json")):
            template = (_read_json(Path(legacy)) or {}).get("chat_template")  # processors saved before v4.52
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
    if _looks_local(path):
        if not os.path.exists(path):
            raise UnreadableModelError(
                f"The {role} {str(source)!r} does not exist. Pass a folder that holds a config.json, or a Hub id."
            )
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
            if os.path.isfile(os.path.join(path, "adapter_config.json")):
                raise UnreadableModelError(
                    f"The {role} folder {str(source)!r} holds an adapter, not a model. Merge it into its base first."
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
        raise UnreadableModelError(
            f"The config of the {role} {str(source)!r} cannot be read: {_first_sentence(error)}. Pass a folder that "
            "holds a config.json of a model that transformers knows, or the id of a repository that you can reach."
        ) from error
    if not isinstance(config.name_or_path, str) or not config.name_or_path:
        config.name_or_path = str(path)
    return config


def _looks_local(path: str) -> bool:
    """Hub ids are `name` or `owner/name`; anything else, or anything that is there, is a path."""
    return os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path


def _has_tokenizer_files(folder: Path) -> bool:
    # Without this check, some tokenizer classes come up empty rather than fail.
    patterns = ("tokenizer.json", "vocab.*", "tekken.json", "*.model", "*.tiktoken", "tokenization_*.py")
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def _get(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    """`getattr`, with the first layer's value where a config has one per layer (a RuntimeError in transformers)."""
    try:
        return getattr(config, name, default)
    except RuntimeError:
        return getattr(config.per_layer_config[0], name, default)


def _nested_configs(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
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
    if text is config and _get(config, "num_hidden_layers") is None:
        for name, nested in _nested_configs(config).items():  # `llm_config` and the like of code from the Hub
            if not _is_vision_key(name) and _get(nested, "vocab_size") and _get(nested, "num_hidden_layers"):
                return nested
    return text


def _is_vision_key(name: str) -> bool:
    """`vision_config`, `vq_config`, `mm_vision_tower`, `vit_model_type`, `image_token_id`, ..."""
    part = r"(^|_)(vision|visual|vit|vq|image)(_\w+)?_(config|tower|encoder|model|model_type)$"
    return re.search(rf"{part}|^image_token_(id|index)$", name) is not None


def _is_vlm(config: PreTrainedConfig) -> bool:
    names = {*config.sub_configs, *(name for name, value in vars(config).items() if value is not None)}
    return any(map(_is_vision_key, names))


def _layers(text: PreTrainedConfig) -> list[_Layer]:
    kinds = _get(text, "layer_types") or _get(text, "layers_block_type") or []
    layers = []
    for index in range(_get(text, "num_hidden_layers") or 0):
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
        layers.append(_Layer(kind, heads, _kv_heads(config), head_dim, window))
    return layers


def _kv_heads(config: PreTrainedConfig) -> int | None:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    for name in ("num_key_value_heads", "num_kv_heads", "num_attention_heads"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    return None


def _rope(text: PreTrainedConfig) -> dict[str, dict[str, Any]] | None:
    """RoPE parameters by layer type ("" where all layers share them), or None for another kind of positions."""
    parameters = _get(text, "rope_parameters")
    if not parameters or _get(text, "alibi", False) or _get(text, "position_embedding_type", "rope") != "rope":
        return None
    nested = {kind: value for kind, value in parameters.items() if isinstance(value, dict)}
    by_kind = nested or {"": parameters}
    default = {"rope_type": "default", "partial_rotary_factor": 1.0}
    return {
        kind: {**default, **{k: v for k, v in value.items() if v is not None and k != "type"}}
        for kind, value in by_kind.items()
    }


def _modeling_source(text: PreTrainedConfig) -> str | None:
    """Source of the modeling file beside the config's own, as text: importing it would load what a check need not."""
    try:
        path = Path(inspect.getfile(type(text)))
    except (OSError, TypeError):
        return None
    path = path.with_name(path.name.replace("configuration_", "modeling_"))
    if not path.name.startswith("modeling_") or not path.is_file():
        return None
    return path.read_text(encoding="utf-8")


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_roles(s: _Side, t: _Side) -> list[Check]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    def misfit(reason: str, fix: str = USE_THE_ORIGINAL_LM) -> list[Check]:
        return [Check("roles", "misfit", s.model_type, t.model_type, reason, fix)]

    if t.is_vlm and not s.is_vlm:
        return misfit(
            f"The student and teacher look swapped: {s.title} was given as the student and is a text-only model, "
            f"{t.title} was given as the teacher and is a vision-language model.",
            "Exchange the two.",
        )
    if not s.is_vlm:
        return misfit(
            f"Student {s.title} has no vision config: it is a text-only model.",
            "Pass the vision-language model as the student.",
        )
    if t.is_vlm:
        return misfit(f"Teacher {t.title} is itself a vision-language model: the teacher is a text-only LM.")
    for side in (s, t):
        if side.config.is_encoder_decoder:
            return misfit(
                f"{side.role.capitalize()} {side.title} is an encoder-decoder: KV sharing needs decoder-only models.",
                "Use a decoder-only VLM and its LM.",
            )
    own_code = "AutoModelForCausalLM" in (getattr(t.config, "auto_map", None) or {})
    if type(t.config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        return misfit(f"Teacher {t.title} is not a model that AutoModelForCausalLM loads.")
    for architecture in t.config.architectures or []:
        if re.search(r"Classification$|ForQuestionAnswering$|ForMaskedLM$", architecture):
            return misfit(f"Teacher {t.title} was saved as {architecture}: it has no language-model head.")
    return [Check("roles", "fits", s.model_type, t.model_type)]


def _check_architecture(s: _Side, t: _Side) -> list[Check]:
    ours, theirs = str(s.text.model_type), str(t.text.model_type)
    if _family(ours) == _family(theirs):
        return [Check("architecture", "fits", ours, theirs)]
    reason = (
        f"Student's language model is of type {ours}, the teacher of type {theirs}: their shapes can agree where "
        "norms, biases or the order of rotary dimensions do not."
    )
    return [Check("architecture", "note", ours, theirs, reason, UNLESS_ORIGINAL)]


def _family(model_type: str) -> str:
    """`qwen2_5_vl_text` and `qwen2` are of one family, `gemma2` and `gemma3_text` are not."""
    match = re.match(r"[a-z]+\d*[a-z]*", model_type)
    return match[0] if match else model_type


def _check_layers(s: _Side, t: _Side) -> list[Check]:
    """Number of layers, and the shape of K/V layer by layer."""
    ours, theirs = len(s.layers), len(t.layers)
    checks = [Check("decoder layers", "fits", str(ours), str(theirs))]
    if ours != theirs:
        reason = (
            f"Teacher has {_count(theirs, 'layer')}, the student's language model has {ours}: KV sharing pairs layers "
            "one to one."
        )
        checks = [Check("decoder layers", "misfit", str(ours), str(theirs), reason, USE_THE_ORIGINAL_LM)]
    checks += _compare_layers(
        *("KV heads", "KV head", [x.kv_heads for x in s.layers], [x.kv_heads for x in t.layers]),
        "the teacher's queries attend to the student's keys and values head by head",
    )
    checks += _compare_layers(
        *("head_dim", "dimension", [x.head_dim for x in s.layers], [x.head_dim for x in t.layers]),
        "the teacher's queries and the student's keys must have the same size",
    )
    return checks


def _compare_layers(name: str, noun: str, ours: list[int | None], theirs: list[int | None], why: str) -> list[Check]:
    shown = _values(ours), _values(theirs)
    different = [index for index, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
    if not different:
        return [Check(name, "fits", *shown)]
    first = different[0]
    where = "" if len(set(ours)) == len(set(theirs)) == 1 else f" in layer {first}"
    per = " a head" if name == "head_dim" else ""
    found = f"Teacher has {_count(theirs[first], noun)}{per}{where}, the student's language model has {ours[first]}"
    reason = f"{found}: {why}."
    return [Check(name, "misfit", *shown, reason, USE_THE_ORIGINAL_LM)]


def _check_attention(s: _Side, t: _Side) -> list[Check]:
    checks = [*_attention_problems(s), *_attention_problems(t)]
    return checks or [Check("attention", "fits", _kinds(s.layers), _kinds(t.layers))]


def _attention_problems(side: _Side) -> list[Check]:
    """What keeps this model's layers from passing on plain keys and values, one line each."""
    text, layers, subject = side.text, side.layers, side.subject
    all_layers = _count(len(layers), "layer")
    checks = []

    def found(shown: str, reason: str, status: Status = "misfit") -> None:
        ours, theirs = (shown, "") if side.role == "student" else ("", shown)
        checks.append(Check("attention", status, ours, theirs, reason, USE_SOFTMAX if status == "misfit" else ""))

    for kind in sorted({layer.kind for layer in layers} - SOFTMAX_ATTENTION):
        where = [index for index, layer in enumerate(layers) if layer.kind == kind]
        found(
            f"{kind} in {len(where)} of {len(layers)}",
            f"{subject} has {len(where)} of {all_layers} of kind {kind!r} ({_indices(where)}): they do not keep the "
            "plain keys and values that KV sharing passes on.",
        )
    crossed = [index for index in _get(text, "cross_attention_layers") or [] if index < len(layers)]
    if crossed:
        found(
            f"cross-attention in {len(crossed)} of {len(layers)}",
            f"{subject} has {len(crossed)} of {all_layers} with cross-attention ({_indices(crossed)}): a plain LM has "
            "no layer to pair with them.",
        )
    elif _get(text, "cross_layer_interval") or _get(text, "add_cross_attention"):
        found("cross-attention", f"{subject} has cross-attention: a plain LM has no layer to pair with it.")
    if rank := _get(text, "kv_lora_rank"):
        found(
            "multi-head latent attention",
            f"{subject} uses multi-head latent attention (kv_lora_rank={rank}): its keys and values are compressed, "
            "and have no common head size.",
        )
    if any(layer.query_heads is None for layer in layers):
        found(
            "no attention heads", f"{subject} ({text.model_type}) names no attention heads: it has no keys or values."
        )
    elif source := _modeling_source(text):  # two traits that no config shows
        if re.search(r"self\.\w*sinks?\w*\s*=\s*nn\.", source):
            found(
                "attention sinks",
                f"{subject} ({text.model_type}) has attention sinks: a learned share of the attention that goes to no "
                "key, which KV sharing does not reproduce.",
            )
        if "ALL_ATTENTION_FUNCTIONS" not in source:
            found(
                "own attention code",
                f"{subject} ({text.model_type}) computes attention without transformers' attention interface: its K/V "
                "cannot be recorded.",
            )
    if reused := _get(text, "num_kv_shared_layers"):
        shown = f"{_count(reused, 'layer')} reuse K/V"
        found(shown, f"{subject}: {shown} of earlier layers, which this library is not tested with.", "note")
    if side.role == "student" and _get(text, "use_bidirectional_attention"):
        reason = (
            "Student's prompt attends in both directions: in full and prompt the teacher follows its masks, in none "
            "it reads text from left to right."
        )
        found("bidirectional prompt", reason, "note")
    return checks


def _check_sliding_window(s: _Side, t: _Side) -> list[Check]:
    ours, theirs = _windows(s.layers), _windows(t.layers)
    if [layer.window for layer in s.layers] == [layer.window for layer in t.layers] or ours == theirs == "none":
        return [Check("sliding window", "fits", ours, theirs)]
    reason = (
        f"Sliding windows differ (student: {ours}; teacher: {theirs}): the teacher follows the student's masks in "
        "full, prompt and vision, and its own with kv_sharing=none."
    )
    return [Check("sliding window", "note", ours, theirs, reason)]


def _check_rope(s: _Side, t: _Side) -> list[Check]:
    ours, theirs = _rope(s.text), _rope(t.text)
    shown = _rope_summary(ours), _rope_summary(theirs)
    checks = []
    for side, rope, why, fix in (
        (s, ours, "the teacher's queries are placed by it", "Use a VLM whose language model has RoPE."),
        (t, theirs, "the student's keys are rotated, its queries would not be", USE_THE_ORIGINAL_LM),
    ):
        if rope is None:
            reason = (
                f"{side.subject} ({side.text.model_type}) names no rotary position embedding (rope_parameters): {why}."
            )
            checks.append(Check("RoPE", "misfit", *shown, reason, fix))
    if ours is None or theirs is None:
        return checks

    differences = _rope_differences(ours, theirs)
    if not differences:
        return [Check("RoPE", "fits", *shown)]
    listed = "; ".join(f"{name} {a} / {b}" for name, a, b in differences)
    reason = (
        f"RoPE differs (student / teacher: {listed}): the teacher reuses the student's cos and sin in full, prompt "
        "and vision, and its own with kv_sharing=none."
    )
    # M-RoPE is what a VLM adds to its LM's RoPE, and the same on text.
    expected = all(name.startswith("mrope") for name, _, _ in differences)
    return [Check("RoPE", "note", *shown, reason, "" if expected else UNLESS_ORIGINAL)]


def _rope_differences(ours: _Rope, theirs: _Rope) -> list[tuple[str, Any, Any]]:
    """(parameter, student's value, teacher's value). Parameters for all layers stand for each kind of layer."""
    kinds = {*ours, *theirs} if ours.keys() == theirs.keys() else {*ours, *theirs} - {""}
    differences = []
    for kind in sorted(kinds):
        a, b = (rope.get(kind, rope.get("", {})) for rope in (ours, theirs))
        for name in sorted({*a, *b}):
            if a.get(name) != b.get(name):
                differences.append((f"{kind} {name}".strip(), a.get(name, "none"), b.get(name, "none")))
    return differences


def _rope_summary(rope: _Rope | None) -> str:
    parts = [
        f"{x['rope_type']}, theta {x.get('rope_theta', 0):g}" + (", M-RoPE" if "mrope_section" in x else "")
        for x in (rope or {}).values()
    ]
    return " / ".join(dict.fromkeys(parts)) or "none"


def _check_softcapping(s: _Side, t: _Side) -> list[Check]:
    ours, theirs = _softcaps(s.text), _softcaps(t.text)
    if ours == theirs == "none":
        return [Check("soft-capping", "fits", ours, theirs)]
    if ours != theirs:
        reason = f"Soft-capping differs (student: {ours}; teacher: {theirs}): each model keeps its own."
        return [Check("soft-capping", "note", ours, theirs, reason, UNLESS_ORIGINAL)]
    reason = f"Student and teacher cap their logits ({ours}): capped attention runs without SDPA, which is slower."
    return [Check("soft-capping", "note", ours, theirs, reason)]


def _softcaps(text: PreTrainedConfig) -> str:
    caps = {k: v for k, v in sorted(vars(text).items()) if re.search("soft_?cap", k) and isinstance(v, (int, float))}
    return ", ".join(f"{name.partition('_')[0]} {value:g}" for name, value in caps.items() if value) or "none"


def _check_sizes(s: _Side, t: _Side) -> list[Check]:
    checks = []
    for name, what, ours, theirs in (
        ("hidden_size", "Hidden sizes", str(_get(s.text, "hidden_size")), str(_get(t.text, "hidden_size"))),
        (
            "query heads",
            "Query heads",
            _values([x.query_heads for x in s.layers]),
            _values([x.query_heads for x in t.layers]),
        ),
    ):
        same = ours == theirs
        reason = "" if same else f"{what} differ (student {ours}, teacher {theirs}): allowed, only K/V are shared."
        checks.append(Check(name, "fits" if same else "note", ours, theirs, reason))
    return checks


def _check_vocabulary(s: _Side, t: _Side) -> tuple[list[Check], int]:
    """The checks, and the number of ids that are shared: token strings are compared for every id."""
    checks = []
    for side in (s, t):
        if side.processing is None:
            read = ["not read" if x.processing is None else f"{x.vocab_size} rows" for x in (s, t)]
            reason = (
                f"Vocabularies cannot be compared for lack of the {side.role}'s tokenizer: {side.tokenizer_error}."
            )
            fix = f"Pass a folder or Hub id that has one, or {side.role}_tokenizer."
            checks.append(Check("vocabulary", "misfit", read[0], read[1], reason, fix))
    if checks:
        return checks, 0

    ours, theirs = _token_strings(s.tokenizer), _token_strings(t.tokenizer)
    shown_ours = f"{len(ours)} tokens, {s.vocab_size} rows"
    shown_theirs = f"{len(theirs)} tokens, {t.vocab_size} rows"
    common = min(len(ours), len(theirs))
    different = [index for index in range(common) if ours[index] != theirs[index]]
    prefix = different[0] if different else common
    shared = min(prefix, s.vocab_size, t.vocab_size)

    if different and prefix <= _last_ordinary_id(t.tokenizer, theirs):
        reason = f"{_disagreement(different, ours, theirs)}: what the teacher says would be read as something else."
        fix = "Use the LM that the student was built from, with its own tokenizer."
        return [Check("vocabulary", "misfit", shown_ours, shown_theirs, reason, fix)], shared

    reasons = []
    if different:  # the student took over ids that its LM had kept in reserve, behind all of its language
        reasons.append(f"{_disagreement(different, ours, theirs)}, all among ids that the teacher keeps in reserve.")
    extra = [index for index in range(common, len(ours)) if ours[index] is not None]
    if extra:
        first = extra[0]
        reasons.append(
            f"Student has {_count(len(extra), 'token')} that the teacher lacks (id {first}: {ours[first]!r})."
        )
    beyond = [index for index in range(common, len(theirs)) if theirs[index] is not None]
    if beyond:
        first = beyond[0]
        reasons.append(
            f"Teacher has {_count(len(beyond), 'token')} that the student lacks (id {first}: {theirs[first]!r}): what "
            "it predicts there is left out."
        )
    if shared < prefix:
        reasons.append(f"The smaller embedding has rows for {shared} of the {prefix} shared tokens.")
    if any(token is not None for token in ours[shared:]):
        reasons.append(f"Positions with labels from id {shared} on get cross-entropy only.")
    return [Check("vocabulary", "note" if reasons else "fits", shown_ours, shown_theirs, " ".join(reasons))], shared


def _disagreement(different: list[int], ours: _Tokens, theirs: _Tokens) -> str:
    ids = "1 token id differs" if len(different) == 1 else f"{len(different)} token ids differ"
    first = different[0]
    return (
        f"{ids} between the tokenizers, the first is {first} ({ours[first]!r} for the student, {theirs[first]!r} for "
        "the teacher)"
    )


def _token_strings(tokenizer: Any) -> _Tokens:
    """Token string of each id, None where the tokenizer has no token."""
    tokens: dict[int, str] = {index: token for token, index in tokenizer.get_vocab().items()}
    for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        tokens[index] = str(token)
    return [tokens.get(index) for index in range(max(tokens, default=-1) + 1)]


def _last_ordinary_id(tokenizer: Any, tokens: _Tokens) -> int:
    """The last id that is neither special nor added: all that the model learnt as language lies up to here."""
    reserved = {*getattr(tokenizer, "added_tokens_decoder", {}), *getattr(tokenizer, "all_special_ids", [])}
    return max((i for i, token in enumerate(tokens) if token is not None and i not in reserved), default=-1)


def _image_token_ids(s: _Side) -> tuple[int, ...]:
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    for source in (s.config, s.processing, s.tokenizer):
        values = {getattr(source, name, None) for name in names}
        if found := sorted(value for value in values if isinstance(value, int)):
            return tuple(found)
    return ()


def _check_image_tokens(s: _Side, ids: tuple[int, ...]) -> list[Check]:
    shown = ", ".join(map(str, ids)) or "none"
    if not ids:
        reason = "Student's config names no image token: vision and none cannot tell images from text."
        return [Check("image tokens", "note", shown, "", reason, "Use kv_sharing=full or prompt.")]
    outside = [index for index in ids if index >= s.vocab_size]
    if outside:
        listed = ", ".join(map(str, outside))
        reason = f"Student's embedding has {s.vocab_size} rows and none for image token id {listed}."
        return [Check("image tokens", "note", shown, "", reason)]
    return [Check("image tokens", "fits", shown, "")]


def _check_chat_template(s: _Side, t: _Side) -> list[Check]:
    if s.processing is None or t.processing is None:
        return []

    def note(reason: str, fix: str = "") -> list[Check]:
        return [Check("chat template", "note", shown[0], shown[1], reason, fix)]

    templates = s.template, t.template
    shown = tuple("yes" if template else "none" for template in templates)
    if shown == ("yes", "none"):
        return note(
            "Teacher has no chat template, the student has one: turn markers may be new to the teacher.",
            "If there is an instruct LM that the student was built from, use that one.",
        )
    if shown == ("none", "yes"):
        return note(
            "Student has no chat template, the teacher has one: the teacher expects turn markers and sees none.",
            "If there is a base LM that the student was built from, use that one.",
        )
    ours, theirs = (_render(side.tokenizer, template) for side, template in zip((s, t), templates, strict=True))
    if ours == theirs:
        return [Check("chat template", "fits", shown[0], shown[1])]
    return note(
        f"Chat formats differ (student: {_quote(ours)}; teacher: {_quote(theirs)}): the teacher reads the student's."
    )


def _render(tokenizer: Any, template: str | None) -> str | None:
    """One short exchange in the chat format; None without a template, or with one that takes no plain exchange."""
    if template is None:
        return None
    turns = (("user", "Question"), ("assistant", "Answer"))
    as_text = [{"role": role, "content": content} for role, content in turns]
    as_parts = [{"role": role, "content": [{"type": "text", "text": content}]} for role, content in turns]
    for messages in (as_parts, as_text):
        try:
            rendered = str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
        except Exception:  # jinja's errors, and whatever a template raises on a form that it does not know
            continue
        if "Question" in rendered and "'type'" not in rendered:
            return rendered
    return None


def _end_of_turn(s: _Side, t: _Side, shared_vocab_size: int) -> tuple[tuple[int, int], ...]:
    """(student id, teacher id) where the two chat templates end an assistant's turn with different tokens, of which the teacher does
    not know the student's: one event under two names. Empty where they agree, or where it is not plain that they do."""
    ours, theirs = _ends_turn_with(s), _ends_turn_with(t)
    if ours is None or theirs is None or ours == theirs or ours < shared_vocab_size or theirs >= shared_vocab_size:
        return ()
    return ((ours, theirs),)


def _ends_turn_with(side: _Side) -> int | None:
    """The special token right behind an assistant's answer in the rendered chat; None if there is none."""
    rendered = None if side.tokenizer is None else _render(side.tokenizer, side.template)
    if rendered is None or "Answer" not in rendered:
        return None
    behind = rendered.rsplit("Answer", 1)[1].lstrip()
    added: dict[int, Any] = getattr(side.tokenizer, "added_tokens_decoder", {})
    found = [(len(str(token)), i) for i, token in added.items() if token.special and behind.startswith(str(token))]
    return max(found)[1] if found else None


def _check_quantization(t: _Side) -> list[Check]:
    quantization = getattr(t.config, "quantization_config", None)
    if quantization is None:
        return []
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = settings.get("quant_method", "unknown")
    method = str(getattr(method, "value", method))
    reason = (
        f"Teacher is quantised already ({method}): teacher_quantization does not apply, and it teaches what is left."
    )
    return [Check("quantisation", "note", "", method, reason, "Prefer the full-precision weights of the same LM.")]


# --- text -----------------------------------------------------------------------------------------------------------


def _count(number: int | None, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _values(values: Sequence[int | None]) -> str:
    """`8`, or `8 / 2` where layers differ."""
    return " / ".join(str(value) for value in dict.fromkeys(values)) or "none"


def _kinds(layers: Sequence[_Layer]) -> str:
    counts = Counter(layer.kind.replace("_attention", "") for layer in layers)
    return ", ".join(kind if len(counts) == 1 else f"{count} {kind}" for kind, count in counts.items()) or "none"


def _windows(layers: Sequence[_Layer]) -> str:
    counts = Counter(layer.window for layer in layers if layer.window)
    return ", ".join(f"{window} in {count} of {len(layers)}" for window, count in counts.items()) or "none"


def _indices(indices: Sequence[int]) -> str:
    listed = ", ".join(map(str, indices[:4])) + (", ..." if len(indices) > 4 else "")
    return f"{'layer' if len(indices) == 1 else 'layers'} {listed}"


def _quote(text: str | None, limit: int = 120) -> str:
    if text is None:
        return "not to be rendered"
    return repr(text if len(text) <= limit else text[: limit // 2] + " ... " + text[-limit // 2 :])


def _first_sentence(error: BaseException) -> str:
    """What an exception says, cut at its first line or sentence: the rest is usually advice for programmers."""
    text = str(error).strip() or type(error).__name__
    if re.match(r"Validation error for field", text):
        text = text.replace("\n", " ")  # the field is on the first line, the fault on the second
    text = text.splitlines()[0]
    return re.split(r"\.\s", " ".join(text.split()), maxsplit=1)[0].rstrip(".:")


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, TABLE_WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _row(cells: tuple[str, str, str, str], values: int) -> str:
    name, status, *rest = cells
    shown = [cell if len(cell) <= values else cell[: values - 3] + "..." for cell in rest]
    return "  ".join([f"{name:<16}", f"{status:<6}", *(f"{cell:<{values}}" for cell in shown)]).rstrip()


# --- guessing the teacher -------------------------------------------------------------------------------------------

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
            f"The config and card of {student!r} name no language model. Pass the LM that it was built from as --teacher."
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
        if _looks_local(source):
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
        return _read_json(path) if path else None

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


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


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
        if _is_vision_key(key) or not re.search(r"(^|_)(lm|llm|text|language)(_|$)", key):
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
    if any(_is_vision_key(key) and value is not None for key, value in config.items()):
        # CLIP has a vision config too, and writes no text.
        return "vlm" if not known or CONFIG_MAPPING[model_type] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else "vision"
    own_code = "AutoModelForCausalLM" in (config.get("auto_map") or {})
    return "lm" if own_code or (known and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING) else "vision"

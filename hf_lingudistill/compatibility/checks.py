"""Roles, layers, attention, positions, sizes: one function per line of the table, from configs alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .configs import Layer, Side, modeling_source, rope_of, setting
from .table import Check, Status, count

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_Rope = dict[str, dict[str, Any]]  # parameters by layer type, "" where all layers share them

USE_THE_ORIGINAL_LM = "Use the LM that the student was built from."
UNLESS_ORIGINAL = "If this is not the LM that the student was built from, use that one."
SEEING = "Or give it a teacher of its own class that sees, such as the VLM before: kv_sharing=images shares nothing."
USE_SOFTMAX = "Use a VLM and LM with plain softmax self-attention in every layer (Llama, Qwen2, Qwen3, Gemma, ...)."
SOFTMAX_ATTENTION = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "reference_sliding_attention"}
)
# Mixers without softmax that `mixers.py` can follow, as their modeling files show them; and the settings that must agree for it
_FOLLOWED = {
    "linear_attention": r"self\.in_proj_qkv = (?s:.*)self\.in_proj_z = (?s:.*)self\.in_proj_b = (?s:.*)self\.in_proj_a = "
    r"|self\.in_proj_qkvz = (?s:.*)self\.in_proj_ba = ",
    "conv": r"class \w+ShortConv\(nn\.Module\):(?s:.*?)self\.in_proj = ",
}
_MIXER_SIZES = {
    "linear_attention": (
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
    ),
    "conv": ("hidden_size",),
}
# What no config shows: students of these types cannot be followed, whatever their language model is
_NO_DECODER = "does not give access to its decoder in transformers (get_decoder() returns the model with its head)"
_UNREACHABLE = dict.fromkeys(
    ("blip-2", "instructblip", "instructblipvideo"),
    "runs its language model with its head inside its own forward, so that there is no hidden state to distil from",
) | {
    "shieldgemma2": "is saved by AutoModelForImageTextToText in transformers under names that it does not find again. It is a Gemma 3: in a "
    "copy whose config.json says model_type gemma3, it can be trained",
    "llama4": _NO_DECODER,
    "nemotron_h_omni": _NO_DECODER,
    "diffusion_gemma": "is no autoregressive model: it fills in blocks of tokens by denoising, and a next-token distribution of its LM "
    "has nothing to teach it",
}


def check_roles(s: Side, t: Side, *, sees: bool = False) -> list[Check]:
    """sees: the teacher is to get the images themselves."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    def misfit(reason: str, fix: str = USE_THE_ORIGINAL_LM) -> list[Check]:
        return [Check("roles", "misfit", s.model_type, t.model_type, reason, fix)]

    if t.is_vlm and not s.is_vlm:
        return misfit(
            f"The student and teacher look swapped: {s.title} was given as the student and is a text-only model, "
            f"{t.title} was given as the teacher and is a vision-language model.",
            "Exchange the two.",
        )
    own_code = "AutoModelForCausalLM" in (getattr(s.config, "auto_map", None) or {})
    if not s.is_vlm and type(s.config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:  # UDOP, Evolla, pi0
        return misfit(
            f"Student {s.title} has no vision config that tells where its images go: it cannot be followed.",
            "Use another VLM.",
        )
    if not s.is_vlm:
        return misfit(
            f"Student {s.title} has no vision config: it is a text-only model.",
            "Pass the vision-language model as the student.",
        )
    if sees and not t.is_vlm:
        return misfit(
            f"kv_sharing=images gives the teacher the images themselves, and {t.title} is a text-only LM.",
            "Name a VLM as the teacher, such as the student before it was tuned, or choose another kv_sharing.",
        )
    for side in (s, t):
        if side.config.is_encoder_decoder:
            return misfit(
                f"{side.role.capitalize()} {side.title} is an encoder-decoder: KV sharing needs decoder-only models.",
                "Use a decoder-only VLM and its LM.",
            )
    own_code = "AutoModelForCausalLM" in (getattr(t.config, "auto_map", None) or {})
    for side in (s, t):
        if reason := _UNREACHABLE.get(side.model_type):
            return misfit(f"{side.role.capitalize()} {side.title} {reason}.", "Use another VLM.")
    if t.is_vlm:
        if type(t.config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return misfit(
                f"Teacher {t.title} is not a VLM that AutoModelForImageTextToText loads from transformers itself."
            )
        if sees:
            reason = "Teacher is a VLM, run whole on the images themselves."
        else:
            reason = (
                "Teacher is a VLM: its text half teaches, loaded without the tower. With kv_sharing=images it is run whole, "
                "on the images themselves."
            )
        return [Check("roles", "note", s.model_type, t.model_type, reason)]
    if type(t.config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        if re.search(r"_text(_model)?$", t.model_type):
            return misfit(
                f"Teacher {t.title} is the text half of a vision-language model, and transformers has no causal LM of this type.",
                "Use the LM that the student was built from; where there was none, the VLM that it was tuned from, whose text half can teach.",
            )
        if type(t.config) is type(s.text) and type(s.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:  # Mistral 4
            return misfit(
                f"Teacher {t.title} is of the type of the student's language model, and transformers has no causal LM of this type.",
                f"Use a VLM of type {s.model_type} as the teacher, such as the one that the student was tuned from: its text half teaches.",
            )
        return misfit(f"Teacher {t.title} is not a model that AutoModelForCausalLM loads.")
    for architecture in t.config.architectures or []:
        if re.search(r"Classification$|ForQuestionAnswering$|ForMaskedLM$", architecture):
            return misfit(f"Teacher {t.title} was saved as {architecture}: it has no language-model head.")
    return [Check("roles", "fits", s.model_type, t.model_type)]


def check_same_inputs(s: Side, t: Side, ours: tuple[int, ...], theirs: tuple[int, ...]) -> list[Check]:
    """Whether the teacher can be run on the student's own inputs, as far as configs tell; `image_check.py` tries it. ours, theirs: ids
    that stand for images."""
    if s.model_type != t.model_type:
        reason = f"kv_sharing=images runs the teacher on the student's own inputs, and {t.model_type} does not read those of {s.model_type}."
        fix = "Use a teacher of the student's class, such as the VLM before it was tuned, or another kv_sharing."
        return [Check("inputs", "misfit", s.model_type, t.model_type, reason, fix)]
    shown = [", ".join(map(str, ids)) or "none" for ids in (ours, theirs)]
    if ours != theirs:
        reason = (
            f"kv_sharing=images runs the teacher on the student's own inputs, and the two mark images by other tokens (student: "
            f"{shown[0]}; teacher: {shown[1]})."
        )
        fix = "Use the VLM that the student was tuned from, or another kv_sharing."
        return [Check("inputs", "misfit", shown[0], shown[1], reason, fix)]
    return [Check("inputs", "fits", s.model_type, t.model_type)]


def check_architecture(s: Side, t: Side) -> list[Check]:
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


def check_layers(s: Side, t: Side) -> list[Check]:
    """Number of layers, and the shape of K/V layer by layer."""
    ours, theirs = len(s.layers), len(t.layers)
    checks = [Check("decoder layers", "fits", str(ours), str(theirs))]
    if ours != theirs:
        reason = (
            f"Teacher has {count(theirs, 'layer')}, the student's language model has {ours}: KV sharing pairs layers "
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
    for kind in sorted({layer.kind for layer in s.layers} & _MIXER_SIZES.keys()):
        for size in _MIXER_SIZES[kind]:
            checks += _compare_layers(
                *(size, "channel", [setting(s.text, size)], [setting(t.text, size)]),
                f"what its {kind} layers write must be what the student's read",
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
    found = f"Teacher has {count(theirs[first], noun)}{per}{where}, the student's language model has {ours[first]}"
    if noun == "channel":
        found = f"Teacher has {name} {theirs[first]}, the student's language model {ours[first]}"
    reason = f"{found}: {why}."
    return [Check(name, "misfit", *shown, reason, USE_THE_ORIGINAL_LM)]


def check_attention(s: Side, t: Side) -> list[Check]:
    checks = [*_attention_problems(s), *_attention_problems(t)]
    shown = _kinds(s.layers), _kinds(t.layers)
    different = [i for i, pair in enumerate(zip(s.layers, t.layers, strict=False)) if len(_mixed(*pair)) > 1]
    if different and not any(check.status == "misfit" for check in checks):
        where = _indices(different)
        reason = f"Student and teacher mix tokens in different ways ({where}): KV sharing pairs layers one to one."
        checks.append(Check("attention", "misfit", *shown, reason, USE_THE_ORIGINAL_LM))
    return checks or [Check("attention", "fits", *shown)]


def _mixed(*layers: Layer) -> set[str]:
    """The ways in which these layers mix tokens; "" is softmax attention."""
    return {layer.kind if layer.kind in _MIXER_SIZES else "" for layer in layers}


def _attention_problems(side: Side) -> list[Check]:
    """What keeps this model's layers from passing on plain keys and values, one line each."""
    text, layers, subject = side.text, side.layers, side.subject
    all_layers = count(len(layers), "layer")
    checks = []

    def found(shown: str, reason: str, status: Status = "misfit") -> None:
        ours, theirs = (shown, "") if side.role == "student" else ("", shown)
        fix = f"{USE_SOFTMAX} {SEEING}" if side.role == "student" else USE_SOFTMAX
        checks.append(Check("attention", status, ours, theirs, reason, fix if status == "misfit" else ""))

    source = modeling_source(text)
    for kind in sorted({layer.kind for layer in layers} - SOFTMAX_ATTENTION):
        where = [index for index, layer in enumerate(layers) if layer.kind == kind]
        if kind in _FOLLOWED and re.search(_FOLLOWED[kind], source or ""):
            if side.role == "student":
                found(
                    f"{kind} in {len(where)} of {len(layers)}",
                    f"{subject} has {len(where)} of {all_layers} of kind {kind!r}: what tokens write to their state is shared, and "
                    "the teacher runs them over whole rows (docs/families.md).",
                    "note",
                )
            continue
        why = "they do not keep the plain keys and values that KV sharing passes on"
        if "indexed" in kind or kind == "qwen_sparse_attention":  # what transformers 5.17 calls it
            why = "an indexer of its own picks the keys of each query, which the other model's queries cannot follow"
        found(
            f"{kind} in {len(where)} of {len(layers)}",
            f"{subject} has {len(where)} of {all_layers} of kind {kind!r} ({_indices(where)}): {why}.",
        )
    crossed = [index for index in setting(text, "cross_attention_layers") or [] if index < len(layers)]
    if crossed:
        found(
            f"cross-attention in {len(crossed)} of {len(layers)}",
            f"{subject} has {len(crossed)} of {all_layers} with cross-attention ({_indices(crossed)}): a plain LM has "
            "no layer to pair with them.",
        )
    elif setting(text, "cross_layer_interval") or setting(text, "add_cross_attention"):
        found("cross-attention", f"{subject} has cross-attention: a plain LM has no layer to pair with it.")
    topk = setting(text, "index_topk")
    if topk and not any("index" in layer.kind for layer in layers):
        found(
            "sparse attention",
            f"{subject} has sparse attention (index_topk={topk}): an indexer of its own picks the keys of each query, which the other "
            "model's queries cannot follow.",
        )
    if any(layer.query_heads is None for layer in layers):
        found(
            "no attention heads", f"{subject} ({text.model_type}) names no attention heads: it has no keys or values."
        )
    elif source:  # two traits that no config shows
        if re.search(r"self\.\w*sinks?\w*\s*=\s*nn\.", source) and "s_aux=" not in source:
            found(
                "attention sinks",
                f"{subject} ({text.model_type}) has attention sinks (a learned share of the attention that goes to no key) and does "
                "not hand them to transformers' attention interface: they cannot be reproduced.",
            )
        if "ALL_ATTENTION_FUNCTIONS" not in source:
            found(
                "own attention code",
                f"{subject} ({text.model_type}) computes attention without transformers' attention interface: its K/V "
                "cannot be recorded.",
            )
    if reused := setting(text, "num_kv_shared_layers"):
        shown = f"{count(reused, 'layer')} reuse K/V"
        found(shown, f"{subject}: {shown} of earlier layers, which this library is not tested with.", "note")
    if side.role == "student" and setting(text, "use_bidirectional_attention"):
        reason = (
            "Student's prompt attends in both directions: in full and prompt the teacher follows its masks, in none "
            "it reads text from left to right."
        )
        found("bidirectional prompt", reason, "note")
    return checks


def check_sliding_window(s: Side, t: Side) -> list[Check]:
    ours, theirs = _windows(s.layers), _windows(t.layers)
    if [layer.window for layer in s.layers] == [layer.window for layer in t.layers] or ours == theirs == "none":
        return [Check("sliding window", "fits", ours, theirs)]
    reason = (
        f"Sliding windows differ (student: {ours}; teacher: {theirs}): the teacher follows the student's masks in "
        "full, prompt and vision, and its own with kv_sharing=none."
    )
    return [Check("sliding window", "note", ours, theirs, reason)]


def check_rope(s: Side, t: Side) -> list[Check]:
    ours, theirs = rope_of(s.text), rope_of(t.text)
    shown = _rope_summary(ours), _rope_summary(theirs)
    checks = []
    for side, rope, why, fix in (
        (s, ours, "the teacher's queries are placed by it", f"Use a VLM whose language model has RoPE. {SEEING}"),
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


def check_softcapping(s: Side, t: Side) -> list[Check]:
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


def check_sizes(s: Side, t: Side) -> list[Check]:
    checks = []
    for name, what, ours, theirs in (
        ("hidden_size", "Hidden sizes", str(setting(s.text, "hidden_size")), str(setting(t.text, "hidden_size"))),
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


def check_quantization(t: Side) -> list[Check]:
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


def _values(values: Sequence[int | None]) -> str:
    """`8`, or `8 / 2` where layers differ."""
    return " / ".join(str(value) for value in dict.fromkeys(values)) or "none"


def _kinds(layers: Sequence[Layer]) -> str:
    counts = Counter(layer.kind.replace("_attention", "") for layer in layers)
    return ", ".join(kind if len(counts) == 1 else f"{count} {kind}" for kind, count in counts.items()) or "none"


def _windows(layers: Sequence[Layer]) -> str:
    counts = Counter(layer.window for layer in layers if layer.window)
    return ", ".join(f"{window} in {count} of {len(layers)}" for window, count in counts.items()) or "none"


def _indices(indices: Sequence[int]) -> str:
    listed = ", ".join(map(str, indices[:4])) + (", ..." if len(indices) > 4 else "")
    return f"{'layer' if len(indices) == 1 else 'layers'} {listed}"

"""What a plan needs to know of a model: counted on the model that transformers builds from the config on the meta device.

torch and transformers are imported where a config is read: a wrong option should be reported without that wait.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .known_models import BUILT_IN, BUILT_IN_PAIRS
from .setup import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The linear layers that examples/baselines/lora.yaml adapts
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TowerFacts:
    """A stack of transformer layers: a language model or a vision tower.

    heads_width, kv_width: heads x head size. gated: the MLP has a gate (three matrices) and the norms are RMSNorm; otherwise
    two and LayerNorm. layer_parameters: of one layer. linear_parameters: of all linear weights in the layers.
    largest_linear: elements of the largest of them. lora_width: sum of in + out features of adapted layers. mixers: layers without
    attention that `mixers.py` follows. mixer_writes: elements per token that these write for others, all together. mixer_work:
    multiply-adds per token of their convolutions and scans, all together. mixer_width: elements per token of the widest one's projections.
    """

    layers: int
    hidden: int
    heads: int
    heads_width: int
    kv_width: int
    intermediate: int
    gated: bool
    layer_parameters: int
    linear_parameters: int
    largest_linear: int
    lora_width: int
    mixers: int = 0
    mixer_writes: int = 0
    mixer_work: int = 0
    mixer_width: int = 0


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs to know of a model. parameters: all, tied ones once. vocab: rows of the head. embedding: elements of
    the token embedding. tied: the head is the embedding. patches_per_token: of the vision tower, per image token. tile_patches: those of one
    image or tile, which its attention keeps apart from the others'; None = the config does not say (an image has as many as it needs).
    beside: parameters that text does not run through: tower and projector."""

    name: str
    parameters: int
    vocab: int
    embedding: int
    tied: bool
    text: TowerFacts
    vision: TowerFacts | None = None
    patches_per_token: int = 1
    tile_patches: int | None = None
    beside: int = 0


def read_pair(student: str, teacher: str | None) -> tuple[ModelFacts, ModelFacts]:
    """The facts of a VLM and of its LM, each a folder, a Hub id, or one of `BUILT_IN`, which need no Hub.

    teacher: None = the one that `BUILT_IN_PAIRS`, or the student's config or card, names.

    Raises:
        PlanError: if one of the two is not a causal LM, or if the student has no vision tower.
        UnreadableModelError: if a config cannot be read, or no teacher is named.
    """
    from ...compatibility import named_teacher

    if teacher is None:
        teacher = BUILT_IN_PAIRS.get(student) or named_teacher(student)
    facts = _read_facts("student", student), _read_facts("teacher", teacher)
    if facts[0].vision is None:
        raise PlanError(f"The student {student!r} has no vision tower: pass a vision-language model.")
    return facts


def _read_facts(role: str, name_or_path: str) -> ModelFacts:
    if name_or_path in BUILT_IN and not os.path.exists(name_or_path):
        from transformers import AutoConfig

        settings = dict(BUILT_IN[name_or_path])
        return model_facts(AutoConfig.for_model(settings.pop("model_type"), **settings), name_or_path)
    from ...compatibility import load_config

    return model_facts(load_config(role, name_or_path, trust_remote_code=False, revision=None), name_or_path)


def model_facts(config: PreTrainedConfig, name: str = "") -> ModelFacts:
    """Count a model that is built from its config on the meta device, where weights have shapes and no memory.

    Raises:
        PlanError: if transformers has no model with a language-model head for it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            kind: Any = AutoModelForImageTextToText if _vision_config(config) is not None else AutoModelForCausalLM
            model: Any = kind.from_config(config)
    except (ValueError, KeyError) as error:
        raise PlanError(
            f"No model can be built from the config of {name!r}: {' '.join(str(error).split())}"
        ) from error
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    decoder, text, vision = model.get_decoder(), config.get_text_config(), _vision_config(config)
    if not hasattr(decoder, "layers"):
        raise PlanError(
            f"{name!r} has a decoder of a class that keys and values are not shared with ({type(decoder).__name__}): `lingudistill check` says which "
            "models fit."
        )
    return ModelFacts(
        name=name,
        parameters=sum(p.numel() for p in model.parameters()),
        vocab=head.shape[0],
        embedding=embedding.numel(),
        tied=head is embedding,
        text=_with_mixers(_tower(text, decoder.layers), decoder),
        vision=None if vision is None else _tower(vision, _vision_layers(model, decoder)),
        patches_per_token=_patches_per_token(config),
        tile_patches=_tile_patches(config),
        beside=0 if vision is None else _beside(model),
    )


def _beside(model: Any) -> int:
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    text = {id(p) for part in parts for p in part.parameters()}
    return sum(int(p.numel()) for p in model.parameters() if id(p) not in text)


def _vision_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    vision = getattr(config, "vision_config", None)
    return None if vision is None or isinstance(vision, dict) else vision


def _vision_layers(model: Any, decoder: Any) -> Any:
    """The longest list of layers outside the decoder."""
    from torch import nn

    inside = set(decoder.modules())
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and m not in inside and len(m) > 0]
    return max(lists, key=len)


def _tower(config: PreTrainedConfig, layers: Any) -> TowerFacts:
    from torch import nn

    named = [(name, m) for name, m in layers.named_modules() if isinstance(m, nn.Linear)]
    heads = _first(config, "num_attention_heads", "num_heads")
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return TowerFacts(
        layers=len(layers),
        hidden=config.hidden_size,
        heads=heads,
        heads_width=width,
        kv_width=width // heads * (getattr(config, "num_key_value_heads", None) or heads),
        intermediate=_first(config, "intermediate_size"),
        gated=any(name.endswith("gate_proj") for name, _ in named),
        layer_parameters=sum(p.numel() for p in layers[0].parameters()),
        linear_parameters=sum(m.weight.numel() for _, m in named),
        largest_linear=max(m.weight.numel() for _, m in named),
        lora_width=sum(m.in_features + m.out_features for name, m in named if name.endswith(LORA_TARGETS)),
    )


def _with_mixers(tower: TowerFacts, decoder: Any) -> TowerFacts:
    from ...mixers import mixers_of

    def width(mixer: Any, names: tuple[str, ...]) -> int:
        return sum(int(mixer.module.get_submodule(name).out_features) for name in names)

    found = mixers_of(decoder)
    return replace(
        tower,
        mixers=len(found),
        mixer_writes=sum(width(mixer, mixer.written) for mixer in found),
        mixer_work=sum(_scan_work(mixer.module) for mixer in found),
        mixer_width=max((width(mixer, (*mixer.written, *mixer.own)) for mixer in found), default=0),
    )


def _scan_work(mixer: Any) -> int:
    """Multiply-adds per token: a weight of the convolution each, and where there is a state (key size x value size in each head) three
    products with it: what is there is read, written over, and read by the query. Kernels that take tokens by chunks do more of them at once."""
    conv = getattr(mixer, "conv1d", None) or mixer.conv
    state = mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim if hasattr(mixer, "head_k_dim") else 0
    return int(conv.weight.numel() + 3 * state)


def _first(config: PreTrainedConfig, *names: str) -> int:
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise PlanError(f"The {config.model_type} config has no {' or '.join(names)}: its memory cannot be planned.")


def _tile_patches(config: PreTrainedConfig) -> int | None:
    vision = _vision_config(config)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if size is None or patch is None:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    tall, wide = patch if isinstance(patch, list | tuple) else (patch, patch)
    return int(height // tall) * int(width // wide)


def _patches_per_token(config: PreTrainedConfig) -> int:
    """Vision patches that become one image token: pixel shuffle (Idefics3, SmolVLM, InternVL), patch merging (Qwen-VL), pooling
    (Gemma 3)."""
    vision = _vision_config(config)
    if pooled := getattr(config, "mm_tokens_per_image", None):
        return (_first(vision, "image_size") // _first(vision, "patch_size")) ** 2 // int(pooled)  # type: ignore[arg-type]
    shrunk = 1 / (getattr(config, "downsample_ratio", None) or 1)
    side = getattr(config, "scale_factor", None) or getattr(vision, "spatial_merge_size", None) or shrunk
    return round(side**2)

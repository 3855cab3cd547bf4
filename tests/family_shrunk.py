"""Configs of any VLM class made small, and that of the LM behind each."""

from __future__ import annotations

import re
from typing import Any

VOCAB, FIRST_IMAGE_ID = 352, 336  # the tiny tokenizer has about 320 tokens

# By name, wherever in a config it stands. A head has 16 dimensions, of which M-RoPE turns 8 pairs.
SIZES: dict[str, Any] = dict.fromkeys(
    (
        *("hidden_size", "d_model", "embed_dim", "out_hidden_size", "projection_dim", "embedding_dim", "n_embd"),
        *("vision_feature_dim", "text_hidden_size", "projector_hidden_size", "mlp_hidden_size", "output_hidden_size"),
        *("image_embed_dim", "output_dim", "proj_hidden_size", "latent_dim", "projection_hidden_size", "hidden_dim"),
        *(
            "vision_hidden_size",
            "embedding_size",
            "mm_hidden_size",
            "adapter_hidden_size",
            "projector_intermediate_size",
        ),
    ),
    64,
) | {
    **dict.fromkeys(("intermediate_size", "ffn_dim", "mlp_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("depth", "vision_layers", "num_local_layers", "num_global_layers"), 1),
    **dict.fromkeys(
        ("num_attention_heads", "num_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "global_head_dim", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(
        ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "moe_num_shared_experts"), 1
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size"), 16),
    "codebook_dim": 64,
    "hidden_size_per_layer_input": 0,  # which needs token ids beside embeddings
    "image_size": 32,
    "patch_size": 8,
    "num_kv_shared_layers": 0,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 256,
    "mamba_num_heads": 4,
    "ssm_state_size": 16,
    "n_groups": 2,
}
# The LM that a text half was made from, where the text half's own type has no causal LM
LM_OF = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_5_omni_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_omni_moe_text": "qwen3_moe",
    "glm4v_text": "glm4",
    "glm4v_moe_text": "glm4_moe",
    "glm_ocr_text": "glm4",
    "ernie4_5_vl_moe_text": "ernie4_5_moe",
    "paddleocr_vl_text": "ernie4_5",
    "granite4_vision_text": "granite",
    "granite_docling_text": "granite",
    "hunyuan_vl_text": "hunyuan_v1_dense",
}

# Where a class's defaults are no model: what published configs say, or what the class's own documentation does
_GLM_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
PUBLISHED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm4v", "glm46v", "glmga"), {"text_config": {"rope_parameters": _GLM_ROPE}}),
    "cohere_compass": {  # rotary embeddings in local layers, none in global ones
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention"] * 20,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50000.0, "mrope_section": [24, 20, 20]},
                "full_attention": None,
            },
        }
    },
    "chameleon": {"vocabulary_map": {"<image>": 8711, "IMGIMGA": 4}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 11, "num_experts_per_tok": 6}},
    "emu3": {"vocabulary_map": {"<image>": 151669, "<|extra_200|>": 151847}},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 1, 0, 1],
        "downsample_rate": "1/2",
    },
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 64}}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151652},  # which the class leaves to the checkpoint
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 151652,
        "text_config": {"head_dim": 128, "num_attention_heads": 32},
    },
    "step3p7": {
        "text_config": {"layer_types": ["full_attention"] + ["sliding_attention"] * 44, "sliding_window": 512},
    },
}
# Sizes that hang together
TINY: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "vision_config": {"codebook_size": 8, "base_channels": 32},
        "audio_config": {"codebook_size": 8},
        "image_token_offset": VOCAB - 16,
        "audio_token_offset": VOCAB - 8,
    },
    "chameleon": {"vocabulary_map": {"<image>": FIRST_IMAGE_ID, "IMGIMGA": 4}},
    "emu3": {"vocabulary_map": {"<image>": FIRST_IMAGE_ID, "<|extra_200|>": 5}, "vq_config": {"base_channels": 32}},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0}},
    "hy_v4_vl": {"text_config": {"qk_rope_head_dim": 16}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1]}},
    "muse_spark": {"audio_config": {"patch_sizes": [4, 4], "hidden_sizes": [64, 64], "depths": [1, 1]}},
}


def published(model_type: str) -> Any:
    """The config of a class, at the size that it has by default; of an LM's type, a LLaVA around it."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return CONFIG_MAPPING["llava"](text_config=CONFIG_MAPPING[model_type]())
    return CONFIG_MAPPING[model_type](**PUBLISHED.get(model_type, {}))


def tiny(model_type: str) -> Any:
    """The config of a class, small enough to build on the spot."""
    return shrink(published(model_type), TINY.get(model_type, {}))


def shrink(config: Any, given: dict[str, Any] | None = None) -> Any:
    """A config of the same class with the same kinds of layers. given: settings that are not to be found by name."""
    from transformers import PreTrainedConfig

    from hf_lingudistill.compatibility.configs import modeling_source

    settings = {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "model_type")}
    if "conv_L_cache" in settings and "conv" not in settings["layer_types"]:  # the class's default has none
        settings |= {"layer_types": ["conv", "full_attention"] * (settings["num_hidden_layers"] // 2)}
    taken = iter(range(FIRST_IMAGE_ID, VOCAB))
    for name, value in settings.items():
        own = config.__dict__.get(name)
        if isinstance(own, PreTrainedConfig):
            settings[name] = shrink(own, (given or {}).get(name)).to_dict()
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            settings[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}[name]
        elif re.search(r"token_(id|index)$", name) and isinstance(value, int):
            settings[name] = next(taken)
        elif (
            name in SIZES and value is not None and not (isinstance(value, list) and not isinstance(SIZES[name], list))
        ):
            settings[name] = SIZES[name]
        elif name in SIZES and isinstance(value, list) and len(value) == 2:  # height and width
            settings[name] = [SIZES[name]] * 2
    if settings.get("kv_lora_rank"):  # the rotary part alone
        settings.pop("head_dim", None)
        settings["num_key_value_heads"] = settings.get("num_attention_heads")
    if (kept := _kept_layers(config, settings)) is not None:
        count = config.__dict__["num_hidden_layers"]
        for name, value in config.to_dict().items():
            if (
                isinstance(value, list)
                and len(value) == count
                and name not in ("mrope_section", "vision_feature_layer")
            ):
                settings[name] = [settings[name][i] if isinstance(settings[name], list) else value[i] for i in kept]
        settings["num_hidden_layers"] = len(kept)
        if special := settings.get("per_layer_config"):  # Gemma 4: wider heads where attention is global
            at = {int(index): value for index, value in special.items()}
            settings["per_layer_config"] = {
                i: {k: 32 if k == "head_dim" else SIZES.get(k, v) for k, v in at[old].items()}
                for i, old in enumerate(kept)
                if old in at
            }
    if config.__dict__.get("head_dim", 0) is None and "num_attention_heads" in settings:
        settings["head_dim"] = SIZES["head_dim"]
    for name in ("rope_parameters", "rope_scaling"):
        if not settings.get(name):
            settings.pop(name, None)
        elif isinstance(settings[name], dict):
            settings[name] = _sections(settings[name], "mrope_section" in (modeling_source(config) or ""))
    nested = {name for name, value in config.__dict__.items() if isinstance(value, PreTrainedConfig)}
    settings |= {name: value for name, value in (given or {}).items() if name not in nested}
    return type(config).from_dict(settings)


def stand_in_for_timm() -> None:
    """Let vision towers of timm be modules without weights: timm needs torchvision, and towers do not run here."""
    import torch
    from transformers import MODEL_MAPPING, Gemma3nVisionConfig, PreTrainedModel, TimmWrapperConfig

    class TimmStandIn(PreTrainedModel):
        config_class: Any = None

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.post_init()

    for kind in (TimmWrapperConfig, Gemma3nVisionConfig):
        stand_in = type("TimmStandIn", (TimmStandIn,), {"config_class": kind, "__module__": __name__})
        MODEL_MAPPING.register(kind, stand_in, exist_ok=True)


def _kept_layers(config: Any, settings: dict[str, Any]) -> list[int] | None:
    """Indices of the layers that stay: the first two, and the first of each other kind. None: no kinds are listed."""
    kinds = settings.get("layer_types") or settings.get("layers_block_type")
    if not isinstance(kinds, list) or not kinds or len(kinds) != config.__dict__.get("num_hidden_layers"):
        return None
    return sorted({0, 1, *(kinds.index(kind) for kind in dict.fromkeys(kinds))})


def _sections(rope: dict[str, Any], needed: bool) -> dict[str, Any]:
    """M-RoPE's sections are cut to the pairs of a small head."""
    if any(isinstance(v, dict) for v in rope.values()):
        return {k: _sections(v, needed) if isinstance(v, dict) else v for k, v in rope.items()}
    if rope and (needed or "mrope_section" in rope):
        pairs = int(8 * rope.get("partial_rotary_factor", 1.0))
        part = (pairs + 1) // 3  # the first two are equal: ERNIE interleaves them
        rope = rope | {"mrope_section": [part, part, pairs - 2 * part]}
    return rope


def _without_sections(rope: Any) -> Any:
    return (
        {k: _without_sections(v) for k, v in rope.items() if k != "mrope_section"} if isinstance(rope, dict) else rope
    )


def lm_config(text: Any, other: bool) -> Any:
    """The config of the plain LM behind a text half. other: wider, with another head of queries.

    Raises:
        LookupError: if transformers has none.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = LM_OF.get(text.model_type, text.model_type)
    if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LookupError(f"transformers has no causal LM for {kind}")
    settings = {k: v for k, v in text.to_dict().items() if k not in ("transformers_version", "model_type")}
    if settings.get("head_dim") is None and (heads := getattr(text, "num_attention_heads", None)):
        settings["head_dim"] = text.hidden_size // heads
    settings["tie_word_embeddings"] = False
    if kind == "qwen3_moe":  # as published, and not the class's default
        settings["norm_topk_prob"] = True
    if kind == "glm4":  # whose class turns half of a head where nothing is said
        settings["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
        settings["attention_bias"] = text.model_type == "glm4v_text"
    if kind == "ernie4_5_moe":  # whose experts are those of text alone
        settings["moe_intermediate_size"] = settings["moe_intermediate_size"][0]
    if "rope_parameters" in settings:
        settings["rope_parameters"] = _without_sections(settings["rope_parameters"])
    bound = settings.get("kv_lora_rank") or "conv_L_cache" in settings  # what is shared is as wide as the model
    if other and not bound and settings.get("num_key_value_heads", 4) < 4:
        settings |= {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 6}
    return CONFIG_MAPPING[kind].from_dict(settings) if kind != text.model_type else type(text).from_dict(settings)

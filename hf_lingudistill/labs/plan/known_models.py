"""The sizes of models that people have, so that planning for them needs no Hub.

The fields that decide sizes, as the `config.json` of each repository states them; where they were taken from, and how they were checked:
docs/scale.md. `tests/test_plan.py` holds the number of parameters that transformers builds from each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SIGLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_VIT_300M = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_QWEN_VIT = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2}
_INTERN_VIT = {**_VIT_300M, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True}


def _text(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


_Sizes = tuple[int, int, int, int, int]  # layers, hidden, intermediate, heads, K/V heads
_SMOLLM2_135M, _SMOLLM2_360M, _SMOLLM2_1_7B = (
    (30, 576, 1536, 9, 3),
    (32, 960, 2560, 15, 5),
    (24, 2048, 8192, 32, 32),
)
_QWEN25_05B, _QWEN25_15B, _QWEN25_3B = (24, 896, 4864, 14, 2), (28, 1536, 8960, 12, 2), (36, 2048, 11008, 16, 2)
_QWEN25_7B, _QWEN25_72B = (28, 3584, 18944, 28, 4, 152064), (80, 8192, 29568, 64, 8, 152064)
_LLAMA_7B, _GEMMA3_4B = (32, 4096, 11008, 32, 32), (34, 2560, 10240, 8, 4, 262208)
_GEMMA3_TEXT = {"model_type": "gemma3_text", **_text(*_GEMMA3_4B), "head_dim": 256}


def _smolvlm(text: _Sizes) -> dict[str, Any]:
    return {
        "model_type": "idefics3",
        "text_config": {"model_type": "llama", **_text(*text, 49280)},
        "vision_config": {**_SIGLIP, "image_size": 512, "patch_size": 16},
        "scale_factor": 4,
        "tie_word_embeddings": False,
    }


def _internvl3(text: _Sizes) -> dict[str, Any]:
    return {
        "model_type": "internvl",
        "text_config": {"model_type": "qwen2", **_text(*text, 151674), "tie_word_embeddings": False},
        "vision_config": _INTERN_VIT,
        "tie_word_embeddings": False,
    }


BUILT_IN: Mapping[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": _smolvlm(_SMOLLM2_135M),
    "HuggingFaceTB/SmolVLM-500M-Instruct": _smolvlm(_SMOLLM2_360M),
    "HuggingFaceTB/SmolVLM-Instruct": {
        "model_type": "idefics3",
        "text_config": {"model_type": "llama", **_text(*_SMOLLM2_1_7B, 49155)},
        "vision_config": {**_SO400M, "image_size": 384, "patch_size": 14},
        "scale_factor": 3,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "model_type": "qwen2_5_vl",
        "text_config": _text(*_QWEN25_3B, 151936),
        "vision_config": {**_QWEN_VIT, "intermediate_size": 3420, "out_hidden_size": 2048},
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl",
        "text_config": _text(*_QWEN25_7B),
        "vision_config": {**_QWEN_VIT, "intermediate_size": 3420, "out_hidden_size": 3584},
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-VL-72B-Instruct": {
        "model_type": "qwen2_5_vl",
        "text_config": _text(*_QWEN25_72B),
        "vision_config": {**_QWEN_VIT, "intermediate_size": 3456, "out_hidden_size": 8192},
        "tie_word_embeddings": False,
    },
    "llava-hf/llava-1.5-7b-hf": {
        "model_type": "llava",
        "text_config": {"model_type": "llama", **_text(*_LLAMA_7B, 32064)},
        "vision_config": {"model_type": "clip_vision_model", **_VIT_300M, "image_size": 336, "patch_size": 14},
        "tie_word_embeddings": False,
    },
    "OpenGVLab/InternVL3-1B-hf": _internvl3(_QWEN25_05B),
    "OpenGVLab/InternVL3-2B-hf": _internvl3(_QWEN25_15B),
    "google/gemma-3-4b-it": {
        "model_type": "gemma3",
        "text_config": _GEMMA3_TEXT,
        "vision_config": {
            "model_type": "siglip_vision_model",
            **_SO400M,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": 256,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        **_text(*_SMOLLM2_135M, 49152),
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-360M-Instruct": {
        "model_type": "llama",
        **_text(*_SMOLLM2_360M, 49152),
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {
        "model_type": "llama",
        **_text(*_SMOLLM2_1_7B, 49152),
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-0.5B-Instruct": {"model_type": "qwen2", **_text(*_QWEN25_05B, 151936), "tie_word_embeddings": True},
    "Qwen/Qwen2.5-1.5B-Instruct": {"model_type": "qwen2", **_text(*_QWEN25_15B, 151936), "tie_word_embeddings": True},
    "Qwen/Qwen2.5-3B-Instruct": {"model_type": "qwen2", **_text(*_QWEN25_3B, 151936), "tie_word_embeddings": True},
    "Qwen/Qwen2.5-7B-Instruct": {"model_type": "qwen2", **_text(*_QWEN25_7B), "tie_word_embeddings": False},
    "Qwen/Qwen2.5-72B-Instruct": {"model_type": "qwen2", **_text(*_QWEN25_72B), "tie_word_embeddings": False},
    "lmsys/vicuna-7b-v1.5": {"model_type": "llama", **_text(*_LLAMA_7B, 32000), "tie_word_embeddings": False},
}
# The language model that each student was built from, or one of its shape: examples/recipes says which is which
BUILT_IN_PAIRS: Mapping[str, str] = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolVLM-500M-Instruct": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "HuggingFaceTB/SmolVLM-Instruct": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen/Qwen2.5-3B-Instruct",
    "Qwen/Qwen2.5-VL-7B-Instruct": "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-VL-72B-Instruct": "Qwen/Qwen2.5-72B-Instruct",
    "llava-hf/llava-1.5-7b-hf": "lmsys/vicuna-7b-v1.5",
    "OpenGVLab/InternVL3-1B-hf": "Qwen/Qwen2.5-0.5B-Instruct",
    "OpenGVLab/InternVL3-2B-hf": "Qwen/Qwen2.5-1.5B-Instruct",
    "google/gemma-3-4b-it": "google/gemma-3-4b-it",  # its text half: no LM of its own was published
}

"""Tiny students and teachers of the classes that the recipes name, with their processors, made in memory.

The real sizes stand in `known_models`: of them, the model types are kept and all else is made small. The processors of Qwen2.5-VL and InternVL
hold a video processor that needs torchvision, which tests do not have: they are made without one, and handed to whoever opens the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma3Processor,
    Idefics3Processor,
    InternVLProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hf_lingudistill.labs.plan.known_models import BUILT_IN

# name of the tokenizer's attribute -> token; the first is the image's placeholder in `input_ids`
TOKENS = {
    "idefics3": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    },
    "llava": {"image_token": "<image>"},
    "qwen2_5_vl": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    },
    "internvl": {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    },
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
}
# What a chat template writes for an image
WRITTEN = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
    "gemma3": "<start_of_image>",
}
_WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {
    **_WIDTHS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def family_of(name: str) -> str:
    return str(BUILT_IN[name]["model_type"])


def make_tokenizer(family: str | None) -> PreTrainedTokenizerFast:
    """The LM's tokenizer (None), or the same with a family's own tokens behind it."""
    base = tiny.make_tokenizer(extra=False)
    if family is None:
        return base
    named = TOKENS[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        eos_token=base.eos_token,
        pad_token=base.pad_token,
        bos_token=base.bos_token,
        extra_special_tokens=named,
        return_token_type_ids=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = tiny.CHATML.replace("<image>", WRITTEN.get(family, "<image>"))
    return tokenizer


def make_processor(family: str) -> Any:
    tokenizer = make_tokenizer(family)
    size = {"height": 32, "width": 32}
    if family == "idefics3":
        images = Idefics3ImageProcessorPil(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
        )
        return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)
    if family == "llava":
        return LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size),
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=tokenizer.chat_template,
        )
    if family == "gemma3":
        images = Gemma3ImageProcessorPil(size=size)
        return Gemma3Processor(images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4)
    if family == "internvl":
        images = GotOcr2ImageProcessorPil(size=size, max_patches=2)
        return _without_video(InternVLProcessor, images, tokenizer, image_seq_length=4)
    images = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32})
    return _without_video(Qwen2_5_VLProcessor, images, tokenizer)


def _without_video(kind: type, image_processor: Any, tokenizer: Any, **kwargs: Any) -> Any:
    class WithoutVideo(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    WithoutVideo.__name__ = kind.__name__
    return WithoutVideo(image_processor, tokenizer, None, chat_template=tokenizer.chat_template, **kwargs)


def make_student(name: str, seed: int = 0) -> Any:
    """A random VLM of the class of a model of `known_models`."""
    real = BUILT_IN[name]
    family, tokenizer = str(real["model_type"]), make_tokenizer(str(real["model_type"]))
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in TOKENS[family].items()}
    text: dict[str, Any] = {**_TEXT, "vocab_size": len(tokenizer)}
    text |= {
        key: real["text_config"][key] for key in ("model_type", "tie_word_embeddings") if key in real["text_config"]
    }
    vision: dict[str, Any] = {**_WIDTHS, "image_size": 32, "patch_size": 8}
    vision |= {
        key: real["vision_config"][key] for key in ("model_type", "vision_use_head") if key in real["vision_config"]
    }
    more: dict[str, Any] = {key: real[key] for key in ("tie_word_embeddings",) if key in real}
    if family == "idefics3":
        more |= {"image_token_id": ids["image_token"], "scale_factor": 2, "pad_token_id": 0}
    elif family == "llava":
        more |= {"image_token_index": ids["image_token"], "image_seq_length": 16}
    elif family == "internvl":
        vision |= {"image_size": [32, 32], "patch_size": [8, 8]}
        more |= {"image_token_id": ids["context_image_token"], "image_seq_length": 4, "downsample_ratio": 0.5}
    elif family == "gemma3":
        text |= {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
        more |= {"image_token_index": ids["image_token"], "mm_tokens_per_image": 4}
        more |= {"boi_token_index": ids["boi_token"], "eoi_token_index": ids["eoi_token"]}
    else:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
        vision |= {"window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 32}
        more |= {"image_token_id": ids["image_token"], "video_token_id": ids["video_token"]}
        more |= {"vision_start_token_id": ids["vision_bos_token"], "vision_end_token_id": ids["vision_eos_token"]}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **more)
    student = AutoModelForImageTextToText.from_config(config).eval()
    tiny.scale_up(student, 1.5, seed)
    return student


def make_teacher(name: str, seed: int = 1) -> Any:
    """A random LM of the class of a model of `known_models`."""
    real = BUILT_IN[name]
    settings = {
        **_TEXT,
        "vocab_size": len(make_tokenizer(None)),
        "tie_word_embeddings": real.get("tie_word_embeddings", True),
    }
    torch.manual_seed(seed)
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(real["model_type"]), **settings)).eval()
    tiny.scale_up(teacher, 1.5, seed)
    return teacher


def save_student(name: str, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Write a student with its processor; a processor that cannot be opened here is handed out for this folder as it is."""
    family = family_of(name)
    make_student(name).save_pretrained(folder)
    processor = make_processor(family)
    if family in ("qwen2_5_vl", "internvl"):
        processor.tokenizer.save_pretrained(folder)
        opened = AutoProcessor.from_pretrained

        def from_pretrained(path: Any, *args: Any, **kwargs: Any) -> Any:
            return processor if str(path) == str(folder) else opened(path, *args, **kwargs)

        patch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
        patch.setattr(type(processor), "save_pretrained", lambda self, out, **_: self.tokenizer.save_pretrained(out))
    else:
        processor.save_pretrained(folder)
    return folder

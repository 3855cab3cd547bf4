"""Tiny nanoVLM checkpoints, and what nanoVLM's own code makes of them: `tests/goldens/nanovlm*`.

The goldens were written by

    python tests/nanovlm_golden.py NANOVLM

with a checkout of https://github.com/huggingface/nanoVLM at 4e0c096 (October 2025), torch 2.13, torchvision 0.28, Pillow 12.3
and einops 0.8. None of its code is here, and the tests do not need it. Weights are made from their index, so the
goldens hold none: they hold token ids, a sample of logits, and the pixels of small tiles.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent / "goldens"
TENSORS, TOKENIZER = FOLDER / "nanovlm.safetensors", FOLDER / "nanovlm_tokenizer"
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BASE_VOCABULARY = 320
GRID = {f"r{row}c{col}": f"<row_{row}_col_{col}>" for row in range(1, 9) for col in range(1, 9)}
ALL_TOKENS = {"image_token": "<|image|>", "global_image_token": "<|global_image|>", **GRID}
POSITIONS, COLUMNS = 12, 24  # how many logits of a row are kept

# size of a tile, pixel shuffle, tied head, tiling: one image token and no tiles; 66 tokens, every image enlarged or not
CASES = list(product((256, 512), (2, 4), (True, False), ("whole", "enlarged", "fitted")))


def name_of(case: tuple[int, int, bool, str]) -> str:
    size, shuffle, tied, tiling = case
    return f"{size}-{shuffle}-{'tied' if tied else 'untied'}-{tiling}"


def config_of(size: int, shuffle: int, tied: bool, tiling: str, *, patch: int = 16, **changes: Any) -> dict[str, Any]:
    """nanoVLM's `config.json` of a two-layer model."""
    tokens = {"image_token": "<|image|>"} if tiling == "whole" else ALL_TOKENS
    config = {
        "vit_hidden_dim": 16,
        "vit_inter_dim": 24,
        "vit_patch_size": patch,
        "vit_img_size": size,
        "vit_n_heads": 2,
        "vit_dropout": 0.0,
        "vit_n_blocks": 2,
        "vit_ln_eps": 1e-6,
        "vit_cls_flag": False,
        "vit_model_type": "google/siglip2-base-patch16-512",
        "lm_hidden_dim": 32,
        "lm_inter_dim": 48,
        "lm_rms_eps": 1e-5,
        "lm_re_base": 100000,
        "lm_max_position_embeddings": 8192,
        "lm_base_vocab_size": BASE_VOCABULARY,
        "extra_token_amount": len(tokens),
        "lm_vocab_size": BASE_VOCABULARY + len(tokens),
        "lm_n_heads": 4,
        "lm_n_kv_heads": 2,
        "lm_dropout": 0.0,
        "lm_n_blocks": 2,
        "lm_attn_scaling": 1.0,
        "lm_max_length": 4096,
        "lm_use_tokens": False,
        "lm_tie_weights": tied,
        "lm_model_type": "HuggingFaceTB/SmolLM2-360M-Instruct",
        "lm_tokenizer": str(TOKENIZER),
        "lm_chat_template": CHATML,
        "mp_pixel_shuffle_factor": shuffle,
        "mp_image_token_length": (size // patch // shuffle) ** 2,
        "max_img_size": 2 * size,
        "resize_to_max_side_len": tiling == "enlarged",
        "vlm_extra_tokens": tokens,
        "vlm_load_backbone_weights": True,
        "vlm_checkpoint_path": "checkpoints",
        "hf_repo_name": "nanoVLM",
    }
    if tiling == "whole":  # a checkpoint from before images were split
        del config["max_img_size"], config["resize_to_max_side_len"]
    return config | changes


def tensors_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor of a nanoVLM checkpoint by its name, as its `save_pretrained` stores them (without the rotary buffer).

    Scaled so that logits have a size of 5 to 10, and so that images and attention matter.
    """
    wide, vision = config["lm_hidden_dim"], config["vit_hidden_dim"]
    patch, side = config["vit_patch_size"], config["vit_img_size"] // config["vit_patch_size"]
    narrow = wide // config["lm_n_heads"] * config["lm_n_kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision_encoder.patch_embedding.conv.weight": (vision, 3, patch, patch),
        "vision_encoder.patch_embedding.conv.bias": (vision,),
        "vision_encoder.patch_embedding.position_embedding": (1, side**2, vision),
        "vision_encoder.layer_norm.weight": (vision,),
        "vision_encoder.layer_norm.bias": (vision,),
        "MP.proj.weight": (wide, vision * config["mp_pixel_shuffle_factor"] ** 2),
        "decoder.norm.weight": (wide,),
        "decoder.head.weight": (config["lm_vocab_size"], wide),
    }
    if not config["lm_tie_weights"]:
        shapes["decoder.token_embedding.weight"] = (config["lm_vocab_size"], wide)
    for index in range(config["vit_n_blocks"]):
        for layer, (rows, columns) in {
            "attn.qkv_proj": (3 * vision, vision),
            "attn.out_proj": (vision, vision),
            "mlp.fc1": (config["vit_inter_dim"], vision),
            "mlp.fc2": (vision, config["vit_inter_dim"]),
        }.items():
            shapes[f"vision_encoder.blocks.{index}.{layer}.weight"] = (rows, columns)
            shapes[f"vision_encoder.blocks.{index}.{layer}.bias"] = (rows,)
        for layer, kind in product(("ln1", "ln2"), ("weight", "bias")):
            shapes[f"vision_encoder.blocks.{index}.{layer}.{kind}"] = (vision,)
    for index in range(config["lm_n_blocks"]):
        sizes = {
            "attn.q_proj": (wide, wide),
            "attn.k_proj": (narrow, wide),
            "attn.v_proj": (narrow, wide),
            "attn.out_proj": (wide, wide),
            "mlp.gate_proj": (config["lm_inter_dim"], wide),
            "mlp.up_proj": (config["lm_inter_dim"], wide),
            "mlp.down_proj": (wide, config["lm_inter_dim"]),
        }
        shapes |= {f"decoder.blocks.{index}.{layer}.weight": shape for layer, shape in sizes.items()}
        shapes |= {f"decoder.blocks.{index}.{layer}.weight": (wide,) for layer in ("norm1", "norm2")}
    return {name: _noise(name, shape) for name, shape in shapes.items()}


def _noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers without a pattern, of integer arithmetic (splitmix64): the same on every machine and with every torch."""
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        bits = (np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 20)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
    uniform = (
        torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) / 2**52 - 1.0) * 3**0.5
    )  # of standard deviation 1
    if len(shape) == 1:
        plain = 1.0 if name.endswith("weight") else 0.0  # a norm's weight, or a bias
        return (plain + 0.1 * uniform).float()
    scale = 1.0 if "head" in name or "embedding.weight" in name else 1.1 / (count / shape[0]) ** 0.5
    return (scale * uniform).reshape(shape).float()


def write_nanovlm(folder: Path, config: dict[str, Any], *, keep_embedding: bool = False) -> Path:
    """A checkpoint as nanoVLM writes it: of a tied pair, safetensors keeps the head and names the other in the metadata."""
    from hf_lingudistill.labs.nanovlm import NanoVLMConfig
    from hf_lingudistill.labs.nanovlm.weights import rotary_frequencies

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    tensors = tensors_of(config)
    tensors["decoder.rotary_embd.inv_freq"] = rotary_frequencies(NanoVLMConfig.read(json.dumps(config)))
    metadata = {"decoder.token_embedding.weight": "decoder.head.weight"} if config["lm_tie_weights"] else {}
    if keep_embedding:
        tensors["decoder.token_embedding.weight"] = tensors.pop("decoder.head.weight")
        metadata = {}
    save_file(tensors, folder / "model.safetensors", metadata)
    return folder


def picture(width: int, height: int) -> Image.Image:
    """Stripes and ramps: every tile differs, and resampling shows."""
    y, x = np.mgrid[:height, :width]
    bands = [x * 255 // width, y * 255 // height, ((x // 7 + y // 11) % 2) * 255]
    return Image.fromarray(np.stack(bands, -1).astype(np.uint8))


def conversations() -> Iterator[tuple[list[Image.Image], str, str]]:
    """(images, question, answer): one image, two of which one is black, none."""
    yield [picture(700, 200)], "what shape is in the image?", "a small red circle"
    yield [picture(150, 90), Image.new("RGB", (90, 640))], "is it blue?", "no"
    yield [], "tell me about the sea", "the sea is deep"


def padded(rows: list[torch.Tensor], side: str, value: int) -> torch.Tensor:
    """(rows, longest)"""
    longest = max(map(len, rows))
    return torch.stack(
        [
            torch.nn.functional.pad(
                row, (longest - len(row), 0) if side == "left" else (0, longest - len(row)), value=value
            )
            for row in rows
        ]
    )


def sample(logits: torch.Tensor, lengths: list[int], side: str) -> torch.Tensor:
    """(B, L, vocabulary) -> (B, POSITIONS, COLUMNS): spread over each row's own tokens and over the vocabulary."""
    kept = []
    for row, length in zip(logits, lengths, strict=True):
        own = row[-length:] if side == "left" else row[:length]
        places = torch.linspace(0, length - 1, POSITIONS).long()
        kept.append(own[places][:, torch.linspace(0, own.shape[1] - 1, COLUMNS).long()])
    return torch.stack(kept)


# Small tiles, whose pixels are kept: (tile, longest side, resize_to_max_side_len, width, height)
PIXELS = [
    (16, 32, True, 45, 30),
    (16, 32, True, 20, 31),
    (16, 32, False, 15, 10),
    (16, 32, False, 17, 32),
    (16, 32, False, 200, 150),
    (16, 64, True, 61, 17),
]


def pixel_name(case: tuple[int, int, bool, int, int]) -> str:
    return "pixels/" + "-".join(map(str, case))


def load() -> dict[str, torch.Tensor]:
    return load_file(TENSORS)


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    import torchvision.transforms  # type: ignore[import-not-found]
    from data import processors  # type: ignore[import-not-found]
    from data.datasets import VQADataset  # type: ignore[import-not-found]
    from models.config import VLMConfig  # type: ignore[import-not-found]
    from models.vision_language_model import VisionLanguageModel  # type: ignore[import-not-found]
    from tiny import make_tokenizer

    from hf_lingudistill.labs.json_text import as_json

    FOLDER.mkdir(exist_ok=True)
    make_tokenizer(extra=False).save_pretrained(TOKENIZER)
    written = TOKENIZER / "tokenizer.json"
    written.write_text(as_json(json.loads(written.read_text(encoding="utf-8"))) + "\n", encoding="utf-8")
    found: dict[str, torch.Tensor] = {}
    for case in CASES:
        raw = config_of(*case)
        processors.TOKENIZERS_CACHE.clear()
        model = VisionLanguageModel(VLMConfig(**raw), load_backbone=False).eval()
        missing, unknown = model.load_state_dict(tensors_of(raw), strict=False)
        assert not unknown and set(missing) <= {"decoder.rotary_embd.inv_freq", "decoder.token_embedding.weight"}, (
            missing,
            unknown,
        )
        tokenizer, run = model.tokenizer, raw["mp_image_token_length"]
        if "max_img_size" in raw:
            process = processors.get_image_processor(
                raw["max_img_size"], raw["vit_img_size"], raw["resize_to_max_side_len"]
            )
        else:  # as nanoVLM 0.2 did
            resize = torchvision.transforms.Resize((raw["vit_img_size"],) * 2)
            to_tensor = torchvision.transforms.ToTensor()
            process = lambda image, resize=resize, to_tensor=to_tensor: (to_tensor(resize(image))[None], (1, 1))  # noqa: E731
        dataset = VQADataset([], tokenizer, process, run)
        ids, images = [], []
        for pictures, question, answer in conversations():
            pixels, grids = dataset._process_images(pictures)
            texts = {"texts": [{"user": question, "assistant": answer}]}
            if "max_img_size" in raw:
                messages = dataset._get_messages(texts, grids)
            else:
                messages = dataset._get_messages(texts, [])
                numbers = [f"<image: {n}>" if len(pictures) > 1 else "" for n in range(len(pictures))]
                messages[0]["content"] = (
                    "".join(n + tokenizer.image_token * run for n in numbers) + messages[0]["content"]
                )
            ids.append(
                torch.tensor(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
            )
            images.append(pixels)
            found[f"{name_of(case)}/ids/{len(ids) - 1}"] = ids[-1].to(torch.int32)
        for side in ("left", "right"):
            rows = padded(ids, side, tokenizer.pad_token_id)
            mask = padded([torch.ones_like(row) for row in ids], side, 0)
            with torch.no_grad():
                hidden, _ = model(rows, images, attention_mask=mask)
                logits = model.decoder.head(hidden)
            found[f"{name_of(case)}/logits/{side}"] = sample(logits, list(map(len, ids)), side)
        own = logits[mask.bool()]
        print(
            f"{name_of(case)}: {tuple(rows.shape)} tokens, logits of std {own.std():.1f}, at most {own.abs().max():.0f}"
        )
    for case in PIXELS:
        tile, longest, enlarge, width, height = case
        found[pixel_name(case)] = processors.get_image_processor(longest, tile, enlarge)(picture(width, height))[0]
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, TENSORS)
    print(f"{TENSORS}: {TENSORS.stat().st_size / 1024:.0f} KB", json.dumps(sorted(found)[:3]))


if __name__ == "__main__":
    main(sys.argv[1])

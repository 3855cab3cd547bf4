"""What a nanoVLM `config.json` says, checked: each key is used, known to change nothing, or refused by name.

nanoVLM's config grew with the project, and a checkpoint holds the keys of its day. Where a key came later, its absence means
what the code of that day did:

    lm_chat_template          prompts were "Question: ... Answer:"
    max_img_size              an image was one square, resized bilinearly
    resize_to_max_side_len    images were not enlarged beyond the next whole tile
    mp_image_token_length     follows from the sizes
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

ROW_COLUMN = "<row_{}_col_{}>"

_INT = (
    "vit_hidden_dim vit_inter_dim vit_patch_size vit_img_size vit_n_heads vit_n_blocks lm_hidden_dim lm_inter_dim "
    "lm_max_position_embeddings lm_vocab_size lm_n_heads lm_n_kv_heads lm_n_blocks mp_pixel_shuffle_factor"
).split()
_FLOAT = "vit_dropout vit_ln_eps lm_rms_eps lm_re_base lm_dropout lm_attn_scaling".split()
_BOOL = "vit_cls_flag lm_use_tokens lm_tie_weights".split()
_TEXT = ["lm_tokenizer"]
_LATER: dict[str, type | tuple[type, ...]] = {
    "lm_chat_template": str,
    "max_img_size": int,
    "resize_to_max_side_len": bool,
    "mp_image_token_length": int,
}
# What was trained on, where it was stored, how long rows were: nothing that the model computes from.
_WITHOUT_EFFECT = set(
    "vit_model_type lm_model_type lm_base_vocab_size extra_token_amount lm_max_length lm_eos_token_id hf_repo_name "
    "vlm_load_backbone_weights vlm_checkpoint_path IMAGE_TOKEN_LENGTH TOTAL_SEQUENCE_LENGTH".split()
)
# Keys of code that was tried and taken back: rotary frequencies corrected for longer contexts.
_LONGER_CONTEXT = {"lm_rope_factor", "lm_beta_fast", "lm_beta_slow"}


class NanoVLMError(ValueError):
    """A checkpoint that cannot be converted. The message says what was expected, what was found, what to do."""


@dataclass(frozen=True)
class NanoVLMConfig:
    """A checked nanoVLM config. Sizes in pixels, tokens and channels.

    text: the file as it was. A converted model's config keeps it as a text: transformers sorts the keys of what it saves, and
    the order of `vlm_extra_tokens` is the order of their ids.
    """

    text: str
    raw: dict[str, Any]

    @classmethod
    def read(cls, text: str) -> NanoVLMConfig:
        """Check the content of a `config.json`.

        Raises:
            NanoVLMError: if a key is missing, unknown or of the wrong type, or if it asks for what transformers cannot compute.
        """
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise NanoVLMError(f"config.json is not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise NanoVLMError(f"config.json must hold a nanoVLM config (an object), found {type(raw).__name__}.")
        if "model_type" in raw or "architectures" in raw:
            raise NanoVLMError(
                f"config.json is that of a transformers model (model_type {raw.get('model_type')!r}), not nanoVLM's. To "
                "write a converted model back, pass --reverse."
            )
        _check_keys(raw)
        config = cls(text, raw)
        _check_supported(config)
        return config

    def __getattr__(self, name: str) -> Any:
        """The value of a key; None for one that came later than this checkpoint."""
        try:
            return self.raw[name]
        except KeyError:
            if name in _LATER or name in _WITHOUT_EFFECT:
                return None
            raise AttributeError(name) from None

    @property
    def patches_per_side(self) -> int:
        return int(self.vit_img_size // self.vit_patch_size)

    @property
    def tokens_per_tile(self) -> int:
        return int((self.patches_per_side // self.mp_pixel_shuffle_factor) ** 2)

    @property
    def extra_tokens(self) -> dict[str, str]:
        """name -> token, in the order of their ids."""
        return dict(self.raw["vlm_extra_tokens"])

    @property
    def image_token(self) -> str:
        return self.extra_tokens["image_token"]

    @property
    def global_token(self) -> str | None:
        return self.extra_tokens.get("global_image_token")

    @property
    def tiles_per_side(self) -> int:
        """The most tiles of one side of an image: 1 where images are never split."""
        return int((self.max_img_size or self.vit_img_size) // self.vit_img_size)

    def notes(self) -> list[str]:
        """What a user should know about this checkpoint, one sentence each."""
        found = []
        for key, meaning in {
            "lm_chat_template": "prompts are written as 'Question: ... Answer:'",
            "max_img_size": "an image is one square of vit_img_size, resized bilinearly",
            "resize_to_max_side_len": "images are not enlarged beyond the next whole tile",
        }.items():
            tiling_only = key == "resize_to_max_side_len" and self.max_img_size is None
            if getattr(self, key) is None and not tiling_only:
                found.append(f"config.json has no {key}: {meaning}, as nanoVLM did before that key existed.")
        found += [
            f"{key} is {self.raw[key]}: nanoVLM also drops residual states in training, transformers attention weights only."
            for key in ("vit_dropout", "lm_dropout")
            if self.raw[key]
        ]
        found.append(
            f"Rows of up to {self.lm_max_position_embeddings:,} tokens give nanoVLM's logits; beyond that nanoVLM stretches "
            "its rotary embedding to the length of the row, which no rope type of transformers does."
        )
        return found


def _check_keys(raw: dict[str, Any]) -> None:
    if "vlm_extra_tokens" not in raw:
        raise NanoVLMError(
            "config.json has no vlm_extra_tokens: in the first release of nanoVLM images stood before the text without tokens of "
            "their own, and transformers has no such input. Expected a checkpoint of nanoVLM 0.2 or later."
        )
    if longer := sorted(_LONGER_CONTEXT & raw.keys()):
        raise NanoVLMError(
            f"config.json has {', '.join(longer)}: a rotary embedding for longer contexts that nanoVLM tried and took back. It "
            "is not supported."
        )
    types: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(_INT, int),
        **dict.fromkeys(_FLOAT, (int, float)),
        **dict.fromkeys(_BOOL, bool),
        **dict.fromkeys(_TEXT, str),
        "vlm_extra_tokens": dict,
    }
    if missing := sorted(types.keys() - raw.keys()):
        raise NanoVLMError(
            f"config.json lacks {', '.join(missing)}. Their values cannot be told from the weights: add them as in the "
            "VLMConfig that the checkpoint was trained with."
        )
    if unknown := sorted(raw.keys() - types.keys() - _LATER.keys() - _WITHOUT_EFFECT):
        raise NanoVLMError(
            f"config.json has keys that this converter does not know: {', '.join(unknown)}. They may change what the model "
            "computes. If you know that they do not, remove them from a copy of config.json."
        )
    for key, expected in {**types, **{key: _LATER[key] for key in _LATER.keys() & raw.keys()}}.items():
        value = raw[key]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            names = " or ".join(t.__name__ for t in (expected if isinstance(expected, tuple) else (expected,)))
            raise NanoVLMError(f"{key} in config.json must be of type {names}, found {value!r}.")
    if small := [key for key in _INT if raw[key] < 1]:
        raise NanoVLMError(f"{small[0]} in config.json must be at least 1, found {raw[small[0]]}.")
    if not all(isinstance(part, str) and part for item in raw["vlm_extra_tokens"].items() for part in item):
        raise NanoVLMError("vlm_extra_tokens in config.json must map names to tokens, both texts that are not empty.")


def _check_supported(config: NanoVLMConfig) -> None:
    if config.vit_cls_flag:
        raise NanoVLMError(
            "vit_cls_flag is true: the vision tower would hand on its CLS token alone, which nanoVLM's own projector cannot "
            "split into image tokens. Expected false."
        )
    if config.lm_use_tokens:
        raise NanoVLMError(
            "lm_use_tokens is true: that is nanoVLM's language model by itself. Expected false, as in a VLM."
        )
    if config.lm_attn_scaling != 1:
        raise NanoVLMError(
            f"lm_attn_scaling is {config.lm_attn_scaling}: transformers' Llama does not scale its rotary embedding. Expected 1.0."
        )
    for part, whole in (
        ("vit_n_heads", "vit_hidden_dim"),
        ("lm_n_heads", "lm_hidden_dim"),
        ("lm_n_kv_heads", "lm_n_heads"),
        ("vit_patch_size", "vit_img_size"),
    ):
        if config.raw[whole] % config.raw[part]:
            raise NanoVLMError(
                f"{whole} ({config.raw[whole]}) must be a multiple of {part} ({config.raw[part]}), in nanoVLM as in transformers."
            )
    side, shuffle = config.patches_per_side, config.mp_pixel_shuffle_factor
    if side % shuffle:
        raise NanoVLMError(f"mp_pixel_shuffle_factor ({shuffle}) must divide the {side} patches per side of an image.")
    if config.mp_image_token_length not in (None, config.tokens_per_tile):
        raise NanoVLMError(
            f"mp_image_token_length is {config.mp_image_token_length}, but {side} x {side} patches and a pixel shuffle of "
            f"{shuffle} give {config.tokens_per_tile} tokens per image."
        )
    if not _positions_are_plain(side):
        raise NanoVLMError(
            f"{side} patches per side ({config.vit_img_size} pixels, patches of {config.vit_patch_size}): transformers' Idefics3 "
            "rounds some of their positions to a neighbour's, so its logits would differ from nanoVLM's."
        )
    _check_tokens(config)


def _check_tokens(config: NanoVLMConfig) -> None:
    tokens, side = config.extra_tokens, config.tiles_per_side
    if "image_token" not in tokens:
        raise NanoVLMError(f"vlm_extra_tokens names no image_token, only {', '.join(tokens) or 'nothing'}.")
    if config.max_img_size is None:
        return
    if side < 1 or config.max_img_size % config.vit_img_size:
        raise NanoVLMError(
            f"max_img_size ({config.max_img_size}) must be a multiple of vit_img_size ({config.vit_img_size}): nanoVLM cuts images "
            "into whole tiles."
        )
    if side == 1 and config.global_token:
        return
    wanted = {f"r{row}c{col}": ROW_COLUMN.format(row, col) for row in range(1, side + 1) for col in range(1, side + 1)}
    if odd := sorted(name for name, token in wanted.items() if tokens.get(name) != token):
        raise NanoVLMError(
            f"max_img_size is {config.max_img_size}, which makes up to {side} x {side} tiles, but vlm_extra_tokens has "
            f"{tokens.get(odd[0])!r} for {odd[0]}; expected {wanted[odd[0]]!r}. If the checkpoint was trained on whole images, "
            "remove max_img_size from a copy of config.json."
        )


def _positions_are_plain(side: int) -> bool:
    """Whether Idefics3, which computes each patch's position from fractions, finds 0, 1, ... for whole images."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    fractions = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor([side]))
    found = torch.bucketize(fractions.clamp(max=1.0 - 1e-6), boundaries, right=True)
    return found.tolist() == list(range(side))

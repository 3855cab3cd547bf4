"""Weights quantised through bitsandbytes: how they are asked for, and the arithmetic that they are really computed in."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from ._quiet import drop
from .machine import machine

logger = logging.getLogger(__name__)

# What bitsandbytes' packed CPU kernels take: blocks of 32 rows, whole quantisation blocks of 64 columns.
PACKED_ROWS, PACKED_COLUMNS = 32, 64
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def quantization_config(quantization: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes settings for `nf4`, `int8` or `none`. Embeddings and head are left whole by transformers."""
    if quantization == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)
    if quantization == "int8":
        # bitsandbytes says on every call that it multiplies in fp16; that is what int8 means there
        drop("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast")
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def choose_kernels(model: PreTrainedModel, *, trained: bool = False) -> None:
    """Decide for each 4-bit layer of a model whether it may use bitsandbytes' packed CPU kernels. Before its first forward.

    On a CPU with native bf16, bitsandbytes repacks a 4-bit layer when it first infers, and from then on computes it in bf16
    whatever the compute dtype is, without a gradient, and stops at shapes that do not pack. Packed are therefore only layers that
    compute in bf16 anyway, on a machine that does so natively, in a model that does not train. The others are computed unpacked,
    in their compute dtype; where the shape is why, one warning says so.

    trained: the model is (or carries) what trains.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    wanted = machine().bf16 and not trained
    misfits = []
    for name, layer in _four_bit_layers(model):
        rows, columns = layer.out_features, layer.in_features
        fits = rows % PACKED_ROWS == 0 and columns % max(PACKED_COLUMNS, layer.weight.blocksize) == 0
        packs = wanted and layer.support_avx512bf16_for_cpu and layer.compute_dtype == torch.bfloat16
        if packs and not fits and layer.weight.device.type == "cpu":
            misfits.append(f"{name} ({rows} x {columns})")
        layer.support_avx512bf16_for_cpu = packs and fits
    if misfits:
        more = f" and {len(misfits) - 1} more layers" if misfits[1:] else ""
        logger.warning(
            "%s%s cannot use bitsandbytes' packed bf16 kernels, which need rows divisible by %d and columns by %d: computed "
            "unpacked, which is slower and as exact; without quantisation (--teacher_quantization none) nothing is packed.",
            misfits[0],
            more,
            PACKED_ROWS,
            PACKED_COLUMNS,
        )


def arithmetic_of(model: PreTrainedModel, *, autocast: torch.dtype | None = None) -> str:
    """What the linear layers of a model are multiplied in: `fp32`, `bf16`, `fp16`, `int8`, or `bf16, packed`.

    autocast: the dtype of the autocast that the model runs under.
    """
    if getattr(model, "is_loaded_in_8bit", False):
        return "int8"
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    if getattr(model, "is_loaded_in_4bit", False):
        layers = [layer for _, layer in _four_bit_layers(model)]
        if any(map(_is_packed, layers)):
            return "bf16, packed"
        dtype = next((layer.compute_dtype for layer in layers if layer.compute_dtype is not None), dtype)
    return _SHORT.get(autocast or dtype, str(autocast or dtype).removeprefix("torch."))


def _is_packed(layer: Any) -> bool:
    """Whether a layer is packed, or will be when it first infers."""
    if layer.weight.device.type != "cpu":
        return False
    done = getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    return bool(done or (layer.support_avx512bf16_for_cpu and not layer.training))


def _four_bit_layers(model: PreTrainedModel) -> list[tuple[str, Any]]:
    from bitsandbytes.nn.modules import Linear4bit

    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)]

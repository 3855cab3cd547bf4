"""nanoVLM's tensors under transformers' names, and back. Nothing is computed: tensors are renamed, split and reshaped."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .config import NanoVLMConfig, NanoVLMError

Tensors = dict[str, torch.Tensor]
HEAD, EMBEDDING, ROTARY = "decoder.head.weight", "decoder.token_embedding.weight", "decoder.rotary_embd.inv_freq"
POSITIONS = "vision_encoder.patch_embedding.position_embedding"


def names(config: NanoVLMConfig) -> dict[str, tuple[str, ...]]:
    """nanoVLM's name -> transformers' name; three for a fused query, key and value. Without the rotary frequencies."""
    vision, text = "model.vision_model", "model.text_model"
    found = {
        "vision_encoder.patch_embedding.conv.weight": f"{vision}.embeddings.patch_embedding.weight",
        "vision_encoder.patch_embedding.conv.bias": f"{vision}.embeddings.patch_embedding.bias",
        POSITIONS: f"{vision}.embeddings.position_embedding.weight",
        "vision_encoder.layer_norm.weight": f"{vision}.post_layernorm.weight",
        "vision_encoder.layer_norm.bias": f"{vision}.post_layernorm.bias",
        "MP.proj.weight": "model.connector.modality_projection.proj.weight",
        EMBEDDING: f"{text}.embed_tokens.weight",
        "decoder.norm.weight": f"{text}.norm.weight",
        HEAD: "lm_head.weight",
    }
    fused: dict[str, tuple[str, ...]] = {}
    for index in range(config.vit_n_blocks):
        ours, theirs = f"vision_encoder.blocks.{index}", f"{vision}.encoder.layers.{index}"
        for kind in ("weight", "bias"):
            fused[f"{ours}.attn.qkv_proj.{kind}"] = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            found[f"{ours}.attn.out_proj.{kind}"] = f"{theirs}.self_attn.out_proj.{kind}"
            for here, there in {
                "ln1": "layer_norm1",
                "ln2": "layer_norm2",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }.items():
                found[f"{ours}.{here}.{kind}"] = f"{theirs}.{there}.{kind}"
    for index in range(config.lm_n_blocks):
        ours, theirs = f"decoder.blocks.{index}", f"{text}.layers.{index}"
        found[f"{ours}.attn.out_proj.weight"] = f"{theirs}.self_attn.o_proj.weight"
        found |= {f"{ours}.attn.{p}_proj.weight": f"{theirs}.self_attn.{p}_proj.weight" for p in "qkv"}
        found |= {f"{ours}.mlp.{p}_proj.weight": f"{theirs}.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
        found[f"{ours}.norm1.weight"] = f"{theirs}.input_layernorm.weight"
        found[f"{ours}.norm2.weight"] = f"{theirs}.post_attention_layernorm.weight"
    return {ours: (theirs,) for ours, theirs in found.items()} | fused


def rotary_frequencies(config: NanoVLMConfig) -> torch.Tensor:
    """(head size / 2,) float32: the inverse frequencies that nanoVLM keeps in its checkpoints."""
    size = config.lm_hidden_dim // config.lm_n_heads
    steps = torch.arange(0, size, 2).float() / size
    return torch.reciprocal(float(config.lm_re_base) ** steps)


def to_transformers(tensors: Mapping[str, torch.Tensor], config: NanoVLMConfig) -> Tensors:
    """A nanoVLM checkpoint's tensors as those of Idefics3ForConditionalGeneration; no `lm_head.weight` where it is tied.

    Raises:
        NanoVLMError: if tensors are missing, unknown, or at odds with the config.
    """
    mapping, given = names(config), dict(tensors)
    frequencies = given.pop(ROTARY, None)
    if frequencies is not None and not _close(frequencies, rotary_frequencies(config)):
        raise NanoVLMError(
            f"{ROTARY} does not hold the frequencies of lm_re_base {config.lm_re_base}: transformers computes them from that "
            "number, so the logits would differ. Expected a checkpoint saved in float32, without a rotary embedding of its own."
        )
    if config.lm_tie_weights:
        _tie(given)
    if missing := sorted(mapping.keys() - given.keys()):
        raise NanoVLMError(f"model.safetensors lacks {_some(missing)}, which config.json asks for.")
    if unknown := sorted(given.keys() - mapping.keys()):
        raise NanoVLMError(
            f"model.safetensors holds {_some(unknown)}, which a nanoVLM of this config.json does not have."
        )
    found: Tensors = {}
    for ours, theirs in mapping.items():
        tensor = given[ours][0] if ours == POSITIONS and given[ours].ndim == 3 else given[ours]
        parts = tensor.chunk(len(theirs)) if len(theirs) > 1 else (tensor,)
        found |= {name: part.contiguous() for name, part in zip(theirs, parts, strict=True)}
    if config.lm_tie_weights:
        del found["lm_head.weight"]
    return found


def to_nanovlm(tensors: Mapping[str, torch.Tensor], config: NanoVLMConfig) -> tuple[Tensors, dict[str, str]]:
    """-> (nanoVLM's tensors, the file's metadata), as nanoVLM's own `save_pretrained` writes them.

    Raises:
        NanoVLMError: if tensors are missing or unknown.
    """
    mapping, given = names(config), dict(tensors)
    if config.lm_tie_weights:
        given.setdefault("lm_head.weight", given.get("model.text_model.embed_tokens.weight", torch.empty(0)))
    expected = {name for theirs in mapping.values() for name in theirs}
    if missing := sorted(expected - given.keys()):
        raise NanoVLMError(f"The weights lack {_some(missing)}, which the nanoVLM that this model came from had.")
    if unknown := sorted(given.keys() - expected):
        raise NanoVLMError(
            f"The weights hold {_some(unknown)}, for which nanoVLM has no place (merge an adapter first)."
        )
    found = {
        ours: torch.cat([given[name] for name in theirs]) if len(theirs) > 1 else given[theirs[0]].contiguous()
        for ours, theirs in mapping.items()
    }
    found[POSITIONS] = found[POSITIONS].unsqueeze(0)
    found[ROTARY] = rotary_frequencies(config)
    if not config.lm_tie_weights:
        return found, {}
    if not torch.equal(found[HEAD], found[EMBEDDING]):
        raise NanoVLMError(
            "lm_head.weight differs from the embedding, but lm_tie_weights is true: nanoVLM keeps one of them."
        )
    del found[EMBEDDING]  # safetensors keeps the first of two names for one tensor, and the other in the metadata
    return found, {EMBEDDING: HEAD}


def _tie(given: Tensors) -> None:
    """A tied pair is stored under one of its names: give it both."""
    for here, there in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
        if here in given:
            given.setdefault(there, given[here])
    if HEAD in given and not torch.equal(given[HEAD], given[EMBEDDING]):
        raise NanoVLMError(
            f"lm_tie_weights is true, but {HEAD} and {EMBEDDING} differ. Set lm_tie_weights to false in a copy of config.json if "
            "the checkpoint was trained with two of them."
        )


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found.float(), expected, rtol=1e-6, atol=0.0)


def _some(found: list[str]) -> str:
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")

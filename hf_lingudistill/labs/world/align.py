"""Stage 1, as real VLMs have it: the tower learns to speak the LM's language while the LM stands still.

    align_tower(vlm, processor, world.pictures(artists=SEEN), steps=1200)

The cheap way, without any LM forward: image token i is taught to *be* the embedding of token i of "The picture shows a lobster."
(cross-entropy over cosines to the embeddings of many tokens, and the squared distance to the right one). A tower so aligned
speaks in words, which flatters whoever reads its tokens as words; what a tower learns through the LM is another matter.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..optim import SmallModelOptimizer
from .pictures import Picture
from .questions import TOLD

COSINE_SCALE = 20.0
DISTRACTORS = 4096  # tokens of no caption among which the right one must be found


def caption_ids(caption: str, tokenizer: Any, slots: int) -> list[int]:
    """The token ids that the image tokens stand for: the told caption, cut or filled with line breaks to `slots`."""
    ids = tokenizer(TOLD.format(caption=caption), add_special_tokens=False)["input_ids"][:slots]
    filler = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    return [*ids, *[filler] * (slots - len(ids))]


def pixels_of(pictures: Sequence[Picture], processor: Any) -> torch.Tensor:
    """(N, 3, S, S), as the processor makes them."""
    values = [
        processor.image_processor([[one.image()] for one in pictures[start : start + 256]], return_tensors="pt")[
            "pixel_values"
        ][:, 0]
        for start in range(0, len(pictures), 256)
    ]
    return torch.cat(values)


def image_tokens(vlm: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S), anywhere -> (B, T, H) on the model's device: what stands in the text model's input at the image's places."""
    features = vlm.model.get_image_features(pixels[:, None].to(vlm.device)).pooler_output
    return torch.stack(list(features))


def disturbed(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each picture moved, scaled, turned a little, mirrored half of the time, and tinted. White stays at the edges."""
    B = pixels.size(0)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(B, *shape, generator=generator) * (high - low) + low

    angle, scale, mirror = uniform(-0.2, 0.2), uniform(0.9, 1.25), uniform(-1, 1).sign()
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([cos * mirror, -sin, sin * mirror, cos], dim=1).view(B, 2, 2)
    theta = torch.cat([rows, uniform(-0.12, 0.12, 2, 1)], dim=2)
    white = pixels.amax(dim=(1, 2, 3), keepdim=True)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels - white, grid, align_corners=False) + white
    gain, shift = uniform(0.8, 1.1, 3, 1, 1), uniform(-0.1, 0.1, 3, 1, 1)
    # exactly zero everywhere would be a padding image to the model
    return moved * gain + shift + 1e-6


def align_tower(
    vlm: Any,
    processor: Any,
    pictures: Sequence[Picture],
    *,
    steps: int,
    batch_size: int = 64,
    muon_lr: float = 0.02,
    adamw_lr: float = 2e-3,
    seed: int = 0,
    checkpoint: Path | None = None,
    save_every: int = 100,
    bf16: bool = False,
    fresh: bool = True,
    unit: float = 1.0,
) -> dict[str, Any]:
    """Train tower and connector alone; the LM stays as it is, bit for bit. The model is changed in place.

    Args:
        vlm, processor: a SmolVLM or Idefics3 with its processor, one tile per picture.
        checkpoint: a file to go on from after an interruption; written every `save_every` steps, atomically.
        bf16: forward in bf16 (autocast); weights stay fp32.
        fresh: the tower knows nothing yet. False: a further round, from what it knows.
        unit: what the projection's output is measured in while it trains; the factor is folded into its weights in the end. The learning
            rates suit embeddings of about .13 per entry (SmolLM2's); where the LM's are smaller, so should the unit be.

    Returns:
        A record: `loss` (last 50 steps), `right` (share of caption tokens right in them), `steps`, `seconds`, interrupted calls included.
    """
    tokenizer = processor.tokenizer
    # Drawn on the CPU wherever the model is: the same pictures, moved in the same way
    generator, device = torch.Generator().manual_seed(seed), vlm.device
    tower = nn.ModuleList([vlm.model.vision_model, vlm.model.connector])
    pixels = pixels_of(pictures, processor)
    slots = image_tokens(vlm, pixels[:1]).size(1)
    wanted = torch.tensor([caption_ids(one.caption, tokenizer, slots) for one in pictures], device=device)
    embeddings = vlm.get_input_embeddings().weight.detach()
    if fresh:
        # The default 0.02 is for inputs of unit size and more of them; at the scale of its fan-in colors show at once
        convolution = vlm.model.vision_model.embeddings.patch_embedding
        drawn = torch.empty(convolution.weight.shape)
        nn.init.normal_(drawn, std=drawn[0].numel() ** -0.5, generator=generator)
        with torch.no_grad():
            convolution.weight.copy_(drawn)
    known = torch.unique(wanted)
    others = torch.randperm(len(tokenizer), generator=generator).to(device)
    candidates = torch.cat([known, others[~torch.isin(others, known)][:DISTRACTORS]])
    place = torch.zeros(len(embeddings), dtype=torch.long, device=device)
    place[candidates] = torch.arange(len(candidates), device=device)
    directions = F.normalize(embeddings[candidates].float(), dim=1)
    spread = embeddings[known].float().pow(2).mean()
    frozen = [
        weight for name, weight in vlm.named_parameters() if ".vision_model." not in name and ".connector." not in name
    ]
    for weight in frozen:
        weight.requires_grad_(False)
    projection = vlm.model.connector.modality_projection.proj
    if not fresh:
        _scale(projection, 1 / unit)
    optimizer = SmallModelOptimizer(tower, muon_lr=muon_lr, adamw_lr=adamw_lr, steps=steps)
    history: list[tuple[float, float]] = []
    started, first, spent = time.perf_counter(), 0, 0.0
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        tower.load_state_dict(state["tower"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        first, history = state["step"], [(loss, share) for loss, share in state["history"]]
        spent = state["seconds"]
    tower.train()
    for step in range(first, steps):
        picked = torch.randint(len(pictures), (batch_size,), generator=generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            seen = image_tokens(vlm, disturbed(pixels[picked], generator)).float() * unit
            ids = wanted[picked.to(device)]
            scores = COSINE_SCALE * F.normalize(seen, dim=-1) @ directions.T
        scores = scores.float().flatten(0, 1)
        labels = place[ids].flatten()
        distance = (seen - embeddings[ids]).pow(2).mean() / spread
        loss = F.cross_entropy(scores, labels) + distance
        loss.backward()
        optimizer.step()
        history.append((loss.item(), (scores.argmax(dim=1) == labels).float().mean().item()))
        if checkpoint is not None and (step + 1) % save_every == 0:
            _save(checkpoint, tower, optimizer, generator, step + 1, history, spent + time.perf_counter() - started)
            said = history[-save_every:]
            mean = [sum(column) / len(said) for column in zip(*said, strict=True)]
            print(f"alignment {step + 1}/{steps}: loss {mean[0]:.3f}, tokens right {mean[1]:.3f}", flush=True)
    _scale(projection, unit)
    tower.eval()
    for weight in frozen:
        weight.requires_grad_(True)
    last = history[-50:]
    return {
        "loss": sum(loss for loss, _ in last) / len(last),
        "right": sum(share for _, share in last) / len(last),
        "steps": steps,
        "seconds": round(spent + time.perf_counter() - started, 1),
    }


@torch.no_grad()
def _scale(projection: nn.Linear, factor: float) -> None:
    if factor != 1.0:  # else the weights stay as they are, bit for bit
        for weight in projection.parameters():
            weight.mul_(factor)


def _save(
    path: Path,
    tower: nn.Module,
    optimizer: SmallModelOptimizer,
    generator: torch.Generator,
    step: int,
    history: list[tuple[float, float]],
    seconds: float,
) -> None:
    state = {
        "tower": tower.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "step": step,
        "history": history,
        "seconds": seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


@torch.no_grad()
def words_seen(vlm: Any, processor: Any, pictures: Sequence[Picture], *, batch_size: int = 64) -> dict[str, Any]:
    """What the image tokens say, read as the nearest token by cosine, of the whole vocabulary.

    Returns:
        `tokens`: share of the caption's own tokens that are right ("a lobster", without the frame around it); `captions`:
        share of pictures with all of them right; `n`.
    """
    tokenizer = processor.tokenizer
    directions = F.normalize(vlm.get_input_embeddings().weight.float(), dim=1)
    pixels = pixels_of(pictures, processor)
    right: list[list[bool]] = []
    frame = len(tokenizer(TOLD.split("{")[0].rstrip(), add_special_tokens=False)["input_ids"])
    for start in range(0, len(pictures), batch_size):
        some = pictures[start : start + batch_size]
        seen = image_tokens(vlm, pixels[start : start + batch_size])
        said = (F.normalize(seen.float(), dim=-1) @ directions.T).argmax(dim=-1)
        for picture, row in zip(some, said.tolist(), strict=True):
            wanted = caption_ids(picture.caption, tokenizer, len(row))
            whole = len(tokenizer(TOLD.format(caption=picture.caption), add_special_tokens=False)["input_ids"])
            # the frame before it, and the full stop after it, are the same for every picture
            own = range(frame, min(whole - 1, len(row)))
            right.append([row[i] == wanted[i] for i in own])
    flat = [hit for row in right for hit in row]
    return {
        "tokens": sum(flat) / len(flat),
        "captions": sum(all(row) for row in right) / len(right),
        "n": len(right),
    }

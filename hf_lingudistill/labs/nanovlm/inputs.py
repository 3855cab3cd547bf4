"""nanoVLM's own inputs for a converted checkpoint: a processor for training and evaluation, on transformers' interface.

    processor = NanoVLMProcessor.from_pretrained(folder)
    LinguDistillTrainer(model=folder, processing_class=processor, ...)

It saves the stock processor (stock.py says how its inputs differ), so what a run leaves loads without this package.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, BatchFeature, PreTrainedTokenizerFast
from transformers.models.granite_docling.processing_granite_docling import GraniteDoclingProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from .config import ROW_COLUMN, NanoVLMConfig, NanoVLMError
from .stock import OFFSET, chat_template, resample


def canvas(config: NanoVLMConfig, height: int, width: int) -> tuple[int, int]:
    """(height, width) that an image is resized to, in pixels: whole tiles. Source: nanoVLM's DynamicResize."""
    tile = config.vit_img_size
    if config.max_img_size is None:
        return tile, tile
    long, short = max(height, width), min(height, width)
    new_long = config.max_img_size
    if not config.resize_to_max_side_len:
        new_long = min(new_long, math.ceil(long / tile) * tile)
    new_short = max(math.ceil(short * (new_long / long) / tile) * tile, tile)
    return (new_short, new_long) if width >= height else (new_long, new_short)


def tiles(config: NanoVLMConfig, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
    """-> (n, 3, tile, tile) float32 in [0, 1], the whole image first; (rows, columns). An RGB image."""
    side = config.vit_img_size
    height, width = canvas(config, image.height, image.width)
    resized = np.array(image.resize((width, height), resample(config)))
    pixels = torch.from_numpy(resized).permute(2, 0, 1).float().div(255)
    rows, cols = height // side, width // side
    cut = pixels.reshape(3, rows, side, cols, side).permute(1, 3, 0, 2, 4).reshape(rows * cols, 3, side, side)
    if rows * cols == 1 or not config.global_token:
        return cut.contiguous(), (rows, cols)
    # From the resized pixels, in floating point, bilinearly: not as the tiles were made.
    whole = torch.nn.functional.interpolate(pixels[None], (side, side), mode="bilinear", antialias=True)
    return torch.cat([whole, cut]), (rows, cols)


def image_string(config: NanoVLMConfig, rows: int, cols: int) -> str:
    """The tokens that stand for an image of rows x cols tiles."""
    run = config.image_token * config.tokens_per_tile
    if config.max_img_size is None:
        return run
    whole = config.global_token + run if config.global_token else ""
    if whole and rows * cols == 1:
        return whole
    return whole + "".join(ROW_COLUMN.format(r + 1, c + 1) + run for r in range(rows) for c in range(cols))


class NanoVLMImageProcessor(Idefics3ImageProcessorPil):
    """nanoVLM's tiles in Idefics3's layout: `pixel_values` (B, tiles, 3, tile, tile), padded with tiles of zeros."""

    def __init__(self, config: NanoVLMConfig) -> None:
        super().__init__()
        self.nanovlm = config.text  # a text, so that the settings can be printed as JSON

    def _preprocess(  # type: ignore[override]
        self, images: list[list[np.ndarray]], return_tensors: Any = None, **_: Any
    ) -> BatchFeature:
        config = NanoVLMConfig.read(self.nanovlm)
        cut = [[tiles(config, Image.fromarray(image.transpose(1, 2, 0))) for image in sample] for sample in images]
        counts = [sum(len(part) for part, _ in sample) for sample in cut]
        side = config.vit_img_size
        pixels = torch.zeros(len(images), max(counts), 3, side, side)
        mask = torch.zeros(len(images), max(counts), side, side, dtype=torch.int64)
        for index, (sample, count) in enumerate(zip(cut, counts, strict=True)):
            if count:
                pixels[index, :count] = torch.cat([part for part, _ in sample])
                mask[index, :count] = 1
                black = ~pixels[index, :count].flatten(1).any(1)
                pixels[index, :count][black] = OFFSET  # or Idefics3 takes the tile for padding
        data = {
            "pixel_values": pixels.numpy(),
            "pixel_attention_mask": mask.numpy(),
            "rows": [[grid[0] for _, grid in sample] for sample in cut],
            "cols": [[grid[1] for _, grid in sample] for sample in cut],
        }
        return BatchFeature(data=data, tensor_type=return_tensors, skip_tensor_conversion=["rows", "cols"])


class NanoVLMProcessor(GraniteDoclingProcessor):
    """Makes nanoVLM's own `input_ids` and pixel tensors for a checkpoint that `lingudistill convert-nanovlm` wrote."""

    stock: Any
    nanovlm: NanoVLMConfig

    def __init__(
        self,
        image_processor: NanoVLMImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        image_seq_len: int = 64,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, image_seq_len=image_seq_len, chat_template=chat_template)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> NanoVLMProcessor:
        """For a converted folder or Hub id.

        Raises:
            NanoVLMError: if the checkpoint does not come from nanoVLM.
        """
        config = origin(
            AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs), pretrained_model_name_or_path
        )
        stock = AutoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        template = chat_template(config, config.image_token, stock.tokenizer.eos_token)
        processor = cls(NanoVLMImageProcessor(config), stock.tokenizer, config.tokens_per_tile, template)
        processor.stock, processor.nanovlm = stock, config
        processor.image_token = config.image_token  # the stock processor may have a placeholder for it
        processor.image_token_id = stock.tokenizer.convert_tokens_to_ids(config.image_token)
        return processor

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        rows = [row for sample in image_inputs["rows"] for row in sample][image_idx]
        cols = [col for sample in image_inputs["cols"] for col in sample][image_idx]
        return image_string(self.nanovlm, rows, cols)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Write the stock processor, which loads without this package."""
        return self.stock.save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def origin(config: Any, source: Any) -> NanoVLMConfig:
    """The nanoVLM config that a converted model's config keeps.

    Raises:
        NanoVLMError: if there is none.
    """
    text = getattr(config, "nanovlm", None)
    if not isinstance(text, str):
        raise NanoVLMError(
            f"{str(source)!r} does not come from nanoVLM: its config.json has no 'nanovlm'. Expected a model that `lingudistill "
            "convert-nanovlm` wrote, or one trained from it."
        )
    return NanoVLMConfig.read(text)

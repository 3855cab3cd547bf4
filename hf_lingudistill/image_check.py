"""Before training with `kv_sharing="images"`: does the teacher get, of the student's batch, what its own processor would give it?

Configs do not tell it (sizes, means, tiles and resampling have a name in each family), so two pictures are put through both processors,
and the teacher is run on what the student's made of them.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from ._internals import DataCollatorForVisionLanguageModeling
from .replay import inference

logger = logging.getLogger(__name__)

SIZES = ((56, 56), (640, 400))  # one that some processors enlarge, and one that most cut or shrink
# Mean distance of pixel values whose standard deviation is about 1: back ends that resample differently stay below it
ALLOWED = 0.02
INSTEAD = "Use the VLM that the student was tuned from, or another kv_sharing. (--self_check false trains without this check.)"


def image_check(ours: Any, theirs: Any, teacher: PreTrainedModel, device: torch.device) -> None:
    """Refuse a teacher that would see other images than the student does, or none.

    Args:
        ours: the student's processor. theirs: the teacher's.
        teacher: the whole VLM, on `device`.

    Raises:
        ValueError: with what differs.
    """
    rows = [_row(size) for size in SIZES]
    theirs = copy.copy(theirs)
    theirs.chat_template = ours.chat_template  # the teacher reads the student's chat
    batch = dict(DataCollatorForVisionLanguageModeling(ours)(copy.deepcopy(rows)))
    try:
        found = _difference(batch, dict(DataCollatorForVisionLanguageModeling(theirs)(rows)))
    except MemoryError:
        raise
    except Exception as error:  # whatever a processor without images raises
        found = f"the teacher's processor ({type(theirs).__name__}) does not take them: {' '.join(str(error).split())[:200]}"
    if found:
        raise ValueError(
            f"kv_sharing='images' runs the teacher on the student's own images, and the two prepare them differently: {found}. {INSTEAD}"
        )
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    try:
        with inference(teacher):
            hidden = teacher.base_model(**inputs, use_cache=False)[0]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each family has its own way to say that tokens and features do not match
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"kv_sharing='images' runs the teacher on the student's own inputs, and it does not read them ({why}). {INSTEAD}"
        ) from error
    if not hidden.isfinite().all():
        raise ValueError(
            "The teacher's hidden states on two pictures are not finite: its weights are broken, or overflow in its precision. Load "
            "other weights, or compute in bf16 or fp32. (--self_check false trains without this check.)"
        )
    logger.info("Image check: both processors make the same tensors of two pictures, and the teacher reads them")


def _row(size: tuple[int, int]) -> dict[str, Any]:
    ramp = Image.linear_gradient("L")
    picture = Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180))).resize(size)
    return {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "a"}],
        "images": [picture],
    }


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """What differs between two batches of the same rows, as half a sentence; empty if nothing does."""
    if odd := sorted(ours.keys() ^ theirs.keys()):
        return f"only one of them makes {', '.join(odd)}"
    for name, mine in ours.items():
        if mine.shape != theirs[name].shape:
            return f"of two pictures, {name} is {tuple(mine.shape)} for the student and {tuple(theirs[name].shape)} for the teacher"
        distance = float((mine.float() - theirs[name].float()).abs().mean())
        if distance > (ALLOWED if mine.is_floating_point() else 0):
            return f"of two pictures, {name} is off by {distance:.2g} on average"
    return ""

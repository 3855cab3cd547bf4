"""What a step asks of an accelerator: operations, each a launch, and waits for its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl import SFTTrainer
from trl.trainer import utils as trl_utils

from hf_lingudistill.step import own_inputs

LAYERS = 30  # as SmolLM2-135M: what is done once a layer must show
# Reading a number (in inference mode by other names), and shapes that depend on values
WAITS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique",
    "repeat_interleave.Tensor",
    "equal",
)


class Count(TorchDispatchMode):
    """Operations that reach a device, views left out, and those among them that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1] + (f".{func._overloadname}" if func._overloadname else "")
        self.operations += not func.is_view
        by_mask = name.startswith(("index.", "index_put")) and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in (args[1] or ())
        )
        self.waits += by_mask or name.startswith(WAITS)
        return func(*args, **(kwargs or {}))


def counted(trainer: Any, rows: list[dict[str, Any]]) -> Count:
    batch = trainer.data_collator(rows)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    labels = (batch["labels"][:, 1:] != -100).sum()
    trainer.training_step(trainer.model, dict(batch), num_items_in_batch=labels)  # what is done once is done
    with Count() as count:
        trainer.training_step(trainer.model, dict(batch), num_items_in_batch=labels)
    return count


@pytest.mark.parametrize("kv_sharing", ["full", "prompt", "vision"])
def test_a_step_launches_little_and_waits_no_more_than_sft(make_trainer: Callable[..., Any], kv_sharing: str) -> None:
    rows = [{**row, "distill": True} for row in tiny.make_rows(2)][1:]
    sft = counted(
        make_trainer(SFTTrainer, model=tiny.make_vlm(0, layers=LAYERS)),
        [{name: value for name, value in row.items() if name != "distill"} for row in rows],
    )
    ours = make_trainer(
        model=tiny.make_vlm(0, layers=LAYERS), teacher_model=tiny.make_lm(1, layers=LAYERS), kv_sharing=kv_sharing
    )
    ours.first_batch.batches_to_compare = 0
    found = counted(ours, rows)
    # TRL 1.15 has no head off Triton: what is compared with is then SFT on a head of ours, which launches some 30 operations less
    assert found.operations - sft.operations <= (1300 if hasattr(trl_utils, "_use_triton") else 1330)
    assert found.waits - sft.waits <= 2
    # The control: without the collator's plan the step has to ask the device
    ours.data_collator.plan = None
    assert counted(ours, rows).waits > found.waits + 5


# What each may add to a step of SFT: operations, waits, and forwards of the VLM, with the waits in transformers' own code
@pytest.mark.parametrize(
    ("settings", "operations", "waits", "forwards"),
    [
        # The teacher's pass, some 40 operations a layer. The plan's check waits on a CPU alone
        ({"kv_source": "student"}, 1300, 1, 0),
        # The default, with a tower that is trained: the VLM before runs to the last image token. It finds its images, places them and looks for padding: each waits
        ({"kv_source": None}, 1334, 1, 1),
        # The same where the tower is frozen: it finds and places them, and its tower is not run
        ({"kv_source": None, "freeze_vision": True}, 1174, 1, 1),
        # The teacher's own forward on the text as well. transformers waits there to see whether rows are packed
        ({"kv_source": None, "blind_weight": 0.5}, 2394, 2, 1),
    ],
    ids=["student", "tower trained", "default", "blind"],
)
def test_a_row_with_an_image_costs_its_forwards_and_little_more(
    make_trainer: Callable[..., Any], settings: dict[str, Any], operations: int, waits: int, forwards: int
) -> None:
    rows = [{**row, "distill": True} for row in tiny.make_rows(1)]
    plain = make_trainer(SFTTrainer, model=tiny.make_vlm(0, layers=LAYERS))
    ours = make_trainer(
        model=tiny.make_vlm(0, layers=LAYERS),
        teacher_model=tiny.make_lm(1, layers=LAYERS),
        kv_sharing="vision",
        **settings,
    )
    ours.first_batch.batches_to_compare = 0
    assert (ours.step.source is not None) == bool(forwards)
    inputs = own_inputs(ours.data_collator(rows))
    found = counted(ours, rows)
    sft = counted(plain, [{name: value for name, value in row.items() if name != "distill"} for row in rows])
    with torch.no_grad(), Count() as forward:
        plain.model.base_model(**inputs)
    assert forward.waits > 0  # control: an image is waited for
    allowed = operations + forwards * forward.operations + (0 if hasattr(trl_utils, "_use_triton") else 30)
    assert found.operations - sft.operations <= allowed
    assert found.waits - sft.waits <= waits + forwards * forward.waits

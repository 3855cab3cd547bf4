"""What accelerate's engines ask of a step with two models: frozen ones in pieces, and the same collectives on every process.

FSDP2 and ZeRO-3 keep each weight in pieces and gather it when its module runs, on all processes at once. A process whose
batch has nothing to distil, or no image, must therefore run the teacher, the VLM before and the vision tower all the same, on a
placeholder whose loss is zero: otherwise the others wait for it forever. DDP and ZeRO-2 replicate the weights; nothing
here concerns them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ._internals import decoder_of, deepspeed_inference, fsdp_units, head_of
from .machine import machine
from .teacher import Teacher
from .vision import trains_vision

Sharding = Literal["fsdp2", "zero3"]


def sharding_of(accelerator: Accelerator) -> Sharding | None:
    """How this run keeps its weights in pieces; None where each process has all of them.

    Raises:
        ValueError: under FSDP1, which hides the student's head from the divergence.
    """
    kind = accelerator.distributed_type.value
    if kind == "FSDP":
        if not accelerator.is_fsdp2:
            raise ValueError(
                "FSDP version 1 is not supported: set fsdp_version: 2 in the accelerate config "
                "(examples/accelerate_configs/fsdp2.yaml)."
            )
        return "fsdp2"
    if kind == "DEEPSPEED" and accelerator.state.deepspeed_plugin.zero_stage == 3:
        return "zero3"
    return None


def is_teacher_sharded(teacher_sharding: str, *, quantised: bool, sharding: Sharding | None) -> bool:
    """Resolve `teacher_sharding`: `auto` shards an unquantised teacher where the engine shards the student.

    Raises:
        ValueError: if `shard` is asked for and cannot be had.
    """
    if teacher_sharding == "shard" and sharding is None:
        raise ValueError(
            "teacher_sharding='shard' needs an engine that shards weights, and this run has none: launch with "
            "examples/accelerate_configs/fsdp2.yaml or zero3.yaml, or set teacher_sharding='replicate'."
        )
    if teacher_sharding == "shard" and quantised:
        raise ValueError(
            "teacher_sharding='shard' cannot shard a quantised teacher, whose packed weights do not split: set "
            "teacher_quantization='none', or teacher_sharding='replicate'."
        )
    return teacher_sharding != "replicate" and sharding is not None and not quantised


def shard_teacher(teacher: Teacher, accelerator: Accelerator, *, offload: bool) -> Teacher:
    """Split the teacher's weights over the processes, with the settings of the student's plugin.

    Args:
        teacher: whole on every process, with a head of exactly the student's vocabulary.
        offload: keep the pieces in CPU memory; they come to the device when they are gathered.

    Returns:
        The same teacher with a head of sharded weights; `footprint` counts this process's pieces.
    """
    model, footprint = shard_model(teacher.model, accelerator, root=decoder_of(teacher.model), offload=offload)
    head = replace(teacher.head, weight=head_of(model).weight)
    return replace(teacher, model=model, head=head, footprint=footprint)


def shard_model(
    model: PreTrainedModel, accelerator: Accelerator, *, root: PreTrainedModel, offload: bool = False
) -> tuple[PreTrainedModel, int]:
    """Split a frozen model over the processes, with the settings of the student's plugin.

    Under FSDP2 the first process's weights are those that count: where loading spares memory, the others have none.

    Args:
        model: in CPU memory.
        root: its part that will be called.
        offload: keep the pieces in CPU memory; they come to the device when they are gathered.

    Returns:
        The model, and the bytes that this process holds of it.
    """
    if sharding_of(accelerator) == "zero3":
        model = deepspeed_inference(model, accelerator, offload=offload)
        pieces = [getattr(p, "ds_tensor", p) for p in model.parameters()]
    else:
        _from_first_process(model, accelerator)
        _fully_shard(model, root, accelerator, offload=offload)
        pieces = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return model, sum(t.numel() * t.element_size() for t in (*pieces, *model.buffers()))


@torch.no_grad()
def _from_first_process(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Give every process the first one's weights, one tensor at a time."""
    for tensor in (*model.parameters(), *model.buffers()):
        sent = tensor.to(accelerator.device).contiguous()
        torch.distributed.broadcast(sent, src=0)
        tensor.copy_(sent)


def _fully_shard(model: PreTrainedModel, root: PreTrainedModel, accelerator: Accelerator, *, offload: bool) -> None:
    """FSDP2 over the part that is called: it must be the root. One unit per layer."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    plugin = accelerator.state.fsdp_plugin
    mesh = accelerator.torch_device_mesh
    settings: dict[str, Any] = {
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
        "reshard_after_forward": plugin.reshard_after_forward,
    }
    policy = CPUOffloadPolicy(pin_memory=machine().accelerated) if offload else plugin.cpu_offload
    if policy is not None:
        settings["offload_policy"] = policy
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    # The model's own layer classes: the student's plugin names those of the student
    units = {*(root._no_split_modules or ()), *(decoder_of(model)._no_split_modules or ())}
    for module in list(root.modules()):
        if type(module).__name__ in units:
            fully_shard(module, **settings)
    fully_shard(root, **settings)
    if tied:
        head.weight = embeddings.weight  # outside the root, the head would keep the whole weight alive
    else:
        fully_shard(head, **settings)


@contextmanager
def head_unsharded(student: PreTrainedModel) -> Iterator[None]:
    """Under FSDP2, gather an untied head that is a unit of its own before it is used as a weight, without its forward.

    Left to `full_tensor()`, each process would keep its own gradient of the head instead of the mean over all. Gathered by
    FSDP2, it is reduced like every other gradient, at the end of the backward pass.
    """
    from torch.distributed.fsdp import FSDPModule

    head = student.get_output_embeddings()
    if not isinstance(head, FSDPModule):
        yield
        return
    head.unshard()
    yield
    if not torch.is_grad_enabled():  # no backward pass will do it
        head.reshard()


@contextmanager
def gathered_for_sampling(model: nn.Module) -> Iterator[None]:
    """Under FSDP2, all weights on every process, in the dtype that they compute in: a process samples by itself then, as long as its
    answers are, where gathering anew for every token would make all wait for all. Nothing elsewhere: TRL gathers for ZeRO-3.

    model: as the engine wrapped it.
    """
    units = fsdp_units(model)
    for unit in units:
        unit.keep_gathered()
    try:
        yield
    finally:
        for unit in units:
            unit.scatter()


def blank_image(
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]], student: PreTrainedModel
) -> dict[str, Any]:
    """The student's vision inputs (`pixel_values` and whatever its family adds) for one small grey image.

    collate: TRL's vision collator, so that the processor of each family makes them.
    """
    message: Callable[[str], list[dict[str, str]]] = lambda role: [{"role": role, "content": "a"}]  # noqa: E731
    # Grey: an all-black tile is exactly zero without normalisation, and is then dropped as padding
    row = {
        "prompt": message("user"),
        "completion": message("assistant"),
        "images": [Image.new("RGB", (56, 56), "grey")],
    }
    features: Callable[..., Any] = student.get_image_features  # type: ignore[assignment]
    accepted = inspect.signature(features).parameters
    return {name: value for name, value in collate([row]).items() if name in accepted and name != "input_ids"}


class SameModules:
    """Where the engine shards: lets every process run the vision tower in each step in which another one does.

    image: the student's vision inputs for one blank image, from `blank_image`.
    """

    def __init__(self, student: PreTrainedModel, image: dict[str, Any], accelerator: Accelerator) -> None:
        self.student, self.image, self.accelerator = student, image, accelerator
        self.images_in_step = True
        # ZeRO-3 keeps the last gradient of a weight that a step does not use, and applies it again: so all are used, for a zero
        self.leaves_gradients = sharding_of(accelerator) == "zero3" and trains_vision(student)

    def look_at(self, batches: list[Mapping[str, Any]]) -> None:
        """Whether any process has an image among the batches of an optimizer step: without one, the tower gets no gradient at all,
        as on a single process. Called by all of them."""
        seen = any("pixel_values" in batch for batch in batches)
        count = torch.tensor(seen, dtype=torch.int32, device=self.accelerator.device)
        self.images_in_step = bool(self.accelerator.reduce(count, reduction="sum"))

    def for_batch(self, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """A context for the student's forward on these inputs."""
        needed = self.images_in_step or self.leaves_gradients or not self.student.training
        if not needed or inputs.get("pixel_values") is not None:
            return nullcontext()
        return vision_on(self.image, self.student)


@contextmanager
def vision_on(image: Mapping[str, Any], student: PreTrainedModel) -> Iterator[None]:
    """The student's forward, of a batch without images, runs the vision tower on a blank image: adds a zero to the input
    embeddings that depends on all the weights of tower and projector.

    It happens where families embed their images, after the text and before the first decoder layer: processes must agree
    on the order of modules, forward and backward.
    """

    embed: Callable[..., Any] = student.get_image_features  # type: ignore[assignment]

    def add_zero(
        _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeddings = kwargs["inputs_embeds"]
        inputs = {k: v.to(embeddings.device) if isinstance(v, torch.Tensor) else v for k, v in image.items()}
        output = embed(**inputs)
        # Before transformers 5.21 SmolVLM sets the projector's output on the object alone, where no tree looks
        features = [
            f for f in tree_leaves([output, getattr(output, "pooler_output", None)]) if isinstance(f, torch.Tensor)
        ]
        zero = sum(f.float().sum() * 0.0 for f in features if f.is_floating_point())
        return args, {**kwargs, "inputs_embeds": embeddings + torch.as_tensor(zero).to(embeddings.dtype)}

    hook = decoder_of(student).register_forward_pre_hook(add_zero, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def forget_evaluation(trainer: Any) -> None:
    """An evaluation before training, on several processes, leaves the model marked as prepared, so that `accelerate` does not wrap it for
    training: each process would apply its own gradient alone. Undo the mark, where nothing is wrapped yet."""
    model, accelerator = trainer.model, trainer.accelerator
    if accelerator.num_processes > 1 and sharding_of(accelerator) is None and trainer.model_wrapped is model:
        model._is_accelerate_prepared = False
        accelerator._models.clear()


def check_one_device(args: Any, student: Any = None) -> None:
    """Refuse a process that sees several GPUs: transformers would wrap the student into `nn.DataParallel`, which TRL does not support. Not where the
    student lies on several of them (`device_map`).

    Raises:
        ValueError: with what to type instead.
    """
    asked = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    if getattr(student, "hf_device_map", None) or asked.get("device_map"):
        return
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs, and a process trains on one. For one: CUDA_VISIBLE_DEVICES=0 before the command. For all: accelerate "
            f"launch --num_processes {args.n_gpu} -m hf_lingudistill distill ..., or the same with a script of your own (docs/engines.md)."
        )

"""Image features that the student and the VLM before share, so that a picture is looked at once.

Where nothing of the vision part is trained (LoRA on the text decoder, `freeze_vision`), both see the same in a picture: the VLM before is
given the student's image features, and its vision tower is not run. Loss and gradients stay what they are but for rounding; the step is cheaper by a
forward of the tower, which is most of what the VLM before costs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd as _Dropout
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ._internals import decoder_of, own_name
from .anchor import Before
from .vision import vision_parameters

logger = logging.getLogger(__name__)

# Beyond rounding, relative to their length: the VLM before computes in its own dtype, the student perhaps under autocast
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUNDING_IN_HALF_PRECISION = 0.05

# Of what a tower returns: the states of its layers, asked for or not
_NOT_READ = ("hidden_states", "attentions")


@dataclass
class Seen:
    """The image features of one batch, in the order in which a forward asked for them. given: how many were used again."""

    kept: list[Any] = field(default_factory=list)
    given: int = 0


@contextmanager
def keeping(model: PreTrainedModel, seen: Seen) -> Iterator[None]:
    """Keep what the model's forward makes of its images."""
    embed = getattr(model.base_model, "get_image_features", None)

    def keep(*args: Any, **kwargs: Any) -> Any:
        output = embed(*args, **kwargs)  # type: ignore[misc]
        if not torch.compiler.is_compiling():
            seen.kept.append(_light(output))
        return output

    with nullcontext() if embed is None else _replaced(model.base_model, keep):
        yield


@contextmanager
def giving(model: PreTrainedModel, seen: Seen) -> Iterator[None]:
    """Give the model's forward image features that are known, in the place of its own."""
    embed = getattr(model.base_model, "get_image_features", None)
    seen.given = 0

    def give(*args: Any, **kwargs: Any) -> Any:
        seen.given += 1
        return seen.kept[seen.given - 1] if seen.given <= len(seen.kept) else embed(*args, **kwargs)  # type: ignore[misc]

    with nullcontext() if embed is None else _replaced(model.base_model, give):
        yield


@contextmanager
def _replaced(backbone: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """`get_image_features` of one module; a copy of it has its own."""
    attributes = backbone.__dict__
    known = attributes.get("get_image_features")
    attributes["get_image_features"] = function
    try:
        yield
    finally:
        if known is None:
            del attributes["get_image_features"]
        else:
            attributes["get_image_features"] = known


def _light(output: Any) -> Any:
    """What a tower returned, without the states of its layers, which would live on through the student's forward."""
    if not isinstance(output, ModelOutput):
        return output
    light = type(output)(**{name: value for name, value in output.items() if name not in _NOT_READ})
    # Before transformers 5.21 SmolVLM sets the projector's output on the object alone, and it is among no items
    for name, value in vars(output).items():
        if name not in _NOT_READ and getattr(light, name, None) is not value:
            object.__setattr__(light, name, value)
    return light


class Eyes:
    """Lets the student and the VLM before look at a picture once, where both see the same.

    That is tried once, on a batch with images: the weights have to be equal, and what the VLM before makes of features that are given has
    to be what it makes of its own. It is looked at again wherever the student's weights have been touched since.
    """

    def __init__(self, student: PreTrainedModel, before: Before) -> None:
        self.student, self.before = student, before
        self.alike: bool | None = None  # None: not tried
        self._ours, self._theirs = (_vision_tensors(model) for model in (student, before.model))
        self._parameters = list(vision_parameters(student).values())
        self._touched = -1

    def open(self) -> Seen | None:
        """For one batch: where its features are kept; None where something of the student's vision part is trained, or differs."""
        if any(weight.requires_grad for weight in self._parameters):
            self._touched = -1
            return None
        touched = sum(weight._version for weight in self._parameters)
        if touched != self._touched:
            self._touched, self.alike = touched, None if self._may_be_alike() else False
        return None if self.alike is False else Seen()

    def of_student(self, seen: Seen | None) -> AbstractContextManager[None]:
        """Around the student's forward."""
        if seen is None:
            return nullcontext()
        return giving(self.student, seen) if seen.kept else keeping(self.student, seen)

    def of_before(self, seen: Seen | None, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Around the forward of the VLM before on these inputs of its backbone. Where it comes first, its features go to the student only
        if they are the same bit for bit: computed from weights of the same dtype."""
        if seen is None:
            return nullcontext()
        first = not seen.kept
        if first and any(ours.dtype != self._theirs[name].dtype for name, ours in self._ours.items()):
            return nullcontext()
        if self.alike is None:
            self._try_on(inputs, seen)
        if not self.alike:
            return nullcontext()
        return keeping(self.before.model, seen) if first else giving(self.before.model, seen)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _try_on(self, inputs: Mapping[str, Any], seen: Seen) -> None:
        """Find out whether they are `alike`. seen: what the student made of the images, if it came first."""
        own = Seen()
        try:
            with keeping(self.before.model, own):
                wanted = self.before.last_keys(inputs)
            given = seen if seen.kept else own
            with giving(self.before.model, given):
                found = self.before.last_keys(inputs)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a family's forward raises that reads more of its tower than it is given
            logger.info("The VLM before runs its own vision tower: %s", error)
            self.alike = False
            return
        pairs = [(found, wanted), *zip(_tensors(given.kept), _tensors(own.kept), strict=False)]
        used = bool(own.kept) and len(own.kept) == len(given.kept) == given.given
        allowed = _ROUNDING.get(self.before.model.dtype, _ROUNDING_IN_HALF_PRECISION)
        self.alike = used and all(_close(*pair, allowed) for pair in pairs)
        if self.alike:
            logger.info("The VLM before and the student look at a picture once: nothing of the vision part is trained")

    def _may_be_alike(self) -> bool:
        if _differs_in_training(self.student):
            return False
        if self.before.model is self.student:  # with its adapter off: the same, unless that reaches the tower
            return all(own_name(self.student, name) is not None for name in self._ours)
        return self._ours.keys() == self._theirs.keys() and all(
            torch.equal(ours.to(self._theirs[name]), self._theirs[name]) for name, ours in self._ours.items()
        )


def _vision_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers outside of the language model."""
    known = {id(buffer) for buffer in decoder_of(model).buffers()}
    buffers = {name: buffer for name, buffer in model.named_buffers() if id(buffer) not in known}
    return {**vision_parameters(model), **buffers}


def _differs_in_training(model: PreTrainedModel) -> bool:
    """Whether a module outside of the decoder is another in training: dropout, stochastic depth, the statistics of a batch."""
    language = set(decoder_of(model).modules())
    outside = [module for module in model.modules() if module not in language]
    return any(isinstance(module, _BatchNorm) for module in outside) or any(
        isinstance(value, float) and value > 0.0 and ("drop" in name or (name == "p" and isinstance(module, _Dropout)))
        for module in outside
        for name, value in vars(module).items()
    )


def _tensors(outputs: list[Any]) -> list[torch.Tensor]:
    """The features themselves, of each call."""
    flat = [getattr(output, "pooler_output", output) for output in outputs]
    parts = [part for one in flat for part in (one if isinstance(one, list | tuple) else [one])]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _close(ours: torch.Tensor, theirs: torch.Tensor, allowed: float) -> bool:
    ours, theirs = ours.float(), theirs.float()
    return ours.shape == theirs.shape and bool((ours - theirs).norm() <= allowed * theirs.norm())

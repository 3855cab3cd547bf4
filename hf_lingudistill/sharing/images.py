"""`kv_sharing="images"`: the teacher is a VLM with eyes of its own, and is given the images themselves.

Nothing of the student is read. The teacher runs whole, tower and all, on the very inputs that the student got, so that both must be of
one class and read one processor's tensors and tokens (`compatibility`, `image_check.py`). It is how a VLM is held to the VLM that it was
tuned from, on text and on images; layers need not be softmax attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .base import Sharing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..queries import QueryPlan
    from ..student_kv import SharedKV


class Images(Sharing):
    """See the module."""

    in_words = "reads its own keys and values only"
    records_kv = False
    reads_student = False
    keeps_documents_apart = False
    sees = True

    def own(self, readable: torch.Tensor, labelled: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return readable & False  # the plan says where the loss is; the pass is the VLM's own, on everything

    def queries_per_row(self, length: int, image_tokens: int, response_tokens: int) -> int:
        return length

    @contextmanager
    def recording(self, student: PreTrainedModel) -> Iterator[SharedKV]:
        """Keep what the student's backbone is called with."""
        from ..student_kv import SharedKV

        shared = SharedKV(keep_kv=False)

        def keep(_: Any, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            shared.inputs = kwargs

        hook = student.base_model.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield shared
        finally:
            hook.remove()

    def teacher_pass(self, teacher: PreTrainedModel, shared: SharedKV, plan: QueryPlan) -> torch.Tensor:
        from ..replay import whole_pass

        hidden: torch.Tensor = whole_pass(teacher, shared, plan)
        return hidden

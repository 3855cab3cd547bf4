"""What a sharing mode is: which keys and values are the teacher's own, what is recorded for it, and how it runs.

Read by the config, the command line, the planner, `diagnose`, the cards and the docs, some of which must answer without loading
torch: nothing here imports it before a mode is used.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..queries import QueryPlan
    from ..student_kv import SharedKV


@dataclass(frozen=True)
class Sharing:
    """One mode of `kv_sharing`. A new mode is a subclass in a file of its own, and one entry in `sharing/__init__.py`.

    name: its value in the config. reads: where the teacher reads the student's keys and values. computes: the positions
    that it runs on. choose: when to choose it. Each is half a sentence, for help texts and tables.
    """

    name: str
    reads: str
    computes: str
    choose: str

    # What the student's forward leaves: keys and values of every layer, and the embeddings that its decoder reads
    records_kv: ClassVar[bool] = True
    records_inputs: ClassVar[bool] = False
    # Whether the teacher's pass depends on the student at all
    reads_student: ClassVar[bool] = True
    # Whether it does on a row without an image
    text_reads_student: ClassVar[bool] = True
    # Whose it reads where `kv_source` is left out, as measured: with `vision` alone the VLM before is the better one (docs/parents.md)
    source: ClassVar[str] = "student"
    # Whether documents packed into one row stay apart
    keeps_documents_apart: ClassVar[bool] = True
    # The weight of what the teacher says without the image, where `blind_weight` is left out
    blind: ClassVar[float] = 0.0
    # Whether student and teacher may differ in hidden size
    any_width: ClassVar[bool] = True
    # Whether the teacher is a VLM, run whole on the images themselves
    sees: ClassVar[bool] = False
    # What a model card says of it: "layer by layer the teacher ..."
    in_words: ClassVar[str]

    def own(self, readable: torch.Tensor, labelled: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Where the teacher's own keys and values replace the student's.

        Args:
            readable: (B, T) bool, tokens that the teacher knows. labelled: (B, T) bool, tokens with a label.
            attended: (B, T) bool, tokens that are not padding.

        Returns:
            (B, T) bool. The teacher is queried there, up to the row's last loss position, and at the loss positions.
        """
        raise NotImplementedError

    def queries_per_row(self, length: int, image_tokens: int, response_tokens: int) -> int:
        """How many positions of a row the teacher computes, for a plan made before there is a batch."""
        raise NotImplementedError

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Raise ValueError where this pair cannot use the mode. Shapes of keys and values are checked in every mode."""

    def recording(self, student: PreTrainedModel) -> AbstractContextManager[SharedKV]:
        """Record what this mode needs of the student's forwards inside the context."""
        from ..student_kv import recording

        return recording(student, keep_kv=self.records_kv, keep_inputs=self.records_inputs)

    def teacher_pass(self, teacher: PreTrainedModel, shared: SharedKV, plan: QueryPlan) -> torch.Tensor:
        """The teacher's last hidden state at the plan's loss positions, (N, H_t), without gradient."""
        from ..replay import replayed_pass

        hidden: torch.Tensor = replayed_pass(teacher, shared, plan)
        return hidden


class Full(Sharing):
    """The paper's: every key and value is the student's."""

    in_words = "reads the student's keys and values at every position"

    def own(self, readable: torch.Tensor, labelled: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return readable & False

    def queries_per_row(self, length: int, image_tokens: int, response_tokens: int) -> int:
        return response_tokens


class Prompt(Sharing):
    """The prompt is the student's, the answer the teacher's own."""

    in_words = "reads the student's keys and values at the prompt, text and image, and its own at the answer"

    def own(self, readable: torch.Tensor, labelled: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return readable & labelled

    def queries_per_row(self, length: int, image_tokens: int, response_tokens: int) -> int:
        return response_tokens


class Vision(Sharing):
    """Only what the teacher cannot read itself is the student's."""

    in_words = "reads the student's keys and values at image tokens and its own at all text"
    text_reads_student = False
    source = "before"

    def own(self, readable: torch.Tensor, labelled: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return readable

    def queries_per_row(self, length: int, image_tokens: int, response_tokens: int) -> int:
        return length - image_tokens


class Unshared(Sharing):
    """Nothing is shared: the teacher's plain forward on the text."""

    in_words = "reads its own keys and values only, with images left out"
    records_kv = False
    reads_student = False
    keeps_documents_apart = False

    def own(self, readable: torch.Tensor, labelled: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return readable

    def queries_per_row(self, length: int, image_tokens: int, response_tokens: int) -> int:
        return length - image_tokens

    def teacher_pass(self, teacher: PreTrainedModel, shared: SharedKV, plan: QueryPlan) -> torch.Tensor:
        from ..replay import plain_pass

        hidden: torch.Tensor = plain_pass(teacher, plan)
        return hidden

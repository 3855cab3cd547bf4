"""What one prompt says about a student and its original: drift of keys, values and hidden states, and perplexity by sharing mode.

B rows, T positions, N answer tokens, P tokens that the teacher reads, L layers.

The student runs once. The original then reads the same prompt in every sharing mode. Its own keys, values and hidden states are
those of its pass in `vision` mode, where it computes every token that it can read, at the student's positions, and takes only the
image from the student: with the student's own weights it would compute what the student computes, image or not, so that whatever
differs is drift. (Image tokens have no counterpart in a model that cannot see, and are left out.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..._internals import head_of
from ...losses import label_nll
from ...queries import QueryPlan, plan_queries
from ...sharing import MODES, sharing
from ...student_kv import recording
from ...teacher import Teacher
from ..evaluation.models import Scored
from ..evaluation.reading import answer_inputs
from ..statistics import OVERFLOW, NotFiniteScore
from .prompts import Prompt
from .states import layer_outputs, recording_own, state_drift

READ_IN = tuple(name for name, mode in MODES.items() if mode.any_width and not mode.sees)
READERS = ("student", *READ_IN)
# A teacher that answers with the student's keys and values and without the image, and says the mean of both probabilities
TWICE = {mode: f"{mode}, read twice" for mode in READ_IN if MODES[mode].reads_student}


@dataclass(frozen=True)
class Reading:
    """What a batch says. nats: reader (the student, or the teacher in a sharing mode, or twice, see `TWICE`) -> (N,) at the answers' tokens. drift:
    (L, 3, 2), relative distance and cosine of keys, values, hidden states (NaN where widths differ), averaged over the P tokens that
    the teacher reads."""

    nats: dict[str, torch.Tensor]
    drift: torch.Tensor
    positions: int


@dataclass(frozen=True)
class Measured:
    """What one prompt says. nats: sums over the answer's tokens. drift, positions: as in `Reading`."""

    key: str
    condition: str
    nats: dict[str, float]
    tokens: int
    drift: torch.Tensor
    positions: int


def measure(student: Scored, teacher: Teacher, prompt: Prompt, *, max_answer_tokens: int = 128) -> Measured:
    """Read one prompt.

    Raises:
        ValueError: if the answer has no token that the teacher shares, or a reader's loss on it is not finite.
    """
    inputs, labels = _inputs(student, prompt, max_answer_tokens)
    try:
        found = read(student.model, teacher, inputs, labels)
    except ValueError as error:
        raise ValueError(f"{prompt.key}: {error}") from error
    nats = {reader: float(values.double().sum()) for reader, values in found.nats.items()}
    if bad := next((reader for reader, value in nats.items() if not math.isfinite(value)), None):
        who = "the student" if bad == "student" else f"the teacher ({bad})"
        raise NotFiniteScore(f"{prompt.key}: the loss of {who} is not finite. {OVERFLOW}")
    return Measured(prompt.key, prompt.condition, nats, found.nats["student"].numel(), found.drift, found.positions)


@torch.no_grad()
def read(student: PreTrainedModel, teacher: Teacher, inputs: dict[str, Any], labels: torch.Tensor) -> Reading:
    """Run the student once and the teacher once per sharing mode.

    Args:
        inputs: of the student, without labels. labels: (B, T), -100 where nothing is scored.

    Raises:
        ValueError: if no label can be scored.
    """
    backbone: Any = student.base_model
    with layer_outputs(student) as student_hidden, recording(student) as shared:
        backbone(**inputs, use_cache=False)
    plans = {mode: _plan(teacher, inputs, labels, mode) for mode in READ_IN}
    if not plans["full"].num_loss:
        raise ValueError("no token of the answer is shared by student and teacher. Leave it out.")
    rows, positions = plans["full"].loss_rows, plans["full"].loss_positions  # the same in every mode
    targets = labels[rows, positions + 1]

    assert shared.last_hidden_state is not None
    nats = {"student": label_nll(shared.last_hidden_state[rows, positions], head_of(student), targets)}
    for mode, plan in plans.items():
        if mode == "vision":
            with layer_outputs(teacher.model) as teacher_hidden, recording_own(teacher.model) as own:
                hidden = sharing(mode).teacher_pass(teacher.model, shared, plan)
            drift = state_drift(shared, student_hidden, own, teacher_hidden, plan)
        else:
            hidden = sharing(mode).teacher_pass(teacher.model, shared, plan)
        nats[mode] = label_nll(hidden, teacher.head, targets)
    for mode, twice in TWICE.items():
        nats[twice] = math.log(2) - torch.logaddexp(-nats[mode], -nats["none"])
    return Reading(nats, drift, plans["vision"].num_queries)


def _inputs(student: Scored, prompt: Prompt, max_answer_tokens: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Model inputs of prompt and answer, one row; labels (1, T), -100 before the answer."""
    answer = student.answer_ids(prompt.answer)[:max_answer_tokens]
    inputs, labels = answer_inputs(student, [student.render(list(prompt.messages))], [prompt.images], [answer])
    start = inputs["input_ids"].size(1) - labels.size(1)
    return inputs, torch.cat([torch.full_like(inputs["input_ids"][:, :start], -100), labels], dim=1)


def _plan(teacher: Teacher, inputs: dict[str, Any], labels: torch.Tensor, mode: str) -> QueryPlan:
    plan: QueryPlan = plan_queries(
        inputs["input_ids"],
        labels,
        sharing=sharing(mode),
        vocabulary=teacher.vocabulary,
        attention_mask=inputs["attention_mask"],
    )
    return plan

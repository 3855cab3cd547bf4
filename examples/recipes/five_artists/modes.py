"""What each sharing mode gives its teacher, before any cure: the frozen original's KL to the captioned original, by mode; and what
`lingudistill diagnose` makes of the pair, which knows neither captions nor tests, only the rows that would be trained on.

Zero would mean that the student's keys and values tell the teacher as much as the caption does. `none` is a teacher that does not
see; a mode above it hurts. The same for the student itself ("student").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_lingudistill._internals import head_of
from hf_lingudistill.compatibility import check_compatibility
from hf_lingudistill.labs.diagnose import diagnose
from hf_lingudistill.labs.diagnose.prompts import Prompts, prompt_of
from hf_lingudistill.labs.evaluation.fidelity import Reference
from hf_lingudistill.labs.evaluation.models import load_scored, user_turn
from hf_lingudistill.labs.evaluation.reading import answer_inputs, logits
from hf_lingudistill.queries import plan_queries
from hf_lingudistill.sharing import MODES as ALL_MODES
from hf_lingudistill.student_kv import recording
from hf_lingudistill.teacher import prepare_teacher, vocabulary_of

BATCH = 8
# An LM has no eyes of its own
MODES = {name: mode for name, mode in ALL_MODES.items() if not mode.sees}
TWICE = "vision and none"  # the mean of both probabilities, as `blind_weight` .5 makes it


@torch.no_grad()
def teachers(
    reference: Reference, depends: Mapping[str, Sequence[bool]], student: Path, original: Path
) -> dict[str, Any]:
    """{reader: {"dependent", "rest", "all"}} in nats per token, on the reference's questions. Everything in fp32."""
    vlm = load_scored("student", str(student), dtype=torch.float32)
    lm = load_scored("original", str(original), dtype=torch.float32)
    fit = check_compatibility(
        vlm.model, lm.model, student_tokenizer=vlm.tokenizer, teacher_tokenizer=lm.tokenizer, teacher_revision=None
    )
    teacher = prepare_teacher(lm.model, vocabulary_of(vlm.model, fit))
    head = reference.head_on(vlm.model.device)
    sums = {reader: {"dependent": [0.0, 0], "rest": [0.0, 0]} for reader in ("student", *MODES, TWICE)}
    questions = reference.questions
    size = reference.head.weight.size(0)
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        ids = [reference.answers[one.key].ids for one in batch]
        prompts = [vlm.render(user_turn(one.instruction, len(one.images))) for one in batch]
        inputs, answer = answer_inputs(vlm, prompts, [one.images for one in batch], ids)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, labels.size(1) - answer.size(1) :] = answer
        with recording(vlm.model, keep_inputs=True) as shared:
            vlm.model.base_model(**inputs, use_cache=False)
        places = [(labels[row] != -100).nonzero()[:, 0] - 1 for row in range(len(batch))]
        wanted = torch.cat([reference.states[one.key] for one in batch]).to(labels.device)
        target = logits(wanted, head).log_softmax(dim=-1)
        flags = torch.tensor([flag for one in batch for flag in depends[one.key]], device=target.device)
        assert shared.last_hidden_state is not None
        own = torch.cat([shared.last_hidden_state[row, place] for row, place in enumerate(places)])
        found = {"student": logits(own, head_of(vlm.model).whole())[:, :size]}
        for name, mode in MODES.items():
            plan = plan_queries(
                inputs["input_ids"], labels, sharing=mode, vocabulary=teacher.vocabulary, attention_mask=inputs["attention_mask"]
            )  # fmt: skip
            states = mode.teacher_pass(teacher.model, shared, plan)
            # In the plan's order: row by row, as the answers are
            found[name] = logits(states, head)
        found[TWICE] = torch.logaddexp(*(found[name].log_softmax(dim=-1) for name in ("vision", "none")))
        for reader, scores in found.items():
            gap = (target.exp() * (target - scores.log_softmax(dim=-1))).sum(dim=-1)
            for part, chosen in (("dependent", flags), ("rest", ~flags)):
                sums[reader][part][0] += float(gap[chosen].sum())
                sums[reader][part][1] += int(chosen.sum())
    result = {}
    for reader, parts in sums.items():
        result[reader] = {part: round(total / max(count, 1), 4) for part, (total, count) in parts.items()}
        total, count = (sum(part[index] for part in parts.values()) for index in (0, 1))
        result[reader]["all"] = round(total / count, 4)
    return {"readers": result, "n": len(questions), "tokens": sum(part[1] for part in sums["student"].values())}


def diagnosed(rows: Sequence[Mapping[str, Any]], student: Path, original: Path) -> dict[str, Any]:
    """What `lingudistill diagnose` recommends on these rows, and the loss of each reader on their answers in nats per token."""
    prompts = Prompts(
        tuple(prompt_of(row, f"row {number}") for number, row in enumerate(rows)), "long answers of the recipe"
    )
    report = diagnose(str(student), str(original), prompts=prompts, dtype=torch.float32, progress=False)
    perplexity = report["perplexity"]["about"]
    losses = {
        reader: round(math.log(found["value"]), 4) for reader, found in perplexity.items() if isinstance(found, dict)
    }
    found = report["recommendation"]
    return {"recommended": found["mode"], "blind_weight": found["blind_weight"], "losses": losses, "n": len(rows)}

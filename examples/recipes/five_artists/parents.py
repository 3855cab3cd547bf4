"""An experiment of this recipe: at every token of a distilled row, the frozen parent that gives the label more probability teaches.

The parents are the original LM, which reads the VLM before by its image tokens, and the VLM before itself; rows that are not marked are
the VLM before's. No part of the library: it becomes one if it wins here.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_lingudistill import LinguDistillTrainer
from hf_lingudistill._internals import head_of
from hf_lingudistill.losses import Anchor, label_nll, score
from hf_lingudistill.step import DistillStep, own_inputs


class PerTokenStep(DistillStep):
    """The step, with the better parent of every token as its teacher."""

    @torch.compiler.disable
    def __call__(self, inputs: dict[str, Any]) -> Any:
        plan = (inputs.get("queries") or self.plan(inputs)).to(inputs["input_ids"].device)
        assert self.source is not None and plan.num_queries > 0
        rows, positions, N = plan.label_rows, plan.label_positions, plan.num_loss
        labels = inputs["labels"][rows, positions + 1]
        said, before_head, shared = self.source.look(own_inputs(inputs), rows, positions, self.sharing)
        taught, teacher_head = self._teach(shared, plan)
        hidden = self._backbone(inputs)[0].last_hidden_state[rows, positions]
        speaks = label_nll(taught, teacher_head, labels[:N]) <= label_nll(said[:N], before_head, labels[:N])
        others = torch.cat([(~speaks).nonzero()[:, 0], torch.arange(N, len(rows), device=rows.device)])
        order = torch.cat([speaks.nonzero()[:, 0], others])
        anchor = Anchor(said[others], before_head, torch.ones_like(others, dtype=torch.bool))
        scores = score(
            hidden[order],
            head_of(self.student).whole(),
            labels[order],
            taught[speaks],
            teacher_head,
            self.weights,
            anchor=anchor,
        )
        return self._output(scores, labels[order], None)


class PerTokenTrainer(LinguDistillTrainer):
    """`LinguDistillTrainer` with `PerTokenStep`; needs anchor='before' and kv_source='before'."""

    def _make_step(self, *args: Any, **kwargs: Any) -> DistillStep:
        step = super()._make_step(*args, **kwargs)
        step.__class__ = PerTokenStep
        step.watchers = []  # they follow the plan's order
        return step

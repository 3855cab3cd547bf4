"""`kv_sharing="inputs"`: the teacher reads the student's projected image features as input embeddings of its own.

No keys and values are shared. The teacher runs over the whole row: its own embeddings at the tokens that it knows, the
student's input embeddings (projected image features, the VLM's own tokens) elsewhere, under the student's masks and rotary
embeddings. A strong baseline where image tokens lie near the LM's word embeddings, at the price of a full-length pass.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .base import Sharing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..queries import QueryPlan
    from ..student_kv import SharedKV

# Configs whose decoders multiply what comes in, whoever embedded it
_SCALES = ("embedding_multiplier", "scale_emb", "embed_scale")


class Inputs(Sharing):
    """See the module."""

    in_words = "reads its own keys and values only, with the student's image features as its inputs"
    records_kv = False
    records_inputs = True
    text_reads_student = False
    any_width = False

    def own(self, readable: torch.Tensor, labelled: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return attended

    def queries_per_row(self, length: int, image_tokens: int, response_tokens: int) -> int:
        return length

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Raises:
        ValueError: if hidden sizes differ, if embeddings are scaled differently, or if the student feeds image features to
            deeper layers as well (deepstack), which the teacher would not get.
        """
        ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
        instead = "Use kv_sharing='vision'."
        if ours.hidden_size != theirs.hidden_size:
            raise ValueError(
                f"kv_sharing='inputs' hands the student's embeddings to the teacher: the student's are {ours.hidden_size} wide, the "
                f"teacher's {theirs.hidden_size}. {instead}"
            )
        if getattr(getattr(student.config, "vision_config", None), "deepstack_visual_indexes", None):
            raise ValueError(
                f"kv_sharing='inputs' cannot follow {type(student).__name__}, which adds image features to deeper layers as well "
                f"(deepstack). {instead}"
            )
        found = _scale_of(student), _scale_of(teacher)
        if abs(found[0] - found[1]) > 1e-3 * abs(found[1]):
            raise ValueError(
                f"kv_sharing='inputs' needs embeddings of one scale: the student multiplies its by {found[0]:g}, the teacher by "
                f"{found[1]:g}. {instead}"
            )

    def teacher_pass(self, teacher: PreTrainedModel, shared: SharedKV, plan: QueryPlan) -> torch.Tensor:
        from ..replay import inference, replayed_pass

        if not plan.num_queries:
            return super().teacher_pass(teacher, shared, plan)
        assert shared.inputs_embeds is not None
        with inference(teacher):
            embeds = teacher.get_input_embeddings()(plan.token_ids)  # (Q, H)
            theirs = shared.inputs_embeds[plan.rows, plan.positions].to(embeds.dtype)
            embeds = embeds.where(plan.readable[:, None], theirs)
        hidden: torch.Tensor = replayed_pass(teacher, shared, plan, inputs_embeds=embeds[None])
        return hidden


def _scale_of(model: PreTrainedModel) -> float:
    """What a model's embeddings are multiplied by, in its embedding module or in its decoder."""
    config, embeddings = model.config.get_text_config(), model.get_input_embeddings()
    found: list[Any] = [getattr(embeddings, "scalar_embed_scale", None) or getattr(embeddings, "embed_scale", None)]
    found += [getattr(config, name, None) for name in _SCALES]
    return math.prod(float(scale) for scale in found if scale is not None)

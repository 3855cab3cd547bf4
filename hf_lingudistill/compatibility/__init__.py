"""Does a teacher fit a student? Answered from configs and tokenizers alone; no weights are read.

    report = check_compatibility("path/or/id/of/the/VLM", "path/or/id/of/its/LM")
    print(report)                # a table, 100 columns wide
    report.raise_for_misfit()    # ValueError with every misfit and its fix

KV sharing lets layer l of the teacher attend to the keys and values of layer l of the student, so both need softmax
self-attention in every layer and K/V of the same shape. Everything else may differ, and is noted where it matters. With
`kv_sharing="images"` nothing is shared: the teacher is a VLM that must read the student's very inputs.

`guess_teacher` finds the LM that a VLM's config or model card names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..sharing import sharing
from .checks import (
    check_architecture,
    check_attention,
    check_layers,
    check_quantization,
    check_roles,
    check_rope,
    check_same_inputs,
    check_sizes,
    check_sliding_window,
    check_softcapping,
)
from .configs import Side, UnreadableModelError, is_vlm, load_config
from .guess import guess_teacher, named_teacher
from .table import TABLE_WIDTH, Check, CompatibilityReport
from .vocabulary import (
    check_chat_template,
    check_image_tokens,
    check_vocabulary,
    check_whole_vocabulary,
    end_of_turn,
    placeholder_ids,
)

if TYPE_CHECKING:
    from .configs import ModelReference

__all__ = [
    "TABLE_WIDTH",
    "Check",
    "CompatibilityReport",
    "UnreadableModelError",
    "check_compatibility",
    "guess_teacher",
    "is_vlm",
    "load_config",
    "named_teacher",
]


def check_compatibility(
    student: ModelReference,
    teacher: ModelReference,
    *,
    student_tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    trust_remote_code: bool = False,
    student_revision: str | None = None,
    teacher_revision: str | None = None,
    kv_sharing: str | None = None,
    student_chat_template: str | None = None,
) -> CompatibilityReport:
    """Check whether `teacher` can teach `student` with shared K/V.

    Args:
        student: the VLM, as folder, Hub id, config, or model (its config is used; no parameter is touched).
        teacher: the LM, or a VLM whose text half is to teach, likewise.
        student_tokenizer: tokenizer or processor. By default loaded from where the config came from.
        teacher_tokenizer: likewise. Without tokenizers the vocabularies cannot be compared, which is a misfit.
        trust_remote_code: allow configs and tokenizers to run code from their repository.
        student_revision: branch, tag or commit on the Hub.
        teacher_revision: likewise.
        kv_sharing: the mode that is to be used, where it is known: with `images`, other things must agree.
        student_chat_template: that the student will be trained with, where it is not its tokenizer's.

    Raises:
        UnreadableModelError: if a config cannot be read.
    """
    s = Side.load("student", student, student_tokenizer, trust_remote_code, student_revision)
    s.given_template = student_chat_template
    t = Side.load("teacher", teacher, teacher_tokenizer, trust_remote_code, teacher_revision)

    sees = kv_sharing is not None and sharing(kv_sharing).sees
    roles = check_roles(s, t, sees=sees)
    if not s.is_vlm or (sees and not t.is_vlm):  # swapped, or no VLM: every other line would compare the wrong things
        return CompatibilityReport(s.title, t.title, roles)

    s.load_tokenizer()
    t.load_tokenizer()
    vocabulary, shared_vocab_size = check_vocabulary(s, t)
    image_token_ids = placeholder_ids(s)
    if sees:
        of_models = check_same_inputs(s, t, image_token_ids, placeholder_ids(t))
        vocabulary += check_whole_vocabulary(s, t, shared_vocab_size)
    else:
        of_models = [
            *check_architecture(s, t),
            *check_layers(s, t),
            *check_attention(s, t),
            *check_sliding_window(s, t),
            *check_rope(s, t),
            *check_softcapping(s, t),
            *check_sizes(s, t),
        ]
    checks = [
        *roles,
        *of_models,
        *vocabulary,
        *check_image_tokens(s, image_token_ids),
        *check_chat_template(s, t),
        *check_quantization(t),
    ]
    return CompatibilityReport(
        s.title,
        t.title,
        checks,
        shared_vocab_size=shared_vocab_size,
        student_vocab_size=s.vocab_size,
        teacher_vocab_size=t.vocab_size,
        image_token_ids=image_token_ids,
        aliases=end_of_turn(s, t, shared_vocab_size),
        teacher_is_vlm=t.is_vlm,
    )

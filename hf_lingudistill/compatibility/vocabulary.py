"""Tokens: which ids mean the same to both models, which stand for images, and how the two write a chat."""

from __future__ import annotations

from typing import Any

from .configs import Side, is_vision_key, nested_configs
from .table import Check, count

_Tokens = list[str | None]  # token string by id, None where there is none


def check_vocabulary(s: Side, t: Side) -> tuple[list[Check], int]:
    """The checks, and the number of ids that are shared: token strings are compared for every id."""
    checks = []
    for side in (s, t):
        if side.processing is None:
            read = ["not read" if x.processing is None else f"{x.vocab_size} rows" for x in (s, t)]
            reason = (
                f"Vocabularies cannot be compared for lack of the {side.role}'s tokenizer: {side.tokenizer_error}."
            )
            fix = f"Save it beside the model (save_pretrained), or pass a folder or Hub id that has one (in Python, {side.role}_tokenizer)."
            checks.append(Check("vocabulary", "misfit", read[0], read[1], reason, fix))
    if checks:
        return checks, 0

    ours, theirs = _token_strings(s.tokenizer), _token_strings(t.tokenizer)
    shown_ours = f"{len(ours)} tokens, {s.vocab_size} rows"
    shown_theirs = f"{len(theirs)} tokens, {t.vocab_size} rows"
    common = min(len(ours), len(theirs))
    different = [index for index in range(common) if ours[index] != theirs[index]]
    prefix = different[0] if different else common
    shared = min(prefix, s.vocab_size, t.vocab_size)

    if different and prefix <= _last_ordinary_id(t.tokenizer, theirs):
        reason = f"{_disagreement(different, ours, theirs)}: what the teacher says would be read as something else."
        fix = "Use the LM that the student was built from, with its own tokenizer."
        return [Check("vocabulary", "misfit", shown_ours, shown_theirs, reason, fix)], shared

    reasons = []
    if different:  # the student took over ids that its LM had kept in reserve, behind all of its language
        reasons.append(f"{_disagreement(different, ours, theirs)}, all among ids that the teacher keeps in reserve.")
    extra = [index for index in range(common, len(ours)) if ours[index] is not None]
    if extra:
        first = extra[0]
        reasons.append(
            f"Student has {count(len(extra), 'token')} that the teacher lacks (id {first}: {ours[first]!r})."
        )
    beyond = [index for index in range(common, len(theirs)) if theirs[index] is not None]
    if beyond:
        first = beyond[0]
        reasons.append(
            f"Teacher has {count(len(beyond), 'token')} that the student lacks (id {first}: {theirs[first]!r}): what "
            "it predicts there is left out."
        )
    if shared < prefix:
        reasons.append(f"The smaller embedding has rows for {shared} of the {prefix} shared tokens.")
    if any(token is not None for token in ours[shared:]):
        reasons.append(f"Positions with labels from id {shared} on get cross-entropy only.")
    return [Check("vocabulary", "note" if reasons else "fits", shown_ours, shown_theirs, " ".join(reasons))], shared


def check_whole_vocabulary(s: Side, t: Side, shared: int) -> list[Check]:
    """What a teacher must know that is run on the student's ids as they are: every token of the student's."""
    if s.processing is None or t.processing is None:
        return []
    ours = _token_strings(s.tokenizer)
    unknown = [index for index in range(shared, len(ours)) if ours[index] is not None]
    if not unknown:
        return []
    first = unknown[0]
    reason = (
        f"kv_sharing=images runs the teacher on the student's own ids, and it does not know {count(len(unknown), 'token')} of the "
        f"student's (id {first}: {ours[first]!r})."
    )
    fix = "Use the VLM that the student was tuned from, with its own tokenizer, or another kv_sharing."
    return [Check("whole vocabulary", "misfit", f"{len(ours)} tokens", f"{shared} shared", reason, fix)]


def _disagreement(different: list[int], ours: _Tokens, theirs: _Tokens) -> str:
    ids = "1 token id differs" if len(different) == 1 else f"{len(different)} token ids differ"
    first = different[0]
    return (
        f"{ids} between the tokenizers, the first is {first} ({ours[first]!r} for the student, {theirs[first]!r} for "
        "the teacher)"
    )


def _token_strings(tokenizer: Any) -> _Tokens:
    """Token string of each id, None where the tokenizer has no token."""
    tokens: dict[int, str] = {index: token for token, index in tokenizer.get_vocab().items()}
    for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        tokens[index] = str(token)
    return [tokens.get(index) for index in range(max(tokens, default=-1) + 1)]


def _last_ordinary_id(tokenizer: Any, tokens: _Tokens) -> int:
    """The last id that is neither special nor added: all that the model learnt as language lies up to here."""
    reserved = {*getattr(tokenizer, "added_tokens_decoder", {}), *getattr(tokenizer, "all_special_ids", [])}
    return max((i for i, token in enumerate(tokens) if token is not None and i not in reserved), default=-1)


def placeholder_ids(s: Side) -> tuple[int, ...]:
    """Ids that stand for images and videos, sorted: those of the config, else of its vision config (Phi-4-multimodal), else of the
    processor or tokenizer. Empty where none of them names one."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    nested = [value for name, value in nested_configs(s.config).items() if is_vision_key(name)]
    for source in (s.config, *nested, s.processing, s.tokenizer):
        values = {getattr(source, name, None) for name in names}
        if found := sorted(value for value in values if isinstance(value, int)):
            return tuple(found)
    return ()


def check_image_tokens(s: Side, ids: tuple[int, ...]) -> list[Check]:
    shown = ", ".join(map(str, ids)) or "none"
    if not ids:
        reason = "Student's config names no image token: vision and none cannot tell images from text."
        return [Check("image tokens", "note", shown, "", reason, "Use kv_sharing=full or prompt.")]
    outside = [index for index in ids if index >= s.vocab_size]
    if outside:
        listed = ", ".join(map(str, outside))
        reason = f"Student's embedding has {s.vocab_size} rows and none for image token id {listed}."
        return [Check("image tokens", "note", shown, "", reason)]
    return [Check("image tokens", "fits", shown, "")]


def check_chat_template(s: Side, t: Side) -> list[Check]:
    if s.processing is None or t.processing is None:
        return []

    def note(reason: str, fix: str = "") -> list[Check]:
        return [Check("chat template", "note", shown[0], shown[1], reason, fix)]

    templates = s.template, t.template
    shown = tuple("yes" if template else "none" for template in templates)
    if shown == ("yes", "none"):
        return note(
            "Teacher has no chat template, the student has one: turn markers may be new to the teacher.",
            "If there is an instruct LM that the student was built from, use that one.",
        )
    if shown == ("none", "yes"):
        return note(
            "Student has no chat template, the teacher has one: the teacher expects turn markers and sees none.",
            "If there is a base LM that the student was built from, use that one.",
        )
    ours, theirs = (_render(side.tokenizer, template) for side, template in zip((s, t), templates, strict=True))
    if ours == theirs:
        return [Check("chat template", "fits", shown[0], shown[1])]
    return note(
        f"Chat formats differ (student: {_quote(ours)}; teacher: {_quote(theirs)}): the teacher reads the student's."
    )


def _render(tokenizer: Any, template: str | None) -> str | None:
    """One short exchange in the chat format; None without a template, or with one that takes no plain exchange."""
    if template is None:
        return None
    turns = (("user", "Question"), ("assistant", "Answer"))
    as_text = [{"role": role, "content": content} for role, content in turns]
    as_parts = [{"role": role, "content": [{"type": "text", "text": content}]} for role, content in turns]
    for messages in (as_parts, as_text):
        try:
            rendered = str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
        except Exception:  # jinja's errors, and whatever a template raises on a form that it does not know
            continue
        if "Question" in rendered and "'type'" not in rendered:
            return rendered
    return None


def end_of_turn(s: Side, t: Side, shared_vocab_size: int) -> tuple[tuple[int, int], ...]:
    """(student id, teacher id) where the two chat templates end an assistant's turn with different tokens, of which the teacher does
    not know the student's: one event under two names. Empty where they agree, or where it is not plain that they do."""
    ours, theirs = _ends_turn_with(s), _ends_turn_with(t)
    if ours is None or theirs is None or ours == theirs or ours < shared_vocab_size or theirs >= shared_vocab_size:
        return ()
    return ((ours, theirs),)


def _ends_turn_with(side: Side) -> int | None:
    """The special token right behind an assistant's answer in the rendered chat; None if there is none."""
    rendered = None if side.tokenizer is None else _render(side.tokenizer, side.template)
    if rendered is None or "Answer" not in rendered:
        return None
    behind = rendered.rsplit("Answer", 1)[1].lstrip()
    added: dict[int, Any] = getattr(side.tokenizer, "added_tokens_decoder", {})
    found = [(len(str(token)), i) for i, token in added.items() if token.special and behind.startswith(str(token))]
    return max(found)[1] if found else None


def _quote(text: str | None, limit: int = 120) -> str:
    if text is None:
        return "not to be rendered"
    return repr(text if len(text) <= limit else text[: limit // 2] + " ... " + text[-limit // 2 :])

"""Are these the models that the suite needs? Told from names, configs and chat templates, before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .models import Scored, require_template, without_weights
from .suite import GroundedTask, Suite

VLMS = ("base", "before", "after")
STRANGER = 0.5  # of the tokens of the questions, without a counterpart: above, no model has to be asked


def check_roles(models: Mapping[str, str], sees: Mapping[str, bool], suite: Suite) -> None:
    """Refuse swapped, doubled and missing models.

    Args:
        models: {name: folder or Hub id}. sees: {name: whether its config is a VLM's}.

    Raises:
        ValueError: in one sentence that says what to pass instead.
    """
    wrong = [name for name in VLMS if name in models and not sees[name]]
    if sees.get("original") and "original" in models:
        swapped = f" {wrong[0]} is one: are the two swapped?" if wrong else ""
        raise ValueError(
            f"original: {models['original']!r} is a vision-language model; expected the language model that it was built from.{swapped} A "
            "VLM to compare with is passed as --base."
        )
    if wrong:
        raise ValueError(
            f"{wrong[0]}: {models[wrong[0]]!r} is a language model that takes no images; expected a vision-language model. Pass the "
            "language model as --original."
        )
    places: dict[str, str] = {}
    for name, path in models.items():
        place = str(Path(path).resolve()) if Path(path).is_dir() else path
        if place in places:
            raise ValueError(f"{places[place]} and {name} are the same model, {path!r}; expected two to compare.")
        places[place] = name
    if not any(sees.values()) and (task := next((t for t in suite.fidelity if t.template == "before"), None)):
        raise ValueError(
            f"Task {task.name!r} asks the original in the VLM's chat template, and no VLM is given: pass --before, or set `template: own`."
        )
    if suite.fidelity and "original" not in models:
        raise ValueError(
            f"Suite {suite.name!r} measures fidelity to the original, which is missing; pass the language model that the VLM was built "
            "from as --original."
        )


def check_templates(
    models: Mapping[str, str], sees: Mapping[str, bool], suite: Suite, *, trust_remote_code: bool = False
) -> None:
    """Refuse a model without a chat template in a suite that asks it in one.

    Args: as `check_roles`.

    Raises:
        UnreadableModelError: in one sentence that says what to change.
    """
    for name, path in models.items():
        if advice := _needs_template(suite, name, sees[name]):
            require_template(name, path, sees=sees[name], trust_remote_code=trust_remote_code, advice=advice)


def _needs_template(suite: Suite, name: str, sees: bool) -> str | None:
    """What to do where a model has no chat template; None where the suite asks it nothing in one."""
    chats = suite.ifeval is not None or any("chat" in task.forms for task in suite.texts)
    chats |= bool(suite.lm_eval.tasks and suite.lm_eval.chat_template)
    chats |= sees and bool(suite.vision or suite.grounded or suite.lmms_eval.tasks)
    own = [task.name for task in suite.fidelity if name != "original" or task.template == "own"]
    if chats or (own and name != "original"):
        return "Save its tokenizer with one, or leave the tasks that need it out of the suite."
    if own:
        return f"Set `template: before` at the suite's fidelity task {own[0]!r}: it is then asked in the VLM's. Or save its tokenizer with one."
    return None


def check_tokens(
    models: Mapping[str, str],
    sees: Mapping[str, bool],
    suite: Suite,
    items: Mapping[str, Any],
    *,
    reference: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Refuse a model of another tokenizer where token is held against token. What of the original's probability lies on tokens that a model
    lacks is measured later; that it lacks most of them is told here.

    Args: as `check_roles`; items: by task. reference: who tells which tokens of an answer depend on its image.

    Raises:
        ValueError: naming the model and what it is held against.
    """
    if not (suite.grounded or suite.fidelity):
        return
    bare = {
        name: without_weights(name, path, sees=sees[name], trust_remote_code=trust_remote_code)
        for name, path in models.items()
    }
    if reference is not None:
        for task in suite.grounded:
            expected = _splits(bare[reference], task, items[task.name])
            for name in (name for name in bare if sees[name]):
                if _splits(bare[name], task, items[task.name]) != expected:
                    raise ValueError(
                        f"Task {task.name!r}: {name} splits the answers into other tokens than {reference}, so that a split by token "
                        "cannot be shared. Score models with one tokenizer together."
                    )
    if suite.fidelity:
        asked = [question.instruction for task in suite.fidelity for question in items[task.name]]
        original = bare["original"]
        for name, model in bare.items():
            if (left := _without_counterpart(original, model, asked)) > STRANGER:
                raise ValueError(
                    f"{name} has not the original's tokens: {left:.0%} of the original's tokens of the suite's questions have no counterpart "
                    "under the same id. Fidelity compares a VLM with the LM that it was built from."
                )


def _splits(model: Scored, task: GroundedTask, items: Any) -> list[list[int]]:
    """The token ids of the answers, as far as they are scored."""
    return [model.answer_ids(item.answers[0])[: task.max_answer_tokens] for item in items]


def _without_counterpart(original: Scored, model: Scored, texts: list[str]) -> float:
    """The share of the original's tokens of these texts that are other strings in the model's vocabulary, or none."""
    ids = [i for text in texts for i in original.ids(text)]
    known = [i for i in ids if i < len(model.tokenizer)]
    ours, theirs = (scored.tokenizer.convert_ids_to_tokens(known) for scored in (original, model))
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return 1 - same / len(ids) if ids else 0.0

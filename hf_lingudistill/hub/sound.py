"""Whether what is sent is a model: every weight that its config asks for, none of them NaN, and the one that its report is about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .manifest import PublishError, one_line
from .results import main_model


def check_weights(folder: Path, files: Sequence[str], *, adapter: bool) -> str | None:
    """Look at every weight of a saved model. -> a note, if no class could be built that says which weights there must be.

    files: of the folder. adapter: it holds an adapter alone, which lacks the weights of its base.

    Raises:
        PublishError: naming weights that are missing or not finite.
    """
    from ..weights import BadWeights, check_finite

    try:
        for name in files:
            if name.endswith(".safetensors"):
                check_finite(_tensors(folder / name), folder / name)
        return None if adapter else _check_whole(folder)
    except BadWeights as error:
        raise PublishError(str(error)) from None


def _tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """By name, one at a time."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118  # a file, not a mapping
            yield key, weights.get_tensor(key)


def _check_whole(folder: Path) -> str | None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from .._internals import loaded_by_every_process
    from ..compatibility import is_vlm
    from ..weights import BadWeights, load_whole

    try:
        config = AutoConfig.from_pretrained(folder)
        auto: Any = AutoModelForImageTextToText if is_vlm(config) else AutoModelForCausalLM
        with loaded_by_every_process():
            load_whole(auto, folder, device_map="meta", use_safetensors=True)  # names and shapes alone
    except BadWeights:
        raise
    except Exception as error:  # code that comes with the model, a quantisation that this machine cannot load, ...
        return f"whether {folder.name} holds all of its weights is not known: it cannot be loaded here ({one_line(error)})"
    return None


def model_in_report(
    report: Mapping[str, Any], folder: Path, *, adapter: bool, beside: bool
) -> tuple[str | None, str | None]:
    """-> (the report's name for the model in this folder, a note on that or None).

    Told by the fingerprint that `evaluate` takes of every model. `main_model` where a report has none (the demo's), and for an
    adapter, which is evaluated merged. beside: whether the report lies with the model, as the demo's does.

    Raises:
        PublishError: if the report is about other models.
    """
    if not report:
        return None, None
    models = {name: fact for name, fact in (report.get("models") or {}).items() if isinstance(fact, Mapping)}
    main, prints = main_model(report), {name: fact.get("fingerprint") for name, fact in models.items()}
    if not any(prints.values()):
        there = next((name for name in models if _is_at(models[name], folder)), None)
        if there is None and not beside:
            raise PublishError(
                "The report does not say which weights it is about (it has no fingerprints), and does not lie with this model: evaluate the model, "
                "and pass that report."
            )
        return there or main, None
    if adapter:
        path = models.get(main, {}).get("path")
        return (
            main,
            f"the scores are those of {main!r} in the report ({path}): an adapter cannot be compared with what was evaluated",
        )
    from ..weights import fingerprint

    mine = fingerprint(folder)
    if found := [name for name, print_ in prints.items() if print_ == mine]:
        return main if main in found else found[0], None
    known = ", ".join(f"{name} ({fact.get('path')})" for name, fact in models.items())
    raise PublishError(
        f"The report is about other weights or settings than those in {folder.name} now: it knows {known}, none of which has this "
        f"folder's fingerprint, {mine}. Evaluate the model as it is, and pass that report (or none, with no report.json in the folder)."
    )


def _is_at(fact: Mapping[str, Any], folder: Path) -> bool:
    path = fact.get("path")
    return isinstance(path, str) and Path(path).expanduser().resolve() == folder.resolve()

"""The files that make a model's repository: the saved model itself, its card, the evaluation's report, the run's facts."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from .card import render_card, usage_of
from .edits import UnreadableCard, is_ours, merged, sealed
from .manifest import (
    PLOTS,
    SCORES,
    Item,
    Manifest,
    PublishError,
    check_repo_id,
    command_for,
    json_bytes,
    one_line,
    refuse_secrets,
)
from .metadata import eval_result_file, licence_of
from .results import tasks_of
from .run_facts import FILE_NAME as RUN_FACTS
from .run_facts import RunFacts, hub_id, is_local, read_run_facts
from .sound import check_weights, model_in_report

# Files of a model's folder that transformers reads. All else there stays at home: optimizer states, `training_args.bin` (which
# holds the token), checkpoints, caches, logs.
_MODEL_FILES = re.compile(
    r"config\.json|generation_config\.json|model\.safetensors|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json"
    r"|adapter_config\.json|adapter_model\.safetensors"
    r"|processor_config\.json|preprocessor_config\.json|image_processor_config\.json|video_preprocessor_config\.json"
    r"|tokenizer\.json|tokenizer_config\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|vocab\.json"
    r"|merges\.txt|chat_template\.jinja|chat_template\.json|additional_chat_templates/[\w.-]+\.jinja"
)


def model_manifest(
    output_dir: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    report: str | Path | None = None,
    run_facts: RunFacts | None = None,
    base_model: str | None = None,
    teacher: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    revision: str | None = None,
    tag: str | None = None,
    message: str | None = None,
    command: str | None = None,
    space: str | None = None,
) -> Manifest:
    """List what makes a model's repository: weights, processor, card, report, plots, run facts and recipe.

    Args:
        output_dir: a saved model; of an embedded demo, its OUT (the model is OUT/after).
        report: `report.json` of an evaluation, or its folder; left out, looked for in `output_dir`.
        run_facts: left out, `lingudistill.json` of `output_dir`.
        base_model, teacher: Hub ids of the VLM before and of the original LM, where the run facts know folders only.
        license: code of a licence; left out, the base model's.
        command: what goes on after a failure; left out, `command_for` these arguments.
        space: Hub id of the Space that shows the model, for a link.

    Raises:
        PublishError: if the folder holds no complete model in safetensors, a weight is missing or not finite, the report is about another
            model, or a listed file holds a token or a local path.
    """
    check_repo_id(repo_id, base_model, teacher)
    for what, name in (("tag", tag), ("revision", revision)):
        if name is not None and (
            re.fullmatch(r"[A-Za-z0-9_][\w./-]*", name) is None or ".." in name or name.endswith((".", "/"))
        ):
            raise PublishError(
                f"{what} {name!r} is no name for one on the Hub: use letters, digits, '.', '-' and '_'."
            )
    if license and licence_of({}, license)[0] is None:
        raise PublishError(f"license must be a licence's code on the Hub, such as apache-2.0; got {license!r}.")
    root = Path(output_dir).expanduser()
    folder = root / "after" if not _is_model(root) and _is_model(root / "after") else root
    if not _is_model(folder):
        raise PublishError(
            f"{root} holds no saved model (config.json with model.safetensors, or an adapter): pass the folder that training "
            "or `trainer.save_model()` wrote."
        )
    both = [name for name in ("config.json", "adapter_config.json") if (folder / name).is_file()]
    if len(both) == 2 and any((folder / name).exists() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise PublishError(
            f"{folder} holds whole weights and an adapter, and transformers would load the one on top of the other: move out what is not this model's."
        )
    from ..compatibility.configs import is_vision_key

    config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config and not any(map(is_vision_key, config)):
        raise PublishError(
            f"{folder} holds a language model (its config.json, of type {config.get('model_type', '?')!r}, has no vision part): pass the folder "
            "of the VLM that was trained."
        )
    try:
        known = read_run_facts(folder) if run_facts is None else run_facts
    except ValueError as error:
        raise PublishError(str(error)) from None
    facts = _with_ids(known, student=base_model, teacher=teacher)
    base, adapter = (facts.get("student") or {}).get("id"), _is_adapter(folder)
    if adapter and base is None and not known:
        named = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if base := hub_id(named) if isinstance(named, str) else None:
            facts = _with_ids(facts, student=base)
    own = {"the VLM before": base, "the teacher": (facts.get("teacher") or {}).get("id")}
    if taken := next((role for role, name in own.items() if name == repo_id), None):
        raise PublishError(
            f"{repo_id} is {taken} itself, whose weights would be replaced: publish to a repository of another name."
        )
    found = _report_path(folder, root, report)
    results = _read_report(found) if found else {}
    beside = found is not None and found.parent in _beside(folder, root)
    main, whose = model_in_report(results, folder, adapter=adapter, beside=beside)
    files = _model_files(folder)
    unknown = check_weights(folder, files, adapter=adapter)
    plots = _plots(found.parent) if found else []
    pictures = _prompt_pictures(results, found.parent) if found else []
    card = render_card(
        facts,
        results,
        repo_id=repo_id,
        license=license,
        tags=tags,
        plots={PLOTS[item.path.split(".")[0]]: item.path for item in plots if item.path.endswith(".png")},
        main=main,
        usage=usage_of(
            repo_id,
            adapter=adapter,
            base=base,
            chat=_has_chat_template(folder),
            weights="" if adapter else _weights(folder),
        ),
        space=space,
    )
    text, readme_note = _with_local_edits(str(card), folder)
    items = [
        *(_clean(folder, path, base, trained_here=bool(known)) for path in files),
        *plots,
        *pictures,
        Item("README.md", text.encode()),
        *(_run_facts_items(facts) if known else []),
        *(_report_items(results, main) if results else []),
    ]
    for item in items:
        refuse_secrets(item, folder)
    notes = {
        f"no {RUN_FACTS} in {folder.name}: the card says nothing about training": known or "language" in results,
        "no report.json: the card says 'not evaluated' (run `lingudistill evaluate`, then pass --report)": results,
    }
    return Manifest(
        repo_id=repo_id,
        items=tuple(sorted(items, key=lambda item: item.path)),
        command=command or command_for(output_dir, repo_id, private=private, revision=revision),
        private=private,
        revision=revision,
        tag=tag,
        message=message or "Publish with hf_lingudistill",
        notes=(*(note for note, fine in notes.items() if not fine), *readme_note, *filter(None, (whose, unknown))),
    )


def _with_ids(run_facts: RunFacts, **ids: str | None) -> RunFacts:
    """The run facts with these Hub ids (by part: `student`, `teacher`) in place of their own."""
    given = {part: {**(run_facts.get(part) or {}), "id": identity} for part, identity in ids.items() if identity}
    return {**run_facts, **given}


def _is_model(folder: Path) -> bool:
    weights = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    configured = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    return configured and any((folder / name).exists() for name in weights)


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _model_files(folder: Path) -> list[str]:
    """Paths below the folder that are part of the model, checked: whole, safetensors, and inside the folder."""
    candidates = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]
    names = {path.relative_to(folder).as_posix(): path for path in candidates if path.is_file()}
    names = {name: path for name, path in names.items() if _MODEL_FILES.fullmatch(name)}
    index = folder / "model.safetensors.index.json"
    if "model.safetensors" in names:
        names = {name: path for name, path in names.items() if not re.match(r"model[-.].*(of|index)", name)}
    elif index.is_file():
        shards = set((_read_json(index).get("weight_map") or {}).values())
        if missing := sorted(str(shard) for shard in shards if shard not in names):
            raise PublishError(f"{index.name} names {missing[0]!r}, which is not in {folder}: save the model again.")
        names = {n: p for n, p in names.items() if n in shards or not re.fullmatch(r"model-.*\.safetensors", n)}
    root = folder.resolve()
    for name, path in names.items():
        if not path.resolve().is_relative_to(root):
            raise PublishError(f"{path} is a link out of the folder: replace it by the file itself.")
        if name.endswith(".safetensors"):
            _check_weights(path)
    return sorted(names)


def _has_chat_template(folder: Path) -> bool:
    configs = [folder / name for name in ("tokenizer_config.json", "processor_config.json", "chat_template.json")]
    told = any(_read_json(path).get("chat_template") for path in configs if path.is_file())
    return told or (folder / "chat_template.jinja").is_file()


def _weights(folder: Path) -> str:
    """Such as "float32, 542 MB": the dtype that most bytes have, from the headers of the model's safetensors files."""
    sizes: Counter[str] = Counter()
    for name in _model_files(folder):
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="numpy") as weights:
                for key in weights.keys():  # noqa: SIM118  # a file, not a mapping
                    part = weights.get_slice(key)
                    bits = int((re.search(r"\d+", part.get_dtype()) or ["8"])[0])  # F32, BF16, I8, F8_E4M3; BOOL
                    sizes[part.get_dtype()] += math.prod(part.get_shape()) * bits // 8
    total = sum(sizes.values())
    dtype = max(sizes, key=lambda name: sizes[name])
    named = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(dtype, dtype)
    return f"{named}, {total / 1e9:.1f} GB" if total >= 1e9 else f"{named}, {max(total / 1e6, 0.1):.3g} MB"


def _with_local_edits(card: str, folder: Path) -> tuple[str, tuple[str, ...]]:
    """The rendered card with what was edited in the folder's own, and notes on that. Another's README stays at home."""
    readme = folder / "README.md"
    if not readme.is_file():
        return card, ()
    try:
        there = readme.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PublishError(f"{readme} is no text in UTF-8: save it as that, or delete the file.") from None
    if not is_ours(there):
        return card, ("the README.md in the folder was not rendered by hf_lingudistill: it is not sent",)
    try:
        text, kept = merged(card, there)
    except UnreadableCard as error:
        raise PublishError(f"{readme} cannot be read: {error}. Mend it, or delete the file.") from None
    # Sealed anew: on the Hub, what was edited here is what we rendered
    return sealed(text), ((f"kept as edited in README.md: {', '.join(kept)}",) if kept else ())


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, framework="numpy") as weights:
            if not list(weights.keys()):
                raise PublishError(f"{path} holds no weights: save the model again.")
    except SafetensorError as error:
        raise PublishError(
            f"{path} is not a whole safetensors file ({one_line(error)}): save the model again."
        ) from None


def _clean(folder: Path, name: str, base_model: str | None, *, trained_here: bool) -> Item:
    """A file of the model; a config that says from which local folder it was loaded is sent without that.

    trained_here: whether the run facts tell the base model. Then they decide: a relative folder looks like a Hub id from elsewhere.
    """
    path = folder / name
    if path.suffix != ".json" or path.stat().st_size > 2**20:
        return Item(name, path)
    content = _read_json(path)
    changed = _forget_folders(content)
    base = content.get("base_model_name_or_path")
    if isinstance(base, str) and base and (is_local(base) or (trained_here and base != base_model)):
        if base_model is None:
            raise PublishError(
                "The adapter was trained on a local folder, and nobody else could load it: train with --merge_adapter, or publish the "
                "base and pass --before ORG/BASE."
            )
        content["base_model_name_or_path"] = base_model
        changed = True
    return Item(name, json_bytes(content)) if changed else Item(name, path)


def _forget_folders(config: Any) -> bool:
    """Take out, in place, from which local folders a config and those within it (`text_config`, ...) were loaded. -> whether any was."""
    if not isinstance(config, dict):
        return False
    names = [
        key
        for key in ("_name_or_path", "name_or_path")
        if isinstance(config.get(key), str) and config[key] and is_local(config[key])
    ]
    for key in names:
        del config[key]
    return any([_forget_folders(value) for value in config.values()]) or bool(names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PublishError(f"{path} must be JSON: {one_line(error)}.") from None
    if not isinstance(content, dict):
        raise PublishError(f"{path} must be a JSON object, found {type(content).__name__}.")
    return content


def _report_path(folder: Path, root: Path, given: str | Path | None) -> Path | None:
    if given is not None:
        path = Path(given).expanduser()
        path = path / "report.json" if path.is_dir() else path
        if not path.is_file():
            raise PublishError(f"There is no report at {path}: pass the folder that `lingudistill evaluate` wrote.")
        return path
    return next((place / "report.json" for place in _beside(folder, root) if (place / "report.json").is_file()), None)


def _beside(folder: Path, root: Path) -> list[Path]:
    """Where the report of a model lies that was made with it; the demo's is one up."""
    return [folder, root, *([folder.parent] if folder.name == "after" else [])]


def _read_report(path: Path) -> dict[str, Any]:
    report = _read_json(path)
    if not {"tasks", "language"} & report.keys():
        raise PublishError(
            f"{path} must be a report of `lingudistill evaluate` or of the demo: pass another with --report."
        )
    if wrong := _not_of_a_report(report):
        raise PublishError(f"{path} is no whole report: its {wrong}. Evaluate again, or pass another with --report.")
    return report


def _not_of_a_report(report: Mapping[str, Any]) -> str | None:
    """What in it has another shape than `evaluate` writes, or nothing."""
    shapes: dict[str, type] = {
        "tasks": list,
        "models": dict,
        "prompts": list,
        "suite": dict,
        "config": dict,
        "machine": dict,
    }
    for name, kind in shapes.items():
        if not isinstance(report.get(name) or kind(), kind):
            return f"{name!r} is {type(report[name]).__name__}, expected {kind.__name__}"
    for name in ("tasks", "prompts"):
        if odd := next((one for one in report.get(name) or [] if not isinstance(one, Mapping)), None):
            return f"{name!r} holds {type(odd).__name__}, expected mappings"
    for task in report.get("tasks") or []:
        for name, kind in {"scores": dict, "recovered": dict, "controls": dict, "differences": list}.items():
            value = task.get(name) or kind()
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [None]
            if not isinstance(value, kind) or not all(isinstance(one, Mapping) for one in inside):
                return f"task {str(task.get('name'))!r} has {name!r} of another shape"
    return None


def _public_report(value: Any) -> Any:
    """A report without folders of this machine: of each, the last part."""
    if isinstance(value, Mapping):
        return {key: _public_report(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public_report(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"(~[\\/]|/|\.{1,2}[\\/]|[A-Za-z]:[\\/])[^\n]*[\\/][^\n]+", value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def _plots(folder: Path) -> list[Item]:
    names = [f"{stem}.{suffix}" for stem in PLOTS for suffix in ("png", "svg")]
    return [
        Item(name, folder / name) for name in names if (folder / name).is_file() and not (folder / name).is_symlink()
    ]


def _run_facts_items(run_facts: RunFacts) -> list[Item]:
    recipe = [Item("recipe.yaml", _recipe(run_facts["recipe"]))] if run_facts.get("recipe") else []
    return [Item(RUN_FACTS, json_bytes(run_facts)), *recipe]


def _report_items(report: Mapping[str, Any], main: str | None) -> list[Item]:
    entries = eval_result_file(tasks_of(report, main))
    found = [Item(SCORES, entries.encode())] if entries else []
    public = _public_report(report)
    if "tasks" in report and main:
        public["main"] = main  # which of its models lies here
    return [Item("report.json", json_bytes(public)), *found]


def _prompt_pictures(report: Mapping[str, Any], folder: Path) -> list[Item]:
    """The pictures beside a report that its prompts are about."""
    named = [entry.get("image") for entry in report.get("prompts") or [] if isinstance(entry, Mapping)]
    files = {
        name: folder / name
        for name in named
        if isinstance(name, str) and re.fullmatch(r"[\w./ -]+\.(png|jpe?g)", name)
    }
    inside = {
        name: path
        for name, path in files.items()
        if path.is_file() and path.resolve().is_relative_to(folder.resolve())
    }
    return [Item(Path(name).as_posix(), path) for name, path in inside.items()]


def _recipe(recipe: Mapping[str, Any]) -> bytes:
    head = "# Settings of the run that made this model: lingudistill distill --config recipe.yaml --output_dir OUT\n"
    return (head + yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)).encode()

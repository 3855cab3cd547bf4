"""The files of the Space that shows a model: listed and checked as `manifest.py` does for a model, and nothing sent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import RepoCard

from .edits import sealed
from .manifest import Item, Manifest, PublishError, check_repo_id, json_bytes, one_line, refuse_secrets
from .run_facts import FILE_NAME as RUN_FACTS

PACKAGE = Path(__file__).resolve().parents[1]
_SPACE_FILES = {".py", ".txt", ".md", ".html", ".css", ".js", ".svg", ".png", ".jpg", ".jpeg", ".json", ".yaml"}


def space_manifest(
    model: Manifest,
    space_id: str,
    *,
    before: str | None = None,
    original: str | None = None,
    files: str | Path | None = None,
) -> Manifest:
    """List the files of the Space that shows a model beside the VLM before, and the original LM as a text-only third.

    Args:
        model: the manifest of the model, whose run facts and report are used.
        before, original: Hub ids; left out, what the run facts say. The original may be missing.
        files: the folder of the app; left out, `examples/space` of the clone that this package runs from.

    Raises:
        PublishError: if the app is not there, or the VLM before has no Hub id.
    """
    run_facts = json.loads(model.text(RUN_FACTS) or "{}")
    before = before or (run_facts.get("student") or {}).get("id")
    original = original or (run_facts.get("teacher") or {}).get("id")
    check_repo_id(space_id)
    if before is None:
        raise PublishError(
            "The Space shows the VLM before beside this one, and the run facts know it as a folder only: send that folder "
            "with `hf upload ORG/BEFORE FOLDER` and pass --before ORG/BEFORE."
        )
    check_repo_id(before, original)
    if model.revision:
        raise PublishError(
            f"The Space loads models from their main branch, and this one goes to {model.revision!r}: publish it to the main branch, or leave --space out."
        )
    folder = Path(files).expanduser() if files else Path(__file__).resolve().parents[2] / "examples" / "space"
    if not (folder / "app.py").is_file():
        raise PublishError(
            f"The Space's app.py is not in {folder.name!r}: it is no part of the installed package. Clone the repository of "
            "hf_lingudistill and pass --space_files CLONE/examples/space."
        )
    paths = sorted(path for path in folder.rglob("*") if _belongs_to_space(path, folder))
    items = [Item(path.relative_to(folder).as_posix(), path) for path in paths if path.name != "README.md"]
    items += [Item(path.name, path.resolve()) for path in sorted(folder.iterdir()) if _is_shared(path)]
    config = {"before": before, "after": model.repo_id, **({"original": original} if original else {}), **_links()}
    report = next((item for item in model.items if item.path == "report.json"), None)
    if report:
        config["report"] = report.path
    written = [Item("config.json", json_bytes(config)), Item("README.md", _space_readme(folder, space_id, config))]
    if report:
        asked = {entry.get("image") for entry in json.loads(model.text("report.json")).get("prompts") or []}
        written += [report, *(item for item in model.items if item.path in asked)]
    items = [item for item in items if item.path not in {new.path for new in written}] + written
    for item in items:
        refuse_secrets(item, folder)
    return Manifest(
        space_id,
        tuple(sorted(items, key=lambda item: item.path)),
        model.command,
        repo_type="space",
        private=model.private,
        message="Publish the Space with hf_lingudistill",
        notes=(
            f"the Space reads {model.repo_id}, which is private: give it a token as the secret HF_TOKEN in its settings",
        )
        if model.private
        else (),
    )


def _belongs_to_space(path: Path, folder: Path) -> bool:
    relative = path.relative_to(folder)
    hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
    return path.is_file() and not path.is_symlink() and not hidden and path.suffix.lower() in _SPACE_FILES


def _is_shared(path: Path) -> bool:
    """A module of the library that the Space uses as it is: in a clone, a link to it."""
    return path.is_symlink() and path.resolve().is_relative_to(PACKAGE) and path.suffix == ".py"


def _space_readme(folder: Path, space_id: str, config: Mapping[str, Any]) -> bytes:
    """The Space's README with the models that it shows in its front matter."""
    path = folder / "README.md"
    front = f"---\ntitle: {space_id.split('/')[-1]}\nsdk: gradio\napp_file: app.py\n---\n"
    text = path.read_text(encoding="utf-8") if path.is_file() else front
    try:
        card = RepoCard(text)
    except (ValueError, yaml.YAMLError) as error:
        raise PublishError(f"The front matter of {path} is not valid: {one_line(error)}.") from None
    card.data["models"] = [config[name] for name in ("before", "after", "original") if config.get(name)]
    card.text = f"\n<!-- lingudistill:about -->\n{card.text.strip()}\n<!-- /lingudistill:about -->\n"
    return sealed(str(card)).encode()


def _links() -> dict[str, str]:
    """{"code": where the library is developed}, if its installed metadata says so."""
    try:
        urls = metadata("hf_lingudistill").get_all("Project-URL") or []
    except PackageNotFoundError:
        return {}
    named = {name.strip().lower(): url.strip() for name, _, url in (line.partition(",") for line in urls)}
    return next(({"code": named[key]} for key in ("repository", "source", "homepage") if key in named), {})

"""The item cache: what a model gave on each item of a task, on disk as soon as it is there, so that a rerun goes on.

One JSON-lines file per model and task. Its first line says which weights, task settings, versions and kind of device the rest belongs
to; if one of them has changed, the file is started anew. Every line names that first line, since another run may start the file anew
while this one is writing to it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from ..._version import __version__
from ...folders import NotOurs
from ...identity import digest
from ..statistics import OVERFLOW, NotFiniteScore

SCHEMA = "lingudistill-items/2"


class ItemCache:
    """Records of one model on one task, by item key.

    path: the file. header: what the records depend on (JSON values).

    Raises:
        NotOurs: if the file is there and is no item cache.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        plain = json.loads(json.dumps(header))
        self.path, self.header = path, {"schema": SCHEMA, **plain}
        self._of = digest(self.header)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if lines and not _is_cache(lines):
            raise NotOurs(f"{str(path)!r} is no item cache: move it, or choose another output_dir.")
        self.records: dict[str, Any] = items_of(lines, plain)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite()

    def __contains__(self, item: str) -> bool:
        return item in self.records

    def add(self, records: Mapping[str, Any]) -> None:
        """Keep records and write them at once.

        Raises:
            NotFiniteScore: for a record that holds NaN or infinity, which would come out as a verdict on the model.
        """
        if (bad := next((item for item, record in records.items() if not _is_finite(record)), None)) is not None:
            raise NotFiniteScore(
                f"{self.path.parent.name}/{self.path.stem}: what the model gives on item {bad!r} is not finite. {OVERFLOW}"
            )
        self.records.update(records)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(self._line(item, record) for item, record in records.items())

    def _line(self, item: str, record: Any) -> str:
        return json.dumps({"item": item, "of": self._of, "record": record}) + "\n"

    def _rewrite(self) -> None:
        partial = self.path.with_suffix(f".{os.getpid()}.tmp")  # two runs may begin at a time
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self.header) + "\n")
            file.writelines(self._line(item, record) for item, record in self.records.items())
        os.replace(partial, self.path)


def items_of(lines: Sequence[str], header: Mapping[str, Any]) -> dict[str, Any]:
    """{item: record} of a cache's lines, of those that belong to a header. A run that was killed may have left half a line."""
    plain = json.loads(json.dumps(header))
    first = _parsed(lines[0]) if lines else None
    # Of before, when lines did not say whose they are
    of = None if first == plain else digest({"schema": SCHEMA, **plain})
    records = [line for line in map(_parsed, lines[1:]) if isinstance(line, dict) and line.get("of") == of]
    return {
        line["item"]: line["record"]
        for line in records
        if {"item", "record"} <= set(line) and _is_finite(line["record"])
    }


def _is_cache(lines: Sequence[str]) -> bool:
    """By its first line; of before, by the one after it."""
    first, second = (
        _parsed(line) for line in (lines[0], lines[1] if len(lines) > 1 else '{"item": "", "record": ""}')
    )
    if not isinstance(first, dict):
        return False
    return first.get("schema") == SCHEMA or not isinstance(second, dict) or {"item", "record"} <= set(second)


def _is_finite(record: Any) -> bool:
    """Whether every number in a JSON value is."""
    if isinstance(record, Mapping | list | tuple):
        return all(map(_is_finite, record.values() if isinstance(record, Mapping) else record))
    return not isinstance(record, float) or math.isfinite(record)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def made_with(model: Any, *packages: str) -> dict[str, Any]:
    """What records depend on besides weights and task, as a header names it: {"device": type, "versions": {package: version}}.

    packages: those that the records depend on beside hf_lingudistill and transformers.
    """
    versions = {"hf_lingudistill": __version__} | {name: _version(name) for name in ("transformers", *packages)}
    return {"device": model.device.type, "versions": versions}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def of_images(images: Sequence[PILImage.Image]) -> list[str]:
    """What images show, as a header names it: mode, size and pixels."""
    return [digest([image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest()]) for image in images]

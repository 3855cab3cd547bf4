"""What a frozen model says of rows, computed once and kept on disk; found again by what the rows hold.

A cache is a folder: `cache.json` says which model, revision and settings its answers belong to, `process-R/part-N.safetensors` hold them,
written by process R as they come, each part whole or not at all. A run that is cut short goes on with the rows that are missing;
another model or setting is refused. Nothing is ever overwritten, and no file that is not its own touched (`folders.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .folders import claim, replacing

HEADER, COMPLETE = "cache.json", "complete.json"
FORMAT = 2
PART_BYTES = 2**26
Answer = dict[str, torch.Tensor]  # by name, each (tokens, ...)


class StaleCache(ValueError):
    """A cache holds the answers of another model, or under other settings, or cannot be read. Nothing in it was touched."""


def row_key(ids: torch.Tensor, labels: torch.Tensor, images: Iterable[Any]) -> bytes:
    """16 bytes that stand for a row: its tokens (T,) and labels (T,) without padding, and the pixels of its images (PIL)."""
    found = hashlib.blake2b(digest_size=16)
    for tokens in (ids, labels):
        found.update(tokens.to("cpu", torch.int64).numpy().tobytes())
        found.update(b"|")
    for image in images:
        found.update(f"{image.mode}{image.size}".encode())
        found.update(image.tobytes())
    return found.digest()


class RowCache:
    """One cache. Made by every process of a run, which share the folder; `begin` goes before anything is added.

    title: how messages name it. settings: what the answers depend on (JSON values).
    """

    def __init__(self, folder: Path, title: str, settings: Mapping[str, Any], *, process: int = 0) -> None:
        self.folder, self.title, self.process = folder, title, process
        self.settings: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **settings}))
        self._by = title.replace(" ", "_")
        self._new: dict[bytes, Answer] = {}
        self._written: set[bytes] = set()
        self._size = 0
        self._measured: dict[str, float] = {}
        self._open_parts: dict[Path, Any] = {}
        self._index: list[np.ndarray[Any, Any]] = [np.empty(0, dtype=np.int64) for _ in range(5)]
        self._parts: list[Path] = []
        self.measured: dict[str, float] = {}
        self.nbytes = 0

    def alone(self) -> AbstractContextManager[Any]:
        """Waits for another run that fills this cache. Held by one process of each run."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        return WeakFileLock(self.folder.with_name(f"{self.folder.name}.lock"))

    def begin(self) -> None:
        """Make the folder, or check the one that is there. By one process, before the others `read`.

        Raises:
            NotOurs: if the folder is there and is no cache of this kind.
            StaleCache: if it holds other answers.
        """
        claim(self.folder, by=self._by)
        if not (self.folder / HEADER).exists():
            self._write(HEADER, self.settings)
        self.check()

    def check(self) -> None:
        """Compare what the cache was made with.

        Raises:
            StaleCache: if the answers there are those of another model, or of other settings.
        """
        found = self._read(HEADER)
        for name in dict.fromkeys([*self.settings, *found]):
            ours, theirs = self.settings.get(name), found.get(name)
            if ours != theirs:
                raise StaleCache(
                    f"The {self.title} in {str(self.folder)!r} was computed with {name} = {theirs!r}, and this run has {ours!r}: remove "
                    "that folder, or set another cache_dir."
                )

    def read(self) -> None:
        """Take up what all processes have written.

        Raises:
            StaleCache: if a part is damaged.
        """
        self._written.clear()
        self._parts = sorted(self.folder.glob("process-*/part-*.safetensors"))
        self._open_parts.clear()
        self.measured, self.nbytes = {}, sum(part.stat().st_size for part in self._parts)
        index: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(5)]
        for number, part in enumerate(self._parts):
            file = self._open(part)
            words, ends = file.get_tensor("keys").numpy(), file.get_tensor("ends").numpy()
            begins = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
            columns = (words[:, 0], words[:, 1], np.full(len(ends), number), begins, ends)
            for column, values in zip(index, columns, strict=True):
                column.append(values)
            for name, value in json.loads((file.metadata() or {}).get("measured", "{}")).items():
                self.measured[name] = self.measured.get(name, 0.0) + value
        joined = [np.concatenate([np.empty(0, dtype=np.int64), *column]) for column in index]
        order = np.argsort(joined[0], kind="stable")
        self._index = [column[order] for column in joined]

    def __len__(self) -> int:
        return len(self._index[0])

    def __contains__(self, key: bytes) -> bool:
        return key in self._new or key in self._written or self._place(key) is not None

    def get(self, key: bytes) -> Answer | None:
        """The answer about a row; None if there is none. Of rows that were added, after the next `read`."""
        if (place := self._place(key)) is None:
            return None
        part, begin, end = place
        file = self._open(self._parts[part])
        return {name: file.get_slice(name)[begin:end] for name in file.keys() if name not in ("keys", "ends")}

    def add(self, key: bytes, answer: Answer, measured: Mapping[str, float] | None = None) -> None:
        """Keep the answer about a row. measured: sums that `measured` will tell of all rows."""
        if key in self:
            return
        answer = {name: tensor.detach().to("cpu").contiguous() for name, tensor in answer.items()}
        self._new[key] = answer
        self._size += sum(tensor.numel() * tensor.element_size() for tensor in answer.values())
        for name, value in (measured or {}).items():
            self._measured[name] = self._measured.get(name, 0.0) + value
        if self._size >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last part."""
        if not self._new:
            return
        keys, answers = list(self._new), list(self._new.values())
        names = list(answers[0])
        ends = np.cumsum([len(answer[names[0]]) for answer in answers])
        tensors = {name: torch.cat([answer[name] for answer in answers]) for name in names}
        tensors["keys"] = torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.int64).reshape(-1, 2).copy())
        tensors["ends"] = torch.from_numpy(ends.astype(np.int64))
        mine = self.folder / f"process-{self.process}"
        numbers = [int(part.stem.rpartition("-")[2]) for part in mine.glob("part-*.safetensors")]
        name = f"part-{max(numbers, default=-1) + 1:05d}.safetensors"
        with replacing(mine, name, by=self._by) as staging:
            save_file(tensors, staging / name, metadata={"measured": json.dumps(self._measured)})
        self._written.update(keys)
        self._new, self._size, self._measured = {}, 0, {}

    def counts_of(self, dataset: str) -> dict[str, int] | None:
        """What was counted when all rows of the dataset of this fingerprint had been gone through; None if they have not."""
        if not (self.folder / COMPLETE).exists():
            return None
        counts: dict[str, int] | None = self._read(COMPLETE).get(dataset)
        return counts

    def mark_complete(self, dataset: str, counts: Mapping[str, int]) -> None:
        """All rows of the dataset are in. By one process."""
        known = self._read(COMPLETE) if (self.folder / COMPLETE).exists() else {}
        self._write(COMPLETE, {**known, dataset: dict(counts)})

    def _place(self, key: bytes) -> tuple[int, int, int] | None:
        first, second = np.frombuffer(key, dtype=np.int64)
        at = int(np.searchsorted(self._index[0], first))
        while at < len(self._index[0]) and self._index[0][at] == first:
            if self._index[1][at] == second:
                return int(self._index[2][at]), int(self._index[3][at]), int(self._index[4][at])
            at += 1
        return None

    def _open(self, part: Path) -> Any:
        if part not in self._open_parts:
            try:
                self._open_parts[part] = safe_open(part, framework="pt")
            except (SafetensorError, OSError) as error:
                raise StaleCache(
                    f"{str(part)!r} of the {self.title} cannot be read ({' '.join(str(error).split())[:100]}): remove it and "
                    f"{str(self.folder / COMPLETE)!r}, and its rows are computed again."
                ) from error
        return self._open_parts[part]

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise StaleCache(
                f"{str(path)!r} of the {self.title} cannot be read: remove that folder, or set another cache_dir."
            )
        return found

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        with replacing(self.folder, name, by=self._by) as staging:
            (staging / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

    def __getstate__(self) -> dict[str, Any]:
        """For a dataloader's workers, which open the parts themselves."""
        return {**self.__dict__, "_open_parts": {}}

"""`lingudistill distill`, killed where the first argument says: JSON with `write` (the n-th file opened, renamed or removed while a
checkpoint is written), `torch_save` (half-way through the n-th), `step` (in the n-th backward pass) or nothing. The rest is its argv."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from hf_lingudistill.checkpoints import STAGING
from hf_lingudistill.scripts.distill import main


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(at: dict[str, int]) -> None:
    seen = dict.fromkeys(("write", "torch_save", "step"), 0)

    def reached(kind: str) -> bool:
        seen[kind] += 1
        return seen[kind] == at.get(kind)

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[1], str) and "w" in args[1]
        if (writes or event in ("os.rename", "os.remove", "shutil.rmtree")) and STAGING in str(args[0]):
            if reached("write"):
                die()

    save, backward = torch.save, torch.Tensor.backward

    def half_saved(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if reached("torch_save"):
            buffer = io.BytesIO()
            save(value, buffer)
            Path(path).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
            die()
        save(value, path, *args, **kwargs)

    def watched_backward(*args: Any, **kwargs: Any) -> None:
        backward(*args, **kwargs)
        if reached("step"):
            die()

    sys.addaudithook(on_event)
    torch.save = half_saved
    torch.Tensor.backward = watched_backward  # type: ignore[method-assign]


if __name__ == "__main__":
    arm(json.loads(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))

"""What this machine can do: whatever decides by it asks here, and one environment variable forces each answer.

    LINGUDISTILL_MACHINE="bf16=0,threads=2" lingudistill distill ...

| answer | forced by | what it decides |
|---|---|---|
| `bf16` | `0`, `1` | precision by default, bitsandbytes' packed kernels. `0` keeps oneDNN from native bf16 too; `1` on a machine without it emulates: slow, and right |
| `avx512` | `0` | the CPU kernels of torch and bitsandbytes: `0` takes those of AVX2 |
| `threads` | 1 or more | threads of a process that has the machine for itself |
| `gpus` | 0 or more | devices in sight: the first so many |
| `mps` | `0` | whether Apple's GPU is used |

What is not there cannot be forced, bf16 apart. Libraries choose their kernels and devices once, so this package sees to
them when it is imported: set the variable before that. A later change reaches `bf16`, `threads` and `mps`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VARIABLE = "LINGUDISTILL_MACHINE"
_EXAMPLE = f'{VARIABLE}="bf16=0,threads=2"'
# answer -> the values that may be forced; an int: any whole number of at least this
_ALLOWED: dict[str, str | int] = {"bf16": "01", "avx512": "01", "threads": 1, "gpus": 0, "mps": "01"}


@dataclass(frozen=True)
class Machine:
    """bf16: the device that is used multiplies in it natively. avx512: of the CPU kernels in use. threads: CPU cores that this
    process may use. gpus: devices in sight, Apple's apart. mps: Apple's GPU is used."""

    bf16: bool
    avx512: bool
    threads: int
    gpus: int
    mps: bool

    @property
    def accelerated(self) -> bool:
        return self.gpus > 0 or self.mps

    @property
    def device(self) -> torch.device:
        """Where a single process computes: the current accelerator, or the CPU."""
        import torch

        found = torch.accelerator.current_accelerator(check_available=True) if self.accelerated else None
        return found or torch.device("cpu")

    @property
    def name(self) -> str:
        """Of the GPU, or the CPU's architecture."""
        import platform

        import torch

        return torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine()


def machine(*, use_cpu: bool = False) -> Machine:
    """What the machine can do, as far as `LINGUDISTILL_MACHINE` does not say otherwise. use_cpu: whatever else there is.

    Raises:
        ValueError: if the variable cannot be read, or asks for what this machine does not have.
    """
    import torch

    forced = _forced()
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if found is None else found.type
    has = {
        "avx512": int(torch.backends.cpu.get_cpu_capability() == "AVX512"),
        "gpus": max(torch.accelerator.device_count(), 1) if kind not in ("cpu", "mps") else 0,
        "mps": int(kind == "mps"),
    }
    for name, number in has.items():
        if forced.get(name, number) > number:
            raise ValueError(
                f"{VARIABLE} says {name}={forced[name]}, and this machine has {name}={number}: what is not there cannot be forced."
            )
    for name in ("avx512", "gpus"):
        if forced.get(name, has[name]) < has[name]:
            raise ValueError(
                f"{VARIABLE} says {name}={forced[name]}, after torch had started with {name}={has[name]}: set it before "
                "hf_lingudistill is imported."
            )
    mps = bool(forced.get("mps", has["mps"])) and not use_cpu
    if use_cpu or (kind == "mps" and not mps):
        kind = "cpu"
    return Machine(
        bf16=bool(forced["bf16"]) if "bf16" in forced else _multiplies_in_bf16(kind),
        avx512=bool(has["avx512"]),
        threads=forced.get("threads") or _cores(),
        gpus=0 if use_cpu else has["gpus"],
        mps=mps,
    )


def device_of(name: str | None) -> torch.device:
    """The device of this name (cpu, cuda, cuda:1); left out, where a single process computes.

    Raises:
        ValueError: if there is no such device here.
    """
    import torch

    found = machine()
    if name is None:
        return found.device
    here = {"cpu": 1, found.device.type: max(found.gpus, 1)}
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= here.get(device.type, 0):
        names = [
            kind if kind in ("cpu", "mps") else f"{kind}:{index}" for kind, n in here.items() for index in range(n)
        ]
        raise ValueError(f"device must be one of this machine's, {', '.join(names)}; got {name!r}.")
    return device


def take_threads() -> None:
    """On a CPU, take every core: `accelerate launch` starts a single process with one thread unless told otherwise, and torch
    counts the host's cores where a Space has some of them.

    Left alone where the number of threads is set to anything but one, or several processes share the machine, unless it is forced.
    """
    import torch

    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    alone = launched and int(os.environ.get("WORLD_SIZE", "1")) == 1 and not machine().accelerated
    if alone or "CPU_CORES" in os.environ or "threads" in _forced():
        torch.set_num_threads(machine().threads)


def settle() -> None:
    """Hand what is forced to the libraries that choose by themselves; they read the environment once."""
    try:
        forced = _forced()
    except ValueError:
        return  # said by whoever asks first: an import is no place for it
    if forced.get("avx512") == 0:
        os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
    if forced.get("bf16") == 0:
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2" if forced.get("avx512") == 0 else "AVX512_CORE_VNNI")
    if "gpus" in forced:
        for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
            seen = [name for name in os.environ.get(variable, "").split(",") if name]
            seen = seen or [str(index) for index in range(forced["gpus"])]
            os.environ[variable] = ",".join(seen[: forced["gpus"]])
    if "threads" in forced:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(forced["threads"])
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(forced["threads"])


def _forced() -> dict[str, int]:
    """`LINGUDISTILL_MACHINE`, read and checked. -> answer: value, of those that are forced."""
    forced = {}
    for part in filter(None, (part.strip() for part in os.environ.get(VARIABLE, "").split(","))):
        name, _, value = (text.strip() for text in part.partition("="))
        if name not in _ALLOWED:
            raise ValueError(f"{VARIABLE} knows {', '.join(_ALLOWED)}; got {part[:60]!r}. Write it as {_EXAMPLE}.")
        allowed = _ALLOWED[name]
        if isinstance(allowed, str):
            valid, wanted = value in tuple(allowed), "0 or 1"
        else:
            valid, wanted = (
                value.isascii() and value.isdigit() and len(value) < 6,
                f"a whole number of at least {allowed}",
            )
            valid = valid and int(value) >= allowed
        if not valid or name in forced:
            found = "a second value" if valid else repr(value[:60])
            raise ValueError(f"{VARIABLE}: {name} must be {wanted}, once; got {found}. Write it as {_EXAMPLE}.")
        forced[name] = int(value)
    return forced


def _multiplies_in_bf16(kind: str) -> bool:
    """kind: the type of the device that is used. Emulated, bf16 is slower than fp32."""
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    if kind == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if kind == "cuda":
        try:
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        except RuntimeError:
            return True  # no GPU is lent yet: on ZeroGPU, whose devices do
    return bool(is_torch_bf16_gpu_available())


def _cores() -> int:
    """Cores that this process may use: what it is bound to, or what its container is granted, whichever is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    granted = [float(os.environ["CPU_CORES"])] if os.environ.get("CPU_CORES") else []  # said by Hugging Face Spaces
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        granted.append(float(quota) / float(period))
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        pass
    return max(1, int(min([cores, *granted])))

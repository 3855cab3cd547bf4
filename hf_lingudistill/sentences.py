"""What a command says: an error as one sentence, and a command as it can be typed here."""

from __future__ import annotations

import difflib
import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LONGEST = 600  # characters of an error; some libraries quote whole files


def one_sentence(error: BaseException) -> str:
    """The message of an error on one line of at most `LONGEST` characters; of one that only says that something failed, with what
    it failed of."""
    text = _message(error)
    root = error
    while root.__cause__ is not None or (root.__context__ is not None and not root.__suppress_context__):
        root = root.__cause__ or root.__context__  # type: ignore[assignment]
    if root is not error and type(error).__module__.startswith(("datasets", "pyarrow", "multiprocess")):
        cause = _message(root)
        text = text if cause in text else f"{text.rstrip('.')}: {cause}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4].rstrip()} ..."


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    # Whose messages are sentences; of others the type is half of what they say
    if isinstance(error, ValueError | OSError | ImportError | RuntimeError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def how_to_see_more(error: BaseException) -> str:
    """What an error message ends with where a library failed; what this package says itself has no more behind it."""
    while error.__cause__ is not None:
        error = error.__cause__
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if (
        trace is None
        or str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] == __package__.partition(".")[0]
    ):
        return ""
    return " (LINGUDISTILL_DEBUG=1 shows the traceback)"


def count(number: int, one: str, several: str | None = None) -> str:
    """`1 note`, `2 notes`."""
    return f"{number} {one if number == 1 else several or one + 's'}"


def no_access(error: BaseException, name: str) -> str | None:
    """What keeps a repository of the Hub from being read, and what to do; None for any other error."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    found: BaseException | None = error
    while found is not None and not isinstance(found, GatedRepoError | RepositoryNotFoundError):
        found = found.__cause__ or found.__context__
    if found is None:
        return None
    signed_in, page = bool(get_token()), f"{constants.ENDPOINT}/{name}"
    if isinstance(found, GatedRepoError) and signed_in:
        return f"it is gated, and the token in use has no access: ask for it on {page}."
    if isinstance(found, GatedRepoError):
        return f"it is gated: ask for access on {page}, and sign in with `hf auth login` (or set HF_TOKEN)."
    if signed_in:
        return "there is no such repository, or it is private and the token in use may not read it."
    return "there is no such repository, or it is private: then sign in with `hf auth login` (or set HF_TOKEN)."


def at_home(value: Any) -> Any:
    """A text that begins with `~/`, alone or behind `--OPTION=`, with the home folder in its place; in lists and mappings too. A shell does
    that for words of its own, not for what stands in quotes, behind `=` or in a file."""
    if isinstance(value, dict):
        return {key: at_home(one) for key, one in value.items()}
    if isinstance(value, list):
        return [at_home(one) for one in value]
    if not isinstance(value, str):
        return value
    option, equals, rest = value.partition("=") if value.startswith("--") else ("", "", value)
    return f"{option}{equals}{os.path.expanduser(rest)}" if rest.startswith("~/") else value


# What other trainers call it
_KNOWN_AS = {
    "dataset": "dataset_name",
    "data": "dataset_name",
    "batch_size": "per_device_train_batch_size",
    "per_device_batch_size": "per_device_train_batch_size",
    "torch_dtype": "dtype",
    "model": "student",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "output": "output_dir",
    "lora_rank": "lora_r",
    "repo": "repo_id",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?`, or nothing where nothing is near."""
    known, dashes = set(known), "--" if name.startswith("--") else ""
    other = dashes + _KNOWN_AS.get(name.removeprefix("--"), "")
    near = [other] if other in known else difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
    return f", did you mean {near[0]!r}?" if near else ""


def install(extra: str) -> str:
    """The command that installs an extra, and where it is typed: the package is not on PyPI."""
    return f"`pip install -e '.[{extra}]'` in a clone of hf_lingudistill"


def typed(*words: str) -> str:
    """`lingudistill WORDS` as it runs when it is typed here: the command is not on the PATH of a virtual environment that is not
    active."""
    return f"{_lingudistill()} {shlex.join(words)}"


def _lingudistill() -> str:
    script = Path(sys.executable).parent / "lingudistill"
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m hf_lingudistill.cli"
    found = shutil.which("lingudistill")
    if found and os.path.samefile(found, script):
        return "lingudistill"
    try:
        script = script.relative_to(Path.cwd())
    except ValueError:
        pass
    return shlex.quote(str(script))

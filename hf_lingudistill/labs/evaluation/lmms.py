"""Vision on public suites: lmms-eval's tasks (docvqa_val, ocrbench, mmstar, mme ...), as an optional back end.

>>> from lmms_eval.evaluator import simple_evaluate
>>> simple_evaluate(ImagePath(load_scored("vlm", "ORG/VLM")), tasks=["docvqa_val"])

lmms-eval brings one adapter for each model family; this one asks any VLM through its processor and chat template, as the
package's own vision tasks do.

    pip install --no-deps 'lmms-eval>=0.7.3' loguru tenacity

beside the `eval` extra is all that most of its tasks need. It is no extra of its own, because extras install dependencies, and
those of lmms-eval are some fifty, pin wandb, and have a torchvision that must fit the torch that is there.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from numbers import Real
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from ...identity import digest
from ...progress import progress_bar
from ...rgb import to_rgb
from ..statistics import Items
from .cache import ItemCache, made_with
from .grounded import answer_scores
from .models import Scored, chat_template_of, user_turn
from .reading import Images
from .suite import HarnessTasks
from .vision import generate

try:
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config
    from tenacity import RetryError
except ImportError as error:  # without it everything but these suites works
    lmms = TaskManager = object
    MISSING = str(error)
else:
    MISSING = ""

INSTALL = "pip install --no-deps 'lmms-eval>=0.7.3' loguru tenacity"
IMAGE = "<image>"  # where a task's text says that an image stands
MAX_NEW_TOKENS = 1024  # where a task sets no length: what most of lmms-eval's own adapters take

Answer = Callable[[Sequence[Any], Sequence[str], Sequence[Images]], list[Any]]  # requests, prompts, images -> answers


class ImagePath(lmms):  # type: ignore[misc]
    """lmms-eval's model of a VLM: its own processor and chat template, whatever its family.

    Answers are greedy, with one beam, whatever sampling a task asks for: an identical rerun gives identical numbers.

    cache_folder: for item caches, one per task; without it nothing is kept.

    Raises:
        ModuleNotFoundError: if lmms-eval is not installed.
    """

    is_simple = True  # requests hold text and images; in lmms-eval's other form, messages, there is no log-likelihood

    def __init__(self, scored: Scored, *, batch_size: int = 8, cache_folder: Path | None = None) -> None:
        _require_lmms_eval()
        super().__init__()
        self.scored, self.batch_size, self.cache_folder = scored, batch_size, cache_folder

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers, each cut at the first of its task's stop strings."""

        def write(batch: Sequence[Any], prompts: Sequence[str], images: Sequence[Images]) -> list[str]:
            settings = batch[0].args[1]  # of the task, so the same for all
            length = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
            return [_cut(text, settings.get("until")) for text in generate(self.scored, prompts, images, length)]

        return self._answered(requests, write)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """(nats per token, whether greedy decoding writes it) of each continuation, as the assistant's turn.

        A loss, despite the name: that is what lmms-eval's adapters return, and its multiple choice takes the least.
        """

        def score(batch: Sequence[Any], prompts: Sequence[str], images: Sequence[Images]) -> list[tuple[float, bool]]:
            # A space between prompt and continuation is for the chat template to write
            ids = [self.scored.answer_ids(self._continuation(request).lstrip()) for request in batch]
            rows = answer_scores(self.scored, prompts, images, ids)
            return [(-sum(p for p, _ in row) / len(row), all(hit for _, hit in row)) for row in rows]

        # In a wrapper, because lmms-eval 0.7.3 makes a string of a bare pair, on which its multiple choice fails.
        return [GenerationResult((loss, greedy)) for loss, greedy in self._answered(requests, score)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            f"Task {requests[0].task_name!r} asks in several rounds, which this adapter cannot; leave it out of the suite."
        )

    def _answered(self, requests: Sequence[Any], answer: Answer) -> list[Any]:
        """What `answer` gives on each request, from the cache where it is there."""
        found: dict[tuple[str, str], Any] = {}
        for task in dict.fromkeys(request.task_name for request in requests):
            own = {_key(request): request for request in requests if request.task_name == task}
            found |= {(task, key): value for key, value in self._task_answers(task, own, answer).items()}
        return [found[request.task_name, _key(request)] for request in requests]

    def _task_answers(self, task: str, requests: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
        store = self._cache(task, requests)
        given = dict(store.records) if store else {}
        # Alike in length: little padding.
        todo = sorted(requests.keys() - given.keys(), key=lambda key: (-len(requests[key].args[0]), key))
        bar = progress_bar(total=len(requests), initial=len(given), desc=f"{self.scored.name}: {task}", unit="item")
        for start in range(0, len(todo), self.batch_size):
            asked = {key: self._prompt(requests[key]) for key in todo[start : start + self.batch_size]}
            new: dict[str, Any] = {}
            for sees in (True, False):  # a processor takes images for all texts of a batch, or for none
                keys = [key for key, (_, images) in asked.items() if bool(images) is sees]
                if keys:
                    prompts, images = zip(*(asked[key] for key in keys), strict=True)
                    new |= zip(keys, answer([requests[key] for key in keys], prompts, images), strict=True)
            if store:
                store.add(new)
            given |= new
            bar.update(len(new))
        bar.close()
        return given

    def _cache(self, task: str, requests: Mapping[str, Any]) -> ItemCache | None:
        """What a task's answers depend on: weights, chat template, prompts, settings, and the dataset as it was read."""
        if self.cache_folder is None:
            return None
        asked = {
            key: [request.args[0], request.args[1] if isinstance(request.args[1], dict | str) else None]
            for key, request in requests.items()
        }
        data = [getattr(split, "_fingerprint", None) for split in self.task_dict[task].values()]
        header = {
            "model": self.scored.fingerprint,
            "dtype": str(self.scored.model.dtype),
            "made_with": made_with(self.scored.model, "lmms_eval"),
            "task": digest([asked, data, chat_template_of(self.scored)]),
        }
        return ItemCache(self.cache_folder / f"lmms_eval-{task}.jsonl", header)

    def _prompt(self, request: Any) -> tuple[str, Images]:
        """The user's turn as the chat template writes it, and its images."""
        text, _, doc_to_visual, *_ = request.args
        images = list(doc_to_visual(self._document(request)) or ())
        for image in images:
            if not isinstance(image, PILImage.Image):
                raise ValueError(
                    f"Task {request.task_name!r} shows a {type(image).__name__}, this adapter passes images only; leave tasks about "
                    "video and audio out of the suite."
                )
        return self.scored.render(_turn(text, len(images))), [to_rgb(image) for image in images]

    def _continuation(self, request: Any) -> str:
        target = request.args[1]
        return target if isinstance(target, str) else str(target(self._document(request)))

    def _document(self, request: Any) -> Any:
        *_, index, task, split = request.args
        return self.task_dict[task][split][index]


def lmms_scores(
    scored: Scored, tasks: HarnessTasks, *, seed: int, batch_size: int, cache_folder: Path | None = None
) -> dict[str, dict[str, Any]]:
    """lmms-eval's per-item scores. -> {task: {"items": Items, "metric", "higher_is_better", "title"}}.

    tasks: names that lmms-eval knows (a group or tag stands for its tasks), or paths of YAML files of tasks. Prompts always go
    through the model's chat template.

    A score is the mean over items of the first metric that every item has; a task that sorts its items under several metrics
    (mme) gives one score for each. Where lmms-eval's own summary is no such mean (mme's sum over categories, mmstar's mean over
    categories), the two differ.

    Raises:
        ModuleNotFoundError: if lmms-eval is not installed.
        ValueError: for a task that lmms-eval does not know, or whose items have no number.
        OSError: if a task's data cannot be read.
    """
    model = ImagePath(scored, batch_size=batch_size, cache_folder=cache_folder)
    names, manager = find_tasks(tasks.tasks)
    try:
        results = simple_evaluate(
            model=model,
            tasks=names,
            num_fewshot=tasks.num_fewshot,
            limit=tasks.limit,
            task_manager=manager,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, RetryError) as error:
        if model.task_dict:  # filled once all data is read: something else went wrong
            raise
        cause = error.last_attempt.exception() if isinstance(error, RetryError) else error
        raise OSError(
            f"lmms-eval could not read the data of {', '.join(names)} ({' '.join(str(cause).split())[:200]}). The public tasks need "
            "the Hub; a suite's `vision` tasks read local data."
        ) from cause
    found: dict[str, dict[str, Any]] = {}
    for task, samples in results["samples"].items():
        found |= task_scores(task, samples, results["higher_is_better"][task])
    return found


def task_scores(
    task: str, samples: Sequence[Mapping[str, Any]], higher_is_better: Mapping[str, bool | None]
) -> dict[str, dict[str, Any]]:
    """A task's entries in `lmms_scores` from its logged samples. higher_is_better: {metric: ...}.

    Raises:
        ValueError: if no metric is a number per item.
    """
    values: dict[str, Items] = {}
    for metric in higher_is_better:
        # A document comes once per filter: the first is the task's own, and stands.
        numbers = {str(sample["doc_id"]): _number(sample.get(metric)) for sample in reversed(samples)}
        values[metric] = {key: (number, 1.0) for key, number in numbers.items() if number is not None}
    documents = len({sample["doc_id"] for sample in samples})
    whole = [metric for metric, items in values.items() if len(items) == documents]
    chosen = whole[:1] or [metric for metric, items in values.items() if items]
    if not chosen:
        raise ValueError(
            f"lmms-eval's metrics of {task} ({', '.join(higher_is_better)}) are not numbers per item, which intervals and paired "
            "differences need; leave this task out."
        )
    return {
        task if whole else f"{task}/{metric}": {
            "items": values[metric],
            "metric": metric,
            "higher_is_better": higher_is_better[metric] is not False,
            "title": task if whole else f"{task}, {metric}",
        }
        for metric in chosen
    }


def _number(value: Any) -> float | None:
    """A metric's value on one item: a number, or a mapping that holds one as its `score`."""
    if isinstance(value, Mapping):
        value = value.get("score")
    return float(value) if isinstance(value, Real) else None


def _key(request: Any) -> str:
    return f"{request.doc_id}-{request.idx}"  # idx: of the choice


def _turn(text: str, images: int) -> list[dict[str, Any]]:
    """One user message; its images stand where the text says, if it says so for each of them, else before the text."""
    pieces = text.split(IMAGE)
    if images == 0 or len(pieces) != images + 1:
        return user_turn("".join(pieces), images)
    parts: list[dict[str, Any]] = []
    for piece in pieces:
        parts += [{"type": "image"}] * bool(parts)
        parts.append({"type": "text", "text": piece})
    return [{"role": "user", "content": [part for part in parts if part.get("text") != ""]}]


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first stop string."""
    for stop in [until] if isinstance(until, str) else until or ():
        # A blank line is what lmms-eval fills in where a task names no stop. A chat model ends its turn itself.
        if stop.strip():
            text = text.split(stop)[0]
    return text.strip()


# --------------------------------------------------------------------------------------------------------------------
# Tasks
# --------------------------------------------------------------------------------------------------------------------
class _ItemTasks(TaskManager):  # type: ignore[misc]
    """lmms-eval's tasks without their aggregation, of which nothing is used.

    Some write files for a leaderboard, some fail on a part of the items, and ocrbench's adds up over the models of one process.
    """

    def load_task_or_group(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        loaded: dict[str, Any] = super().load_task_or_group(*args, **kwargs)
        for task in _leaves(loaded):
            task.aggregation = partial(dict.fromkeys, list(task.aggregation()), _no_summary)
        return loaded


def _no_summary(_: Any) -> float:
    return math.nan


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[Any]:
    for task in tasks.values():
        if isinstance(task, Mapping) and not hasattr(task, "aggregation"):
            yield from _leaves(task)
        else:
            yield task


@cache
def _task_manager(files: tuple[str, ...], known: bool) -> Any:
    """The index of the tasks beside `files` and, if `known`, of lmms-eval's two thousand, which takes seconds."""
    folders = [str(Path(file).resolve().parent) for file in files]
    return _ItemTasks(verbosity="ERROR", include_path=folders, include_defaults=known)


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def find_tasks(tasks: Sequence[str]) -> tuple[list[str], Any]:
    """(their names, the `TaskManager` that knows them) of tasks given by name or YAML file. Asks no model and reads no data.

    Raises:
        ModuleNotFoundError: if lmms-eval is not installed.
        ValueError, FileNotFoundError: for a task that is not there.
    """
    _require_lmms_eval()
    names, files = [_task_name(task) for task in tasks], tuple(filter(_is_file, tasks))
    manager = _task_manager(files, known=len(files) < len(names))
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks)
            raise ValueError(
                f"lmms-eval has no task {name!r}; expected one that `lmms-eval tasks list` shows"
                f"{', such as ' + ', '.join(close) if close else ''}, or the path of a YAML file."
            )
    return names, manager


def _require_lmms_eval() -> None:
    if MISSING:
        raise ModuleNotFoundError(f"lmms-eval cannot be imported ({MISSING}); run `{INSTALL}`.")


def _task_name(task: str) -> str:
    """A task's name; of a file, the one that it gives its task or group."""
    if not _is_file(task):
        return task
    if not Path(task).is_file():
        raise FileNotFoundError(
            f"No lmms-eval task file {task!r}: expected a task's name, or the path of its YAML file."
        )
    config = load_yaml_config(task, mode="simple")
    return str(config["task"] if isinstance(config.get("task"), str) else config.get("group"))

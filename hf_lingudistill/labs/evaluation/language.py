"""Language: any lm-eval task on a VLM's text path, and bits per byte on held-out text.

>>> from lm_eval import simple_evaluate
>>> simple_evaluate(TextPath(load_scored("vlm", "ORG/VLM")), tasks=["arc_easy"])
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...identity import digest
from ...progress import progress_bar
from ...sentences import install
from ..statistics import Items
from .cache import ItemCache, made_with
from .models import Scored, user_turn
from .reading import FiniteLogits, check_logits, plain_generation, text_types
from .suite import HarnessTasks, TextTask

try:
    # Logs of the harness about tasks that are not asked for
    os.environ.setdefault("LOGLEVEL", "ERROR")
    from lm_eval.models.huggingface import HFLM
except ImportError:  # without the `eval` extra everything but the harness works
    HFLM = object


def require_harness() -> None:
    """Raise ModuleNotFoundError, which says what to install, if lm-eval is not."""
    if HFLM is object:
        raise ModuleNotFoundError(f"lm-eval is not installed; run {install('eval')}.")


class TextPath(HFLM):  # type: ignore[misc]
    """lm-eval's model of an LM, or of a VLM called without an image: its own tokenizer, its own chat template.

    On a plain LM it is lm-eval's `HFLM`, but for the generation config, of which only the stops count.

    Raises:
        ModuleNotFoundError: if lm-eval is not installed.
    """

    def __init__(self, scored: Scored, *, batch_size: int = 8, max_length: int | None = None) -> None:
        require_harness()
        quiet = logging.getLogger("lm_eval.models.huggingface")
        level = quiet.level
        quiet.setLevel(logging.ERROR)  # it warns of each model that is passed as an object
        super().__init__(
            pretrained=scored.model,
            tokenizer=scored.tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
        )
        quiet.setLevel(level)
        self.scored = scored

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if types := text_types(self.scored.model, inps, [0] * len(inps)):
            with torch.inference_mode():
                logits: torch.Tensor = self.model(inps, **types).logits
        else:
            logits = super()._model_call(inps, *args, **kwargs)
        check_logits(logits, self.scored.name)
        return logits

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with plain_generation(self.model):
            return super()._model_generate(*args, logits_processor=[FiniteLogits(self.scored.name)], **kwargs)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat history through the model's own template; a VLM's processor may be the only one to have it."""
        if not self.scored.sees:
            return str(super().apply_chat_template(chat_history, add_generation_prompt))
        return self.scored.render(
            chat_history, answer=add_generation_prompt, continue_final_message=not add_generation_prompt
        )


def harness_scores(
    scored: Scored, tasks: HarnessTasks, *, seed: int, batch_size: int, cache_folder: Path
) -> dict[str, dict[str, Any]]:
    """lm-eval's per-item scores. -> {task: {"items": Items, "metric", "higher_is_better", "title"}}.

    Of a task's metrics the first is reported, `acc_norm` before `acc` where a task has both. Answers are kept in lm-eval's own
    request cache under `cache_folder`, whose name tells weights, versions and device: a rerun asks for no answer twice.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from .tasks import OWN_TASKS

    cache_folder.mkdir(parents=True, exist_ok=True)
    by = digest(made_with(scored.model, "lm_eval"))
    weights = f"{scored.fingerprint.replace('/', '--')}-{str(scored.model.dtype).removeprefix('torch.')}-{by}"
    wanted: list[Any] = [OWN_TASKS[name]() if name in OWN_TASKS else name for name in tasks.tasks]
    try:
        results = simple_evaluate(
            TextPath(scored, batch_size=batch_size),
            tasks=wanted,
            num_fewshot=tasks.num_fewshot,
            limit=tasks.limit,
            apply_chat_template=tasks.chat_template,
            use_cache=str(cache_folder / f"lm_eval-{weights}"),
            # Reading lm-eval's thousands of task files takes ten seconds, which its own tasks need and ours do not
            task_manager=TaskManager(include_defaults=any(isinstance(task, str) for task in wanted)),
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (ConnectionError, OSError) as error:
        raise OSError(
            f"lm-eval could not read the data of {', '.join(tasks.tasks)} ({' '.join(str(error).split())[:200]}). The public tasks "
            "need the Hub; `--suite quick` runs without it."
        ) from error
    found: dict[str, dict[str, Any]] = {}
    for task, samples in results["samples"].items():
        metric = _metric(samples, results.get("configs", {}).get(task, {}))
        better = results["higher_is_better"].get(task, {}).get(metric)
        found[task] = {
            # a document may come once per filter: the first is the task's own
            "items": {str(s["doc_id"]): (float(s[metric]), 1.0) for s in reversed(samples)},
            "metric": metric,
            "higher_is_better": True if better is None else bool(better),
            "title": task.removesuffix("_local"),
        }
    return found


def _metric(samples: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    """The metric whose mean over items is the task's score. Others are something else per item: `perplexity` a log-likelihood, of which
    lm-eval makes a perplexity at the end."""
    ways = {
        one["metric"]: one.get("aggregation") for one in config.get("metric_list") or [] if isinstance(one, Mapping)
    }

    def is_mean(name: str) -> bool:
        way = ways.get(name)
        return way in ("mean", "nanmean") if isinstance(way, str) else "perplexity" not in name

    metrics = [
        name for name in samples[0]["metrics"] if isinstance(samples[0].get(name), int | float) and is_mean(name)
    ]
    if not metrics:
        raise ValueError(
            f"lm-eval's metrics {samples[0]['metrics']} are not means of numbers per item, which intervals and paired differences need; "
            "leave this task out."
        )
    return "acc_norm" if "acc_norm" in metrics else str(metrics[0])


# --------------------------------------------------------------------------------------------------------------------
# Bits per byte
# --------------------------------------------------------------------------------------------------------------------
def bits_per_byte(
    scored: Scored,
    task: TextTask,
    form: str,
    texts: Mapping[str, str],
    cache: ItemCache,
    *,
    batch_size: int = 8,
    progress: str | None = None,
) -> Items:
    """-> {key: (bits, bytes)} of each text. Bits per byte can be compared between tokenizers; times ln 2 it is the
    log-perplexity per byte.

    In `plain` form all but a text's first token is scored, after a bos token where the tokenizer puts one. In `chat` form the first words are the user's request to continue
    them, and what the assistant then says is scored, without the token that ends its turn.
    """
    todo = [key for key in texts if key not in cache]
    prepared = {key: _tokenised(scored, task, form, texts[key]) for key in todo}
    todo.sort(key=lambda key: -len(prepared[key][0]))  # alike in length: little padding
    bar = progress_bar(
        total=len(texts), initial=len(texts) - len(todo), desc=progress, unit="text", disable=progress is None
    )
    for start in range(0, len(todo), batch_size):
        keys = todo[start : start + batch_size]
        nats = sequence_nll(scored.model, [prepared[key][0] for key in keys], [prepared[key][1] for key in keys])
        cache.add({key: [value / math.log(2), prepared[key][2]] for key, value in zip(keys, nats, strict=True)})
        bar.update(len(keys))
    bar.close()
    return {key: (float(cache.records[key][0]), float(cache.records[key][1])) for key in texts}


def _tokenised(scored: Scored, task: TextTask, form: str, text: str) -> tuple[list[int], int, int]:
    """(ids, number of leading ids that are not scored, UTF-8 bytes of the scored text)."""
    if form == "plain":
        ids, bos = scored.ids(text), scored.tokenizer.bos_token_id
        # Where the tokenizer itself puts a bos before a text (Gemma, Llama 3), the model has never read one without.
        lead = [bos] if bos is not None and scored.tokenizer(text)["input_ids"][:1] == [bos] != ids[:1] else []
        first = 1
        # A byte-level token may be part of a character, whose bytes cannot be counted: the first character goes as a whole.
        while "\ufffd" in scored.tokenizer.decode(ids[:first]) and first < 4:
            first += 1
        unscored = len(scored.tokenizer.decode(ids[:first]).encode())
        return [*lead, *ids], len(lead) + first, len(text.encode()) - unscored
    words = text.split(" ")
    head, body = " ".join(words[: task.head_words]), " ".join(words[task.head_words :])
    prompt = scored.ids(scored.render(user_turn(f"Continue this text: {head}")))
    return [*prompt, *scored.answer_ids(body)], len(prompt), len(body.encode())


@torch.inference_mode()
def sequence_nll(model: Any, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[float]:
    """Nats of each row's tokens from position starts[i] on, given those before. Rows are padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
    labels = ids.masked_fill(mask == 0, -100)
    for row, start in enumerate(starts):
        labels[row, :start] = -100
    types = text_types(model, ids, starts)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **types).logits[:, :-1]
    loss = F.cross_entropy(logits.float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return list(loss.double().sum(dim=1).tolist())

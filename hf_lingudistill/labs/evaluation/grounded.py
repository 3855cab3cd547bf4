"""Language about an image: how likely are held-out answers, on the tokens that depend on the image and on the rest.

Which tokens depend on the image is found, not listed: under the *same* answer the image is exchanged for others, and a token
whose log-probability then falls (under a reference model) depends on it. The split is the same for every model scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...progress import progress_bar
from ..statistics import Items
from .cache import ItemCache
from .data import ImageItem, grey, other_item
from .models import Scored, user_turn
from .reading import Images, answer_inputs
from .suite import GroundedTask

Tokens = list[list[float]]  # per answer token: [log-probability in nats, 1 if it is the most likely one]


def token_scores(
    scored: Scored,
    task: GroundedTask,
    items: Sequence[ImageItem],
    cache: ItemCache,
    *,
    seed: int,
    swaps: bool,
    batch_size: int = 8,
    progress: str | None = None,
) -> dict[str, dict[str, Any]]:
    """{key: {"ids", "own", "shuffled", "grey"[, "swaps"]}}: the answer's token ids and their scores under each image.

    swaps: also under `task.swaps` other images each, which the reference model needs.
    """
    shuffled = [items[i].images for i in other_item(list(items), seed)]
    others = (
        [[items[i].images for i in other_item(list(items), seed, 2 + k)] for k in range(task.swaps)] if swaps else []
    )
    todo = [
        i
        for i, item in enumerate(items)
        if item.key not in cache or (swaps and "swaps" not in cache.records[item.key])
    ]
    bar = progress_bar(
        total=len(items), initial=len(items) - len(todo), desc=progress, unit="item", disable=progress is None
    )
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        questions = [items[i].question for i in batch]
        ids = [scored.answer_ids(items[i].answers[0])[: task.max_answer_tokens] for i in batch]

        def under(images: Sequence[Images], questions: Any = questions, ids: Any = ids) -> list[Tokens]:
            # Rendered each time: an item's own images and those of another one may differ in number
            turns = [user_turn(question, len(group)) for question, group in zip(questions, images, strict=True)]
            return answer_scores(scored, [scored.render(turn) for turn in turns], images, ids)

        own = under([items[i].images for i in batch])
        exchanged = under([shuffled[i] for i in batch])
        blank = under([[grey(image) for image in items[i].images] for i in batch])
        swapped = [under([other[i] for i in batch]) for other in others]
        records: dict[str, Any] = {}
        for position, i in enumerate(batch):
            record = {
                "ids": ids[position],
                "own": own[position],
                "shuffled": exchanged[position],
                "grey": blank[position],
            }
            if swaps:
                record["swaps"] = [[token[0] for token in column[position]] for column in swapped]
            records[items[i].key] = record
        cache.add(records)
        bar.update(len(batch))
    bar.close()
    return {item.key: cache.records[item.key] for item in items}


@torch.inference_mode()
def answer_scores(
    scored: Scored, prompts: Sequence[str], images: Sequence[Images], ids: Sequence[Sequence[int]]
) -> list[Tokens]:
    """Each answer token's log-probability after prompt, image and the answer's earlier tokens."""
    inputs, labels = answer_inputs(scored, prompts, images, ids)
    longest = labels.size(1)
    logits = scored.model(**inputs, logits_to_keep=longest + 1, use_cache=False).logits[:, -longest - 1 : -1].float()
    log_probs = logits.log_softmax(dim=-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    hits = logits.argmax(dim=-1) == labels
    return [
        [
            [round(float(p), 5), int(h)]
            for p, h in zip(log_probs[row, : len(answer)], hits[row, : len(answer)], strict=True)
        ]
        for row, answer in enumerate(ids)
    ]


def image_tokens(task: GroundedTask, reference: Mapping[str, Mapping[str, Any]]) -> dict[str, list[bool]]:
    """{key: which answer tokens depend on the image}, from the reference model's scores with `swaps`.

    Raises:
        ValueError: if none does: the reference model does not look at its images, or `threshold` is too high.
    """
    found = {}
    for key, record in reference.items():
        swapped = record["swaps"]
        found[key] = [
            own - sum(column[position] for column in swapped) / len(swapped) > task.threshold
            for position, (own, _) in enumerate(record["own"])
        ]
    if not any(map(any, found.values())):
        raise ValueError(
            f"Task {task.name!r}: exchanging the image moves no token by {task.threshold} nats, so the reference model does not "
            "use its images here. Choose another --reference, or lower `threshold`."
        )
    return found


def split_scores(
    records: Mapping[str, Mapping[str, Any]], chosen: Mapping[str, Sequence[bool]]
) -> dict[str, dict[str, Items]]:
    """{measure: {condition: Items}} with the measures

    - `image_nll`, `rest_nll`: nats per token that depends on the image, and per other token (own, and both controls);
    - `image_accuracy`: share of the image's tokens that the model would write itself, given the answer so far.
    """
    measures: dict[str, dict[str, Items]] = {"image_nll": {}, "rest_nll": {}, "image_accuracy": {}}
    for condition in ("own", "grey", "shuffled"):
        sums: dict[str, dict[str, tuple[float, float]]] = {measure: {} for measure in measures}
        for key, record in records.items():
            tokens = list(zip(record[condition], chosen[key], strict=True))
            on_image = [token for token, depends in tokens if depends]
            rest = [token for token, depends in tokens if not depends]
            sums["image_nll"][key] = (-sum(p for p, _ in on_image), len(on_image))
            sums["rest_nll"][key] = (-sum(p for p, _ in rest), len(rest))
            sums["image_accuracy"][key] = (sum(hit for _, hit in on_image), len(on_image))
        for measure, items in sums.items():
            measures[measure][condition] = items
    return measures


def wins(records: Mapping[str, Mapping[str, Any]], against: Mapping[str, Mapping[str, Any]]) -> Items:
    """{key: (1 if the whole answer is likelier here than `against`, 0.5 if equally likely, else 0, 1)}."""

    def likelihood(record: Mapping[str, Any]) -> float:
        return float(sum(p for p, _ in record["own"]))

    found = {}
    for key in records:
        mine, theirs = likelihood(records[key]), likelihood(against[key])
        found[key] = (0.5 if mine == theirs else float(mine > theirs), 1.0)
    return found

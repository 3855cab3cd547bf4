"""Wrong data among ten thousand rows: every bad row is counted by its reason, and every good one is trained on."""

from __future__ import annotations

import io
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as PILImage

from hf_lingudistill.data import BadRow, SharedCounts, drop_empty_answers
from hf_lingudistill.finite import FiniteWatch

MakeTrainer = Callable[..., Any]
MAX_LENGTH = 56


def encoded(image: PILImage.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int] = (24, 24)) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size. Nothing of it is decoded before the size is judged."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


JPEG = encoded(noise(), "JPEG")
FRAMES = [PILImage.new("P", (24, 24), color) for color in (1, 2, 3)]
ROTATED = PILImage.Exif()
ROTATED[0x0112] = 6
GOOD: dict[str, bytes] = {
    "jpeg": JPEG,
    "cmyk": encoded(noise().convert("CMYK"), "JPEG"),
    "16 bit": encoded(PILImage.fromarray(np.arange(576, dtype=np.uint16).reshape(24, 24) * 100), "PNG"),
    "transparent palette": encoded(noise().convert("P"), "PNG", transparency=0),
    "animated": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "one pixel": encoded(noise((1, 1)), "PNG"),
    "rotated": encoded(noise((30, 20)), "JPEG", exif=ROTATED),
    "very wide": encoded(noise((600, 2)), "PNG"),
}
# What is wrong -> the images of the row, and the reason that it must be counted under
BAD: dict[str, tuple[list[Any], str]] = {
    "truncated": ([JPEG[: len(JPEG) // 2]], "image unreadable"),
    "no image": ([b"this is a text"], "image unreadable"),
    "0x0": ([b"P6 0 0 255\n"], "image unreadable"),
    "claims 60,000 x 60,000": ([png_of_size(60_000, 60_000)], "image too large"),
    "missing file": (["absent/image.png"], "image unreadable"),
    "null": ([None], "image missing"),
    "too many for max_length": ([JPEG] * 8, "image tokens over max_length"),
    "empty answer": ([JPEG], "empty answer"),
}


def make_rows(count: int, share: float = 0.05, seed: int = 0) -> tuple[list[dict[str, Any]], list[str | None]]:
    """`count` rows, `share` of them bad, of every kind alike -> (rows, for each what is wrong with it)."""
    rng, kinds = random.Random(seed), list(BAD)
    spoilt = rng.sample(range(count), max(len(kinds), int(count * share)))
    wrong = {index: kinds[place % len(kinds)] for place, index in enumerate(spoilt)}
    names, rows = list(GOOD), []
    for index in range(count):
        what = wrong.get(index)
        images = BAD[what][0] if what else [] if index % 3 == 0 else [GOOD[names[index % len(names)]]]
        answer = "" if what == "empty answer" else "a small red circle"
        rows.append(
            {
                "images": [_stored(image) for image in images],
                "prompt": [
                    {"role": "user", "content": f"row {index}: {'what shape is it?' if images else 'tell me'}"}
                ],
                "completion": [{"role": "assistant", "content": answer}],
                "distill": index % 3 == 0,
            }
        )
    return rows, [wrong.get(index) for index in range(count)]


def _stored(image: Any) -> Any:
    return (
        None
        if image is None
        else {"bytes": image if isinstance(image, bytes) else None, "path": image if isinstance(image, str) else None}
    )


def make_dataset(rows: list[dict[str, Any]]) -> Dataset:
    message = List({"role": Value("string"), "content": Value("string")})
    features = {"images": List(Image()), "prompt": message, "completion": message, "distill": Value("bool")}
    return Dataset.from_list(rows, features=Features(features))


@pytest.fixture
def trained_rows(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each row reached the student in training, by the number in its text."""
    seen: Counter[int] = Counter()
    begin = FiniteWatch.open

    def open_and_note(self: FiniteWatch, input_ids: torch.Tensor, row: torch.Tensor | None) -> None:
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in input_ids]
        numbers = [int(re.search(r"row (\d+):", text)[1]) for text in texts]  # type: ignore[index]
        # rows are numbered, but for those of a stream that several workers read
        assert row is not None and all(
            given in (-1, number) for given, number in zip(row.tolist(), numbers, strict=True)
        )
        seen.update(numbers)
        begin(self, input_ids, row)

    monkeypatch.setattr(FiniteWatch, "open", open_and_note)
    return seen


SETTINGS: dict[str, Any] = {"max_length": MAX_LENGTH, "skip_bad_rows": True, "logging_steps": 1000}


def expected_of(wrong: list[str | None]) -> tuple[list[int], dict[str, int]]:
    return (
        [index for index, what in enumerate(wrong) if what is None],
        dict(Counter(BAD[what][1] for what in wrong if what is not None)),
    )


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_bad_row_is_counted_and_every_good_row_is_used(
    make_trainer: MakeTrainer, trained_rows: Counter[int], count: int
) -> None:
    rows, wrong = make_rows(count)
    good, reasons = expected_of(wrong)
    assert len(good) == count * 95 // 100 and set(reasons) == {reason for _, reason in BAD.values()}
    trainer = make_trainer(
        train_dataset=make_dataset(rows), per_device_train_batch_size=25, max_steps=-1, num_train_epochs=1, **SETTINGS
    )
    trainer.train()
    assert dict(trainer.skipped_rows) == reasons
    assert trained_rows == Counter(good)  # each once, and no other


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_counts_what_its_workers_skip(
    make_trainer: MakeTrainer, trained_rows: Counter[int], workers: int
) -> None:
    rows, wrong = make_rows(160)
    good, reasons = expected_of(wrong)
    stream = make_dataset(rows).to_iterable_dataset(num_shards=2)
    steps = -(-len(good) // 8)
    trainer = make_trainer(
        train_dataset=stream,
        per_device_train_batch_size=8,
        max_steps=steps + 1,
        dataloader_num_workers=workers,
        **SETTINGS,
    )
    trainer.train()
    assert set(trained_rows) == set(good)
    if workers == 0:  # two workers may have begun the next epoch when the run ends
        assert all(trainer.skipped_rows[reason] >= count for reason, count in reasons.items())
    assert set(trainer.skipped_rows) == set(reasons)


def test_without_skipping_the_first_bad_row_stops_the_run(make_trainer: MakeTrainer) -> None:
    rows, wrong = make_rows(200)
    first = next(index for index, what in enumerate(wrong) if what is not None)
    trainer = make_trainer(
        train_dataset=make_dataset(rows),
        train_sampling_strategy="sequential",
        per_device_train_batch_size=1,
        max_steps=200,
        **{**SETTINGS, "skip_bad_rows": False},
    )
    with pytest.raises(BadRow, match=f"^Row {first}"):
        trainer.train()


def test_image_between_pils_warning_and_its_error_is_decoded(make_trainer: MakeTrainer) -> None:
    """PIL warns from 89 million pixels on and refuses from 179 million on."""
    from hf_lingudistill.data import decode_image

    with pytest.warns(PILImage.DecompressionBombWarning):
        assert decode_image(encoded(PILImage.new("1", (10_000, 9_000)), "PNG")).size == (10_000, 9_000)
    with pytest.raises(BadRow, match="too large to decode"):
        decode_image(png_of_size(20_000, 10_000))


# --------------------------------------------------------------------------------------------------------------------
# Text alone
# --------------------------------------------------------------------------------------------------------------------
TEXT = "the sea is deep, wide and full of salt."


def text_rows(kind: str) -> list[dict[str, Any]]:
    answers = [TEXT, "", TEXT, "  ", TEXT]
    if kind == "completion":
        return [{"prompt": "tell me about the sea", "completion": answer} for answer in answers]
    asked = {"role": "user", "content": "tell me about the sea"}
    if kind == "messages":
        return [{"messages": [asked, {"role": "assistant", "content": answer}]} for answer in answers]
    return [{"prompt": [asked], "completion": [{"role": "assistant", "content": answer}]} for answer in answers]


@pytest.mark.parametrize("stream", [False, True], ids=["map-style", "stream"])
@pytest.mark.parametrize("kind", ["completion", "conversation", "messages"])
def test_empty_answers_among_texts_are_skipped_and_counted(make_trainer: MakeTrainer, kind: str, stream: bool) -> None:
    dataset: Any = Dataset.from_list(text_rows(kind))
    if stream:
        dataset = dataset.to_iterable_dataset()
    kept, dropped = drop_empty_answers(dataset)
    assert len(list(kept)) == 3 and dict(dropped) == {"empty answer": 2}
    trainer = make_trainer(train_dataset=dataset, skip_bad_rows=True, per_device_train_batch_size=1, max_steps=3)
    trainer.train()
    assert dict(trainer.skipped_rows) == {"empty answer": 2}
    assert len(list(trainer.train_dataset)) == 3
    control = make_trainer(
        train_dataset=dataset, per_device_train_batch_size=1, output_dir=trainer.args.output_dir + "2"
    )
    assert len(list(control.train_dataset)) == 5


def test_running_text_and_unknown_columns_are_left_alone() -> None:
    running = Dataset.from_list([{"text": TEXT}, {"text": ""}])
    assert drop_empty_answers(running)[0] is running
    unknown = IterableDataset.from_generator(lambda: iter([{"completion": ""}]))
    assert drop_empty_answers(unknown)[0] is unknown
    with pytest.raises(ValueError, match="^No usable row is left of 2: all answers are empty"):
        drop_empty_answers(Dataset.from_list([{"prompt": "a", "completion": ""}] * 2))


def test_counts_behave_as_a_mapping() -> None:
    counts = SharedCounts()
    assert not counts and len(counts) == 0
    counts.add("empty answer")
    counts.add("empty answer")
    assert counts == {"empty answer": 2} and list(counts) == ["empty answer"]
    with pytest.raises(KeyError):
        counts["no label"]
    with pytest.raises(ValueError):
        counts.add("a reason of which nobody knows")


def test_a_huge_image_costs_no_memory(tmp_path: Path) -> None:
    """The claim is refused before anything of its size is made."""
    import resource

    from hf_lingudistill.data import decode_image

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadRow, match="too large to decode"):
        decode_image(png_of_size(60_000, 60_000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024

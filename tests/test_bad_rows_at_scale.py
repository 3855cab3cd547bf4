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
import tiny
import torch
from datasets import Dataset, Features, Image, IterableDataset, Json, List, Value
from PIL import Image as PILImage

from hf_lingudistill.batch import (
    REASONS,
    ROW_COLUMN,
    BadRow,
    DistillCollator,
    SharedCounts,
    decode_image,
    drop_bad_rows,
    drop_bad_texts,
    prepare_dataset,
)
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
    "empty file": ([b""], "image missing"),
    "too many for max_length": ([JPEG] * 8, "image tokens over max_length"),
    "long question": ([], "no label"),
    "empty answer": ([JPEG], "empty answer"),
    "no answer": ([JPEG], "empty answer"),
}
ANSWERS: dict[str | None, list[dict[str, str]] | None] = {
    "empty answer": [{"role": "assistant", "content": ""}],
    "no answer": None,
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
        question = "tell me " * (60 if what == "long question" else 1) if not images else "what shape is it?"
        rows.append(
            {
                "images": [_stored(image) for image in images],
                "prompt": [{"role": "user", "content": f"row {index}: {question}"}],
                "completion": ANSWERS.get(what, [{"role": "assistant", "content": "a small red circle"}]),
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


def numbers_of(tokenizer: Any, input_ids: torch.Tensor) -> list[int]:
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in input_ids]
    return [int(re.search(r"row (\d+):", text)[1]) for text in texts]  # type: ignore[index]


@pytest.fixture
def trained_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that reached the student in training, in order, by the number in their text."""
    seen: list[int] = []
    begin = FiniteWatch.open

    def open_and_note(self: FiniteWatch, input_ids: torch.Tensor, row: torch.Tensor | None) -> None:
        numbers = numbers_of(self.tokenizer, input_ids)
        # rows are numbered, but for those of a stream that several workers read
        assert row is not None and all(
            given in (-1, number) for given, number in zip(row.tolist(), numbers, strict=True)
        )
        seen.extend(numbers)
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
    make_trainer: MakeTrainer, trained_rows: list[int], count: int
) -> None:
    rows, wrong = make_rows(count)
    good, reasons = expected_of(wrong)
    assert len(good) == count - max(len(BAD), count // 20) and set(reasons) == {reason for _, reason in BAD.values()}
    trainer = make_trainer(
        train_dataset=make_dataset(rows), per_device_train_batch_size=25, max_steps=-1, num_train_epochs=1, **SETTINGS
    )
    trainer.train()
    assert dict(trainer.skipped_rows) == reasons
    assert Counter(trained_rows) == Counter(good)  # each once, and no other


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_counts_what_its_workers_skip(make_trainer: MakeTrainer, workers: int) -> None:
    """Exactly, over one epoch. A flag that is null gets through to here: a stream's column is not read beforehand."""
    rows, wrong = make_rows(160)
    good, reasons = expected_of(wrong)
    rows[good.pop()]["distill"] = None
    stream = make_dataset(rows).to_iterable_dataset(num_shards=2)
    trainer = make_trainer(
        train_dataset=stream, per_device_train_batch_size=8, dataloader_num_workers=workers, **SETTINGS
    )
    assert dict(trainer.skipped_rows) == {}  # nothing has been read yet
    tokenizer = trainer.processing_class.tokenizer
    read = [number for batch in trainer.get_train_dataloader() for number in numbers_of(tokenizer, batch["input_ids"])]
    assert Counter(read) == Counter(good)
    assert dict(trainer.skipped_rows) == {**reasons, "distill flag not boolean": 1}


def test_stream_is_trained_on_without_its_bad_rows(make_trainer: MakeTrainer, trained_rows: list[int]) -> None:
    rows, wrong = make_rows(60)
    good, reasons = expected_of(wrong)
    trainer = make_trainer(
        train_dataset=make_dataset(rows).to_iterable_dataset(),
        per_device_train_batch_size=8,
        max_steps=-(-len(good) // 8),
        **SETTINGS,
    )
    trainer.train()
    assert trained_rows[: len(good)] == good  # in order, and none is missing
    # read once, and the beginning of a second time where the last batch was filled up
    assert set(trainer.skipped_rows) == set(reasons)
    assert all(count <= trainer.skipped_rows[reason] <= 2 * count for reason, count in reasons.items())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streamed", [False, True], ids=["map-style", "stream"])
def test_without_skipping_the_first_bad_row_stops_the_run(
    make_trainer: MakeTrainer, streamed: bool, workers: int
) -> None:
    rows, first = [row for row, what in zip(*make_rows(40), strict=True) if what is None][:20], 7
    rows[first] = {**rows[first], "images": [None]}
    name = rows[first]["prompt"][0]["content"]
    dataset: Any = make_dataset(rows)
    trainer = make_trainer(
        train_dataset=dataset.to_iterable_dataset(num_shards=2) if streamed else dataset,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=1,
        max_steps=20,
        dataloader_num_workers=workers,
        **{**SETTINGS, "skip_bad_rows": False},
    )
    with pytest.raises(BadRow) as stopped:
        trainer.train()
    # several workers of a stream each count their own part, so that its rows are named by how they begin
    row = f"The row that begins {name!r}" if streamed and workers else f"Row {first}"
    assert str(stopped.value) == (
        f"{row}: an image is missing (null). Repair or remove the row, or pass --skip_bad_rows to skip such rows."
    )


def test_rows_of_a_stream_without_a_schema_may_hold_anything(make_trainer: MakeTrainer) -> None:
    """Arrow lets one type into a column. A generator lets in what it likes, and rows without the column too."""
    rows, wrong = make_rows(40, share=0.0)
    good = [row for row, what in zip(rows, wrong, strict=True) if what is None]
    spoilt: list[tuple[Any, str]] = [
        ([17], "image of wrong type"),
        ([np.zeros((4, 4, 3), np.uint8)], "image of wrong type"),
        ([PILImage.new("RGB", (0, 3))], "image of zero size"),
        (noise(), "images not a list"),
    ]
    bad = [{**good[0], "images": images} for images, _ in spoilt]
    bad.append({key: value for key, value in good[0].items() if key != "images"})
    collator = make_trainer(train_dataset=make_dataset(good), max_length=MAX_LENGTH).data_collator
    stream = IterableDataset.from_generator(lambda: iter([*good, *bad]))
    kept, dropped = drop_bad_rows(stream, collator)
    assert [row["prompt"] for row in kept] == [row["prompt"] for row in good]
    assert dict(dropped) == {**Counter(reason for _, reason in spoilt), "image column missing": 1}


@pytest.mark.parametrize("images", [True, False])
def test_a_flag_that_is_null_is_refused_or_its_row_is_skipped(make_trainer: MakeTrainer, images: bool) -> None:
    rows = tiny.make_rows(20, images=images)
    rows[3]["distill"] = None
    dataset = Dataset.from_list(rows if images else [{k: v for k, v in row.items() if k != "images"} for row in rows])
    with pytest.raises(ValueError, match="found None in 1 of 20. Repair them, or pass --skip_bad_rows.$"):
        make_trainer(train_dataset=dataset, **SETTINGS | {"skip_bad_rows": False})
    trainer = make_trainer(train_dataset=dataset, **SETTINGS | {"skip_bad_rows": True})
    assert dict(trainer.skipped_rows) == {"distill flag not boolean": 1}
    assert len(trainer.train_dataset) == 19


@pytest.mark.parametrize("several", [False, True], ids=["one", "by name"])
def test_evaluation_sets_are_cleaned_as_well_and_it_is_said(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, several: bool
) -> None:
    rows, wrong = make_rows(30)
    good, reasons = expected_of(wrong)
    evaluation: Any = make_dataset(rows)
    trainer = make_trainer(
        train_dataset=make_dataset([rows[index] for index in good]),
        eval_dataset={"all": evaluation, "good": evaluation.select(good)} if several else evaluation,
        **SETTINGS,
    )
    parts = trainer.eval_dataset if several else {"all": trainer.eval_dataset, "good": trainer.eval_dataset}
    assert parts["all"][ROW_COLUMN] == good and len(parts["good"]) == len(good)
    assert dict(trainer.skipped_rows) == {}  # those of the training set
    (said,) = [record.getMessage() for record in caplog.records if "evaluation set" in record.getMessage()]
    assert said.startswith(f"Skipped {len(rows) - len(good)} rows of an evaluation set: ")
    assert all(f"'{reason}': {count}" in said for reason, count in reasons.items())
    assert trainer.evaluate()


def test_run_that_resumes_goes_on_with_the_same_rows(
    make_trainer: MakeTrainer, trained_rows: list[int], tmp_path: Path
) -> None:
    rows, wrong = make_rows(40)
    good, _ = expected_of(wrong)
    common = {"train_dataset": make_dataset(rows), "max_steps": len(good) // 4, **SETTINGS}
    make_trainer(output_dir=str(tmp_path / "whole"), **common).train()
    whole = trained_rows.copy()
    trained_rows.clear()
    cut = {"output_dir": str(tmp_path / "cut"), "save_strategy": "steps", "save_steps": 3}
    make_trainer(**{**common, **cut, "max_steps": 3}).train()
    make_trainer(**common, **cut).train(resume_from_checkpoint=True)
    assert trained_rows == whole and len(set(whole)) == len(good) // 4 * 4


def test_processes_that_share_the_check_find_the_same_rows(make_trainer: MakeTrainer) -> None:
    rows, wrong = make_rows(80)
    good, reasons = expected_of(wrong)
    collator: DistillCollator = make_trainer(max_length=MAX_LENGTH).data_collator
    dataset = prepare_dataset(make_dataset(rows))
    state = torch.get_rng_state()
    for num_proc in (None, 1, 2):
        kept, dropped = drop_bad_rows(dataset, collator, num_proc)
        assert kept[ROW_COLUMN] == good and dropped == reasons
    assert torch.equal(torch.get_rng_state(), state)  # no random number of the run was used


def test_image_between_pils_warning_and_its_error_is_decoded() -> None:
    """PIL warns from 89 million pixels on and refuses from 179 million on."""
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
    kept, dropped = drop_bad_texts(dataset)
    assert len(list(kept)) == 3 and dict(dropped) == {"empty answer": 2}
    trainer = make_trainer(
        train_dataset=dataset, eval_dataset=dataset, skip_bad_rows=True, per_device_train_batch_size=1, max_steps=3
    )
    trainer.train()
    assert dict(trainer.skipped_rows) == {"empty answer": 2}
    assert len(list(trainer.train_dataset)) == len(list(trainer.eval_dataset)) == 3
    # Control: not asked to skip, a run stops at the first and names it
    with pytest.raises(ValueError, match="^Row 1 has an empty (completion|answer in its messages)"):
        control = make_trainer(
            train_dataset=dataset, per_device_train_batch_size=1, output_dir=trainer.args.output_dir + "2"
        )
        list(control.train_dataset)
    with pytest.raises(ValueError, match="^Row 1 of dataset 'eval' has an empty"):
        control = make_trainer(
            train_dataset=Dataset.from_list(text_rows(kind)[::2]), eval_dataset=dataset, per_device_train_batch_size=1
        )
        list(control.eval_dataset)


def test_running_text_and_unknown_columns_are_left_alone() -> None:
    running = Dataset.from_list([{"text": TEXT}, {"text": ""}])
    assert drop_bad_texts(running)[0] is running
    unknown = IterableDataset.from_generator(lambda: iter([{"completion": ""}]))
    assert drop_bad_texts(unknown)[0] is unknown
    with pytest.raises(ValueError, match="^No usable row is left of 2: {'empty answer': 2}. Repair the dataset.$"):
        drop_bad_texts(Dataset.from_list([{"prompt": "a", "completion": ""}] * 2))


@pytest.mark.parametrize("stream", [False, True], ids=["map-style", "stream"])
@pytest.mark.parametrize("column", ["text", "body"])
@pytest.mark.parametrize("flagged", [False, True], ids=["", "flagged"])
def test_running_text_that_is_null_is_named_or_skipped(
    make_trainer: MakeTrainer, stream: bool, column: str, flagged: bool
) -> None:
    rows = [{column: text, **({"distill": True} if flagged else {})} for text in (TEXT, TEXT, None, TEXT)]
    data: Any = Dataset.from_list(rows)
    data = data.to_iterable_dataset() if stream else data
    options = {"dataset_text_field": column, "per_device_train_batch_size": 1, "max_steps": 3}
    with pytest.raises(
        ValueError, match=f"^Row 2 has no text: its column '{column}' is null. Remove the row, or pass"
    ):
        make_trainer(train_dataset=data, **options).train()
    with pytest.raises(ValueError, match="Row 2 of dataset 'eval' has no text"):
        list(make_trainer(train_dataset=Dataset.from_list(rows[:2]), eval_dataset=data, **options).eval_dataset)
    trainer = make_trainer(train_dataset=data, skip_bad_rows=True, **options)
    trainer.train()
    assert len(list(trainer.train_dataset)) == 3 and dict(trainer.skipped_rows) == {"not a conversation": 1}


def test_running_text_that_is_a_number_is_named(make_trainer: MakeTrainer) -> None:
    message = "^Row 0: column 'text' holds the number 5, expected a text. Convert the column to text.$"
    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=Dataset.from_list([{"text": 5}] * 4))
    mixed = Dataset.from_list([{"text": TEXT}, {"text": 5}], on_mixed_types="use_json")
    with pytest.raises(ValueError, match="^Row 1: column 'text' holds the number 5"):
        make_trainer(train_dataset=mixed)
    assert len(make_trainer(train_dataset=mixed, skip_bad_rows=True).train_dataset) == 1
    ids = Dataset.from_list([{"text": None, "input_ids": [5, 6], "labels": [5, 6]}] * 4)  # control: nobody reads it
    assert len(make_trainer(train_dataset=ids, skip_bad_rows=True).train_dataset) == 4


def test_a_stream_without_a_usable_row_is_a_sentence(make_trainer: MakeTrainer) -> None:
    def rows() -> Any:
        yield from ({"messages": [USER, {"role": "assistant", "content": ""}], "images": []} for _ in range(3))

    with pytest.raises(ValueError, match=r"no usable row, all of them were skipped \({'empty answer': 3}\)"):
        make_trainer(train_dataset=IterableDataset.from_generator(rows), skip_bad_rows=True)


USER = {"role": "user", "content": "what is the weather in Aberdeen?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}


def is_kept(row: dict[str, Any]) -> bool:
    stream = IterableDataset.from_generator(lambda: iter([row]), features=Features({name: Json() for name in row}))
    kept, dropped = drop_bad_texts(stream)
    rows = list(kept)
    assert len(rows) + sum(dropped.values()) == 1
    return bool(rows)


def test_what_counts_as_an_empty_answer() -> None:
    said, silent = {"role": "assistant", "content": "Rain."}, {"role": "assistant", "content": ""}
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    conversations: list[tuple[Any, bool]] = [
        ([USER, said], True),
        ([USER, silent], False),
        ([USER, silent, USER, said], False),  # a student would learn to say nothing first
        ([USER, said, USER, silent], False),
        ([USER, {**silent, "reasoning_content": "It rains."}, USER, said], True),
        ([USER, {**said, "weight": 0}, USER, {**said, "weight": 1}], False),  # would be trained on against its mark
        ([USER, {**said, "weight": 1}, USER, said], True),
        ([USER, {**said, "train": False}], False),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": " "}]}], False),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": "Rain."}]}], True),
        ([USER, calling], True),  # says nothing, does something
        ([USER, {"role": "model", "content": "Rain."}], True),  # other names: no judgement
        ([], False),
        (None, False),
    ]
    for messages, usable in conversations:
        assert is_kept({"messages": messages}) is usable, messages
    assert is_kept({"prompt": [USER], "completion": [calling]})
    assert not is_kept({"prompt": [USER], "completion": [{**calling, "tool_calls": []}]})
    assert not is_kept({"prompt": "a", "completion": None})


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
    assert {reason for _, reason in BAD.values()} <= set(REASONS)


def test_a_huge_image_costs_no_memory(tmp_path: Path) -> None:
    """The claim is refused before anything of its size is made."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadRow, match="too large to decode"):
        decode_image(png_of_size(60_000, 60_000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024

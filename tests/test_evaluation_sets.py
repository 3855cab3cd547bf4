"""Evaluation sets: what is wrong with one is said with its name before the first step, and no number comes of other rows than meant."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import tiny
from datasets import Dataset, Image, IterableDataset, List

from hf_lingudistill import opening

MakeTrainer = Callable[..., Any]
Row = dict[str, Any]
EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1}


def flagged(flags: list[Any], *, images: bool = True, seed: int = 1) -> Dataset:
    rows = tiny.make_dataset(len(flags), seed=seed, images=images).remove_columns("distill")
    return rows.add_column("distill", flags)


def with_a_bad_image(at: int = 2) -> Dataset:
    rows = tiny.make_dataset(4, seed=1).cast_column("images", List(Image(decode=False))).to_list()
    rows[at]["images"] = [{"bytes": b"no image", "path": None}]
    return Dataset.from_list(rows).cast_column("images", List(Image(decode=False)))


def said(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


# --------------------------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("images", [True, False], ids=["images", "texts"])
@pytest.mark.parametrize("later", [False, True], ids=["at first", "later"])
def test_a_set_without_flags_beside_a_training_set_with_flags_is_named_once(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, images: bool, later: bool
) -> None:
    train, without = flagged([True, False] * 2, images=images), tiny.make_dataset(4, seed=1, images=images)
    sets = {"Plain": without.remove_columns("distill"), "marked": flagged([True, False] * 2, images=images)}
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(train_dataset=train, **({} if later else {"eval_dataset": sets}))
        found = trainer.evaluate(sets) if later else trainer.evaluate()
    assert said(caplog, "which the training set has") == [
        "Evaluation set 'Plain' has no column 'distill', which the training set has: every row of it is distilled, and its loss is not the "
        "one that is trained on. Give it that column."
    ]
    assert found["eval_Plain_distilled_tokens"] > found["eval_marked_distilled_tokens"]  # what it is about
    # Control: nothing is missing where the training set has no flags either
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make_trainer(train_dataset=train.remove_columns("distill"), eval_dataset=sets["Plain"])
    assert not said(caplog, "which the training set has") and said(caplog, "every row is distilled")


@pytest.mark.parametrize(
    "joining", [{"packing": True, "eval_packing": True}, {"packing": True}, {"padding_free": True}], ids=str
)
def test_flags_of_a_set_whose_rows_are_joined_are_refused_and_not_dropped(
    make_trainer: MakeTrainer, joining: Row
) -> None:
    train, text = flagged([True] * 4, images=False).remove_columns("distill"), flagged([True, False] * 2, images=False)
    joining = {**joining, "max_length": None if "padding_free" in joining else 64}
    message = "column 'distill' of evaluation set 'b' (has no meaning|differs)"
    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=train, eval_dataset={"a": train, "b": text}, **joining)
    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=train, **joining).evaluate({"b": text})
    make_trainer(train_dataset=train, eval_dataset={"a": train}, **joining)  # control
    if "packing" in joining:
        make_trainer(train_dataset=train, eval_dataset={"b": text}, **{**joining, "eval_packing": False})


def test_flags_of_a_streamed_set_that_is_packed_are_refused_as_it_is_read(make_trainer: MakeTrainer) -> None:
    train = flagged([True] * 4, images=False).remove_columns("distill")
    rows = [*train.to_list() * 20, *flagged([False], images=False).to_list()]
    late = IterableDataset.from_generator(lambda: iter(rows))
    trainer = make_trainer(train_dataset=train, eval_dataset=late, packing=True, eval_packing=True, max_length=64)
    with pytest.raises(ValueError, match="eval_packing joins rows, so that column 'distill' of the row that begins"):
        trainer.evaluate()


def test_rows_of_an_evaluation_set_that_are_joined_do_not_read_each_other(make_trainer: MakeTrainer) -> None:
    """Its loss picks the best checkpoint: joined or not, it is the same; where nothing would keep the rows apart, it is refused."""
    texts = flagged([True] * 8, images=False).remove_columns("distill")
    given = {
        "train_dataset": texts,
        "eval_dataset": texts,
        "max_length": 128,
        "kv_sharing": "prompt",
        "kv_source": "student",
    }
    plain = make_trainer(**given).evaluate()["eval_ce_loss"]
    joined = make_trainer(**given, packing=True, eval_packing=True)
    assert next(iter(joined.get_eval_dataloader()))["input_ids"].shape[0] == 1  # control: they are joined
    assert joined.evaluate()["eval_ce_loss"] == pytest.approx(plain, rel=1e-5)
    with pytest.raises(ValueError, match="would read each other"):
        make_trainer(**given, eval_packing=True)


@pytest.mark.parametrize("images", [True, False], ids=["images", "texts"])
def test_flags_of_a_set_that_are_not_boolean_are_refused_before_the_first_step(
    make_trainer: MakeTrainer, images: bool
) -> None:
    strings, train = flagged(["true"] * 4, images=images), flagged([True] * 4, images=images)
    message = "Column 'distill' of evaluation set 'b' must hold true or false in every row; found 'true' in 4 of 4"
    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=train, eval_dataset={"a": train, "b": strings})
    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=train).evaluate({"b": strings})
    # Control: a set need not have a marked row, as a training set must
    assert make_trainer(train_dataset=train, eval_dataset=flagged([False] * 4, images=images)).evaluate()


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------
def test_a_bad_row_of_a_set_is_named_before_the_first_step(make_trainer: MakeTrainer) -> None:
    sets = {"good": tiny.make_dataset(4), "bad": with_a_bad_image()}
    with pytest.raises(ValueError, match="^In evaluation set 'bad': Row 2: an image cannot be read"):
        make_trainer(eval_dataset=sets, **EACH_STEP)
    with pytest.raises(ValueError, match="^In the evaluation set: Row 2: an image cannot be read"):
        make_trainer(eval_dataset=sets["bad"], **EACH_STEP)
    with pytest.raises(ValueError, match="^In the evaluation set: Row 2: an image cannot be read"):
        make_trainer(eval_dataset=sets["bad"], dataset_num_proc=2, **EACH_STEP)
    make_trainer(eval_dataset={"good": sets["good"]}, **EACH_STEP)  # control
    trainer = make_trainer(eval_dataset=sets, skip_bad_rows=True, **EACH_STEP)
    assert len(trainer.eval_dataset["bad"]) == 3


def test_a_bad_row_that_only_an_evaluation_meets_is_named_with_its_set_and_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(eval_dataset={"bad": with_a_bad_image().to_iterable_dataset()}, max_steps=3, **EACH_STEP)
    with pytest.raises(ValueError, match="^In evaluation set 'bad', at step 1: Row 2: an image cannot be read"):
        trainer.train()
    with pytest.raises(ValueError, match="^In the rows of 'test', at step 1: Row 2: an image cannot be read"):
        trainer.predict(with_a_bad_image())


def test_a_row_of_a_list_is_named_with_its_set(make_trainer: MakeTrainer) -> None:
    rows = [*tiny.make_rows(2), {"question": "x"}]
    with pytest.raises(ValueError, match="^Row 2 of evaluation set 'b' has the columns question"):
        make_trainer(eval_dataset={"a": tiny.make_rows(2), "b": rows})


def test_a_set_without_rows_is_named(make_trainer: MakeTrainer) -> None:
    empty = tiny.make_dataset(2).select([])
    with pytest.raises(ValueError, match="^evaluation set 'b' has no rows"):
        make_trainer(eval_dataset={"a": tiny.make_dataset(2), "b": empty})
    with pytest.raises(ValueError, match="^train_dataset has no rows"):
        make_trainer(train_dataset=empty)


# --------------------------------------------------------------------------------------------------------------------
# Prediction
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("images", [True, False], ids=["images", "texts"])
@pytest.mark.parametrize("kind", ["dataset", "list", "stream"])
def test_prediction_takes_what_evaluation_takes(make_trainer: MakeTrainer, images: bool, kind: str) -> None:
    trainer = make_trainer(train_dataset=tiny.make_dataset(4, images=images))
    data: Any = tiny.make_dataset(4, seed=1, images=images)
    given = data.to_list() if kind == "list" and not images else data
    given = tiny.make_rows(4, seed=1) if kind == "list" and images else given
    given = data.to_iterable_dataset() if kind == "stream" else given
    assert trainer.predict(given).metrics["test_loss"] == pytest.approx(trainer.evaluate(data)["eval_loss"], rel=1e-5)


def test_of_a_long_set_rows_from_everywhere_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them where there are no more than that."""
    looked: list[int] = []

    def collate(rows: list[Row]) -> None:
        looked.extend(row["number"] for row in rows)

    for length, expected in ((4, [0, 1, 2, 3]), (11, [0, 2, 5, 8])):
        looked.clear()
        monkeypatch.setattr(opening, "CHECKED_OF_EACH", 4)
        opening.check_evaluation_rows({"a": Dataset.from_dict({"number": list(range(length))})}, collate)
        assert looked == expected

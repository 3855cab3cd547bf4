"""Progress in a log: one line per minute, and nothing of what takes less."""

from __future__ import annotations

import io
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from hf_lingudistill import pace, progress
from hf_lingudistill.pace import Pace
from hf_lingudistill.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "every", "lines"), [(io.StringIO(), 0.0, True), (io.StringIO(), 60.0, False)])
def test_a_bar_in_a_log_is_a_line_a_minute(
    stream: io.StringIO, every: float, lines: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control has no minute to wait for: it says something at each step."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "EVERY", every)
    for _ in progress_bar(range(50), desc="reading", unit="row"):
        time.sleep(0.001)
    said = stream.getvalue()
    assert "\r" not in said and (said.count("\n") > 5 and said.startswith("reading: ")) == lines
    assert lines or said == ""


def test_a_bar_on_a_terminal_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress_bar(range(3), desc="reading"):
        pass
    assert stream.getvalue().count("\r") >= 2


def test_the_bars_of_other_libraries_move_once_a_minute_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TQDM_MININTERVAL", "TQDM_DELAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress.calm_other_bars()
    assert "TQDM_DELAY" not in progress.os.environ
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setenv("TQDM_DELAY", "5")  # what the user has set stays
    progress.calm_other_bars()
    assert progress.os.environ["TQDM_MININTERVAL"] == "60" and progress.os.environ["TQDM_DELAY"] == "5"


def test_a_training_says_once_a_minute_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    watch, args = Pace(stream), SimpleNamespace(disable_tqdm=True)
    state: Any = SimpleNamespace(global_step=0, max_steps=600, is_world_process_zero=True)
    watch.on_train_begin(args, state, None, train_dataloader=range(600))
    for step in range(1, 601):
        now[0] += 2.0
        state.global_step = step
        watch.on_step_end(args, state, None)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 20 and lines[0] == "step 30 of 600, 2 s per step, 19 min left"
    args.disable_tqdm = False  # where there is a bar
    now[0] += 120.0
    watch.on_step_end(args, state, None)
    assert len(stream.getvalue().splitlines()) == 20


def test_a_training_that_takes_no_step_is_refused_before_anything_is_saved() -> None:
    args = SimpleNamespace(disable_tqdm=True, per_device_train_batch_size=8, dataloader_drop_last=True)
    state: Any = SimpleNamespace(global_step=5, max_steps=5, is_world_process_zero=True)
    with pytest.raises(ValueError, match="The checkpoint is at step 5 of 5: nothing is left to train"):
        Pace().on_train_begin(args, state, None)
    state.global_step = 0
    empty = type("Loader", (), {"__len__": lambda self: 0, "dataset": [1, 2]})()
    with pytest.raises(ValueError, match="Not one batch: the training set has 2 rows, a batch takes .*=8"):
        Pace().on_train_begin(args, state, None, train_dataloader=empty)
    watch = Pace()
    watch.on_train_begin(args, state, None)  # a stream, whose length nobody knows
    ends, goes_on = (SimpleNamespace(should_training_stop=stop) for stop in (True, False))
    with pytest.raises(ValueError, match="Not one step was trained"):
        watch.on_epoch_end(args, state, ends)
    watch.on_epoch_end(args, state, goes_on)  # a resumed stream: a whole pass was skipped, and the next one trains
    state.global_step = 1
    watch.on_epoch_end(args, state, ends)

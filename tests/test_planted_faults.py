"""The table of planted faults is of this code: each line is there once, and each test that is to find it exists."""

from __future__ import annotations

import re
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]


def stale(fault: Fault) -> list[str]:
    """What the fault names and this repository does not have."""
    source = (ROOT / "hf_lingudistill" / fault.file).read_text(encoding="utf-8")
    found = (
        [] if source.count(fault.before) == 1 else [f"{fault.file} holds its text {source.count(fault.before)} times"]
    )
    for node in fault.tests:
        path, _, test = node.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else ""
        if not re.search(rf"^def {test.partition('[')[0]}" if test else ".", text, re.MULTILINE):
            found.append(f"no {node}")
    return found


def test_every_fault_can_be_planted_and_looked_for() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) > 90
    found = {fault.name: why for fault in FAULTS if (why := stale(fault))}
    assert not found


def test_a_stale_fault_is_noticed() -> None:
    """Control of the test above."""
    assert stale(Fault("x", "losses.py", "no such line", "", "", ("tests/test_losses.py",)))
    assert stale(
        Fault("x", "losses.py", "from __future__ import annotations", "", "", ("tests/test_losses.py::test_no_such",))
    )
    assert stale(Fault("x", "losses.py", "from __future__ import annotations", "", "", ("tests/no_such.py",)))

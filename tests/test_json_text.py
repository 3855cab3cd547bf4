"""Result files: a record per line, and nothing else than `json.dumps` would write."""

from __future__ import annotations

import json
import math

from hf_lingudistill.labs.json_text import WIDTH, as_json

RECORD = {"name": "a" * 30, "values": [1.5, 2], "nested": {"x": None}}


def test_a_record_stands_on_one_line() -> None:
    text = as_json({"title": "t", "rows": [RECORD] * 20, "none": [], "numbers": list(range(500))})
    lines = text.splitlines()
    assert [json.loads(line.strip().rstrip(",")) for line in lines if line.lstrip().startswith('{"name"')] == [
        RECORD
    ] * 20
    assert len(lines) == 20 + 2 + 5  # the list's brackets, its neighbours' lines, and the outermost braces


def test_what_it_writes_is_what_it_got() -> None:
    deep = {"a": {"b": [RECORD] * 9, 3: "é\n", "t": (1, 2)}, "rows": [[RECORD] * 9]}
    assert json.loads(as_json(deep)) == json.loads(json.dumps(deep))
    assert "é" in as_json(deep)
    # What JSON cannot say, and other readers stop at
    assert json.loads(as_json([math.nan, math.inf, -math.inf, 1e308])) == [None, None, None, 1e308]
    assert as_json([]) == "[]" and as_json(1.5) == "1.5"


def test_a_long_record_of_records_is_broken() -> None:
    wide = {"rows": [{f"{number}": {"value": number}} for number in range(3)], "other": {"b" * WIDTH: [[1]]}}
    assert as_json({"w": wide}).splitlines()[1] == ' "w": {'

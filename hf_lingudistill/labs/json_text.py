"""JSON for result files: a record per line, for eyes and for `git diff`."""

from __future__ import annotations

import json
from typing import Any

WIDTH = 200  # characters of a line that holds records within records


def as_json(value: Any) -> str:
    """JSON text, indented by one space per level. A list or mapping of plain values stands on one line, and so does whatever is short.
    Where a number is not finite (the interval of a few items), which JSON cannot say, stands null."""
    return _lines(json.loads(json.dumps(value), parse_constant=lambda _: None), 0)


def _lines(value: Any, depth: int) -> str:
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value:
        return line
    items = value.values() if isinstance(value, dict) else value
    if depth and (len(line) <= WIDTH or not any(isinstance(item, dict | list) for item in items)):
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {_lines(item, depth + 1)}" for key, item in value.items()]
    else:
        parts = [_lines(item, depth + 1) for item in value]
    indent = "\n" + " " * (depth + 1)
    return line[0] + indent + f",{indent}".join(parts) + "\n" + " " * depth + line[-1]

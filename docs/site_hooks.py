"""Hooks of `mkdocs build`: the notebook becomes a page, and what lies outside docs/ is named instead of linked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parent
NOTEBOOK = "tutorial.ipynb"


def page_of(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: texts, code, and what the code printed."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join(line for output in cell["outputs"] for line in output["text"])
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: Any) -> Files:
    notebook = json.loads((DOCS / NOTEBOOK).read_text(encoding="utf-8"))
    files.append(File.generated(config, "tutorial.md", content=page_of(notebook)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that leave docs/ lead nowhere on the site: the path in the repository stands in their place."""
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#\s]+)[^)]*\)", _in_repository, markdown)


def _in_repository(match: re.Match[str]) -> str:
    text, path = match[1].strip("`"), match[2]
    return f"`{path}`" if text == path or path.endswith(text) else f"{match[1]} (`{path}`)"

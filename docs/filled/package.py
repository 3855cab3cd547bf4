"""What the package says of itself: options, modes, families, its demo and diagnosis."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import re
import sys
import textwrap
from dataclasses import fields
from typing import Any

from hf_lingudistill.config import LinguDistillConfig
from hf_lingudistill.labs.demo_report import prompts_text, table, verdict
from hf_lingudistill.labs.diagnose import as_text
from hf_lingudistill.options import DistillOptions
from hf_lingudistill.sharing import MODES

from .files import DEMO, FAMILIES, ROOT, read


def demo() -> str:
    """The embedded demo's table."""
    report = read(DEMO)
    return f"{table(report)}\n\n{' '.join(verdict(report).split())}"


def demo_table() -> str:
    """The table, and the first prompt of each kind with the beginnings of its answers."""
    report = read(DEMO)
    firsts = [next(p for p in report["prompts"] if bool(p.get("image")) == seen) for seen in (False, True)]
    arms = ("original", "before", "after")
    begun = [p | {arm: textwrap.shorten(p[arm], 64, placeholder=" ...") for arm in arms} for p in firsts]
    return f"{table(report)}\n\n```\n{prompts_text(begun)}\n```"


def demo_prompts() -> str:
    """The embedded demo's prompts, before and after."""
    return "```\n" + prompts_text(read(DEMO)["prompts"]) + "\n```"


def modes() -> str:
    """The sharing modes, from the objects that run them."""
    lines = [
        "| `kv_sharing` | the teacher reads the VLM's keys and values | it computes | choose it when |",
        "|---|---|---|---|",
    ]
    for name, mode in MODES.items():
        title = f"`{name}` (default)" if name == LinguDistillConfig.kv_sharing else f"`{name}`"
        lines.append(f"| {title} | {mode.reads} | {mode.computes} | {mode.choose} |")
    return "\n".join(lines)


def options() -> str:
    """The fields that `LinguDistillConfig` adds to `SFTConfig`."""
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for option in fields(DistillOptions):
        kind = DistillOptions.__annotations__[option.name].replace("|", "or")  # a parser writes over `option.type`
        meaning = option.metadata["help"].replace("%%", "%").replace("|", "\\|")
        lines.append(f"| `{option.name}` | `{kind}` | `{json.dumps(option.default)}` | {meaning} |")
    return "\n".join(lines)


def _diagnosis(name: str) -> str:
    """What `lingudistill diagnose` printed from the perplexities on, as far as the reason of its recommendation."""
    text = as_text(read(ROOT / f"docs/results/diagnose/{name}/drift.json"))
    return "```\n" + text[text.index("Perplexity of the answers") :].split("\n  - ")[0] + "\n```"


def diagnose_before() -> str:
    return _diagnosis("before")


def diagnose_after() -> str:
    return _diagnosis("after")


def recipes() -> str:
    """The recipes of examples/recipes/write_recipes.py."""
    path = ROOT / "examples/recipes/write_recipes.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = writer  # where its dataclasses look themselves up
    spec.loader.exec_module(writer)
    return str(writer.index())


def suite_keys() -> str:
    """Every key of a suite, from the classes that read it."""
    from hf_lingudistill.labs.evaluation import suite

    parts = {
        "every task": suite.Data,
        "`texts`": suite.TextTask,
        "`vision`": suite.VisionTask,
        "`grounded`": suite.GroundedTask,
        "`fidelity`": suite.FidelityTask,
        "`ifeval`": suite.IfevalTask,
        "`lm_eval`, `lmms_eval`": suite.HarnessTasks,
    }
    common = {option.name for option in dataclasses.fields(suite.Data)}
    lines = ["| in | key, and its value where it is left out | meaning |", "|---|---|---|"]
    for part, kind in parts.items():
        said, grouped = _parameters(inspect.getdoc(kind) or ""), {}  # keys that one sentence is about share a row
        for option in dataclasses.fields(kind):
            if option.name in said and (kind is suite.Data or option.name not in common):
                needed = option.default is dataclasses.MISSING
                key = f"`{option.name}`" + (" (needed)" if needed else f": `{json.dumps(option.default)}`")
                grouped.setdefault(said[option.name], []).append(key)
        for meaning, keys in grouped.items():
            lines.append(f"| {part} | {', '.join(keys)} | {meaning} |")
    return "\n".join(lines)


def _parameters(doc: str) -> dict[str, str]:
    """{name: what is said of it} of a docstring's `Parameters:`; names that share a sentence share it."""
    found: dict[str, str] = {}
    body = doc.partition("Parameters:")[2]
    for entry in re.split(r"\n    (?=\S)", body):
        names, _, meaning = " ".join(entry.split()).partition(":")
        for name in re.sub(r"\([^)]*\)", "", names).split(","):
            found[name.strip()] = meaning.strip()
    return found


def _families() -> dict[str, Any]:
    return read(FAMILIES)


def _by_fate() -> dict[str, list[dict[str, Any]]]:
    """Rows that went through every stage with the LM as the teacher, with the text half of the VLM before alone, that are refused, and the
    others."""
    found: dict[str, list[dict[str, Any]]] = {"lm": [], "itself": [], "refused": [], "fails": []}
    for row in _families()["families"]:
        done = "itself" if row.get("lm") == "itself" or "lm_note" in row else "lm"
        found[done if row["stage"] == "done" else "refused" if row.get("fits") is False else "fails"].append(row)
    return found


def families_count() -> str:
    fate = _by_fate()
    seen = sum(row.get("images") == "yes" for row in fate["refused"])
    fails = f", and {len(fate['fails'])} could not be built, or fail: see the notes" if fate["fails"] else ""
    return (
        f"Of the {sum(map(len, fate.values()))} types that `AutoModelForImageTextToText` knows (transformers {_families()['transformers']}), "
        f"{len(fate['lm'])} fit their LM and {len(fate['itself'])} more the text half of the VLM before; these went through every stage. "
        f"{len(fate['refused'])} are refused with their reason{fails}. Of the refused, {seen} can be held to the VLM before, run whole "
        "(`kv_sharing=images`)."
    )


_KNOWN = {
    "smolvlm": "SmolVLM",
    "llava": "LLaVA",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_5": "Qwen3.5",
    "internvl": "InternVL",
    "gemma3": "Gemma 3",
    "glm4v": "GLM-4.1V",
    "llama4": "Llama 4",
    "mllama": "Mllama",
    "blip-2": "BLIP-2",
}


def families_known() -> str:
    """README's line."""
    fate = _by_fate()
    fits, refused = fate["lm"] + fate["itself"], fate["refused"]

    def names(rows: list[dict[str, Any]]) -> str:
        there = {row["type"] for row in rows}
        return ", ".join(title for name, title in _KNOWN.items() if name in there)

    release = ".".join(_families()["transformers"].split(".")[:2])
    types = sum(map(len, fate.values()))
    return (
        f"Of the {types} VLM types in transformers {release}, {len(fate['lm'])} can learn from an LM of their text half's class (where published; "
        f"[tiny random models](docs/families.md)): {names(fits)}, ... Refused: "
        f"{names(refused)}, ..."
    )


def families_table() -> str:
    """Every class, by what became of it."""
    lines = [
        "| type | text half | teacher | same weights | full length | note |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in _by_fate().items():
        for row in rows:
            done = row["stage"] == "done"
            errors = [f"{row[key]:.0e}" if key in row and done else "-" for key in ("same_error", "reference_error")]
            note = row.get("lm_note", "" if done else row["note"])
            if "lm_note" in row:
                note = f"with {row['lm']}: {note}"
            if row.get("images") == "yes":
                note = f"`images` works. {note}"
            note = textwrap.shorten(
                note.replace("|", "/").replace("<", "(").replace(">", ")"), 220, placeholder=" ..."
            )
            teacher = {"lm": f"`{row['lm']}`", "itself": "the VLM before", "refused": "refused"}.get(
                name, f"fails ({row['stage']})"
            )
            lines.append(
                f"| {row['type']} | {row.get('text', '-')} | {teacher} | {errors[0]} | {errors[1]} | {note} |"
            )
    return "\n".join(lines)

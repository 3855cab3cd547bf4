"""The student and the rows of `nanovlm_460m.yaml`, in `outputs/nanovlm_460m`.

    python examples/recipes/nanovlm_460m.py                        # 12 subsets of FineVision, 6,000 rows each, streamed
    python examples/recipes/nanovlm_460m.py --rows 50              # a trial
    python examples/recipes/nanovlm_460m.py --student FOLDER --finevision FOLDER   # what lies on this machine

What is there already is left as it is: run it again to go on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, Features, Image, List, Value, load_dataset

from hf_lingudistill.labs.nanovlm import NanoVLMError, from_nanovlm

RECIPE = Path(__file__).with_suffix(".yaml")
FEATURES = Features({"images": List(Image()), "messages": List({"role": Value("string"), "content": Value("string")})})
IMAGE_MARKS = ("<|image|>", "<image>")  # nanoVLM removes its own from texts too: each would be taken for an image


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--student", default="lusxvr/nanoVLM-460M-8k", help="nanoVLM's checkpoint: folder or Hub id")
    parser.add_argument("--student_revision", metavar="REVISION")
    parser.add_argument("--finevision", default="HuggingFaceM4/FineVision", help="folder or Hub id")
    parser.add_argument("--finevision_revision", metavar="REVISION")
    parser.add_argument("--rows", type=int, default=6000, help="of each subset; default: 6000")
    args = parser.parse_args(argv)
    if args.rows < 1:
        parser.error(f"--rows must be at least 1, got {args.rows}.")
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    student = Path(recipe["model_name_or_path"])
    if student.exists():
        print(f"{student}: there")
    else:
        try:
            print(from_nanovlm(args.student, str(student), revision=args.student_revision))
        except NanoVLMError as error:
            print(error, file=sys.stderr)
            return 2
    for source in recipe["datasets"]:
        folder = Path(source["path"])
        if folder.exists():
            print(f"{folder}: there")
            continue
        rows = Dataset.from_generator(
            subset,
            features=FEATURES,
            gen_kwargs={
                "finevision": args.finevision,
                "name": folder.name,
                "revision": args.finevision_revision,
                "count": args.rows,
            },
        )
        partial = folder.with_name(f".{folder.name}-partial")
        rows.save_to_disk(partial)
        partial.rename(folder)
        print(f"{folder}: {len(rows):,} rows, distill: {str(source['distill']).lower()}")
    return 0


def subset(finevision: str, name: str, revision: str | None, count: int) -> Iterator[dict[str, Any]]:
    """Rows of a subset that have an answer, as messages; the same ones for the same revision."""
    stream = load_dataset(finevision, name, split="train", streaming=True, revision=revision)
    stream = stream.decode(False).shuffle(seed=0, buffer_size=1000)  # images stay as they were stored
    rows = (row for row in map(as_messages, stream) if row["messages"])
    return islice(rows, count)


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    """FineVision's `texts` (question and answer per turn) as turns; the images belong to the first question, as in nanoVLM."""
    turns = []
    for text in row["texts"]:
        if not text["assistant"].strip():
            continue
        turns += [
            {"role": "user", "content": without_marks(text["user"])},
            {"role": "assistant", "content": without_marks(text["assistant"])},
        ]
    return {"images": row.get("images") or [], "messages": turns}


def without_marks(text: str) -> str:
    for mark in IMAGE_MARKS:
        text = text.replace(mark, "")
    return text


if __name__ == "__main__":
    sys.exit(main())

"""The type of a row in demo, world and recipes."""

from __future__ import annotations

from datasets import Features, Image, List, Value

# The row type of TRL's conversational prompt-completion format, with the images that its VLM collator asks of every row.
ROW_FEATURES = Features(
    {
        "images": List(Image()),
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "completion": List({"role": Value("string"), "content": Value("string")}),
        "distill": Value("bool"),
    }
)

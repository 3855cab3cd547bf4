"""The part of a card that says how to run the model. Each block runs as printed, or the line above it says what it needs."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

PACKAGES = '"transformers>=5" torch torchvision pillow num2words'

_LOAD = """import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

source = "{source}"
device = "cuda" if torch.cuda.is_available() else "cpu"
processor = AutoProcessor.from_pretrained(source)
model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto").to(device)
"""
_CHAT = """

def ask(*content):
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": list(content)}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=64)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


picture = {"type": "image", "image": Image.open("picture.jpg")}
print(ask(picture, {"type": "text", "text": "What is in this picture?"}))
print(ask({"type": "text", "text": "Why do leaves fall in autumn?"}))"""
_PLAIN = """
text = processor.image_token + "What is in this picture?"
inputs = processor(text=text, images=Image.open("picture.jpg"), return_tensors="pt").to(device, model.dtype)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_PIPELINE = """from transformers import pipeline

ask = pipeline("image-text-to-text", model="{source}", dtype="auto")
picture = {{"type": "image", "path": "picture.jpg"}}
question = {{"type": "text", "text": "What is in this picture?"}}
messages = [{{"role": "user", "content": [picture, question]}}]
print(ask(text=messages, max_new_tokens=64, return_full_text=False)[0]["generated_text"])"""


@dataclass(frozen=True)
class Usage:
    """How one model is run.

    source: its Hub id, or a folder. made_by: what makes that folder, where it is none of the Hub. adapter: a LoRA adapter and not
    whole weights, on `base` (a Hub id, where there is one). chat: whether the processor has a chat template. weights: dtype and
    size, such as "float32, 542 MB".
    """

    source: str
    made_by: str = ""
    adapter: bool = False
    base: str | None = None
    chat: bool = True
    weights: str = ""

    def needs(self) -> str:
        """What must be there before the first block runs."""
        packages = PACKAGES + (" peft" if self.adapter else "")
        sentences = [f"`pip install {packages}`, and a picture of yours named `picture.jpg`."]
        if self.made_by:
            sentences.append(f"`{self.source}` is {self.made_by}.")
        if self.adapter:
            sentences.append("This is a LoRA adapter: the same line loads the model that it was trained on with it.")
        if self.weights:
            sentences.append(
                f"The weights are {self.weights}; `dtype=torch.bfloat16` takes half of the memory of float32 on a GPU."
                if self.weights.startswith("float32")
                else f"The weights are {self.weights}."
            )
        return "\n".join(textwrap.wrap(" ".join(sentences), 120, break_long_words=False, break_on_hyphens=False))

    def snippet(self) -> str:
        """Plain transformers: a question about a picture, and one of text alone."""
        return _LOAD.format(source=self.source) + (_CHAT if self.chat else _PLAIN)

    def other_ways(self) -> list[tuple[str, str, str]]:
        """[(what it is and needs, language, code)]"""
        ways = []
        if self.chat:
            ways.append(("In one call:", "python", _PIPELINE.format(source=self.source)))
        serve = f"vllm serve {self.source}"
        if self.adapter:
            serve = f"vllm serve {self.base} --enable-lora --lora-modules restored={self.source}" if self.base else ""
        if serve:
            note = "As a server, on a machine with a GPU and `pip install vllm`, if vLLM has this architecture (not tried here):"
            ways.append((note, "bash", serve))
        return ways

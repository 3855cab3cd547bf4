"""Answers to questions about images, their controls, and language about an image split by what depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import tiny
import torch
from families import build_family
from PIL import Image as PILImage

from hf_lingudistill.labs.evaluation import vision
from hf_lingudistill.labs.evaluation.cache import ItemCache
from hf_lingudistill.labs.evaluation.data import ImageItem, grey, image_items, other_item, text_items
from hf_lingudistill.labs.evaluation.grounded import answer_scores, image_tokens, split_scores, token_scores, wins
from hf_lingudistill.labs.evaluation.models import Scored, user_turn
from hf_lingudistill.labs.evaluation.reading import plain_generation, write_answers
from hf_lingudistill.labs.evaluation.suite import GroundedTask, TextTask, VisionTask
from hf_lingudistill.labs.evaluation.vision import answers, conditions, generate, question, score_answers

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "teal": (0, 128, 128)}
SHAPES = {"red": "a red circle", "blue": "a blue triangle", "green": "a green shape", "teal": "a teal rectangle"}
SENTENCES = {
    "red": "it is a red circle.",
    "blue": "it is a blue triangle. the sea is deep.",
    "green": "it is a green shape.",
    "teal": "the sea is deep: it is a teal rectangle.",
}


def even(color: str) -> PILImage.Image:
    return PILImage.new("RGB", (40, 40), COLORS[color])


@pytest.fixture(scope="module")
def items() -> list[ImageItem]:
    """Four evenly coloured images, questions of several lengths, sentences that name the color."""
    questions = ("what shape is it?", "what is in the image? tell me.", "what?", "tell me about the image")
    return [
        ImageItem(str(index), (even(color),), text, (SENTENCES[color],))
        for index, (color, text) in enumerate(zip(COLORS, questions, strict=True))
    ]


@pytest.fixture(scope="module")
def vlm() -> Scored:
    return Scored("vlm", "", "vlm", tiny.make_vlm(3), tiny.make_processor(), "vlm")


@pytest.fixture(scope="module")
def blind() -> Scored:
    """The same VLM with the way from its eyes cut."""
    model = tiny.make_vlm(3)
    for parameter in model.model.connector.parameters():
        parameter.data.zero_()
    return Scored("blind", "", "vlm", model, tiny.make_processor(), "blind")


@pytest.fixture
def inputs_of() -> Iterator[Callable[[torch.nn.Module], list[dict[str, Any]]]]:
    """`calls = inputs_of(module)`: a list of the keyword arguments of each forward call."""
    handles = []

    def record(module: torch.nn.Module) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        handles.append(
            module.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
        )
        return calls

    yield record
    for handle in handles:
        handle.remove()


def task(**settings: Any) -> VisionTask:
    return VisionTask(**{"name": "t", "path": "drawn", "max_new_tokens": 5, **settings})


def ask(scored: Scored, items: list[ImageItem], path: Path, **settings: Any) -> dict[str, dict[str, str]]:
    """The answers under each condition."""
    return {
        name: answers(scored, task(**settings), items, images, ItemCache(path / f"{name}.jsonl", {}), batch_size=3)
        for name, images in conditions(items, ("grey", "shuffled"), 0).items()
    }


def plain_argmax(scored: Scored, text: str, images: Sequence[PILImage.Image], steps: int) -> str:
    """The answer found by a full forward a token, without a cache, padding or `generate`."""
    inputs = dict(scored.processing(text=[text], images=[list(images)], return_tensors="pt", add_special_tokens=False))
    stop = scored.model.generation_config.eos_token_id
    new: list[int] = []
    with torch.no_grad():
        for _ in range(steps):
            token = scored.model(**inputs, use_cache=False).logits[0, -1].argmax()
            new.append(int(token))
            if new[-1] == stop:
                break
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token[None, None]], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return str(scored.tokenizer.decode(new, skip_special_tokens=True)).strip()


# --------------------------------------------------------------------------------------------------------------------
# Generation and controls
# --------------------------------------------------------------------------------------------------------------------
def test_an_answer_is_the_teacher_forced_argmax(vlm: Scored, items: list[ImageItem]) -> None:
    prompts = [vlm.render(user_turn(item.question, 1)) for item in items]
    written = generate(vlm, prompts, [item.images for item in items], 5)  # one batch, prompts of four lengths
    plain = [plain_argmax(vlm, text, item.images, 5) for text, item in zip(prompts, items, strict=True)]
    assert written == plain
    assert len(set(written)) > 1
    exchanged = [plain_argmax(vlm, text, items[i - 1].images, 5) for i, text in enumerate(prompts)]
    assert written != exchanged


def habits(token: int) -> dict[str, Any]:
    """Every field of a generation config that moves answers which begin with `token`."""
    return {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "encoder_repetition_penalty": 5.0,
        "suppress_tokens": [token],
        "begin_suppress_tokens": [token],
        "bad_words_ids": [[token]],
        "min_length": 40,
        "min_new_tokens": 6,
        "sequence_bias": [[[token], -100.0]],
        "forced_bos_token_id": 5,
        "forced_eos_token_id": 5,
        "exponential_decay_length_penalty": (1, 5.0),
        "num_beams": 3,
        "do_sample": True,
        "top_k": 5,
        "eos_token_id": None,
    }


def test_of_a_generation_config_only_the_stops_count(vlm: Scored, items: list[ImageItem]) -> None:
    """Two models with the same weights give the same answers, whatever their generation configs say."""
    prompts, images = [vlm.render(user_turn(item.question, 1)) for item in items], [item.images for item in items]
    plain = generate(vlm, prompts, images, 6)
    (first,) = write_answers(vlm, prompts[:1], images[:1], max_new_tokens=1)
    config = vlm.model.generation_config
    for name, value in habits(first.ids[0]).items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(config, name, value)
            assert generate(vlm, prompts, images, 6) == plain, name
            assert vlm.model.generation_config is config and getattr(config, name) == value
    with pytest.MonkeyPatch.context() as patch:  # control: a stop does count
        patch.setattr(config, "eos_token_id", [first.ids[0]])
        assert generate(vlm, prompts, images, 6) != plain


def test_the_generation_config_comes_back_after_an_error(vlm: Scored) -> None:
    own = vlm.model.generation_config
    with pytest.raises(RuntimeError, match="out of memory"), plain_generation(vlm.model):
        assert vlm.model.generation_config is not own
        raise RuntimeError("out of memory")
    assert vlm.model.generation_config is own


def test_the_controls_change_the_pixels_that_the_model_gets_and_nothing_else(
    vlm: Scored, items: list[ImageItem], tmp_path: Path, inputs_of: Callable[[torch.nn.Module], list[dict[str, Any]]]
) -> None:
    # `generate` may encode the images before it calls the model: the pixels are seen where the vision tower gets them
    calls, towers = inputs_of(vlm.model), inputs_of(vlm.model.model.vision_model)
    given: dict[str, list[torch.Tensor]] = {}
    texts: dict[str, list[torch.Tensor]] = {}
    for name, images in conditions(items, ("grey", "shuffled"), 0).items():
        calls.clear()
        towers.clear()
        answers(vlm, task(max_new_tokens=1), items, images, ItemCache(tmp_path / f"{name}.jsonl", {}), batch_size=1)
        given[name] = [call["pixel_values"] for call in towers]
        assert len(given[name]) == len(items)
        texts[name] = [call["input_ids"] for call in calls]
    assert all(torch.equal(a, b) for name in ("grey", "shuffled") for a, b in zip(texts["own"], texts[name], strict=True))  # fmt: skip
    for index, pixels in enumerate(given["grey"]):
        assert pixels.unique().numel() == 1
        assert not torch.equal(pixels, given["own"][index])
    other = other_item(items, 0)
    assert sorted(other) == list(range(len(items)))
    for index, pixels in enumerate(given["shuffled"]):
        assert torch.equal(pixels, given["own"][other[index]])
        assert not torch.equal(pixels, given["own"][index])


def test_a_blind_model_scores_the_same_under_its_controls_and_a_seeing_one_does_not(
    vlm: Scored, blind: Scored, items: list[ImageItem], tmp_path: Path
) -> None:
    for scored in (vlm, blind):
        given = ask(scored, items, tmp_path / scored.name)
        # Half of what it says of its own images is accepted, so that its score is neither 0 nor 1
        marked = [
            ImageItem(item.key, item.images, item.question, (given["own"][item.key] if index < 2 else "neither",))
            for index, item in enumerate(items)
        ]
        scores = {name: score_answers(task(), marked, found) for name, found in given.items()}
        assert [value for value, _ in scores["own"].values()] == [1.0, 1.0, 0.0, 0.0]
        for control in ("grey", "shuffled"):
            assert (scores[control] == scores["own"]) == (scored is blind)
            assert (given[control] == given["own"]) == (scored is blind)


def test_only_the_controls_asked_for_are_made(items: list[ImageItem]) -> None:
    assert list(conditions(items, (), 0)) == ["own"]
    assert list(conditions(items, ("shuffled",), 0)) == ["own", "shuffled"]


def test_an_answered_item_is_not_asked_again(
    vlm: Scored, items: list[ImageItem], tmp_path: Path, inputs_of: Callable[[torch.nn.Module], list[dict[str, Any]]]
) -> None:
    images = [item.images for item in items]
    whole = answers(vlm, task(), items, images, ItemCache(tmp_path / "whole.jsonl", {}), batch_size=2)
    store = ItemCache(tmp_path / "part.jsonl", {})
    answers(vlm, task(), items[:3], images[:3], store, batch_size=2)
    calls = inputs_of(vlm.model)
    assert answers(vlm, task(), items, images, ItemCache(tmp_path / "part.jsonl", {}), batch_size=2) == whole
    prompts = [call["input_ids"] for call in calls if call["input_ids"].size(1) > 1]
    assert [len(ids) for ids in prompts] == [1]  # the fourth item alone
    calls.clear()
    answers(vlm, task(), items, images, ItemCache(tmp_path / "part.jsonl", {}), batch_size=2)
    assert calls == []


def test_the_prompt_holds_suffix_and_lettered_choices(
    vlm: Scored, items: list[ImageItem], tmp_path: Path, inputs_of: Callable[[torch.nn.Module], list[dict[str, Any]]]
) -> None:
    item = ImageItem("0", items[0].images, "what shape?", ("circle",), ("circle", "triangle"))
    assert question(item) == "what shape?\nA. circle\nB. triangle"
    assert question(items[0]) == items[0].question
    calls = inputs_of(vlm.model)
    answers(vlm, task(suffix=" one word."), [item], [item.images], ItemCache(tmp_path / "x.jsonl", {}))
    prompt = vlm.tokenizer.decode(calls[0]["input_ids"][0])
    assert "what shape?\nA. circle\nB. triangle one word.<|im_end|>" in prompt


@pytest.mark.parametrize(
    ("metric", "accepted", "expected"),
    [
        ("exact_match", ("a red circle",), 1.0),
        ("anls", ("a red circles",), 1 - 1 / 13),
        ("relaxed_accuracy", ("a blue circle",), 0.0),
        ("vqa_accuracy", ("red circle",), 1.0),
        ("multiple_choice", ("B",), 1.0),
    ],
)
def test_every_metric_of_a_suite_scores_items(metric: str, accepted: tuple[str, ...], expected: float) -> None:
    choices = {"choices": "choices"} if metric == "multiple_choice" else {}
    item = ImageItem("k", (), "?", accepted, ("a blue circle", "a red circle") if choices else ())
    found = score_answers(task(metric=metric, **choices), [item], {"k": "a red circle"})
    assert found == {"k": (pytest.approx(expected), 1.0)}


# --------------------------------------------------------------------------------------------------------------------
# Items
# --------------------------------------------------------------------------------------------------------------------
def test_every_shift_is_a_permutation_without_a_fixed_point(items: list[ImageItem]) -> None:
    many = items * 3
    permutations = [other_item(many, 7, shift) for shift in range(1, len(many))]
    for found in permutations:
        assert sorted(found) == list(range(len(many)))
        assert all(other != index for index, other in enumerate(found))
    # and two of them agree nowhere
    assert all(len({found[index] for found in permutations}) == len(many) - 1 for index in range(len(many)))
    assert other_item(many, 7) == permutations[0] != other_item(many, 8)
    with pytest.raises(ValueError, match=r"^Exchanging images needs at least 2 items; got 1\.$"):
        other_item(items[:1], 0)


def test_grey_is_even_and_of_the_same_size() -> None:
    found = grey(PILImage.new("RGB", (7, 5), "red"))
    assert (found.size, found.getcolors()) == ((7, 5), [(35, (127, 127, 127))])


FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answer": datasets.List(datasets.Value("string")),
        "choices": datasets.List(datasets.Value("string")),
        "index": datasets.Value("int64"),
    }
)


@pytest.fixture
def rows() -> datasets.Dataset:
    names = list(COLORS)
    found = [
        {"image": even(name), "question": "what?", "answer": [name, SHAPES[name]], "choices": names, "index": index}
        for index, name in enumerate(names)
    ]
    return datasets.Dataset.from_list(found, features=FEATURES)


@pytest.mark.parametrize("kind", ["parquet", "saved", "saved with splits"])
def test_items_come_from_any_kind_of_dataset(kind: str, rows: datasets.Dataset, tmp_path: Path) -> None:
    data: dict[str, Any] = {"path": str(tmp_path / "data")}
    if kind == "parquet":
        rows.to_parquet(tmp_path / "data.parquet")
        data = {"path": "parquet", "data_files": str(tmp_path / "data.parquet")}
    elif kind == "saved":
        rows.save_to_disk(tmp_path / "data")
    else:
        datasets.DatasetDict({"train": rows.select([0]), "test": rows}).save_to_disk(tmp_path / "data")
    found = image_items(VisionTask(name="t", **data), seed=0)
    assert [item.answers for item in found] == [(name, text) for name, text in SHAPES.items()]
    assert [item.images[0].getpixel((0, 0)) for item in found] == list(COLORS.values())
    assert [item.key for item in found] == ["0", "1", "2", "3"]
    drawn = [item.key for item in image_items(VisionTask(name="t", n=2, **data), seed=0)]
    assert len(drawn) == 2 and drawn == sorted(drawn)
    assert drawn == [item.key for item in image_items(VisionTask(name="t", n=2, **data), seed=0)]


def test_an_answer_by_index_is_the_choice_at_that_index(rows: datasets.Dataset, tmp_path: Path) -> None:
    rows.save_to_disk(tmp_path / "data")
    settings: dict[str, Any] = {"answer": "index", "choices": "choices", "metric": "multiple_choice"}
    found = image_items(VisionTask(name="t", path=str(tmp_path / "data"), **settings), seed=0)
    assert [item.answers for item in found] == [(name,) for name in COLORS]
    right = score_answers(task(metric="multiple_choice", choices="choices"), found, dict(zip("0123", COLORS, strict=True)))  # fmt: skip
    assert all(score == (1.0, 1.0) for score in right.values())


def test_what_is_wrong_with_a_dataset_is_said_by_task(rows: datasets.Dataset, tmp_path: Path) -> None:
    rows.save_to_disk(tmp_path / "data")
    path = str(tmp_path / "data")
    with pytest.raises(ValueError) as raised:
        image_items(VisionTask(name="t", path=path, question="query"), seed=0)
    assert str(raised.value) == (
        f"Task 't': {path} has no column 'query', found image, question, answer, choices, index. Name the columns in the suite."
    )
    with pytest.raises(ValueError) as raised:
        image_items(VisionTask(name="t", path=path, n=5), seed=0)
    assert str(raised.value) == "Task 't' asks for 5 items, the data has 4 usable ones: lower n."
    with pytest.raises(ValueError, match=r"^Task 't', item 0: expected an image; an image cannot be read \(.+Repair or drop"):  # fmt: skip
        image_items(VisionTask(name="t", path=path, image="question"), seed=0)
    for builtin in (VisionTask(name="t", builtin="nope"), GroundedTask(name="t", builtin="nope")):
        with pytest.raises(
            ValueError,
            match=r"^Task 't': built-in 'nope' is unknown; expected one of drawn_colors, drawn_yes_no, easy",
        ):
            image_items(builtin, seed=0)
    with pytest.raises(ValueError, match=r"^Task 't': built-in text 'nope' is unknown; expected one of xsum, imdb, "):
        text_items(TextTask(name="t", builtin="nope"), seed=0)


def test_texts_are_cut_and_short_ones_left_out(tmp_path: Path) -> None:
    texts = ["too short", "w " * 30, "word " * 300]
    datasets.Dataset.from_dict({"text": texts}).to_json(tmp_path / "texts.jsonl")
    found = text_items(TextTask(name="t", path="json", data_files=str(tmp_path / "texts.jsonl")), seed=0)
    assert {key: len(text.split()) for key, text in found.items()} == {"1": 30, "2": 120}
    # A script without spaces has no words, and says so before a model is loaded
    datasets.Dataset.from_dict({"text": ["\u6d77\u5f88\u6df1\u3002" * 70, "too short"]}).to_json(tmp_path / "zh.jsonl")
    with pytest.raises(ValueError, match=r"Task 't': none of its 2 texts has 20 words, with a space between each"):
        text_items(TextTask(name="t", path="json", data_files=str(tmp_path / "zh.jsonl")), seed=0)
    both = [str(tmp_path / "texts.jsonl")] * 2
    two = text_items(TextTask(name="t", path="json", data_files=both, max_words=20), seed=0)
    assert {key: len(text.split()) for key, text in two.items()} == {"1": 20, "2": 20, "4": 20, "5": 20}


# --------------------------------------------------------------------------------------------------------------------
# Language about an image
# --------------------------------------------------------------------------------------------------------------------
class ColorReader(torch.nn.Module):
    """A model whose dependence on the image is known: a fixed table of bigrams, but after " a" it names the image's color.

    Whatever else it writes is the same for every image. sight: nats in favour of the color's first token; 0 is blind.
    """

    def __init__(self, tokenizer: Any, sight: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.bigrams = torch.randn(len(tokenizer), len(tokenizer), generator=generator)
        self.trigger = tokenizer.convert_tokens_to_ids("Ġa")
        self.words = torch.tensor([tokenizer(f" {name}")["input_ids"][0] for name in COLORS])
        self.palette = torch.tensor(list(COLORS.values())) / 127.5 - 1
        self.sight, self.device = sight, torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, logits_to_keep: int, **_: Any) -> Any:
        logits = self.bigrams[input_ids].clone()  # (B, T, V)
        color = torch.cdist(pixel_values[:, 0].mean(dim=(-1, -2)), self.palette).argmin(dim=1)  # (B,)
        for row, word in enumerate(self.words[color]):
            logits[row, input_ids[row] == self.trigger, word] += self.sight
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def reader(sight: float) -> Scored:
    processor = tiny.make_processor()
    return Scored("reader", "", "vlm", ColorReader(processor.tokenizer, sight), processor, "reader")


def about(**settings: Any) -> GroundedTask:
    return GroundedTask(**{"name": "t", "path": "drawn", "swaps": 2, **settings})


def scores_of(
    scored: Scored, items: list[ImageItem], path: Path, *, swaps: bool = True, **settings: Any
) -> dict[str, dict[str, Any]]:
    store = ItemCache(path, {})
    return token_scores(scored, about(**settings), items, store, seed=0, swaps=swaps, batch_size=3)


def test_exchanging_images_finds_exactly_the_tokens_that_depend_on_them(
    items: list[ImageItem], tmp_path: Path
) -> None:
    scored = reader(sight=6.0)
    records = scores_of(scored, items, tmp_path / "a.jsonl")
    chosen = image_tokens(about(), records)
    for item in items:
        tokens = scored.tokenizer.convert_ids_to_tokens(records[item.key]["ids"])
        assert "".join(tokens).replace("Ġ", " ") == item.answers[0]
        expected = [index > 0 and tokens[index - 1] == "Ġa" for index in range(len(tokens))]
        assert chosen[item.key] == expected
        assert sum(expected) == 1


def test_a_model_that_does_not_look_finds_none_and_says_so(items: list[ImageItem], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        image_tokens(about(), scores_of(reader(sight=0.0), items, tmp_path / "a.jsonl"))
    assert str(raised.value) == (
        "Task 't': exchanging the image moves no token by 0.5 nats, so the reference model does not use its images here. Choose "
        "another --reference, or lower `threshold`."
    )
    # nor does one that looks, where more is asked for than looking is worth
    records = scores_of(reader(sight=6.0), items, tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="moves no token by 100.0 nats"):
        image_tokens(about(threshold=100.0), records)


def test_the_measures_tell_seeing_from_not(items: list[ImageItem], tmp_path: Path) -> None:
    seeing = scores_of(reader(sight=12.0), items, tmp_path / "a.jsonl")
    chosen = image_tokens(about(), seeing)
    split = split_scores(seeing, chosen)
    assert set(split) == {"image_nll", "rest_nll", "image_accuracy"}
    assert list(split["image_accuracy"]["own"].values()) == [(1, 1)] * 4
    # four items of four colors: exchanged, none names its own; grey is nearest to teal
    assert list(split["image_accuracy"]["shuffled"].values()) == [(0, 1)] * 4
    assert list(split["image_accuracy"]["grey"].values()) == [(0, 1)] * 3 + [(1, 1)]
    assert split["rest_nll"]["own"] == split["rest_nll"]["shuffled"] == split["rest_nll"]["grey"]
    assert all(
        own[0] < exchanged[0]
        for own, exchanged in zip(
            split["image_nll"]["own"].values(), split["image_nll"]["shuffled"].values(), strict=True
        )
    )


def test_the_measures_by_hand() -> None:
    records = {
        "a": {condition: [[-1.0, 1], [-2.0, 0], [-4.0, 1]] for condition in ("own", "grey", "shuffled")},
        "b": {condition: [[-8.0, 0]] for condition in ("own", "grey", "shuffled")},
    }
    found = split_scores(records, {"a": [True, True, False], "b": [False]})
    assert found["image_nll"]["own"] == {"a": (3.0, 2), "b": (0, 0)}
    assert found["rest_nll"]["own"] == {"a": (4.0, 1), "b": (8.0, 1)}
    assert found["image_accuracy"]["own"] == {"a": (1, 2), "b": (0, 0)}


def plain_scores(scored: Scored, item: ImageItem, images: Any, ids: list[int]) -> list[list[float]]:
    """The answer's log-probabilities from one full forward without padding."""
    text = scored.render(user_turn(item.question, len(images)))
    inputs = dict(scored.processing(text=[text], images=[list(images)], return_tensors="pt", add_special_tokens=False))
    start = inputs["input_ids"].size(1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = scored.model(**inputs, use_cache=False).logits[0, start - 1 : -1].double()
    log_probs = logits.log_softmax(-1)
    return [[log_probs[i, token].item(), int(logits[i].argmax() == token)] for i, token in enumerate(ids)]


def close(rows: list[list[float]]) -> list[Any]:
    return [[pytest.approx(value, abs=1e-4), hit] for value, hit in rows]  # kept to five digits


def test_answer_scores_are_those_of_a_plain_forward_whatever_the_padding(vlm: Scored, items: list[ImageItem]) -> None:
    ids = [vlm.ids(item.answers[0]) for item in items]
    prompts = [vlm.render(user_turn(item.question, 1)) for item in items]
    assert len({len(row) for row in ids}) > 2 and len({len(vlm.ids(prompt)) for prompt in prompts}) > 2
    found = answer_scores(vlm, prompts, [item.images for item in items], ids)
    for item, row, scores in zip(items, ids, found, strict=True):
        assert scores == close(plain_scores(vlm, item, item.images, row))
        assert scores != close(plain_scores(vlm, item, [grey(image) for image in item.images], row))


@pytest.mark.parametrize("model_type", ["paligemma", "as if it were another"])
def test_a_prefix_lm_does_not_see_the_answer_that_it_scores(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exchanging the last token must not move the scores of those before it; with the types of other families it does."""
    family = build_family("paligemma")
    batch = family.make_inputs("right", seed=0)
    start = int((batch["labels"][0] != -100).nonzero()[0])
    inputs = {name: batch[name][:1, :start] for name in ("input_ids", "attention_mask", "token_type_ids")}
    inputs["pixel_values"] = batch["pixel_values"][:1]
    assert not inputs["token_type_ids"].any()
    model = family.fresh_student()
    monkeypatch.setattr(model.config, "model_type", model_type)
    scored: Any = SimpleNamespace(model=model, with_images=lambda *_: dict(inputs))
    answer = batch["labels"][0, start : start + 5].tolist()
    first, second = (
        answer_scores(scored, [""], [()], [ids])[0] for ids in (answer, [*answer[:-1], (answer[-1] + 1) % 100])
    )
    assert first[-1] != second[-1]
    assert (first[:-1] == second[:-1]) == (model_type == "paligemma")


def test_an_answer_may_hold_no_token(vlm: Scored, items: list[ImageItem]) -> None:
    prompts = [vlm.render(user_turn(item.question, 1)) for item in items[:2]]
    images = [item.images for item in items[:2]]
    ids = [vlm.ids("a red circle"), []]
    found = answer_scores(vlm, prompts, images, ids)
    assert found[0] == close(plain_scores(vlm, items[0], items[0].images, ids[0]))
    assert found[1] == []
    assert answer_scores(vlm, prompts, images, [[], []]) == [[], []]


def test_items_may_hold_different_numbers_of_images(vlm: Scored, items: list[ImageItem], tmp_path: Path) -> None:
    two = ImageItem("two", (even("red"), even("blue")), "what?", ("a red circle",))
    mixed = [two, *items[1:3]]
    records = scores_of(vlm, mixed, tmp_path / "a.jsonl")
    other = mixed[other_item(mixed, 0)[0]]
    assert len(other.images) == 1
    assert records["two"]["own"] == close(plain_scores(vlm, two, two.images, records["two"]["ids"]))
    assert records["two"]["shuffled"] == close(plain_scores(vlm, two, other.images, records["two"]["ids"]))


def test_answers_are_cut_and_scored_under_every_condition(vlm: Scored, items: list[ImageItem], tmp_path: Path) -> None:
    records = scores_of(vlm, items, tmp_path / "a.jsonl", max_answer_tokens=4)
    other = other_item(items, 0)
    swaps = [other_item(items, 0, 2), other_item(items, 0, 3)]
    for index, item in enumerate(items):
        record = records[item.key]
        assert record["ids"] == vlm.ids(item.answers[0])[:4]
        for condition, images in (
            ("own", item.images),
            ("shuffled", items[other[index]].images),
            ("grey", [grey(item.images[0])]),
        ):
            assert record[condition] == close(plain_scores(vlm, item, images, record["ids"]))
        for column, swap in zip(record["swaps"], swaps, strict=True):
            plain = plain_scores(vlm, item, items[swap[index]].images, record["ids"])
            assert column == [pytest.approx(value, abs=1e-4) for value, _ in plain]


def test_a_model_scored_before_it_became_the_reference_is_asked_again(
    vlm: Scored, items: list[ImageItem], tmp_path: Path, inputs_of: Callable[[torch.nn.Module], list[dict[str, Any]]]
) -> None:
    path = tmp_path / "a.jsonl"
    plain = scores_of(vlm, items, path, swaps=False)
    assert all("swaps" not in record for record in plain.values())
    calls = inputs_of(vlm.model)
    assert scores_of(vlm, items, path, swaps=False) == plain
    assert calls == []
    full = scores_of(vlm, items, path)
    assert all(len(record["swaps"]) == 2 for record in full.values())
    assert len(calls) == 2 * 5  # two batches; own, exchanged, grey and two swaps
    calls.clear()
    assert scores_of(vlm, items, path) == full
    assert scores_of(vlm, items, path, swaps=False) == full
    assert calls == []


def test_the_win_rate_counts_ties_by_half() -> None:
    def record(*log_probs: float) -> dict[str, Any]:
        return {"own": [[value, 0] for value in log_probs]}

    mine = {"a": record(-1.0, -1.0), "b": record(-3.0), "c": record(-2.0, -2.0)}
    theirs = {"a": record(-3.0), "b": record(-1.0, -1.0), "c": record(-4.0)}
    assert wins(mine, theirs) == {"a": (1.0, 1.0), "b": (0.0, 1.0), "c": (0.5, 1.0)}
    assert wins(theirs, mine) == {"a": (0.0, 1.0), "b": (1.0, 1.0), "c": (0.5, 1.0)}
    assert all(share == (0.5, 1.0) for share in wins(mine, mine).values())


def test_metrics_are_found_beside_the_package() -> None:
    assert sorted(
        path.name for path in vision.METRICS.iterdir() if path.is_dir() and not path.name.startswith("_")
    ) == [
        "anls",
        "exact_match",
        "multiple_choice",
        "relaxed_accuracy",
        "vqa_accuracy",
    ]

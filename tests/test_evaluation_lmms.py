"""lmms-eval as a back end. Most of these need it installed; what they score is drawn on the spot."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_lingudistill.labs.evaluation import Suite, evaluate_models, lmms
from hf_lingudistill.labs.evaluation.cache import ItemCache
from hf_lingudistill.labs.evaluation.data import ImageItem, grey
from hf_lingudistill.labs.evaluation.models import Scored, load_scored, user_turn
from hf_lingudistill.labs.evaluation.suite import GroundedTask, HarnessTasks, VisionTask
from hf_lingudistill.labs.evaluation.vision import answers, score_answers

needs_lmms_eval = pytest.mark.skipif(bool(lmms.MISSING), reason=f"lmms-eval cannot be imported: {lmms.MISSING}")

LENGTH = 6  # new tokens of an answer
FEATURES = Features(
    {
        "image": Image(),
        "question": Value("string"),
        "answer": Value("string"),
        "choices": List(Value("string")),
        "category": Value("string"),
        "question_id": Value("string"),
    }
)


@pytest.fixture(scope="module")
def vlm(saved_pair: tuple[Path, Path]) -> Scored:
    return load_scored("vlm", str(saved_pair[0]), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def items() -> list[ImageItem]:
    """Seven drawings and questions of several lengths."""
    found = []
    for index in range(7):
        image = PILImage.new("RGB", (32, 32), ("white", "black")[index % 2])
        box = (2 + index, 3, 20 + index, 25)
        draw = ImageDraw.Draw(image)
        colour = ("red", "lime", "blue", "orange")[index % 4]
        (draw.ellipse if index % 3 else draw.rectangle)(box, fill=colour)
        found.append(ImageItem(str(index), (image,), "what is in the image?" + " tell me." * (index % 3), ()))
    return found


@pytest.fixture(scope="module")
def own_answers(vlm: Scored, items: list[ImageItem], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the package's own vision task gives on the same items."""
    task = VisionTask(name="shapes", path="drawn", max_new_tokens=LENGTH)
    store = ItemCache(tmp_path_factory.mktemp("cache") / "own.jsonl", {})
    return answers(vlm, task, items, [item.images for item in items], store, batch_size=3)


@pytest.fixture(scope="module")
def marked(items: list[ImageItem], own_answers: dict[str, str]) -> list[ImageItem]:
    """The items with answers of which the model gives every second one."""
    accepted = [own_answers[item.key] if index % 2 else "no such answer" for index, item in enumerate(items)]
    return [
        ImageItem(item.key, item.images, item.question, (answer,))
        for item, answer in zip(items, accepted, strict=True)
    ]


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval waits two seconds between five attempts."""
    if not lmms.MISSING:
        from lmms_eval.api.task import ConfigurableTask

        for method in (ConfigurableTask.download, ConfigurableTask.process_results):
            monkeypatch.setattr(method.retry, "sleep", lambda seconds: None)


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[..., str]:
    """Write a task of lmms-eval (`write_task(rows, name, **settings)`) with its data. -> the path of its YAML file."""

    def write(rows: list[dict[str, Any]], name: str = "shapes", **settings: Any) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        empty = {"image": None, "answer": "", "choices": [], "category": "", "question_id": ""}
        Dataset.from_list([empty | row for row in rows], features=FEATURES).to_parquet(folder / "test.parquet")
        task = {
            "task": name,
            "dataset_path": "parquet",
            "dataset_kwargs": {"data_files": {"test": str(folder / "test.parquet")}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_visual": "image",
            "doc_to_text": "question",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            **settings,
        }
        if "generate" in task["output_type"]:
            task.setdefault("generation_kwargs", {"max_new_tokens": LENGTH})
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(task), encoding="utf-8")
        return str(file)

    return write


def rows_of(items: list[ImageItem]) -> list[dict[str, Any]]:
    return [{"image": item.images[0], "question": item.question, "answer": item.answers[0]} for item in items]


def scores(vlm: Scored, task: str, **settings: Any) -> dict[str, dict[str, Any]]:
    cache_folder = settings.pop("cache_folder", None)
    return lmms.lmms_scores(
        vlm, HarnessTasks(tasks=(task,), **settings), seed=0, batch_size=3, cache_folder=cache_folder
    )


# --------------------------------------------------------------------------------------------------------------------
# Without lmms-eval
# --------------------------------------------------------------------------------------------------------------------
def test_without_lmms_eval_the_error_says_what_to_install(vlm: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lmms_eval", "lmms_eval.api.instance"):
        monkeypatch.setitem(sys.modules, module, None)  # what makes Python say that there is none
    spec = importlib.util.spec_from_file_location("hf_lingudistill.labs.evaluation.lmms_afresh", lmms.__file__)
    assert spec is not None and spec.loader is not None
    afresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(afresh)
    sentence = (
        r"^lmms-eval cannot be imported \(.*lmms_eval.*\); run `pip install --no-deps 'lmms-eval>=0\.7\.3' .*`\.$"
    )
    with pytest.raises(ModuleNotFoundError, match=sentence):
        afresh.lmms_scores(vlm, HarnessTasks(tasks=("docvqa_val",)), seed=0, batch_size=1)
    with pytest.raises(ModuleNotFoundError, match=sentence):  # before a model is loaded, too
        afresh.find_tasks(["docvqa_val"])


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("what is it?", 1, ["image", "what is it?"]),
        ("is <image> like <image>?", 2, ["is ", "image", " like ", "image", "?"]),
        ("<image>what is it?", 1, ["image", "what is it?"]),
        ("is <image> like it?", 2, ["image", "image", "is  like it?"]),  # said too seldom: where, is anyone's guess
    ],
)
def test_images_stand_where_the_text_says(text: str, images: int, expected: list[str]) -> None:
    (turn,) = lmms._turn(text, images)
    assert turn["role"] == "user"
    assert [part.get("text", part["type"]) for part in turn["content"]] == expected


def test_a_turn_without_images_is_plain_text() -> None:
    assert lmms._turn("what <image> is it?", 0) == user_turn("what  is it?")


def test_an_answer_ends_at_its_tasks_stop_string_but_not_at_a_blank_line() -> None:
    assert lmms._cut("yes\n\nbecause Q: why", ["\n\n", "Q:"]) == "yes\n\nbecause"
    assert lmms._cut("yes. no", ".") == "yes"
    assert lmms._cut("yes", None) == "yes"


def test_a_metric_that_every_item_has_comes_first_else_each_has_its_own_items() -> None:
    samples = [
        {"doc_id": 0, "a": {"score": 1.0}, "all": {"score": 1}},
        {"doc_id": 1, "b": {"score": 0.0}, "all": {"score": 0}},
        {"doc_id": 1, "b": {"score": 1.0}, "all": {"score": 1}},  # of a second filter
    ]
    found = lmms.task_scores("t", samples, {"a": True, "b": False, "all": None})
    assert found == {
        "t": {"items": {"0": (1.0, 1.0), "1": (0.0, 1.0)}, "metric": "all", "higher_is_better": True, "title": "t"}
    }
    found = lmms.task_scores("t", samples, {"a": True, "b": False})
    assert {name: entry["items"] for name, entry in found.items()} == {
        "t/a": {"0": (1.0, 1.0)},
        "t/b": {"1": (0.0, 1.0)},
    }
    assert [entry["higher_is_better"] for entry in found.values()] == [True, False]


def test_metrics_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"metrics of t \(submission\) are not numbers per item.*leave this task out\.$"
    ):
        lmms.task_scores("t", [{"doc_id": 0, "submission": {"answer": "yes"}}], {"submission": True})


# --------------------------------------------------------------------------------------------------------------------
# With lmms-eval
# --------------------------------------------------------------------------------------------------------------------
@needs_lmms_eval
def test_scores_are_those_of_our_own_answers_on_the_same_items(
    vlm: Scored, marked: list[ImageItem], own_answers: dict[str, str], write_task: Callable[..., str]
) -> None:
    expected = score_answers(VisionTask(name="shapes", path="drawn"), marked, own_answers)
    assert {value for value, _ in expected.values()} == {0.0, 1.0}

    (entry,) = scores(vlm, write_task(rows_of(marked))).values()
    assert entry["items"] == expected
    assert (entry["metric"], entry["higher_is_better"], entry["title"]) == ("exact_match", True, "shapes")

    # Control: the same questions about grey images get other answers.
    blank = [ImageItem(i.key, (grey(i.images[0]),), i.question, i.answers) for i in marked]
    (entry,) = scores(vlm, write_task(rows_of(blank), "blank")).values()
    assert entry["items"] != expected


@needs_lmms_eval
def test_a_limit_takes_the_first_items(vlm: Scored, marked: list[ImageItem], write_task: Callable[..., str]) -> None:
    (entry,) = scores(vlm, write_task(rows_of(marked)), limit=3).values()
    assert sorted(entry["items"]) == ["0", "1", "2"]


@needs_lmms_eval
def test_items_with_and_without_an_image_may_share_a_batch(
    vlm: Scored, marked: list[ImageItem], own_answers: dict[str, str], write_task: Callable[..., str], tmp_path: Path
) -> None:
    rows = rows_of(marked)
    text_only = VisionTask(name="text", path="drawn", max_new_tokens=LENGTH)
    bare = [ImageItem("0", (), marked[0].question, ())]
    answer = answers(vlm, text_only, bare, [()], ItemCache(tmp_path / "text.jsonl", {}))["0"]
    assert answer != own_answers["0"]
    rows[0] |= {"image": None, "answer": answer}
    file = Path(write_task(rows, "mixed"))
    (file.parent / "utils.py").write_text("def images(doc):\n    return [doc['image']] if doc['image'] else []\n")
    text = file.read_text(encoding="utf-8").replace("doc_to_visual: image", "doc_to_visual: !function utils.images")
    file.write_text(text, encoding="utf-8")
    (entry,) = scores(vlm, str(file)).values()
    assert entry["items"] == {str(index): (float(index % 2 or index == 0), 1.0) for index in range(len(rows))}


@needs_lmms_eval
def test_a_group_stands_for_its_tasks(
    vlm: Scored, marked: list[ImageItem], write_task: Callable[..., str], tmp_path: Path
) -> None:
    for name in ("first", "second"):
        write_task(rows_of(marked), name)
    group = {"group": "both", "task": ["first", "second"], "aggregate_metric_list": [{"metric": "exact_match"}]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    found = scores(vlm, str(tmp_path / "both.yaml"), limit=2)
    assert {name: len(entry["items"]) for name, entry in found.items()} == {"first": 2, "second": 2}


@needs_lmms_eval
def test_another_family_answers_the_same_in_a_batch_as_alone(items: list[ImageItem]) -> None:
    """LLaVA, with no, one and two images."""
    llava = tiny_llava()
    documents = [{"images": [item.images[0]] * (index % 3)} for index, item in enumerate(items)]
    requests = [_request(item.question, {"max_new_tokens": LENGTH}, index) for index, item in enumerate(items)]

    def written(batch_size: int) -> list[str]:
        model = lmms.ImagePath(llava, batch_size=batch_size)
        model.task_dict = {"drawn": {"test": documents}}
        return model.generate_until(requests)

    together = written(4)
    assert together == written(1)
    for document in documents:  # control: without the images the answers are others
        document["images"] = [grey(image) for image in document["images"]]
    assert together != written(1)


def tiny_llava() -> Scored:
    tokenizer = tiny.make_tokenizer(extra=True)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny.CHATML,
    )
    config = LlavaConfig(
        text_config=tiny.text_config(len(tokenizer), tie_word_embeddings=False),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config).eval()
    tiny.scale_up(model, 1.5)
    return Scored("llava", "llava", "vlm", model, processor, "llava")


@needs_lmms_eval
def test_multiple_choice_takes_the_choice_of_the_least_loss(
    vlm: Scored, items: list[ImageItem], write_task: Callable[..., str]
) -> None:
    choices = ["a small red circle", "the sea", "a blue triangle"]

    def loss(item: ImageItem, choice: str) -> float:
        """By the plain formula: one row at a time, the whole text through the processor."""
        prompt = vlm.render(user_turn(item.question, 1))
        inputs = vlm.with_images([prompt + choice], [item.images])
        start = vlm.with_images([prompt], [item.images])["input_ids"].shape[1]
        labels = inputs["input_ids"].clone()
        labels[:, :start] = -100
        with torch.no_grad():
            return float(vlm.model(**inputs, labels=labels).loss)

    losses = [[loss(item, choice) for choice in choices] for item in items]
    best = [choices[row.index(min(row))] for row in losses]
    others = [choice if index % 2 else next(c for c in choices if c != choice) for index, choice in enumerate(best)]
    rows = [
        {"image": item.images[0], "question": item.question, "answer": answer, "choices": choices}
        for item, answer in zip(items, others, strict=True)
    ]
    task = write_task(
        rows,
        "choices",
        output_type="multiple_choice",
        doc_to_choice="choices",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    (entry,) = scores(vlm, task).values()
    assert entry["items"] == {str(index): (float(index % 2), 1.0) for index in range(len(items))}

    model = lmms.ImagePath(vlm, batch_size=4)
    model.task_dict = {"drawn": {"test": [{"images": item.images} for item in items]}}
    requests = [
        _request(item.question, f" {choice}", index, idx)
        for index, item in enumerate(items)
        for idx, choice in enumerate(choices)
    ]
    given = [result.text for result in model.loglikelihood(requests)]
    assert [value for value, _ in given] == pytest.approx(sum(losses, []), abs=1e-4)


def _request(text: str, wanted: str | dict[str, int], index: int, idx: int = 0) -> Any:
    """A request about a document; wanted: a continuation to score, or the settings to generate with."""
    from lmms_eval.api.instance import Instance

    return Instance(
        request_type="loglikelihood" if isinstance(wanted, str) else "generate_until",
        arguments=(text, wanted, lambda document: document["images"], index, "drawn", "test"),
        idx=idx,
        metadata={"task": "drawn", "doc_id": index, "repeats": 1},
    )


@needs_lmms_eval
def test_a_killed_run_goes_on_and_a_rerun_asks_the_model_nothing(
    vlm: Scored,
    marked: list[ImageItem],
    write_task: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, folder = write_task(rows_of(marked)), tmp_path / "items"
    generate, asked = lmms.generate, []

    def until_killed(scored: Scored, prompts: Sequence[str], *arguments: Any) -> list[str]:
        asked.extend(prompts)
        if len(asked) > until:
            raise KeyboardInterrupt
        return generate(scored, prompts, *arguments)

    monkeypatch.setattr(lmms, "generate", until_killed)
    until = 3  # one batch
    with pytest.raises(KeyboardInterrupt):
        scores(vlm, task, cache_folder=folder)
    until, asked = 100, []
    found = scores(vlm, task, cache_folder=folder)
    assert len(asked) == len(marked) - 3
    assert found == scores(vlm, task)

    until, asked = 0, []
    assert scores(vlm, task, cache_folder=folder) == found
    assert asked == []

    # Control: with one image changed, the answers kept are of no use.
    rows = rows_of(marked)
    rows[3]["image"] = grey(rows[3]["image"])
    with pytest.raises(KeyboardInterrupt):
        scores(vlm, write_task(rows), cache_folder=folder)


@needs_lmms_eval
@pytest.mark.parametrize(
    ("suite", "fields", "expected"),
    [
        ("mme/mme", {"category": ["existence", "text_translation"]}, {"perception": 4, "cognition": 3}),
        (
            "mmstar/mmstar",
            {"category": ["math", "logical reasoning"], "l2_category": ["geometry"], "index": [0]},
            {"average": 7},
        ),
        ("ocrbench/ocrbench", {"dataset": ["x"], "question_type": ["Doc-oriented VQA"]}, {"ocrbench_accuracy": 7}),
        ("docvqa/docvqa_val", {"questionId": [0]}, {"anls": 7}),
    ],
)
def test_public_suites_give_a_number_per_item(
    vlm: Scored,
    marked: list[ImageItem],
    tmp_path: Path,
    suite: str,
    fields: dict[str, list[Any]],
    expected: dict[str, int],
) -> None:
    """Their own YAML, prompts and scoring, on drawings. Their own summaries would fail on seven items."""
    import lmms_eval.tasks

    rows = [
        {"image": item.images[0], "question": item.question, "answer": "yes", "answers": [item.answers[0]]}
        | {name: values[index % len(values)] for name, values in fields.items()}
        | {"question_id": str(index)}
        for index, item in enumerate(marked)
    ]
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(tmp_path / "test.parquet")
    public = Path(lmms_eval.tasks.__file__).parent / f"{suite}.yaml"
    split = lmms.load_yaml_config(str(public), mode="simple")["test_split"]
    task = {
        "include": str(public),
        "task": "drawn",
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(tmp_path / "test.parquet")}},
        "generation_kwargs": {"max_new_tokens": LENGTH},
    }
    (tmp_path / "drawn.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    found = scores(vlm, str(tmp_path / "drawn.yaml"))
    assert {len(entry["items"]) for entry in found.values()} == set(expected.values())
    for metric, count in expected.items():
        (entry,) = (entry for entry in found.values() if metric in entry["metric"])
        assert len(entry["items"]) == count
        assert all(0 <= value <= 1 for value, _ in entry["items"].values())


@needs_lmms_eval
def test_data_that_cannot_be_read_is_one_sentence(vlm: Scored, write_task: Callable[..., str]) -> None:
    task = write_task([{"question": "where is it?"}], dataset_path="nobody/nothing", dataset_kwargs={})
    with pytest.raises(
        OSError, match=r"could not read the data of shapes \(.*nobody/nothing.*\)\. The public tasks need the Hub"
    ):
        scores(vlm, task)


@needs_lmms_eval
def test_a_missing_task_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"No lmms-eval task file 'nowhere\.yaml': expected"):
        lmms.find_tasks(["nowhere.yaml"])


@needs_lmms_eval
def test_video_is_refused(vlm: Scored, marked: list[ImageItem], write_task: Callable[..., str]) -> None:
    task = write_task(rows_of(marked), "film", doc_to_visual="question")
    with pytest.raises(ValueError, match="Task 'film' shows a str, this adapter passes images only"):
        scores(vlm, task)


@needs_lmms_eval
@pytest.mark.slow
def test_an_unknown_task_is_refused_with_its_neighbours() -> None:
    """Slow: lmms-eval reads two thousand YAML files to know its tasks."""
    with pytest.raises(ValueError, match=r"no task 'docvqa_vall'; expected one that .*docvqa_val"):
        lmms.find_tasks(["docvqa_vall"])
    assert lmms.find_tasks(["docvqa_val", "mme"])[0] == ["docvqa_val", "mme"]


@needs_lmms_eval
def test_scores_land_in_the_report_with_intervals_and_paired_differences(
    saved_pair: tuple[Path, Path], marked: list[ImageItem], write_task: Callable[..., str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny.make_vlm(5).save_pretrained(other)
    tiny.make_processor().save_pretrained(other)
    task = write_task(rows_of(marked))
    data = str(Path(task).with_name("test.parquet"))
    about = GroundedTask(name="about", path="parquet", data_files={"test": data}, swaps=1, threshold=0.001)
    suite = Suite(name="public", lmms_eval=HarnessTasks(tasks=(task,)), grounded=(about,), resamples=50)
    report = evaluate_models(
        {"original": str(saved_pair[1]), "before": str(saved_pair[0]), "after": str(other)},
        suite,
        tmp_path / "out",
        batch_size=3,
        dtype=torch.float32,
        device="cpu",
        progress=False,
        say=lambda line: None,
    )
    (entry, *_) = report["tasks"]
    assert (entry["name"], entry["group"], entry["n"]) == ("lmms_eval/shapes", "vision", 7)
    assert entry["scores"]["before"]["value"] == pytest.approx(3 / 7)
    assert entry["scores"]["before"]["low"] < 3 / 7 < entry["scores"]["before"]["high"]
    assert "original" not in entry["scores"]  # an LM sees nothing
    (difference,) = entry["differences"]
    assert (difference["of"], difference["minus"], difference["n"]) == ("after", "before", 7)
    assert difference["value"] == pytest.approx(entry["scores"]["after"]["value"] - 3 / 7)
    written = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert written["tasks"][0] == json.loads(json.dumps(entry))

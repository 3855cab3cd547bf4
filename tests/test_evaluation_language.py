"""The text path: a VLM in lm-eval, bits per byte, and the item cache that lets a run go on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, Image
from families import build_family
from PIL import Image as PILImage
from tokenizers.processors import TemplateProcessing
from tokenizers_for_tests import PARTS_TEMPLATE

from hf_lingudistill.folders import NotOurs
from hf_lingudistill.labs.evaluation import language
from hf_lingudistill.labs.evaluation import tasks as local_tasks
from hf_lingudistill.labs.evaluation.cache import SCHEMA, ItemCache
from hf_lingudistill.labs.evaluation.language import TextPath, bits_per_byte, harness_scores, sequence_nll
from hf_lingudistill.labs.evaluation.models import Scored, chat_template_of, load_scored, user_turn
from hf_lingudistill.labs.evaluation.reading import answer_states
from hf_lingudistill.labs.evaluation.suite import HarnessTasks, TextTask
from hf_lingudistill.weights import fingerprint

instances = pytest.importorskip("lm_eval.api.instance", reason="the `eval` extra is not installed")
hflm = pytest.importorskip("lm_eval.models.huggingface", reason="the `eval` extra is not installed").HFLM

TEXTS = {
    "short": "the cat sat on the mat and looked at a small red circle. what shape is in the image? it is blue.",
    "long": "tell me about the sea. " * 9 + "it is deep, wide and full of salt.",
    "unicode": "éclair: naïve “quotes” and 文字 are more bytes than characters; the sea is deep and wide and full of it.",
}


@pytest.fixture(scope="module")
def lm() -> Scored:
    """A plain LM with the VLM's tokenizer, so that the two share a vocabulary."""
    tokenizer = tiny.make_tokenizer(extra=True)
    return Scored("lm", "", "lm", tiny.make_lm(1, vocab_size=len(tokenizer)), tokenizer, "lm")


def holding(lm: Scored) -> Scored:
    """A VLM whose text weights are those of an LM."""
    vlm = tiny.make_vlm(0)
    vlm.get_decoder().load_state_dict(lm.model.get_decoder().state_dict())
    return Scored("vlm", "", "vlm", vlm, tiny.make_processor(), "vlm")


@pytest.fixture(scope="module")
def vlm(lm: Scored) -> Scored:
    return holding(lm)


@pytest.fixture(scope="module")
def other_vlm() -> Scored:
    return Scored("other", "", "vlm", tiny.make_vlm(5), tiny.make_processor(), "other")


def of_the_harness(scored: Scored, **settings: Any) -> Any:
    """lm-eval's own model of the same weights."""
    return hflm(pretrained=scored.model, tokenizer=scored.tokenizer, backend="causal", batch_size=3, **settings)


# --------------------------------------------------------------------------------------------------------------------
# lm-eval
# --------------------------------------------------------------------------------------------------------------------
QUESTIONS = ("what shape is in the image?", "tell me about the sea", "is there a green shape? the cat sat on the mat.")


def contexts(model: Any, chat: bool) -> list[str]:
    """Questions as they are, or as the chat template of an lm-eval model writes them."""
    if not chat:
        return list(QUESTIONS)
    return [model.apply_chat_template([{"role": "user", "content": text}]) for text in QUESTIONS]


def likelihoods(model: Any, chat: bool) -> list[tuple[float, bool]]:
    requests = [
        instances.Instance("loglikelihood", {}, (context, continuation), index)
        for index, context in enumerate(contexts(model, chat))
        for continuation in (" a blue triangle", " yes.", " deep, wide and full of salt")
    ]
    return list(model.loglikelihood(requests, disable_tqdm=True))


def written(model: Any, chat: bool) -> list[str]:
    settings = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    requests = [
        instances.Instance("generate_until", {}, (context, settings), index)
        for index, context in enumerate(contexts(model, chat))
    ]
    return list(model.generate_until(requests, disable_tqdm=True))


def almost(rows: list[tuple[float, bool]]) -> list[tuple[Any, bool]]:
    # fp32: the VLM wraps the same text model in other code, so the last bits may differ
    return [(pytest.approx(value, abs=1e-4), greedy) for value, greedy in rows]


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_the_adapter_gives_the_numbers_of_lm_eval_on_a_plain_lm(lm: Scored, chat: bool) -> None:
    reference = of_the_harness(lm)
    assert likelihoods(TextPath(lm, batch_size=3), chat) == almost(likelihoods(reference, chat))
    assert written(TextPath(lm, batch_size=3), chat) == written(reference, chat)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_and_on_a_vlm_whose_text_weights_are_that_lm(lm: Scored, vlm: Scored, other_vlm: Scored, chat: bool) -> None:
    reference = of_the_harness(lm)
    assert likelihoods(TextPath(vlm, batch_size=2), chat) == almost(likelihoods(reference, chat))
    assert written(TextPath(vlm, batch_size=2), chat) == written(reference, chat)
    # other text weights give other numbers
    assert likelihoods(TextPath(other_vlm, batch_size=2), chat) != almost(likelihoods(reference, chat))
    assert written(TextPath(other_vlm, batch_size=2), chat) != written(reference, chat)


def test_no_habit_of_a_generation_config_changes_what_lm_eval_reads(vlm: Scored) -> None:
    plain = written(TextPath(vlm, batch_size=2), False)
    own = vlm.model.generation_config
    token = vlm.ids(plain[0])[0]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("suppress_tokens", [token]), ("min_new_tokens", 6), ("repetition_penalty", 5.0)):
            patch.setattr(own, name, value)
        assert written(of_the_harness(vlm), False) != plain  # control: lm-eval's own model follows it
        assert written(TextPath(vlm, batch_size=2), False) == plain
    assert vlm.model.generation_config is own


def test_the_chat_template_changes_the_numbers(vlm: Scored) -> None:
    assert likelihoods(TextPath(vlm), True) != almost(likelihoods(TextPath(vlm), False))


def test_rolling_likelihoods_are_those_of_lm_eval_too(lm: Scored, vlm: Scored) -> None:
    requests = [
        instances.Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(TEXTS.values())
    ]
    own = TextPath(vlm, batch_size=2).loglikelihood_rolling(requests, disable_tqdm=True)
    assert own == pytest.approx(of_the_harness(lm).loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-3)


def test_a_template_that_reads_parts_is_given_parts() -> None:
    processor = tiny.make_processor()
    processor.chat_template = processor.tokenizer.chat_template = PARTS_TEMPLATE
    scored = Scored("vlm", "", "vlm", tiny.make_vlm(0), processor, "vlm")
    history = [{"role": "user", "content": "tell me about the sea"}]
    assert TextPath(scored).apply_chat_template(history) == "<|user|>tell me about the sea<eos>"
    # lm-eval's own model hands the template a string, and it writes an empty turn without a word
    assert of_the_harness(scored).apply_chat_template(history) == "<|user|><eos>"


def test_a_conversation_may_end_in_the_assistants_unfinished_turn(lm: Scored, vlm: Scored) -> None:
    history = [{"role": "user", "content": "what shape?"}, {"role": "assistant", "content": "it is a"}]
    unfinished = TextPath(vlm).apply_chat_template(history, add_generation_prompt=False)
    assert unfinished == of_the_harness(lm).apply_chat_template(history, add_generation_prompt=False)
    assert unfinished.endswith("assistant\nit is a")


def test_without_lm_eval_the_adapter_says_what_to_install(lm: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "HFLM", object)
    with pytest.raises(ModuleNotFoundError) as raised:
        TextPath(lm)
    assert (
        str(raised.value) == "lm-eval is not installed; run `pip install -e '.[eval]'` in a clone of hf_lingudistill."
    )


# The harness with a task of its own -------------------------------------------------------------------------------
def _rows(**_: Any) -> DatasetDict:
    rows = [
        {"question": text, "choices": ["a blue triangle", "yes", "deep and wide"], "gold": index % 3}
        for index, text in enumerate([*QUESTIONS, *TEXTS.values()])
    ]
    return DatasetDict({"test": Dataset.from_list(rows)})


@pytest.fixture
def local_task(monkeypatch: pytest.MonkeyPatch) -> str:
    task = local_tasks._task("tiny_local", _rows)
    monkeypatch.setitem(local_tasks.OWN_TASKS, "tiny_local", lambda: task)
    return "tiny_local"


@pytest.fixture
def count_forwards() -> Iterator[Callable[[Scored], list[int]]]:
    """`calls = count_forwards(scored)`: a list that gets one entry, the batch size, a forward call."""
    handles = []

    def count(scored: Scored) -> list[int]:
        calls: list[int] = []

        def note(module: Any, args: Any, kwargs: Any) -> None:
            ids = args[0] if args else kwargs.get("input_ids")
            calls.append(len(ids))

        handles.append(scored.model.register_forward_pre_hook(note, with_kwargs=True))
        return calls

    yield count
    for handle in handles:
        handle.remove()


def test_harness_scores_are_per_item_and_a_rerun_asks_the_model_nothing(
    lm: Scored, vlm: Scored, local_task: str, tmp_path: Path, count_forwards: Callable[[Scored], list[int]]
) -> None:
    calls = count_forwards(vlm)
    tasks = HarnessTasks(tasks=(local_task,), limit=5)

    def run(scored: Scored, tasks: HarnessTasks = tasks) -> dict[str, Any]:
        return harness_scores(scored, tasks, seed=0, batch_size=2, cache_folder=tmp_path)[local_task]

    first = run(vlm)
    assert (first["metric"], first["higher_is_better"], first["title"]) == ("acc_norm", True, "tiny")
    assert list(sorted(first["items"])) == ["0", "1", "2", "3", "4"]
    asked = len(calls)
    assert asked > 0
    assert run(vlm) == first
    assert len(calls) == asked
    # what the harness makes of the plain likelihoods: the choice with the most nats a byte
    texts = [row["question"] for row in _rows()["test"]][:5]
    for index, text in enumerate(texts):
        options = [" a blue triangle", " yes", " deep and wide"]
        context = f"Question: {text}\nAnswer:"
        ids = lm.ids(context)
        nats = [
            -sequence_nll(lm.model, [[*ids, *lm.ids(option)]], [len(ids)])[0] / (len(option) - 1) for option in options
        ]
        right = nats.index(max(nats)) == index % 3
        assert first["items"][str(index)] == (float(right), 1.0)
    # other weights share nothing with it
    assert run(lm)["items"] == first["items"]
    assert len(list(tmp_path.glob("lm_eval-*"))) == 2


def test_the_harness_may_use_the_chat_template(vlm: Scored, local_task: str, tmp_path: Path) -> None:
    plain = HarnessTasks(tasks=(local_task,))
    seen: list[str] = []

    class Recorded(TextPath):
        def loglikelihood(self, requests: Any, **kwargs: Any) -> Any:
            seen.extend(request.args[0] for request in requests)
            return super().loglikelihood(requests, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "TextPath", Recorded)
        for chat in (False, True):
            tasks = HarnessTasks(tasks=plain.tasks, chat_template=chat)
            harness_scores(vlm, tasks, seed=0, batch_size=4, cache_folder=tmp_path / str(chat))
    half = len(seen) // 2
    assert all(text.startswith("Question: ") for text in seen[:half])
    assert all(text.startswith("<|im_start|>user\nQuestion: ") for text in seen[half:])
    assert all(text.endswith("<|im_start|>assistant\n") for text in seen[half:])


def test_scienceqa_is_asked_without_its_images(lm: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The questions that have one would be guessed; a hint comes before the question."""
    rows = [
        {"image": None, "question": QUESTIONS[0], "choices": ["yes", "no"], "answer": 1, "hint": ""},
        {
            "image": PILImage.new("RGB", (4, 4)),
            "question": "which one?",
            "choices": ["a", "b"],
            "answer": 0,
            "hint": "",
        },
        {"image": None, "question": QUESTIONS[1], "choices": ["yes", "no", "deep"], "answer": 2, "hint": "look at it"},
    ]
    data = Dataset.from_list(rows).cast_column("image", Image())
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "test.parquet")
    monkeypatch.setattr(local_tasks, "SCIENCEQA", str(tmp_path / "data"))
    asked: list[str] = []

    class Recorded(TextPath):
        def loglikelihood(self, requests: Any, **kwargs: Any) -> Any:
            asked.extend("".join(request.args) for request in requests)
            return super().loglikelihood(requests, **kwargs)

    monkeypatch.setattr(language, "TextPath", Recorded)
    found = harness_scores(
        lm, HarnessTasks(tasks=("scienceqa_text",)), seed=0, batch_size=4, cache_folder=tmp_path / "cache"
    )["scienceqa_text"]
    assert sorted(asked) == sorted(
        [f"Question: {QUESTIONS[0]}\nAnswer: {choice}" for choice in ("yes", "no")]
        + [f"Context: look at it\nQuestion: {QUESTIONS[1]}\nAnswer: {choice}" for choice in ("yes", "no", "deep")]
    )
    assert found["metric"] == "acc_norm" and len(found["items"]) == 2


@pytest.mark.slow  # lm-eval reads all its task files
def test_a_public_task_without_the_hub_says_so(lm: Scored, tmp_path: Path) -> None:
    with pytest.raises(
        OSError, match=r"^lm-eval could not read the data of arc_easy \(.+`--suite quick` runs without"
    ):
        harness_scores(lm, HarnessTasks(tasks=("arc_easy",), limit=2), seed=0, batch_size=2, cache_folder=tmp_path)


def test_a_metric_that_is_no_number_per_item_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^lm-eval's metrics \['bleu'\] are not means of numbers per item, which"):
        language._metric([{"metrics": ["bleu"], "bleu": ("a", "b")}], {})
    assert language._metric([{"metrics": ["f1", "acc"], "f1": 0.5, "acc": 1}], {}) == "f1"


def test_a_metric_that_is_no_mean_over_items_is_not_reported_as_one() -> None:
    """LAMBADA's `perplexity` is a log-likelihood per item, of which the more is the better."""
    sample = {"metrics": ["perplexity", "acc"], "perplexity": -3.1, "acc": 1.0}
    ways = [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc", "aggregation": "mean"}]
    assert language._metric([sample], {"metric_list": ways}) == language._metric([sample], {}) == "acc"
    with pytest.raises(ValueError, match="are not means"):
        language._metric([{**sample, "metrics": ["perplexity"]}], {"metric_list": ways[:1]})
    # Control: another that is no mean, by its aggregation alone
    assert (
        language._metric(
            [sample],
            {
                "metric_list": [
                    {"metric": "acc", "aggregation": "median"},
                    {"metric": "perplexity", "aggregation": "mean"},
                ]
            },
        )
        == "perplexity"
    )


# --------------------------------------------------------------------------------------------------------------------
# Bits per byte
# --------------------------------------------------------------------------------------------------------------------
def task(**settings: Any) -> TextTask:
    return TextTask(name="t", path="json", head_words=4, **settings)


def score(scored: Scored, form: str, folder: Path, texts: dict[str, str] = TEXTS, batch_size: int = 8) -> Any:
    store = ItemCache(folder / f"{form}-{batch_size}.jsonl", {})
    return bits_per_byte(scored, task(), form, texts, store, batch_size=batch_size)


def oracle(scored: Scored, ids: list[int], start: int) -> float:
    """Bits of the tokens from `start` on, one text at a time, one position at a time, in double precision."""
    with torch.no_grad():
        logits = scored.model(input_ids=torch.tensor([ids])).logits[0].double()
    return -sum(F.log_softmax(logits[i - 1], dim=-1)[ids[i]].item() for i in range(start, len(ids))) / math.log(2)


@pytest.mark.parametrize("which", ["lm", "vlm"])
def test_bits_per_byte_of_plain_text_are_those_of_an_oracle(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    scored = request.getfixturevalue(which)
    found = score(scored, "plain", tmp_path)
    # The first character, é, is two tokens of this byte-level tokenizer: it goes as a whole
    for key, skipped in {"short": 1, "long": 1, "unicode": 2}.items():
        ids = scored.ids(TEXTS[key])
        head = scored.tokenizer.decode(ids[:skipped])
        assert TEXTS[key].startswith(head)
        bits, size = found[key]
        assert bits == pytest.approx(oracle(scored, ids, skipped), rel=1e-5)
        assert size == len(TEXTS[key].removeprefix(head).encode())
        assert bits != pytest.approx(oracle(scored, ids, skipped + 1), rel=1e-5)
    assert "\ufffd" in scored.tokenizer.decode(scored.ids(TEXTS["unicode"])[:1])


def test_chat_form_scores_the_answer_and_nothing_else(vlm: Scored, tmp_path: Path) -> None:
    found = score(vlm, "chat", tmp_path)
    for key, text in TEXTS.items():
        words = text.split(" ")
        head, body = " ".join(words[:4]), " ".join(words[4:])
        prompt = f"<|im_start|>user\nContinue this text: {head}<|im_end|>\n<|im_start|>assistant\n"
        start = len(vlm.ids(prompt))
        bits, size = found[key]
        assert size == len(body.encode())
        assert bits == pytest.approx(oracle(vlm, [*vlm.ids(prompt), *vlm.ids(body)], start), rel=1e-5)
        # with the prompt's tokens it would be another number
        assert bits != pytest.approx(oracle(vlm, [*vlm.ids(prompt), *vlm.ids(body)], 1), rel=1e-2)


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_neither_batch_size_nor_padding_matters(lm: Scored, vlm: Scored, form: str, tmp_path: Path) -> None:
    one, all_at_once = (score(vlm, form, tmp_path, batch_size=size) for size in (1, 3))
    for key in TEXTS:
        assert one[key] == (pytest.approx(all_at_once[key][0], rel=1e-5), all_at_once[key][1])
    assert score(lm, form, tmp_path / "lm") == {key: (pytest.approx(v, rel=1e-5), w) for key, (v, w) in one.items()}


def test_other_text_weights_give_other_bits(vlm: Scored, other_vlm: Scored, tmp_path: Path) -> None:
    one, other = score(vlm, "plain", tmp_path / "a"), score(other_vlm, "plain", tmp_path / "b")
    assert all(one[key][0] != pytest.approx(other[key][0], rel=1e-3) for key in TEXTS)
    assert [one[key][1] for key in TEXTS] == [other[key][1] for key in TEXTS]


def test_a_text_begins_with_bos_where_the_tokenizer_says_so(lm: Scored, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer(extra=True)
    bos = tokenizer.bos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    with_bos = Scored("lm", "", "lm", lm.model, tokenizer, "bos")
    found, without = score(with_bos, "plain", tmp_path / "with"), score(lm, "plain", tmp_path / "without")
    ids = lm.ids(TEXTS["short"])
    assert found["short"][0] == pytest.approx(oracle(lm, [tokenizer.bos_token_id, *ids], 2), rel=1e-5)
    assert found["short"][0] != pytest.approx(without["short"][0], rel=1e-3)
    assert found["short"][1] == without["short"][1]  # the same text is scored


# --------------------------------------------------------------------------------------------------------------------
# The item cache
# --------------------------------------------------------------------------------------------------------------------
class Stopped(Exception):
    """What stands for a killed run."""


def test_an_interrupted_run_goes_on_without_asking_about_what_is_done(
    vlm: Scored, tmp_path: Path, count_forwards: Callable[[Scored], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {str(index): f"{text} {index} and so on" for index, text in enumerate([*TEXTS.values()] * 2)}
    whole = score(vlm, "plain", tmp_path / "whole", texts, batch_size=2)
    calls = count_forwards(vlm)

    def once(*args: Any) -> list[float]:
        if calls:
            raise Stopped
        return sequence_nll(*args)

    with monkeypatch.context() as patch:
        patch.setattr(language, "sequence_nll", once)
        with pytest.raises(Stopped):
            score(vlm, "plain", tmp_path / "cut", texts, batch_size=2)
    assert calls == [2]
    assert score(vlm, "plain", tmp_path / "cut", texts, batch_size=2) == whole
    assert calls == [2, 2, 2]  # six texts, each asked about once
    assert score(vlm, "plain", tmp_path / "cut", texts, batch_size=2) == whole
    assert calls == [2, 2, 2]
    # without the cache the model is asked again
    score(vlm, "plain", tmp_path / "new", texts, batch_size=2)
    assert calls == [2] * 6


def test_a_torn_last_line_costs_that_item_only(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "task.jsonl"
    ItemCache(path, {"model": "m"}).add({"a": [1.0, 2], "b": "zwölf", "c": [3.0, 4]})
    content = path.read_text()
    path.write_text(content[:-9])
    again = ItemCache(path, {"model": "m"})
    assert again.records == {"a": [1.0, 2], "b": "zwölf"}
    assert "a" in again and "c" not in again
    # the half line is gone, so that what is written next stands on a line of its own
    again.add({"c": [3.0, 4]})
    assert path.read_text() == content
    assert ItemCache(path, {"model": "m"}).records == {"a": [1.0, 2], "b": "zwölf", "c": [3.0, 4]}


@pytest.mark.parametrize("changed", [{"model": "n", "task": "t"}, {"model": "m", "task": "u"}])
def test_a_cache_of_other_weights_or_another_task_is_started_anew(changed: dict[str, str], tmp_path: Path) -> None:
    header, path = {"model": "m", "task": "t"}, tmp_path / "task.jsonl"
    ItemCache(path, header).add({"a": 1})
    assert ItemCache(path, dict(header)).records == {"a": 1}
    assert ItemCache(path, changed).records == {}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"schema": SCHEMA, **changed}]


def test_a_run_that_goes_on_in_a_file_that_another_has_begun_anew_gives_it_nothing(tmp_path: Path) -> None:
    """Two models under one name, evaluated into one folder at a time."""
    path = tmp_path / "task.jsonl"
    one = ItemCache(path, {"model": "one"})
    one.add({"a": 1.0})
    two = ItemCache(path, {"model": "two"})
    two.add({"a": 2.0})
    one.add({"b": 1.0})
    assert ItemCache(path, {"model": "two"}).records == {"a": 2.0}


def test_a_cache_of_before_is_read(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    before = [{"model": "m"}, {"item": "a", "record": 1.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in before))
    assert ItemCache(path, {"model": "m"}).records == {"a": 1.0} == ItemCache(path, {"model": "m"}).records
    path.write_text("".join(json.dumps(line) + "\n" for line in before))
    assert ItemCache(path, {"model": "n"}).records == {}


def test_a_file_that_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    for text in ('{"model": "m"\nnonsense\n', '{"name": "me"}\n{"name": "you"}\nnonsense\n'):
        path.write_text(text)
        with pytest.raises(NotOurs, match=r"is no item cache: move it, or choose another output_dir\.$"):
            ItemCache(path, {"model": "m"})
        assert path.read_text().endswith("nonsense\n")


# --------------------------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------------------------
def test_a_folder_holds_an_lm_or_a_vlm(saved_pair: tuple[Path, Path]) -> None:
    student, teacher = (load_scored("m", str(path), device="cpu") for path in saved_pair)
    assert (student.kind, student.sees, teacher.kind, teacher.sees) == ("vlm", True, "lm", False)
    assert not student.model.training
    assert student.model.dtype == torch.float32
    assert student.tokenizer is student.processing.tokenizer
    assert teacher.tokenizer is teacher.processing
    rendered = student.render(user_turn("what shape?", images=2))
    assert rendered == "<|im_start|>user\n<image><image>what shape?<|im_end|>\n<|im_start|>assistant\n"
    assert chat_template_of(student) == tiny.CHATML


def test_the_fingerprint_changes_with_weights_and_settings_and_with_nothing_else(tmp_path: Path) -> None:
    _, folder = tiny.save_pair(tmp_path)
    first = fingerprint(str(folder), None)
    (folder / "README.md").write_text("a card")
    assert fingerprint(str(folder), None) == first
    model = tiny.make_lm(1)
    model.get_input_embeddings().weight.data[0, 0] += 1e-3
    model.save_pretrained(folder)
    changed = fingerprint(str(folder), None)
    assert changed != first
    (folder / "generation_config.json").write_text('{"max_length": 7}')
    assert fingerprint(str(folder), None) != changed
    seen = {changed}
    for name in (
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "tekken.tiktoken",
        "modeling_own.py",
        "chat_template.jinja",
    ):
        (folder / name).write_text("words")  # whatever decides how a text is read
        assert fingerprint(str(folder), None) not in seen, name
        seen.add(fingerprint(str(folder), None))


def test_what_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    from hf_lingudistill.compatibility import UnreadableModelError

    with pytest.raises(
        UnreadableModelError, match=r"^after: there is no folder '.*nowhere'\. Expected the folder or Hub"
    ):
        load_scored("after", str(tmp_path / "nowhere"))
    # a config without weights
    tiny.make_lm(1).config.save_pretrained(tmp_path)
    with pytest.raises(UnreadableModelError, match="a config and no safetensors weights"):
        load_scored("after", str(tmp_path))


@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_a_text_is_read_onward_alone_or_in_a_batch(name: str) -> None:
    """PaliGemma reads a prompt in both directions; of what is scored, no token may see the next. Oracle: the model, token by token."""
    model = build_family(name).student.eval()
    generator = torch.Generator().manual_seed(0)
    rows, starts = [torch.randint(5, 150, (n,), generator=generator).tolist() for n in (24, 17)], [12, 8]

    def types(before: int, length: int) -> dict[str, torch.Tensor]:
        kinds = [[int(place >= before) for place in range(length)]]
        return {"token_type_ids": torch.tensor(kinds)} if name == "paligemma" else {}

    expected = []
    for row, start in zip(rows, starts, strict=True):
        nats = 0.0
        for end in range(start, len(row)):
            ids = torch.tensor([row[:end]])
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **types(start, end)).logits[0, -1]
            nats -= logits.float().log_softmax(-1)[row[end]].item()
        expected.append(nats)
    assert sequence_nll(model, rows, starts) == pytest.approx(expected, rel=1e-4)
    alone = [sequence_nll(model, [row], [start])[0] for row, start in zip(rows, starts, strict=True)]
    assert alone == pytest.approx(expected, rel=1e-4)
    scored = SimpleNamespace(model=model, ids=lambda text: [int(word) for word in text.split()])
    asked = " ".join(map(str, rows[0][:12]))
    states = [answer_states(scored, [asked], [()], [[*rows[0][12:-1], last]])[0] for last in (7, 8)]  # type: ignore[arg-type]
    torch.testing.assert_close(states[0], states[1])  # the last token is predicted from them and changes none

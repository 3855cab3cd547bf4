"""A model whose weights are finite and whose numbers overflow: it is named, and no verdict comes of it. One item is none either."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hf_lingudistill.labs.diagnose.measure import measure
from hf_lingudistill.labs.diagnose.prompts import Prompt, load_prompts
from hf_lingudistill.labs.evaluation.cache import ItemCache
from hf_lingudistill.labs.evaluation.language import TextPath, bits_per_byte
from hf_lingudistill.labs.evaluation.models import Scored
from hf_lingudistill.labs.evaluation.plots import plot_all
from hf_lingudistill.labs.evaluation.reading import write_answers
from hf_lingudistill.labs.evaluation.report import Task, build_report
from hf_lingudistill.labs.evaluation.suite import TextTask
from hf_lingudistill.labs.evaluation.terminal import as_text
from hf_lingudistill.labs.evaluation.vision import generate
from hf_lingudistill.labs.json_text import as_json
from hf_lingudistill.labs.score_mix.report import as_text as mix_text
from hf_lingudistill.labs.score_mix.report import write_report as write_mix
from hf_lingudistill.labs.score_mix.run import Limits, Source, _of_row, _of_source
from hf_lingudistill.labs.statistics import Bootstrap, NotFiniteScore
from hf_lingudistill.mixtures import DistillSource
from hf_lingudistill.queries import Vocabulary
from hf_lingudistill.teacher import prepare_teacher
from hf_lingudistill.weights import check_finite


def scored(*, overflows: bool) -> Scored:
    """A VLM with finite weights, the last of which take its states out of what fp32 holds."""
    vlm = tiny.make_vlm(0).eval()
    if overflows:
        with torch.no_grad():
            vlm.get_decoder().norm.weight.fill_(3e38)
            vlm.get_output_embeddings().weight.mul_(1e3)
    check_finite(vlm.named_parameters(), "x")
    return Scored("after", "x", "vlm", vlm, tiny.make_processor(), "f")


WAYS = {
    "written": lambda model, _: write_answers(model, ["the cat"], [()], max_new_tokens=2),
    "sampled": lambda model, _: write_answers(model, ["the cat"], [()], max_new_tokens=2, temperature=1.0, seeds=[0]),
    "about pictures": lambda model, _: generate(model, ["the cat"], [[]], 2),
    "texts": lambda model, folder: bits_per_byte(
        model, TextTask("t", path="t.jsonl"), "plain", {"a": "the cat sat"}, ItemCache(folder / "after/t.jsonl", {})
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_overflows_is_named(tmp_path: Path, way: str) -> None:
    with pytest.raises(NotFiniteScore, match=r"^after.*not finite.* score it in a wider dtype \(--dtype float32\)"):
        WAYS[way](scored(overflows=True), tmp_path)
    WAYS[way](scored(overflows=False), tmp_path)  # control


@pytest.mark.parametrize("way", ["_model_call", "_model_generate"])
def test_lm_evals_model_that_overflows_is_named(way: str) -> None:
    pytest.importorskip("lm_eval.models.huggingface", reason="the `eval` extra is not installed")
    ids = torch.tensor([[5, 6, 7]])
    given: dict[str, Any] = {} if way == "_model_call" else {"max_length": 5, "stop": ["\n"]}
    with pytest.raises(NotFiniteScore, match="^after: its logits are not finite"):
        getattr(TextPath(scored(overflows=True)), way)(ids, **given)
    getattr(TextPath(scored(overflows=False)), way)(ids, **given)


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_diagnose_names_who_overflows(broken: str) -> None:
    prompt = load_prompts().prompts[0]
    student, lm = scored(overflows=broken == "student"), tiny.make_lm(1)
    shared = len(tiny.make_tokenizer(extra=False))
    vocabulary = Vocabulary(size=student.model.config.text_config.vocab_size, shared_size=shared)
    if broken == "teacher":
        with torch.no_grad():
            lm.model.norm.weight.fill_(3e38)
            lm.get_output_embeddings().weight.mul_(1e3)
    with pytest.raises(NotFiniteScore, match=f"the loss of the {broken}.* is not finite"):
        measure(student, prepare_teacher(lm, vocabulary), prompt, max_answer_tokens=4)
    measure(scored(overflows=False), prepare_teacher(tiny.make_lm(1), vocabulary), prompt, max_answer_tokens=4)


def test_a_record_that_is_not_finite_is_neither_kept_nor_taken(tmp_path: Path) -> None:
    path = tmp_path / "after/task.jsonl"
    cache = ItemCache(path, {"model": "f"})
    cache.add({"good": {"nats": [1.0, 2.0], "text": "nan", "none": None}})
    for bad in (math.nan, [1.0, -math.inf], {"own": [[math.nan, 1]]}):
        with pytest.raises(NotFiniteScore, match="^after/task: what the model gives on item 'bad' is not finite"):
            cache.add({"bad": bad})
    with path.open("a") as file:  # as versions before this wrote it
        file.write(json.dumps({"item": "old", "record": {"kl": [math.nan]}}) + "\n")
    again = ItemCache(path, {"model": "f"})
    assert "good" in again and "old" not in again and "bad" not in again


def task(**items: dict[str, tuple[float, float]]) -> Task:
    return Task("vision/t", "vision", "T", "accuracy", "", True, dict(items))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_report_names_model_task_and_item(bad: float) -> None:
    fine = {"a": (0.0, 1.0), "b": (1.0, 1.0)}
    facts: dict[str, Any] = {"models": {"before": {}, "after": {}}}
    build_report([task(before=fine, after=fine)], Bootstrap(resamples=20), **facts)
    with pytest.raises(NotFiniteScore, match="^after, vision/t: the score of item 'b' is not finite"):
        build_report([task(before=fine, after={**fine, "b": (bad, 1.0)})], Bootstrap(resamples=20), **facts)
    with pytest.raises(NotFiniteScore, match="item 'b'"):
        Bootstrap(resamples=20).difference(fine, {**fine, "b": (bad, 1.0)})


def test_one_item_makes_no_verdict(tmp_path: Path) -> None:
    bootstrap = Bootstrap(resamples=50)
    one, other = {"a": (1.0, 1.0)}, {"a": (0.0, 1.0)}
    found = bootstrap.difference(one, other)
    assert found["value"] == 1.0 and found["low"] == -math.inf and found["high"] == math.inf
    assert bootstrap.recovered(one, other, one)["reason"] == "fewer than 6 items cannot tell"
    facts: dict[str, Any] = {"models": {"original": {}, "before": {}, "after": {}}}
    kl = Task(
        "fidelity/x/text_kl", "language", "K", "text_kl", "", False, {"original": other, "before": one, "after": one}
    )
    report = build_report([task(original=one, before=other, after=one), kl], bootstrap, **facts)
    said = as_text(report)
    assert "after, vision against before: fewer than 6 items cannot tell (+1.000)." in said
    assert "Infinity" not in as_json(report)  # no JSON: other readers stop at it
    plot_all(report, tmp_path)  # no axis ends at infinity
    # control: twenty items that all agree do say something
    many = {str(i): (1.0, 1.0) for i in range(20)}, {str(i): (0.0, 1.0) for i in range(20)}
    report = build_report([task(original=many[0], before=many[1], after=many[0])], bootstrap, **facts)
    assert "after, vision against before: a change" in as_text(report)
    same = build_report([task(original=many[0], before=many[1], after=many[1])], bootstrap, **facts)
    said = "after, vision against before: no clear change (the 95 % interval includes 0): +0.000 [-0.168, +0.168]."
    assert said in as_text(same)


def test_one_row_of_a_source_decides_nothing(tmp_path: Path) -> None:
    prompt = Prompt(key="s/0", condition="text", messages=(), answer="", images=())
    source = Source("s", (prompt,), {}, DistillSource(path="x"))
    seen = {"s/0": {"tokens": 4, "own": [1.0] * 4}}
    told = {"s/0": {"tokens": 4, "entropy": 40.0, "nats": 4.0}}
    found = _of_source(source, seen, told, Bootstrap(resamples=20), Limits())
    assert found["distill"] is True and found["sure"] is False
    report = {"sources": [found], "rows": [_of_row(source, prompt, seen, told)], "limits": vars(Limits())}
    write_mix({"schema": "x", **report}, tmp_path)
    assert "true ?" in mix_text(report)

"""The model card: what it says, what it does not say, and that nobody's text can say it for us."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripts import script

from hf_lingudistill.config import LinguDistillConfig
from hf_lingudistill.hub.card import render_card, usage_of
from hf_lingudistill.hub.escape import fenced, markdown, plain
from hf_lingudistill.hub.metadata import eval_result_file, eval_results
from hf_lingudistill.hub.results import main_model, tasks_of
from hf_lingudistill.hub.run_facts import dataset_fact, hub_id, public_name, recipe_of
from hf_lingudistill.sharing import MODES

ROOT = Path(__file__).resolve().parents[1]
SHA = "0123456789abcdef0123456789abcdef01234567"

FACTS: dict[str, Any] = {
    "schema": "lingudistill-record/1",
    "student": {
        "id": "ORG/VLM",
        "name": "ORG/VLM",
        "revision": SHA,
        "license": "apache-2.0",
        "language": ["en"],
        "parameters": 256_000_000,
    },
    "teacher": {
        "id": "ORG/LM",
        "name": "ORG/LM",
        "revision": SHA[::-1],
        "license": "apache-2.0",
        "quantization": "nf4",
        "arithmetic": "bf16, packed",
        "mib": 81.25,
        "quantization_kl": 0.0123,
    },
    "datasets": [
        {"id": "ORG/DOCS", "name": "ORG/DOCS", "revision": SHA, "split": "train", "distill": False},
        {"id": None, "name": "own-texts", "revision": None, "distill": True},
    ],
    "settings": {
        "kv_sharing": "vision",
        "distill_tokens": "confident",
        "distill_margin": 0.5,
        "ce_weight": 0.5,
        "distill_weight": 1.0,
        "beta": 0.0,
        "temperature": 2.0,
        "learning_rate": 1e-05,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "seed": 7,
    },
    "training": {
        "steps": 1500,
        "tokens": 12_345_678,
        "distilled_rows_share": 0.4,
        "distilled_tokens_share": 0.271,
        "seconds": 3605.2,
    },
    "hardware": {"device": "NVIDIA H100", "processes": 2, "threads": None, "precision": "bf16"},
    "versions": {"hf_lingudistill": "0.1.0", "torch": "2.13.0"},
    "recipe": {"model_name_or_path": "ORG/VLM", "dataset_name": "ORG/DOCS"},
}


def score(value: float, width: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width, "n": 96}


REPORT: dict[str, Any] = {
    "schema": "lingudistill-evaluation/1",
    "suite": {"name": "quick", "seed": 0},
    "models": {name: {"path": name, "kind": "vlm"} for name in ("original", "before", "after", "ce_only")},
    "tasks": [
        {
            "name": "bits_per_byte/xsum/plain",
            "group": "language",
            "title": "News (XSum)",
            "metric": "bits_per_byte",
            "unit": "bits/byte",
            "higher_is_better": False,
            "n": 96,
            "scores": {"original": score(1.2), "before": score(1.5), "after": score(1.25), "ce_only": score(1.3)},
            "controls": {},
            "differences": [{"of": "after", "minus": "before", **score(-0.25, 0.05)}],
            "recovered": {"after": {"value": 0.833, "low": 0.7, "high": 0.95}},
        },
        {
            "name": "lm_eval/hellaswag",
            "group": "language",
            "title": "HellaSwag",
            "metric": "acc",
            "unit": "",
            "higher_is_better": True,
            "n": 200,
            "scores": {"before": score(0.4), "after": score(0.39)},
            "recovered": {"after": {"value": None, "reason": "nothing was lost"}},
        },
        {
            "name": "vision/easy_vqa_what",
            "group": "vision",
            "title": "easy-VQA color and shape",
            "metric": "accuracy",
            "unit": "",
            "higher_is_better": True,
            "n": 200,
            "scores": {"before": score(0.9), "after": score(0.8)},
            "controls": {"grey": {"after": score(0.2)}, "shuffled": {"after": score(0.21)}},
            "differences": [{"of": "after", "minus": "before", **score(-0.1, 0.02)}],
            "recovered": {},
        },
    ],
    "machine": {"torch": "2.13.0"},
}
DEMO: dict[str, Any] = json.loads((ROOT / "docs/results/demo/report.json").read_text(encoding="utf-8"))


def metadata(text: str) -> dict[str, Any]:
    """The YAML block, found as the Hub's server finds it."""
    block = REGEX_YAML_BLOCK.search(text)
    assert block is not None
    data: dict[str, Any] = yaml.safe_load(block[2])
    return data


def render(facts: Any = FACTS, report: Any = REPORT, **options: Any) -> str:
    return str(render_card(facts, report, **{"repo_id": "ann/model", **options}))


# --------------------------------------------------------------------------------------------------------------------
# What it says
# --------------------------------------------------------------------------------------------------------------------
def test_the_metadata_says_where_the_model_comes_from() -> None:
    data = metadata(render(tags=["mine"]))
    assert data["base_model"] == "ORG/VLM" and data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-text-to-text"
    assert data["datasets"] == ["ORG/DOCS"] and data["license"] == "apache-2.0" and data["language"] == ["en"]
    assert {"lingudistill", "trl", "distillation", "teacher:ORG/LM", "mine"} <= set(data["tags"])
    assert "ORG/LM" not in json.dumps(data["base_model"])  # a second base would read as a merge


def test_the_page_says_how_the_model_was_trained() -> None:
    text = render()
    for fact in (
        f"[ORG/VLM](https://huggingface.co/ORG/VLM) at `{SHA}`",
        f"[ORG/LM](https://huggingface.co/ORG/LM) at `{SHA[::-1]}`; weights in nf4, computed in bf16, packed, 81.2 MiB, KL to full precision 0.0123 nats",
        f"[ORG/DOCS](https://huggingface.co/datasets/ORG/DOCS) at `{SHA}` (train, cross-entropy only); own-texts (distilled)",
        "40% of the rows, 27% of the answer tokens",
        "| `kv_sharing` | vision |",
        "confident, margin 0.5 nats",
        "0.5 x CE + 1.0 x divergence",
        "temperature 2.0",
        "| steps | 1,500 |",
        "8 rows per device x 4 accumulation steps x 2 processes",
        "| tokens seen | 12,345,678 |",
        "2 x NVIDIA H100, bf16",
        "| seconds | 3,605 |",
        "256.0M parameters",
        "recipe.yaml",
        "arXiv:2604.00829",
    ):
        assert fact in text, fact


def test_the_tables_hold_the_scores_with_their_intervals() -> None:
    text = render()
    assert (
        "| News (XSum) (bits/byte, lower is better) | 96 | 1.200 [1.100, 1.300] | 1.500 [1.400, 1.600] | **1.250 [1.150, 1.350]** "
        "| 1.300 [1.200, 1.400] | 83% [70%, 95%] |"
    ) in text
    assert "| nothing was lost |" in text
    assert "| -0.100 [-0.120, -0.080] | 0.200 [0.100, 0.300] | 0.210 [0.110, 0.310] |" in text
    assert "easy-VQA color and shape: a loss." in text  # what it costs is said, not only tabled
    better = json.loads(
        json.dumps(REPORT).replace('"minus": "before", "value": -0.1', '"minus": "before", "value": 0.0')
    )
    better["tasks"][2]["differences"][0] |= {"low": -0.02, "high": 0.02}
    assert "no difference that 200 items can show" in render(report=better)


def test_the_demos_report_is_read_as_well() -> None:
    text = render({}, DEMO, name="demo")
    language, vision = DEMO["language"], DEMO["vision"]
    assert f"**{language['after']:.3f} [" in text and f"| {language['recovered']:.0%} |" in text
    assert f"**{vision['after']:.3f} [" in text and f"| {vision['shuffled']['after']:.3f} |" in text
    assert "make demo" in text and DEMO["prompts"][0]["before"] in text


def test_missing_facts_are_named_once_and_no_row_is_empty() -> None:
    text = render({}, {}, repo_id=None)
    assert text.count("Not evaluated") >= 3 and text.count("not known to this card") == 2
    assert "**Not chosen yet.**" in text and "not recorded" not in text
    data = metadata(text)
    assert not {"base_model", "datasets", "license", "language", "model-index"} & data.keys()
    assert "nan" not in text.lower().split() and "None" not in text
    # control: with the facts, none of it is said
    assert "not known" not in render() and "**Not chosen yet.**" not in render()


def test_the_training_table_has_a_row_for_what_is_known() -> None:
    """And one for the data in any case: readers look for it."""
    text = render({"settings": {"kv_sharing": "vision", "seed": 3}}, {})
    table = re.search(r"## How it was trained\n\n(?:\|.*\n)+", text)
    assert table is not None
    assert re.findall(r"^\| ([^|]+) \|", table[0], re.MULTILINE) == ["data", "`kv_sharing`", "seed"]
    assert "| data | not recorded |" in table[0]
    for part in ("student", "teacher", "settings", "training", "hardware"):
        for name in FACTS[part]:  # control of "no row is empty": whichever single fact is missing
            fewer = {**FACTS, part: {key: value for key, value in FACTS[part].items() if key != name}}
            assert not re.search(
                r"\|\s*(None|;.*)?\s*\|$",
                "\n".join(re.findall(r"^\| [a-z`].*\|$", render(fewer, {}), re.MULTILINE)),
                re.MULTILINE,
            ), (part, name)


def test_brackets_are_spoken_of_where_there_are_some() -> None:
    few = json.loads(json.dumps(REPORT))
    for task in few["tasks"]:
        for score in task["scores"].values():
            score["low"] = score["high"] = None
        for share in task.get("recovered", {}).values():
            share["low"] = share["high"] = None
    assert "In brackets" in render() and "In brackets" not in render(report=few)


@pytest.mark.parametrize("reference", ["before", "after", "another", None])
def test_tokens_that_a_compared_model_chose_give_no_verdict(reference: str | None) -> None:
    """Where it is sure, it is sure by chance as well: of two equal models it comes out ahead."""
    report = json.loads(json.dumps(REPORT))
    task = json.loads(json.dumps(report["tasks"][0]))
    task |= {
        "name": "grounded/g/image_nll",
        "group": "grounded",
        "title": "Pictures: image tokens",
        "higher_is_better": False,
    }
    task["differences"] = [{"of": "after", "minus": "before", "value": 0.8, "low": 0.7, "high": 0.9}]
    task["notes"] = {} if reference is None else {"reference": reference}
    report["tasks"].append(task)
    text = render(report=report)
    biased = reference in ("before", "after")
    assert ("Pictures: image tokens: a loss." in text) is not biased
    assert ("Pictures: image tokens: no verdict" in text) is biased


def test_what_was_not_evaluated_is_named() -> None:
    assert "Not evaluated: long answers about an image." in render()
    assert "Not evaluated: language, vision, long answers about an image." in render(report={})


@pytest.mark.parametrize(
    ("student", "chosen", "expected"),
    [
        ({"license": "mit"}, None, {"license": "mit"}),
        ({"license": "mit"}, "cc-by-nc-4.0", {"license": "cc-by-nc-4.0"}),
        ({}, None, {}),
        (
            {"license": "other", "license_name": "qwen", "license_link": "https://example.org/LICENSE"},
            None,
            {"license": "other", "license_name": "qwen", "license_link": "https://example.org/LICENSE"},
        ),
        ({"license": "other", "license_name": "x\ny: z", "license_link": "javascript:alert(1)"}, None, {"license": "other"}),
        ({"license": "mit\ninjected: true"}, None, {}),
    ],
)  # fmt: skip
def test_the_licence_is_inherited_and_flagged_where_it_must_be_chosen(
    student: dict[str, Any], chosen: str | None, expected: dict[str, str]
) -> None:
    text = render({**FACTS, "student": {"id": "ORG/VLM", **student}}, license=chosen)
    found = {name: value for name, value in metadata(text).items() if name.startswith("license")}
    assert found == expected
    assert ("**Not chosen yet.**" in text) == (not expected)


def test_every_sharing_mode_has_a_sentence_of_its_own() -> None:
    def method(mode: str | None) -> str:
        text = render({**FACTS, "settings": {**FACTS["settings"], "kv_sharing": mode}})
        return next(line for line in text.splitlines() if line.startswith("The frozen "))

    found = {mode: method(mode) for mode in MODES}
    unknown = "may read the student's keys and values"
    assert len(set(found.values())) == len(MODES) and not any(unknown in text for text in found.values())
    assert unknown in method("a mode of another release")  # the control
    assert "reads the images itself" in found["images"] and "never seen an image" not in found["images"]


def test_a_different_licence_of_the_teacher_is_pointed_out() -> None:
    other = {**FACTS, "teacher": {**FACTS["teacher"], "license": "gemma"}}
    assert "The teacher's licence is `gemma`" in render(other)
    assert "The teacher's licence" not in render()


def test_a_path_in_a_report_is_no_hub_id() -> None:
    report = json.loads(json.dumps(REPORT))
    report["models"] |= {
        "before": {"path": "demo/before", "parameters": 3_000_000},
        "original": {"path": "demo/original"},
    }
    data = metadata(render({}, report))
    assert "base_model" not in data and not [tag for tag in data["tags"] if tag.startswith("teacher:")]
    assert "model is the unpublished model demo/before, trained with" in render({}, report)


def test_the_report_tells_which_of_its_models_the_card_is_about() -> None:
    assert main_model(REPORT) == "after"
    default = LinguDistillConfig.kv_sharing
    arms = ("original", "before", "ce", *(mode for mode in MODES if mode != default))
    assert main_model({"models": dict.fromkeys((default, *arms), {})}) == default == "vision"
    assert main_model({"models": dict.fromkeys(arms, {})}) == arms[-1]  # control
    assert main_model({"models": {"before": {}, "mine": {}}}) == "mine"
    task = tasks_of(REPORT, "ce_only")[0]
    assert task.scores["after"].value == 1.3


# --------------------------------------------------------------------------------------------------------------------
# Results, by the library's own validators
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("report", [REPORT, DEMO])
def test_the_model_index_is_valid_and_holds_the_scores(report: dict[str, Any]) -> None:
    text = render(report=report)
    name, results = model_index_to_eval_results(metadata(text)["model-index"])
    assert name == "model"
    assert {result.metric_value for result in results} == {task.scores["after"].value for task in tasks_of(report)}
    again = ModelCard(text)  # parses and validates
    assert again.data.eval_results == results
    # control: the validator does reject
    with pytest.raises(ValueError, match="model_index"):
        ModelCard(text.replace("  - task:\n", "  - chore:\n", 1))


def gsm8k(**changes: Any) -> dict[str, Any]:
    task = {
        "name": "lm_eval/gsm8k",
        "group": "language",
        "title": "GSM8K",
        "metric": "exact_match",
        "unit": "",
        "n": 1319,
        "data": {"harness": "lm_eval"},
    }
    return {
        **REPORT,
        "tasks": [*REPORT["tasks"], {**task, "higher_is_better": True, "scores": {"after": score(0.25)}, **changes}],
    }


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("bits_per_byte/wikitext/plain", {"id": None, "name": "our_wiki", "split": "test"}, "wikitext"),
        ("bits_per_byte/wikitext/plain", {}, "wikitext"),  # a report of before, which did not say
        ("bits_per_byte/wikitext/plain", {"id": "ORG/WIKI", "name": "ORG/WIKI", "split": "test"}, "ORG/WIKI"),
        ("vision/docvqa_val", {"id": None, "name": "invoices.jsonl", "split": "test"}, "docvqa_val"),
        ("bits_per_byte/news/plain", {"builtin": "xsum"}, "EdinburghNLP/xsum"),
        ("bits_per_byte/xsum/plain", {"builtin": "contracts"}, "xsum"),
        ("lm_eval/hellaswag", {"harness": "lm_eval"}, "Rowan/hellaswag"),
    ],
)
def test_a_dataset_is_named_where_the_items_are_known_to_be_its(
    name: str, data: dict[str, Any], expected: str
) -> None:
    """The name of a task is its user's: data of one's own called `wikitext` is not Salesforce's."""
    report = {**REPORT, "tasks": [{**REPORT["tasks"][0], "name": name, "data": data}]}
    assert [entry.dataset_type for entry in eval_results(tasks_of(report))] == [expected]


def test_two_tasks_on_the_same_data_stay_two_in_the_metadata() -> None:
    """The Hub takes entries of one dataset, configuration and split for one, and would put both scores under the first title."""
    task = REPORT["tasks"][0]
    data = {"id": "org/drawings", "name": "drawings", "split": "test"}
    tasks = [
        {**task, "name": f"vision/{name}", "title": title, "data": {**data, **more}}
        for name, title, more in (
            ("seen", "Artists that were trained on", {}),
            ("unseen", "Artists that were not", {}),
            ("art", "Art", {"config": "Art"}),
            ("biology", "Biology", {"config": "Biology"}),
            ("validation", "Validation", {"split": "validation"}),
        )
    ]
    found = eval_results(tasks_of({**REPORT, "tasks": tasks}))
    assert len({entry.unique_identifier for entry in found}) == len(found) == 5
    index = eval_results_to_model_index("m", found)[0]["results"]
    assert [one["dataset"]["name"] for one in index] == [task["title"] for task in tasks]
    assert found[2].dataset_config == "art" and found[4].dataset_split == "validation"


def test_eval_results_are_of_whole_registered_benchmarks_alone() -> None:
    text = eval_result_file(tasks_of(gsm8k()), date="2026-01-02")
    assert text is not None
    entries = parse_eval_result_entries(yaml.safe_load(text))
    assert all(isinstance(entry, EvalResultEntry) for entry in entries)
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [("openai/gsm8k", "gsm8k", 25.0)]
    for mine in (
        {},
        {"id": None, "name": "gsm8k.jsonl", "split": "test"},
    ):  # nor is data of one's own, whatever it is called
        assert eval_result_file(tasks_of(gsm8k(data=mine))) is None
    assert eval_result_file(tasks_of(gsm8k(n=200))) is None  # a part of a benchmark is no entry on its leaderboard
    assert eval_result_file(tasks_of(REPORT)) is None


def test_scores_that_are_no_numbers_are_left_out() -> None:
    odd = json.loads(json.dumps(REPORT))
    odd["tasks"][0]["scores"]["after"]["value"] = float("nan")
    odd["tasks"][1]["scores"]["after"] = None
    odd["tasks"].append({"name": "empty"})
    assert [task.name for task in tasks_of(odd)] == ["vision/easy_vqa_what"]
    assert "News" not in render(report=odd)


# --------------------------------------------------------------------------------------------------------------------
# Anybody's text
# --------------------------------------------------------------------------------------------------------------------
HOSTILE = [
    "a\n---\nlicense: unlicense\n---\n",
    "---",
    "x: y\n- z",
    "{{ 7 * 7 }} {% for x in y %}",
    "![x](https://evil.example/pixel.png)",
    "<script>alert(1)</script>",
    "a | b | c",
    "`code` **bold** # head",
    "```\nfence\n```",
    "\u202egnp.txt \x00\x07",
    "モデル Ünïcode 🦙",
    "../../etc/passwd",
    "'\"%@&*!",
    "x" * 5000,
    "",
]


def everywhere(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts and a report with this text in every place that somebody else fills."""
    record = json.loads(json.dumps(FACTS))
    for part in ("student", "teacher"):
        record[part] |= {"id": text, "name": text, "license": text, "language": [text], "revision": text}
    record["datasets"] = [{"id": text, "name": text, "config": text, "split": text, "revision": text}]
    record["settings"] |= {"kv_sharing": text, "distill_tokens": text}
    record["hardware"]["device"] = text
    record["versions"] = {text: text}
    report = json.loads(json.dumps(REPORT))
    for task in report["tasks"]:
        task |= {"name": f"a/{text}", "title": text, "unit": text, "metric": text}
    report["tasks"][1]["recovered"] = {"after": {"value": None, "reason": text}}
    report["suite"]["name"] = text
    report["prompts"] = [{"prompt": text, "before": text, "after": text, "original": text}]
    return record, report


KNOWN_FIELDS = {
    "base_model", "base_model_relation", "datasets", "language", "library_name", "license", "license_name", "license_link",
    "pipeline_tag", "tags", "model-index",
}  # fmt: skip


def check_hostile(text: str) -> None:
    record, report = everywhere(text)
    card = render(record, report, name=text, tags=[text])
    data = metadata(card)
    assert data.keys() <= KNOWN_FIELDS
    assert data["library_name"] == "transformers"
    assert all(re.fullmatch(r"[\w.:/-]+", tag) for tag in data["tags"])
    ModelCard(card)
    page = card[REGEX_YAML_BLOCK.search(card).end() :]  # type: ignore[union-attr]
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", page, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside
    assert not re.search(r"(?<!\\)!\[[^\]]*\]\(https://evil", outside)
    # rows of a table have as many cells as its head
    for table in re.findall(r"(?:^\|.*\|$\n?)+", outside, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().splitlines()}
        assert len(widths) == 1, table
    headings = re.findall(r"^#+ .*$", outside, re.MULTILINE)
    assert len(headings) == 9, headings


def each_hostile(test: Any) -> Any:
    for text in HOSTILE:
        test = example(text)(test)
    return test


@settings(max_examples=40)
@each_hostile
@given(st.text(max_size=60))
def test_nobodys_text_gets_into_the_metadata_or_out_of_its_cell(text: str) -> None:
    check_hostile(text)


def test_unescaped_text_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the two tests above."""
    assert markdown("<b>|`x`") == "&lt;b&gt;\\|\\`x\\`"
    for module in {module for name, module in sys.modules.items() if name.startswith("hf_lingudistill.hub")}:
        if hasattr(module, "markdown"):
            monkeypatch.setattr(module, "markdown", lambda text, *_, **__: str(text))
    for text in ("a|b", "<script>", "![x](https://evil.example)"):
        with pytest.raises(AssertionError):
            check_hostile(text)


def test_invisible_characters_are_taken_out() -> None:
    """Controls and marks of direction: what is read must be what is there."""
    assert plain("a\u202eb\x00c\u200bd\ne") == "abcd e" and markdown("\u202egnp.exe") == "gnp.exe"


def test_a_fence_cannot_be_closed_from_inside() -> None:
    block = fenced("a\n```\n# out\n````\nb")
    assert block.startswith("`````text\n") and block.endswith("\n`````")


def test_the_card_renders_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert "ORG/VLM" in render()
    with pytest.raises(AssertionError, match="the network was asked"):  # control
        socket.create_connection(("127.0.0.1", 9))


def test_an_adapters_card_says_so() -> None:
    text = render(usage=usage_of("ann/model", adapter=True, base="ORG/VLM"))
    data = metadata(text)
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter")
    assert "LoRA adapter" in text and "LoRA adapter" not in render()
    assert "vllm serve ORG/VLM --enable-lora --lora-modules restored=ann/model" in text
    assert "pip install" in text and " peft`" in text


# --------------------------------------------------------------------------------------------------------------------
# Names in records
# --------------------------------------------------------------------------------------------------------------------
def test_folders_are_known_by_their_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models/before").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for reference in (str(tmp_path / "models/before"), "models/before", "./models/before", "/gone/models/before"):
        assert public_name(reference) == "before" and hub_id(reference) is None
    assert public_name("ORG/VLM") == hub_id("ORG/VLM") == "ORG/VLM"
    assert hub_id("not a name") is None


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("https://host/rows.csv?X-Amz-Signature=SECRET&x=1", "https://host/rows.csv"),
        ("https://ann:SECRET@host:8080/a/rows.csv#SECRET", "https://host:8080/a/rows.csv"),
        ("s3://key:SECRET@bucket/rows.parquet", "s3://bucket/rows.parquet"),
        ("hf://datasets/ORG/DATA@v1/train.parquet", "hf://datasets/ORG/DATA@v1/train.parquet"),
        ("file:///data/SECRET/rows.csv", "rows.csv"),
        ("C:\\SECRET\\rows.csv", "rows.csv"),
    ],
)
def test_of_a_url_the_place_is_published_and_no_password_or_signature(reference: str, expected: str) -> None:
    from hf_lingudistill.mixtures import DistillMixtureConfig

    assert public_name(reference) == expected
    fact = dataset_fact("csv", data_files={"train": [reference]})
    recipe = recipe_of(DistillMixtureConfig(datasets=[{"path": "csv", "data_files": reference}]))  # type: ignore[list-item]
    assert "SECRET" not in json.dumps([fact, recipe])


def test_a_recipe_holds_what_was_chosen_and_no_token(tmp_path: Path) -> None:
    from trl import ModelConfig

    from hf_lingudistill import LinguDistillConfig
    from hf_lingudistill.mixtures import DistillMixtureConfig

    config = LinguDistillConfig(
        output_dir=str(tmp_path),
        hub_token="hf_" + "x" * 30,
        beta=0.5,
        model_init_kwargs={"revision": "main", "token": "hf_" + "y" * 30},
        teacher_model_name_or_path=str(tmp_path),
    )
    mixture = DistillMixtureConfig(datasets=[{"path": "ORG/DATA", "distill": True}])  # type: ignore[list-item]
    recipe = recipe_of(config, ModelConfig(model_name_or_path="ORG/VLM"), mixture)
    assert recipe["beta"] == 0.5 and recipe["model_name_or_path"] == "ORG/VLM"
    assert recipe["datasets"] == [{"path": "ORG/DATA", "split": "train", "distill": True}]
    assert recipe["model_init_kwargs"] == {"revision": "main"}
    assert recipe["teacher_model_name_or_path"] == tmp_path.name
    assert "hf_" not in yaml.safe_dump(recipe) and str(tmp_path) not in yaml.safe_dump(recipe)
    assert yaml.safe_load(yaml.safe_dump(recipe)) == recipe


def test_a_card_says_how_each_mode_reads() -> None:
    said = {name: str(render_card({"settings": {"kv_sharing": name}}, {})) for name in MODES}
    assert all(mode.in_words in said[name] for name, mode in MODES.items() if not mode.sees)
    assert MODES["full"].in_words not in said["vision"]  # control
    assert "may read the student's keys and values" in str(render_card({"settings": {"kv_sharing": "other"}}, {}))
    once, twice = (str(render_card({"settings": {"kv_sharing": "vision", "blind_weight": w}}, {})) for w in (0.0, 0.3))
    assert "teaches the mean of both (0.3 of the second)" in twice and "mean of both" not in once


# --------------------------------------------------------------------------------------------------------------------
# The committed cards
# --------------------------------------------------------------------------------------------------------------------
def test_the_committed_cards_are_what_the_results_say() -> None:
    cards = script("model_cards/render.py")
    assert "demo.md" in cards.render()
    assert cards.stale(cards.render()) == [], "run `make cards`"


def test_links_in_the_committed_cards_lead_somewhere() -> None:
    for path in (ROOT / "model_cards").glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).is_file(), f"{path.name}: {target}"


def test_a_changed_result_makes_a_card_stale_and_a_new_recipe_gets_one(tmp_path: Path) -> None:
    """Control of the test above, on a copy; the recipe's report has the other schema."""
    cards = script("model_cards/render.py")
    shutil.copytree(ROOT / "docs/results/demo", tmp_path / "docs/results/demo")
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards/gone.md").write_text("left over" + cards.NOTE)
    (tmp_path / "cards/mine.md").write_text("written by hand")  # nothing that `make cards` may remove
    for name, text in cards.render(tmp_path).items():
        (tmp_path / "cards" / name).write_text(text, encoding="utf-8")
    assert cards.stale(cards.render(tmp_path), tmp_path / "cards") == ["gone.md"]
    (tmp_path / "cards/gone.md").unlink()
    changed = json.loads(json.dumps(DEMO))
    changed["language"]["after"] += 1
    (tmp_path / "docs/results/demo/report.json").write_text(json.dumps(changed))
    results = tmp_path / "examples/recipes/small/results"
    results.mkdir(parents=True)
    (results / "report.json").write_text(json.dumps(REPORT))
    (results / "lingudistill.json").write_text(json.dumps(FACTS))
    assert cards.stale(cards.render(tmp_path), tmp_path / "cards") == ["demo.md", "small.md"]
    assert "1.250 [1.150, 1.350]" in cards.render(tmp_path)["small.md"]


def test_a_recipe_over_seeds_gets_a_card(tmp_path: Path) -> None:
    """Means and t intervals of its default arm; what it says of items and of one run elsewhere is not said here."""
    cards = script("model_cards/render.py")
    folder = tmp_path / "examples/recipes/five_artists"
    (folder / "results").mkdir(parents=True)
    shutil.copy(ROOT / "examples/recipes/five_artists/recipe.yaml", folder)

    def mean(value: float) -> dict[str, float]:
        return {"mean": value, "half": 0.01, "seeds": 5}

    arms = {
        name: {"text_kl": mean(value), "naming_seen": mean(0.85)}
        for name, value in {"before": 2.9, "ce": 0.4, "vision": 0.27}.items()
    }
    arms["vision"] |= {"recovered_text_kl": mean(0.9), "naming_exchanged": mean(0.1)}
    arms["original"] = {"text_kl": {"mean": 0.001, "half": None}}
    paired = {"vision - ce": {"text_kl": mean(-0.13)}, "vision - before": {"naming_seen": {"mean": 0.0, "half": 0.02}}}
    summary = {
        "seeds": 5,
        "device": "Some GPU",
        "default": "vision",
        "regimes": {"P": {"severe": arms}},
        "paired": {"P": {"severe": paired}},
    }
    (folder / "results/summary.json").write_text(json.dumps(summary))
    text = cards.render(tmp_path)["five_artists.md"]
    assert "**0.270 [0.260, 0.280]**" in text and "2.900 [2.890, 2.910]" in text and "90% [89%, 91%]" in text
    assert "In brackets: means over 5 seeds, with 95 % t intervals over them." in text and "over items" not in text
    assert "Against it, this model is better on KL to the original LM" in text and "0.100 [0.090, 0.110]" in text
    assert "| `kv_sharing` | vision |" in text and "| steps | 45 |" in text and "Some GPU, bf16" in text
    summary["seeds"], arms["vision"]["text_kl"]["half"] = 1, None
    (folder / "results/summary.json").write_text(json.dumps(summary))
    assert "In brackets: one seed." in cards.render(tmp_path)["five_artists.md"]

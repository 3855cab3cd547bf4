"""Pairs by folder, Hub id or object, and how the report reads. Configs and tokenizers only, no weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pairs import IMAGE, USE_THE_ORIGINAL_LM, VOCAB, Tokenizers, llama, messages, only, save, sizes, vlm
from tokenizers_for_tests import PARTS_TEMPLATE, word_tokenizer
from transformers import AutoModelForImageTextToText, LlamaConfig, LlavaConfig, PreTrainedConfig

from hf_lingudistill.compatibility import TABLE_WIDTH, UnreadableModelError, check_compatibility


@pytest.fixture
def folders(tmp_path: Path, tokenizers: Tokenizers) -> tuple[str, str]:
    """A VLM and its LM on disk: configs and tokenizers, no weights."""
    return (
        save(tmp_path / "vlm", vlm(), tokenizers["student_tokenizer"]),
        save(tmp_path / "lm", llama(), tokenizers["teacher_tokenizer"]),
    )


def test_folders_without_weights_are_enough(folders: tuple[str, str]) -> None:
    for folder in folders:
        suffixes = {path.suffix for path in Path(folder).iterdir()}
        assert suffixes <= {".json", ".jinja"}, "control: there is nothing here that could hold weights"
    report = check_compatibility(*folders)
    assert report.fits
    assert report.shared_vocab_size == VOCAB
    assert report.student == f"{folders[0]} (llava; language model llama)"


def test_weights_that_are_there_are_not_read(folders: tuple[str, str]) -> None:
    for folder in folders:
        Path(folder, "model.safetensors").write_bytes(b"no weights")
    assert check_compatibility(*folders).fits
    with pytest.raises(Exception, match="header"):  # control: reading them would not have gone unnoticed
        AutoModelForImageTextToText.from_pretrained(folders[0])


def test_a_config_remembers_where_its_tokenizer_is(folders: tuple[str, str]) -> None:
    student, teacher = (PreTrainedConfig.get_config_dict(folder)[0] for folder in folders)
    configs = LlavaConfig(**student, name_or_path=folders[0]), LlamaConfig(**teacher, name_or_path=folders[1])
    assert check_compatibility(*configs).shared_vocab_size == VOCAB


def test_a_folder_without_tokenizer_is_a_misfit(folders: tuple[str, str], tmp_path: Path) -> None:
    bare = save(tmp_path / "bare", llama(), None)
    report = check_compatibility(folders[0], bare)
    assert messages(report, "vocabulary") == [
        f"Vocabularies cannot be compared for lack of the teacher's tokenizer: {bare} holds none. Save it beside the model "
        "(save_pretrained), or pass a folder or Hub id that has one (in Python, teacher_tokenizer)."
    ]


def test_a_vlm_template_of_an_older_processor_is_read(folders: tuple[str, str]) -> None:
    assert only(check_compatibility(*folders), "chat template").student == "none"
    Path(folders[0], "chat_template.json").write_text(json.dumps({"chat_template": PARTS_TEMPLATE}))
    assert only(check_compatibility(*folders), "chat template").student == "yes"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "The teacher '{}' does not exist. Pass a folder that holds a config.json, or a Hub id."),
        ({}, "The teacher folder '{}' holds no config.json. Pass the folder that save_pretrained wrote."),
        (
            {"adapter_config.json": "{}"},
            "The teacher folder '{}' holds an adapter, not a model. Merge it into its base first (docs/lora.md shows how).",
        ),
        ({"config.json": "{"}, "The config of the teacher '{}' cannot be read: It looks like the config file at"),
        ({"config.json": "{}"}, "The config of the teacher '{}' cannot be read: Unrecognized model in"),
        (
            {"config.json": '{"model_type": "llama", "num_hidden_layers": "three"}'},
            "The config of the teacher '{}' cannot be read: Validation error for field 'num_hidden_layers'",
        ),
        (
            {"config.json": '{"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}'},
            "The teacher '{}' runs code from its repository. Read it, and pass trust_remote_code if you trust it.",
        ),
    ],
    ids=["missing", "empty", "adapter", "broken", "unknown", "wrong-type", "code"],
)
def test_a_model_that_cannot_be_read_is_named_in_one_line(
    files: dict[str, str] | None, message: str, folders: tuple[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
    with pytest.raises(UnreadableModelError) as error:
        check_compatibility(folders[0], folder)
    assert str(error.value).startswith(message.format(folder))
    assert "\n" not in str(error.value)


def test_code_of_a_repository_runs_only_when_trusted(folders: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    proof = tmp_path / "it_ran"
    (folder / "configuration_mine.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig\n"
        f"Path({str(proof)!r}).touch()\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    auto_map = {
        "AutoConfig": "configuration_mine.MineConfig",
        "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps({**sizes(), "model_type": "mine", "auto_map": auto_map}))
    word_tokenizer(VOCAB).save_pretrained(folder)
    with pytest.raises(UnreadableModelError):
        check_compatibility(folders[0], folder)
    assert not proof.exists()
    assert check_compatibility(folders[0], folder, trust_remote_code=True).fits
    assert proof.exists()


def test_a_repository_that_is_not_there_is_bad_input(folders: tuple[str, str]) -> None:
    with pytest.raises(
        UnreadableModelError,
        match="^There is no folder 'nobody/nothing' here, and as a repository it cannot be read. The config of the student 'nobody/nothing' cannot be read: ",
    ):
        check_compatibility("nobody/nothing", folders[1])


def test_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="student must be a path, a Hub id, a config or a model, got int."):
        check_compatibility(3, llama())  # type: ignore[arg-type]


def test_the_report_is_json(tokenizers: Tokenizers) -> None:
    report = check_compatibility(vlm(), llama(num_hidden_layers=2), **tokenizers)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["fits"] is False
    assert content["shared_vocab_size"] == VOCAB
    assert content["image_token_ids"] == [IMAGE]
    assert {
        "name": "decoder layers",
        "status": "misfit",
        "student": "3",
        "teacher": "2",
        "reason": "Teacher has 2 layers, the student's language model has 3: KV sharing pairs layers one to one.",
        "fix": USE_THE_ORIGINAL_LM,
    } in content["checks"]


def test_the_table_reads_at_100_columns(tokenizers: Tokenizers) -> None:
    long = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "beta_fast": 32.0}}
    report = check_compatibility(vlm(llama(vocab_size=49, **long)), llama(num_hidden_layers=2), **tokenizers)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= TABLE_WIDTH
    header = next(line for line in lines if line.startswith("check"))
    row = next(line for line in lines if line.startswith("decoder layers"))
    for word, value in (("status", "misfit"), ("student", "3"), ("teacher", "2")):
        assert row[header.index(word) :].startswith(value), "columns are aligned"
    assert lines[lines.index(row) + 1 : lines.index(row) + 3] == [
        "    Teacher has 2 layers, the student's language model has 3: KV sharing pairs layers one to one.",
        "    Fix: Use the LM that the student was built from.",
    ]
    assert lines[-1] == "Does not fit: 1 misfit, 2 notes."


def test_the_last_line_says_whether_it_fits(tokenizers: Tokenizers) -> None:
    assert str(check_compatibility(vlm(), llama(), **tokenizers)).endswith("\nFits, with 1 note.")
    same = word_tokenizer(VOCAB + 1)
    report = check_compatibility(vlm(), llama(vocab_size=49), student_tokenizer=same, teacher_tokenizer=same)
    assert str(report).endswith("\nFits.")

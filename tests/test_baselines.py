"""The cheaper cures: weight interpolation is exact, and the baselines' configs are read and run by what they name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from scripts import script
from trl import ModelConfig, ScriptArguments, TrlParser

from hf_lingudistill import LinguDistillConfig
from hf_lingudistill.config import LocalSFTConfig
from hf_lingudistill.labs.evaluation.models import load_scored
from hf_lingudistill.mixtures import DistillMixtureConfig

FOLDER = Path(__file__).parents[1] / "examples" / "baselines"


interpolate = script("examples/baselines/interpolate.py").interpolate
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pairs(saved_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {
        "tied": saved_pair,
        "untied": tiny.save_pair(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False),
    }


def states(*folders: Path) -> list[dict[str, torch.Tensor]]:
    """The weights of saved models under names that an LM and a VLM share; a VLM's others keep theirs."""
    found = []
    for folder in folders:
        model = load_scored("m", str(folder), dtype=torch.float32, device="cpu").model
        text = {f"text.{name}": p.detach() for name, p in model.get_decoder().named_parameters()}
        text["head"] = model.get_output_embeddings().weight.detach()  # tied or not
        known = {p.data_ptr() for p in text.values()}
        found.append(text | {n: p.detach() for n, p in model.named_parameters() if p.data_ptr() not in known})
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_every_weight_is_the_weighted_mean_and_the_vlms_own_stay(
    pairs: dict[str, Pair], kind: str, alpha: float, tmp_path: Path
) -> None:
    interpolate(*pairs[kind], alpha, tmp_path / "out")
    vlm, lm, mixed = states(*pairs[kind], tmp_path / "out")
    assert set(mixed) == set(vlm)
    shared = [name for name in vlm if name in lm]
    assert len(shared) == len(lm) > 20
    assert torch.equal(vlm["head"], vlm["text.embed_tokens.weight"]) == (kind == "tied")
    for name, weight in mixed.items():
        rows = len(lm[name]) if name in shared else 0
        expected = alpha * vlm[name][:rows] + (1 - alpha) * lm[name][:rows] if rows else vlm[name][:0]
        if alpha == 0.5:
            torch.testing.assert_close(weight[:rows], expected, rtol=0, atol=1e-6)  # the rounding of fp32
        else:
            assert torch.equal(weight[:rows], expected), name
        assert torch.equal(weight[rows:], vlm[name][rows:]), name  # extra tokens, vision tower, connector
    changed = [name for name in shared if not torch.equal(mixed[name], vlm[name])]
    moving = [name for name in shared if "norm" not in name]  # the norms of both are ones
    assert changed == ([] if alpha == 1.0 else moving)
    assert len(vlm["head"]) == len(lm["head"]) + len(tiny.EXTRA_TOKENS)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_with_alpha_0_the_vlm_writes_what_the_lm_writes(pairs: dict[str, Pair], kind: str, tmp_path: Path) -> None:
    interpolate(*pairs[kind], 0.0, tmp_path)
    ids = torch.tensor([tiny.make_tokenizer(extra=False)(tiny.TEXT[:100])["input_ids"]])
    before, mixed, lm = (load_scored("m", str(path), device="cpu").model for path in (pairs[kind][0], tmp_path, pairs[kind][1]))  # fmt: skip
    with torch.no_grad():
        target = lm(ids).logits
        size = target.size(-1)
        torch.testing.assert_close(mixed(input_ids=ids).logits[..., :size], target, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before(input_ids=ids).logits[..., :size], target, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layers": 1},
            "layers.1.input_layernorm.weight: missing in the LM, (32,) in the VLM.",
        ),
        (
            {"layers": 3},
            "layers.2.input_layernorm.weight: (32,) in the LM, missing in the VLM.",
        ),
        # As many columns, fewer rows: these would fit into the VLM's first rows
        (
            {"num_key_value_heads": 1},
            "layers.0.self_attn.k_proj.weight: (8, 32) in the LM, (16, 32) in the VLM.",
        ),
        (
            {"intermediate_size": 32},
            "layers.0.mlp.down_proj.weight: (32, 32) in the LM, (32, 64) in the VLM.",
        ),
        (
            {"vocab_size": 400},
            "embed_tokens.weight: (400, 32) in the LM, (324, 32) in the VLM.",
        ),
        (
            {"tie_word_embeddings": False},
            "The VLM's head is tied to its embeddings, the LM's is not.",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_lm_is_refused_and_nothing_is_written(
    saved_pair: Pair, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny.make_lm(1, **changes).save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError) as raised:
        interpolate(saved_pair[0], tmp_path / "lm", 0.5, tmp_path / "out")
    assert str(raised.value) == f"{message} Pass the LM that it was built from."
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_is_a_share(saved_pair: Pair, alpha: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        interpolate(*saved_pair, alpha, tmp_path / "out")
    assert str(raised.value) == f"alpha must be in [0, 1] (the share of the VLM), got {alpha}."


def test_the_command_writes_a_vlm_with_its_processor(
    saved_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--vlm", str(saved_pair[0]), "--lm", str(saved_pair[1]), "--alpha", "0.3", "--output_dir", str(out)]
    monkeypatch.setattr(sys, "argv", ["interpolate.py", *arguments])
    script("examples/baselines/interpolate.py").main()
    assert capsys.readouterr().out == f"Saved to {out}: 0.3 of the VLM, 0.7 of the LM.\n"
    assert load_scored("m", str(out)).sees
    # and may be interpolated again, as after distillation
    interpolate(out, saved_pair[1], 0.0, tmp_path / "again")
    assert torch.equal(states(tmp_path / "again")[0]["head"][:320], states(saved_pair[1])[0]["head"])


# --------------------------------------------------------------------------------------------------------------------
# The baselines that are trained
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("kl_text_only", (ScriptArguments, LinguDistillConfig, ModelConfig, DistillMixtureConfig)),
        ("text_replay", (ScriptArguments, LocalSFTConfig, ModelConfig, DistillMixtureConfig)),
        ("lora", (ScriptArguments, LocalSFTConfig, ModelConfig, DistillMixtureConfig)),
    ],
)
def test_a_baselines_config_is_read_whole(name: str, kinds: tuple[type, ...], tmp_path: Path) -> None:
    settings = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    arguments = ["--use_cpu", "true", "--bf16", "false"]
    parsed = TrlParser(kinds).parse_args_and_config(["--config", str(FOLDER / f"{name}.yaml"), *arguments])
    values = {key: value for part in parsed for key, value in vars(part).items()}
    for key, value in settings.items():
        found = values[key]
        if key == "datasets":
            assert [
                {name: getattr(source, name) for name in given} for source, given in zip(found, value, strict=True)
            ] == value
        else:
            assert found == value, key
    # a setting that nothing reads is refused
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**settings, "kv_shairng": "none"}))
    with pytest.raises((ValueError, SystemExit)):
        TrlParser(kinds).parse_args_and_config(["--config", str(tmp_path / "bad.yaml"), *arguments])


@pytest.fixture
def mixture(saved_pair: Pair, tmp_path: Path) -> Callable[..., Path]:
    """`mixture(name, **settings)`: a baseline's YAML with its names replaced by a tiny model and dataset. -> its path."""

    def write(name: str, **settings: Any) -> Path:
        rows: Dataset = tiny.make_dataset(8).remove_columns("distill")
        rows.to_parquet(tmp_path / "rows.parquet")
        content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        content |= {
            "model_name_or_path": str(saved_pair[0]),
            "output_dir": str(tmp_path / "out"),
            "datasets": [
                {"path": "parquet", "data_files": str(tmp_path / "rows.parquet")} for _ in content["datasets"]
            ],
            "max_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "disable_tqdm": True,
            "learning_rate": 0.01,
            **settings,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("name", ["text_replay", "lora"])
def test_a_trained_baseline_writes_a_vlm_of_the_same_shape_with_other_weights(
    name: str, saved_pair: Pair, mixture: Callable[..., Path], tmp_path: Path
) -> None:
    script("examples/baselines/text_replay.py").main(["--config", str(mixture(name))])
    vlm, trained = states(saved_pair[0], tmp_path / "out")
    assert {key: weight.shape for key, weight in trained.items()} == {key: weight.shape for key, weight in vlm.items()}
    moved = {key for key in vlm if not torch.equal(vlm[key], trained[key])}
    if name == "lora":  # merged: only the adapted matrices moved
        kinds = yaml.safe_load((FOLDER / "lora.yaml").read_text(encoding="utf-8"))["lora_target_modules"]
        assert moved and all(any(kind in key for kind in kinds) for key in moved)
        assert "text.layers.0.self_attn.q_proj.weight" in moved
    else:
        assert {"text.embed_tokens.weight", "text.layers.0.self_attn.q_proj.weight"} <= moved | {"head"} and len(
            moved
        ) > 20

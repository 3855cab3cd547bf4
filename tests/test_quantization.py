"""4-bit and int8 weights: which CPU kernels they take, and that the arithmetic that is named is the one that happens."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from hf_lingudistill.machine import VARIABLE
from hf_lingudistill.quantization import arithmetic_of, choose_kernels
from hf_lingudistill.teacher import load_teacher_model

NATIVE = pytest.mark.skipif(
    torch.accelerator.is_available() or not torch.cpu._is_avx512_bf16_supported(),
    reason="bitsandbytes packs on a CPU with AVX512-BF16 alone",
)
# Sizes that pack: rows divisible by 32, columns by 64. (tiny's own width of 32 does not.)
PACKS = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Teachers by whether bitsandbytes can pack their layers."""
    models = {
        "all": tiny.make_lm(1, **PACKS),
        "none": tiny.make_lm(1, intermediate_size=80),
        "some": tiny.make_lm(1, **PACKS | {"intermediate_size": 80}),
    }
    found = {}
    for name, model in models.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


def packed_layers(model: PreTrainedModel) -> tuple[int, int]:
    """(packed, all) 4-bit layers after a forward."""
    from bitsandbytes.nn import Linear4bit

    with torch.no_grad():
        model(torch.randint(3, 20, (2, 5)))
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    return sum(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers), len(layers)


def log_probs(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        return model(ids).logits.float().log_softmax(-1)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", ["all", "some", "none"])
def test_a_layer_is_packed_where_it_fits_and_computes_in_bf16_anyway(
    folders: dict[str, Path], shapes: str, dtype: torch.dtype, cpu_mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_teacher_model(str(folders[shapes]), dtype=dtype)
    said = [record.getMessage() for record in caplog.records if "packed" in record.getMessage()]
    packed, layers = packed_layers(model)
    wanted = cpu_mode == "bf16=1" and dtype == torch.bfloat16
    assert packed == ({"all": layers, "some": layers - 2 * 3, "none": 0}[shapes] if wanted else 0)
    assert len(said) == (wanted and shapes != "all"), "one sentence, and only where a shape is why"
    assert (arithmetic_of(model) == "bf16, packed") is (packed > 0)


@NATIVE
def test_the_sentence_names_layer_shape_and_way_out(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, "bf16=1")
    load_teacher_model(str(folders["some"]), dtype=torch.bfloat16)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == (
        "model.layers.0.mlp.gate_proj (80 x 64) and 5 more layers cannot use bitsandbytes' packed bf16 kernels, which need rows "
        "divisible by 32 and columns by 64: computed unpacked, which is slower and as exact; without quantisation "
        "(--teacher_quantization none) nothing is packed."
    )


@pytest.mark.parametrize("shapes", ["all", "some", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_says_the_same_in_both_cpu_modes(
    folders: dict[str, Path], shapes: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for forced in ("bf16=1", "bf16=0"):
        monkeypatch.setenv(VARIABLE, forced)
        answers.append(log_probs(load_teacher_model(str(folders[shapes]), dtype=dtype)))
    # in fp32 to the bit; in bf16 to its rounding, of which a packed layer has its own
    assert (answers[0] - answers[1]).abs().max() <= (0.0 if dtype == torch.float32 else 0.5)


def test_an_fp32_teacher_is_computed_in_fp32(folders: dict[str, Path], cpu_mode: str) -> None:
    """Against the weights taken out of their 4 bits and multiplied in fp32; bf16 is the control, three orders away."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    whole = AutoModelForCausalLM.from_pretrained(folders["all"], dtype=torch.float32)
    for name, layer in load_teacher_model(str(folders["all"])).named_modules():
        if isinstance(layer, Linear4bit):
            whole.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    exact, rough = (load_teacher_model(str(folders["all"]), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert arithmetic_of(exact) == "fp32"
    assert (log_probs(exact) - log_probs(whole)).abs().max() < 1e-4
    assert (log_probs(rough) - log_probs(whole)).abs().max() > 1e-3


@pytest.mark.parametrize("shapes", ["all", "none"])
def test_a_student_keeps_its_gradients_after_an_evaluation(
    folders: dict[str, Path], shapes: str, cpu_mode: str
) -> None:
    """bitsandbytes would pack at the evaluation, and packed weights hand no gradient on."""
    student = four_bit(folders[shapes])
    untouched = copy.deepcopy(student)
    choose_kernels(student, trained=True)

    def gradient(model: PreTrainedModel, *, evaluated: bool) -> torch.Tensor:
        if evaluated:
            log_probs(model.eval())
        embedded = model.get_input_embeddings()(torch.arange(3, 15).view(1, 12)).float().detach().requires_grad_()
        model.train()(inputs_embeds=embedded.to(model.dtype)).logits.float().logsumexp(-1).sum().backward()
        assert embedded.grad is not None
        return embedded.grad

    expected = gradient(student, evaluated=False)
    assert torch.equal(gradient(student, evaluated=True), expected) and expected.abs().max() > 0
    if shapes == "all" and untouched.model.layers[0].mlp.gate_proj.support_avx512bf16_for_cpu:  # control
        assert not torch.allclose(gradient(untouched, evaluated=True), expected, rtol=0.1)


def four_bit(folder: Path) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
    )


@pytest.mark.parametrize(
    ("quantization", "dtype", "autocast", "arithmetic"),
    [
        ("none", torch.float32, None, "fp32"),
        ("none", torch.float32, torch.bfloat16, "bf16"),
        ("none", torch.float16, None, "fp16"),
        ("nf4", torch.float32, None, "fp32"),
        ("nf4", torch.bfloat16, None, "bf16"),
        ("int8", torch.float32, None, "int8"),
        ("int8", torch.bfloat16, torch.bfloat16, "int8"),
    ],
)
def test_the_arithmetic_has_a_name(
    folders: dict[str, Path], quantization: str, dtype: torch.dtype, autocast: torch.dtype | None, arithmetic: str
) -> None:
    model = load_teacher_model(str(folders["none"]), quantization=quantization, dtype=dtype)
    assert arithmetic_of(model, autocast=autocast) == arithmetic

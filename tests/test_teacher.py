"""The frozen teacher: loading (whole and quantised), and its head over the student's vocabulary."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from planning import prepare_teacher
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedModel

from hf_lingudistill._internals import head_of
from hf_lingudistill.compatibility import CompatibilityReport
from hf_lingudistill.losses import _finish, _raw_logits
from hf_lingudistill.queries import Vocabulary
from hf_lingudistill.teacher import Teacher, compute_dtype_of, load_teacher_model, vocabulary_of

VOCAB = 96
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
QUANTIZED = ("nf4", "int8")

# Mean KL(full precision || quantised) in nats a token on these models, whose logits have a standard deviation of about
# 3: measured 0.05-0.13 for nf4 and 0.0005-0.0014 for int8, against 4 for the same models without their layers.
MOST_KL = {"nf4": 0.3, "int8": 0.005}


def make_model(tied: bool = True, vocab: int = VOCAB, seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama whose layers matter to its logits: see `test_the_layers_matter_to_the_logits`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(20.0 if "embed" in name or "lm_head" in name else 5.0)
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Folders of the two models, by `tied`."""
    folders = {}
    for tied in (True, False):
        folders[tied] = tmp_path_factory.mktemp("teacher")
        make_model(tied).save_pretrained(folders[tied])
    return folders


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (4, 12))


@torch.no_grad()
def log_probs(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(model(input_ids).logits.float(), dim=-1)


def mean_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    return float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())


# --------------------------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------------------------
@TIED
@pytest.mark.parametrize("quantization", [*QUANTIZED, "none"])
def test_a_loaded_teacher_is_frozen_and_in_eval_mode(saved: dict[bool, Path], quantization: str, tied: bool) -> None:
    model = load_teacher_model(str(saved[tied]), quantization=quantization)
    assert not model.training and not any(module.training for module in model.modules())
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@TIED
def test_an_unquantised_teacher_is_the_saved_model(
    saved: dict[bool, Path], input_ids: torch.Tensor, tied: bool
) -> None:
    model = load_teacher_model(str(saved[tied]), quantization="none")
    assert torch.equal(log_probs(model, input_ids), log_probs(make_model(tied), input_ids))


@TIED
def test_a_quantised_teacher_is_smaller_and_close(
    saved: dict[bool, Path], input_ids: torch.Tensor, tied: bool
) -> None:
    whole = load_teacher_model(str(saved[tied]), quantization="none")
    expected = log_probs(whole, input_ids)
    footprint, divergence = {"none": whole.get_memory_footprint()}, {}
    for quantization in QUANTIZED:
        model = load_teacher_model(str(saved[tied]), quantization=quantization)
        footprint[quantization] = model.get_memory_footprint()
        divergence[quantization] = mean_kl(expected, log_probs(model, input_ids))
        assert 1e-5 < divergence[quantization] < MOST_KL[quantization]  # not zero: it is quantised
    kept = whole.get_input_embeddings().weight.nbytes * (1 if tied else 2)
    linear = footprint["none"] - kept
    # The linear layers shrink to a quarter (int8) and an eighth (nf4, and its block scales); the rest stays.
    assert footprint["int8"] < kept + linear / 3 and footprint["nf4"] < kept + linear / 5
    assert footprint["nf4"] > kept
    assert divergence["int8"] < divergence["nf4"]


@TIED
def test_the_layers_matter_to_the_logits(saved: dict[bool, Path], input_ids: torch.Tensor, tied: bool) -> None:
    """Control of the test above: a model that lost its (quantised) layers would be far away."""
    whole = load_teacher_model(str(saved[tied]), quantization="none")
    expected = log_probs(whole, input_ids)
    with torch.no_grad():
        assert 2 < whole(input_ids).logits.std() < 5
        for layer in whole.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
    assert mean_kl(expected, log_probs(whole, input_ids)) > 5 * MOST_KL["nf4"]


@TIED
@pytest.mark.parametrize("quantization", QUANTIZED)
def test_embeddings_and_head_stay_whole(saved: dict[bool, Path], quantization: str, tied: bool) -> None:
    model = load_teacher_model(str(saved[tied]), quantization=quantization)
    original = make_model(tied)
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert torch.equal(model.get_output_embeddings().weight, original.get_output_embeddings().weight)
    quantised = model.model.layers[0].mlp.up_proj.weight
    assert quantised.dtype in (torch.uint8, torch.int8)  # control


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", [*QUANTIZED, "none"])
def test_what_is_not_quantised_has_the_compute_dtype(
    saved: dict[bool, Path], input_ids: torch.Tensor, quantization: str, dtype: torch.dtype
) -> None:
    model = load_teacher_model(str(saved[True]), quantization=quantization, dtype=dtype)
    assert model.get_input_embeddings().weight.dtype == dtype
    assert model.model.norm.weight.dtype == dtype
    with torch.no_grad():
        hidden = model.model(input_ids)[0]
    assert hidden.dtype == dtype and hidden.isfinite().all()


def test_an_int8_teacher_is_quiet(
    saved: dict[bool, Path], input_ids: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """bitsandbytes says of every matrix product that it casts; a training log must not hold a line for each."""
    model = load_teacher_model(str(saved[True]), quantization="int8")
    with caplog.at_level(logging.DEBUG), torch.no_grad():
        model(input_ids)
    assert not [record for record in caplog.records if "MatMul8bitLt" in record.getMessage()]


def test_init_kwargs_win_over_what_is_set_here(saved: dict[bool, Path]) -> None:
    folder = str(saved[True])
    model = load_teacher_model(folder, quantization="none", init_kwargs={"attn_implementation": "eager"})
    assert model.config._attn_implementation == "eager"
    assert load_teacher_model(folder, quantization="none").config._attn_implementation == "sdpa"  # control
    model = load_teacher_model(folder, quantization="nf4", init_kwargs={"quantization_config": None})
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------------
# What is not loaded
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_pickled_weights_are_refused(tmp_path: Path, quantization: str) -> None:
    model = make_model(tied=False)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named model\.safetensors found in directory"):
        load_teacher_model(str(tmp_path), quantization=quantization)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_teacher_model(str(tmp_path), quantization=quantization)  # control


def test_code_that_comes_with_a_model_runs_only_when_trusted(saved: dict[bool, Path], tmp_path: Path) -> None:
    marker = tmp_path / "code_ran"
    folder = tmp_path / "with_code"
    folder.mkdir()
    for file in saved[True].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "modeling_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(marker)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own_llama"
    config["auto_map"] = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_teacher_model(str(folder), quantization="none")
    assert not marker.exists()
    load_teacher_model(str(folder), quantization="none", trust_remote_code=True)
    assert marker.exists()  # control


# --------------------------------------------------------------------------------------------------------------------
# The head over the student's vocabulary
# --------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Vocabularies:
    """Sizes of the student's and the teacher's embeddings, and of the prefix that means the same to both."""

    student: int
    shared: int
    teacher: int = VOCAB


VOCABULARIES = {
    "larger": Vocabularies(VOCAB + 10, VOCAB),
    "larger, with padding rows in the teacher": Vocabularies(VOCAB + 10, VOCAB - 4),
    "equal": Vocabularies(VOCAB, VOCAB),
    "equal, with other tokens at the end": Vocabularies(VOCAB, VOCAB - 7),
    "smaller": Vocabularies(VOCAB - 6, VOCAB - 6),
    "smaller, with other tokens at the end": Vocabularies(VOCAB - 6, VOCAB - 9),
}


@torch.no_grad()
def head_log_probs(teacher: Teacher, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, T, V_student), from the teacher's backbone and the prepared head."""
    hidden = teacher.model.base_model(input_ids)[0]
    logits = _finish(_raw_logits(hidden.flatten(0, 1), teacher.head), teacher.head)
    return F.log_softmax(logits, dim=-1).view(*input_ids.shape, -1)


@TIED
@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_head_covers_the_students_vocabulary_and_keeps_the_teachers_distribution(
    name: str, tied: bool, input_ids: torch.Tensor
) -> None:
    sizes = VOCABULARIES[name]
    input_ids = input_ids.clamp(max=sizes.shared - 1)
    model, student = make_model(tied), make_model(not tied, vocab=sizes.student, seed=1)
    original = make_model(tied)
    with torch.no_grad():
        # Over the shared tokens, as the teacher was before.
        expected = F.log_softmax(original(input_ids).logits[..., : sizes.shared], dim=-1)
    teacher = prepare_teacher(
        model, student, shared_vocab_size=sizes.shared, unreadable_token_ids=(sizes.student - 1,)
    )
    assert teacher.head.weight.shape == (sizes.student, 64)
    assert teacher.vocabulary == Vocabulary(sizes.student, sizes.shared, (sizes.student - 1,))
    actual = head_log_probs(teacher, input_ids)
    torch.testing.assert_close(actual[..., : sizes.shared], expected, atol=1e-6, rtol=0)
    assert actual[..., sizes.shared :].exp().sum() < 1e-30
    assert actual.isfinite().all()
    # Control: with no bias, every token that the two do not share has mass.
    if sizes.shared < sizes.student:
        unbiased = dataclasses.replace(teacher, head=dataclasses.replace(teacher.head, unshared=None))
        assert head_log_probs(unbiased, input_ids)[..., sizes.shared :].exp().sum() > 1e-3
    else:
        assert teacher.head.unshared is None


@TIED
def test_growing_leaves_the_teachers_own_tokens_and_hidden_states_exact(tied: bool, input_ids: torch.Tensor) -> None:
    model, original = make_model(tied), make_model(tied)
    prepare_teacher(model, make_model(vocab=VOCAB + 10), shared_vocab_size=VOCAB)
    for get in (PreTrainedModel.get_input_embeddings, PreTrainedModel.get_output_embeddings):
        grown, before = get(model).weight, get(original).weight
        assert grown.shape[0] == VOCAB + 10
        assert torch.equal(grown[:VOCAB], before) and not grown[VOCAB:].any()
    tie = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tie is tied
    with torch.no_grad():
        assert torch.equal(model.model(input_ids)[0], original.model(input_ids)[0])


@TIED
def test_a_teacher_that_is_large_enough_is_not_touched(tied: bool) -> None:
    for student_vocab in (VOCAB, VOCAB - 6):
        model = make_model(tied)
        teacher = prepare_teacher(model, make_model(vocab=student_vocab), shared_vocab_size=student_vocab)
        assert model.get_input_embeddings().weight.shape[0] == VOCAB
        weight = head_of(model).weight
        assert teacher.head.weight.data_ptr() == weight.data_ptr()  # a view: no second copy of the head in memory


@TIED
@pytest.mark.parametrize("student_vocab", [VOCAB + 10, VOCAB, VOCAB - 6])
def test_a_prepared_teacher_is_frozen_and_in_eval_mode(tied: bool, student_vocab: int) -> None:
    model = make_model(tied).train()
    assert any(parameter.requires_grad for parameter in model.parameters())
    teacher = prepare_teacher(model, make_model(vocab=student_vocab), shared_vocab_size=min(VOCAB, student_vocab))
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training
    assert not teacher.head.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_heads_keep_unshared_tokens_out(dtype: torch.dtype, input_ids: torch.Tensor) -> None:
    teacher = prepare_teacher(make_model().to(dtype), make_model(vocab=VOCAB + 10), shared_vocab_size=VOCAB)
    assert teacher.head.weight is not None and teacher.head.weight.dtype == dtype
    actual = head_log_probs(teacher, input_ids)
    assert actual.isfinite().all() and actual[..., VOCAB:].exp().sum() < 1e-30


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_head_with_a_bias_of_its_own_keeps_it(name: str, input_ids: torch.Tensor) -> None:
    """Phi's head has one; growing must extend it, and cutting must cut it."""
    sizes = VOCABULARIES[name]
    input_ids = input_ids.clamp(max=sizes.shared - 1)
    config = PhiConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=1,
    )
    model = PhiForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.bias.normal_()
        expected = F.log_softmax(model(input_ids).logits[..., : sizes.shared], dim=-1)
        without_bias = F.linear(model.model(input_ids)[0], model.lm_head.weight)[..., : sizes.shared]
    student = make_model(vocab=sizes.student)
    actual = head_log_probs(prepare_teacher(model, student, shared_vocab_size=sizes.shared), input_ids)
    torch.testing.assert_close(actual[..., : sizes.shared], expected, atol=1e-6, rtol=0)
    assert actual[..., sizes.shared :].exp().sum() < 1e-30
    assert (F.log_softmax(without_bias, dim=-1) - expected).abs().max() > 0.1  # control


@TIED
@pytest.mark.parametrize("quantization", QUANTIZED)
def test_a_quantised_teacher_grows_as_well(
    saved: dict[bool, Path], input_ids: torch.Tensor, quantization: str, tied: bool
) -> None:
    model = load_teacher_model(str(saved[tied]), quantization=quantization)
    expected = log_probs(model, input_ids)
    footprint = model.get_memory_footprint()
    teacher = prepare_teacher(model, make_model(vocab=VOCAB + 10), shared_vocab_size=VOCAB)
    actual = head_log_probs(teacher, input_ids)
    torch.testing.assert_close(actual[..., :VOCAB], expected, atol=1e-6, rtol=0)
    assert actual[..., VOCAB:].exp().sum() < 1e-30
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    new_rows = 10 * 64 * 4 * (1 if tied else 2)
    assert teacher.footprint == teacher.model.get_memory_footprint() == footprint + new_rows


@pytest.mark.parametrize(
    ("bf16", "fp16", "dtype"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.float16)],
)
def test_the_compute_dtype_is_autocasts_or_that_of_the_students_weights(
    bf16: bool, fp16: bool, dtype: torch.dtype
) -> None:
    student = make_model(layers=1)
    assert compute_dtype_of(student, bf16=bf16, fp16=fp16) == dtype
    half = student.to(torch.bfloat16)
    assert compute_dtype_of(half, bf16=False, fp16=False) == torch.bfloat16


ADAPTERS: dict[str, dict[str, object]] = {
    "none": {},
    "LoRA on the layers": {"target_modules": ["q_proj"]},
    "LoRA on both ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "both ends trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 6]}},
    "some tokens of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]},
    },
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_students_vocabulary_is_told_through_any_adapter(kind: str, tied: bool) -> None:
    """PEFT's wrappers do not give the sizes of what they wrap."""
    student = tiny.make_vlm(0, tie_word_embeddings=tied)
    size = student.get_input_embeddings().num_embeddings
    if ADAPTERS[kind]:
        student = get_peft_model(student, LoraConfig(r=2, **ADAPTERS[kind])).get_base_model()  # type: ignore[arg-type]
    report = CompatibilityReport("student", "teacher", [], shared_vocab_size=size - 4)
    assert vocabulary_of(student, report).size == size

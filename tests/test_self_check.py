"""The check of the real pair before training: faults that no shape shows are refused with numbers, and nothing is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from families import LM_VOCAB, build_family, randomise_
from peft import LoraConfig, OFTConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoModelForCausalLM,
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    CohereConfig,
    DeepseekV3Config,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    GptOssConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from hf_lingudistill._internals import head_of
from hf_lingudistill.queries import Vocabulary, plan_queries
from hf_lingudistill.replay import replayed_pass
from hf_lingudistill.rotary import order
from hf_lingudistill.self_check import self_check, text_ids
from hf_lingudistill.sharing import sharing
from hf_lingudistill.student_kv import recording

IDS = torch.randint(5, 150, (1, 48), generator=torch.Generator().manual_seed(3))
TRIED = "the student's weights in the teacher's class are off by"
_IDS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}

SIZES: dict[str, Any] = {
    "vocab_size": LM_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **_IDS,
}


def ernie(**sizes: Any) -> Ernie4_5ForCausalLM:
    """An LM whose weights have Llama's names and shapes, and whose attention turns neighbouring dimensions where Llama's turns halves."""
    torch.manual_seed(1)
    return Ernie4_5ForCausalLM(Ernie4_5Config(use_bias=False, **sizes)).eval()


def glm4v_pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A VLM and its LM with the very same weights: the VLM's rotary module repeats each angle, the LM's repeats all of them."""
    sizes = {**SIZES, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
    vision |= {"image_size": 16, "out_hidden_size": 64}
    text = {"rope_parameters": {**rope, "mrope_section": [2, 1, 1]}, "rms_norm_eps": 1e-5, **sizes}
    student = Glm4vForConditionalGeneration(Glm4vConfig(text_config=text, vision_config=vision, image_token_id=150))
    randomise_(student.eval(), seed=1)
    lm = Glm4Config(head_dim=16, attention_bias=True, rope_parameters=rope, rms_norm_eps=1e-5, **sizes)
    teacher = Glm4ForCausalLM(lm).eval()
    teacher.model.load_state_dict(student.get_decoder().state_dict(), strict=True)
    return student, teacher


# --- pairs that fit --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["smolvlm", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_honest_pairs_pass(name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    family = build_family(name)
    student, teacher = family.fresh_student().to(dtype), family.make_teacher(identical=True).to(dtype)
    with caplog.at_level("INFO"):
        self_check(student, teacher, IDS)
    assert TRIED in caplog.text


def in_llava(text: PreTrainedConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A VLM around an LM of any kind, and that LM with the same weights."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=160)
    student = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        spread = 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1.0
        parameter.data.normal_(0.0, spread, generator=generator)
    teacher = AutoModelForCausalLM.from_config(student.config.text_config).eval()
    teacher.model.load_state_dict(student.get_decoder().state_dict(), strict=True)
    return student, teacher


def mla() -> DeepseekV3Config:
    sizes = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    return DeepseekV3Config(**SIZES, **sizes, num_key_value_heads=4, first_k_dense_replace=2)


def sinks() -> GptOssConfig:
    return GptOssConfig(**SIZES, num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize("text", [mla, sinks])
def test_latent_attention_and_sinks_are_followed(
    text: Callable[[], PreTrainedConfig], caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = in_llava(text())
    with caplog.at_level("INFO"):
        self_check(student, teacher, IDS)
    assert TRIED in caplog.text


def test_values_that_a_flash_kernel_padded_are_cut_to_their_size() -> None:
    _, teacher = in_llava(mla())
    asked = torch.where(torch.arange(48) % 3 == 0, IDS, -100)
    plan = plan_queries(IDS, asked, sharing=sharing("full"), vocabulary=Vocabulary(size=160, shared_size=160))
    with torch.no_grad(), recording(teacher) as own:
        teacher.model(IDS)
    expected = replayed_pass(teacher, own, plan)
    own.values = {layer: torch.nn.functional.pad(states, (0, 4)) for layer, states in own.values.items()}
    torch.testing.assert_close(replayed_pass(teacher, own, plan), expected, rtol=0, atol=0)
    own.values = {layer: states.flip(-1) for layer, states in own.values.items()}  # control: they are read
    assert (replayed_pass(teacher, own, plan) - expected).abs().max() > 0.1


def test_head_sizes_that_differ_from_layer_to_layer_pass(caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 4: wide heads in the layers with full attention."""
    gemma4 = pytest.importorskip("transformers.models.gemma4")
    text = gemma4.Gemma4TextConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=LM_VOCAB,
        num_kv_shared_layers=0,
    )
    torch.manual_seed(0)
    student = gemma4.Gemma4ForConditionalGeneration(
        gemma4.Gemma4Config(text_config=text, vision_config=None, audio_config=None)
    )
    teacher = gemma4.Gemma4ForCausalLM(student.config.text_config)
    teacher.model.load_state_dict(student.get_decoder().state_dict(), strict=True)
    with caplog.at_level("INFO"):
        self_check(student.eval(), teacher.eval(), IDS)
    assert TRIED in caplog.text


def test_a_teacher_of_another_width_passes_and_the_log_says_what_was_not_tried(
    caplog: pytest.LogCaptureFixture,
) -> None:
    family = build_family("smolvlm")
    with caplog.at_level("INFO"):
        self_check(family.student, family.make_teacher(identical=False), IDS)
    assert "were not tried in the teacher's class: embed_tokens.weight is (168, 48)" in caplog.text
    assert "cos and sin of the student's RoPE differ" in caplog.text  # another theta: replayed, and no fault
    assert TRIED not in caplog.text


def test_cos_and_sin_in_another_order_are_reordered(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = glm4v_pair()
    with torch.no_grad():  # the very values, by the sizes of the two
        outputs = [
            model.get_decoder().rotary_emb(torch.zeros(1), positions)
            for model, positions in ((student, torch.arange(9).expand(3, 1, -1)), (teacher, torch.arange(9)[None]))
        ]
    assert [order(output) for output in outputs] == ["pairs", "halves"]
    with caplog.at_level("INFO"):
        self_check(student, teacher, IDS)
    assert TRIED in caplog.text


def test_without_that_the_teacher_would_be_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the test above."""
    student, teacher = glm4v_pair()
    monkeypatch.setattr("hf_lingudistill.replay.reordered", lambda rotary, *_: rotary)
    with pytest.raises(ValueError, match=r"Glm4ForCausalLM.*off by [01]\.\d+ of their length"):
        self_check(student, teacher, IDS)


# --- pairs that do not -----------------------------------------------------------------------------------------------


def test_a_permuted_rotary_module_is_refused_on_any_family() -> None:
    family = build_family("qwen2_5_vl")
    teacher = family.make_teacher(identical=False)  # of another width: its class cannot be tried
    rotary: Any = teacher.model.rotary_emb
    forward = rotary.forward

    def interleaved(*args: Any, **kwargs: Any) -> Any:
        cos, sin = forward(*args, **kwargs)
        half = cos.shape[-1] // 2
        return tuple(part[..., :half].repeat_interleave(2, dim=-1) for part in (cos, sin))

    self_check(family.student, teacher, IDS)  # the control
    rotary.register_forward_hook(lambda module, args, kwargs, output: interleaved(*args, **kwargs), with_kwargs=True)
    with pytest.raises(ValueError, match="order their rotary embedding differently"):
        self_check(family.student, teacher, IDS)


def test_a_class_that_turns_queries_another_way_is_refused_with_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    family = build_family("llava")
    config = family.student.config.get_text_config()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    names += ("num_key_value_heads", "rms_norm_eps", "rope_parameters")
    teacher = ernie(**{name: getattr(config, name) for name in names})
    with pytest.raises(ValueError, match="the student the two halves, the teacher neighbours"):
        self_check(family.student, teacher, IDS)
    # And where keys do not tell, its class on the student's weights does
    monkeypatch.setattr("hf_lingudistill.self_check.turned", lambda *_: set())
    with pytest.raises(ValueError, match=r"Ernie4_5ForCausalLM.*off by [01]\.\d+ of their length \(at most 0\.02"):
        self_check(family.student, teacher, IDS)


def test_a_wider_lm_that_turns_queries_another_way_is_refused() -> None:
    """Its class cannot be tried on the student's weights: the keys alone tell."""
    family = build_family("llava")
    config = family.student.config.get_text_config()
    names = ("vocab_size", "num_hidden_layers", "head_dim", "num_key_value_heads", "rope_parameters")
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 6}
    teacher = ernie(**sizes, **{name: getattr(config, name) for name in names})
    with pytest.raises(ValueError, match="the student the two halves, the teacher neighbours"):
        self_check(family.student, teacher, IDS)


def test_an_lm_that_mixes_tokens_outside_attention_is_refused() -> None:
    """As short convolutions and recurrent layers do. Asked about all of its tokens at once, it would pass."""
    family = build_family("smolvlm")
    teacher = family.make_teacher(identical=False)
    self_check(family.student, teacher, IDS)
    teacher.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + args[0].roll(1, dims=1), *args[1:]))
    with pytest.raises(ValueError, match="The teacher is not itself under KV sharing"):
        self_check(family.student, teacher, IDS)


def test_a_teacher_that_is_not_finite_is_refused() -> None:
    family = build_family("smolvlm")
    teacher = family.make_teacher(identical=False)
    teacher.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite: its weights are broken"):
        self_check(family.student, teacher, IDS)


@pytest.mark.parametrize("identical", [True, False], ids=["LM", "wider LM"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_of_the_student_that_are_not_finite_are_named(bad: float, identical: bool) -> None:
    """A distance of NaN is no reason to call the two classes different; with a wider LM there is none. Control: the pair passes before."""
    family = build_family("smolvlm")
    teacher = family.make_teacher(identical=identical)
    self_check(family.student, teacher, IDS)
    weight = family.student.model.text_model.layers[0].mlp.up_proj.weight
    weight.data[0, 0] = bad
    with pytest.raises(ValueError, match=r"the student.*layers\.0\.mlp\.up_proj\.weight"):
        self_check(family.student, teacher, IDS)


# --- what is left behind ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["smolvlm", "qwen2_vl"])
@pytest.mark.parametrize("refused", [False, True])
def test_neither_model_is_changed(name: str, refused: bool) -> None:
    family = build_family(name)
    student, teacher = family.fresh_student().train(), family.make_teacher(identical=True)
    student.base_model.get_input_embeddings().eval()  # a part that somebody froze
    if refused:
        teacher.config.rms_norm_eps = 10.0  # read by the class when it is built
    models = (student, teacher)

    def seen() -> list[Any]:
        states: list[Any] = [torch.get_rng_state().tolist()]
        for model in models:
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            states.append({n: (t.data_ptr(), t.requires_grad, t.grad, t._version) for n, t in tensors.items()})
            states.append(
                [
                    (m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
                    for m in model.modules()
                ]
            )
            states.append((model.config.to_dict(), model.config.get_text_config()._attn_implementation))
        return [*states, str(getattr(student.base_model, "rope_deltas", None))]

    before, weights = copy.deepcopy(seen()), [copy.deepcopy(model.state_dict()) for model in models]
    if refused:
        with pytest.raises(ValueError, match="do not give the student's hidden states"):
            self_check(student, teacher, IDS)
    else:
        self_check(student, teacher, IDS)
    assert seen() == before
    for model, state in zip(models, weights, strict=True):
        torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


# --- in the trainer --------------------------------------------------------------------------------------------------
@pytest.fixture
def unfit_teacher() -> LlamaForCausalLM | Ernie4_5ForCausalLM:
    lm = tiny.make_lm(1).config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", *_IDS)
    return ernie(head_dim=lm.head_dim, **{name: getattr(lm, name) for name in names})


def test_the_trainer_refuses_unless_it_is_told_not_to_look(
    make_trainer: Callable[..., Any], unfit_teacher: Any
) -> None:
    with pytest.raises(ValueError, match="turn other dimensions of a head together.*--self_check false"):
        make_trainer(teacher_model=unfit_teacher)
    make_trainer(teacher_model=unfit_teacher, self_check=False)
    make_trainer(teacher_model=unfit_teacher, kv_sharing="none")  # nothing of the student's is read


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.1),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, trainable_token_indices=[1, 2]),
        OFTConfig(target_modules=["q_proj", "v_proj"], oft_block_size=4, r=0, init_weights=False),
    ],
    ids=["LoRA", "LoRA and tokens", "OFT"],
)
def test_a_trained_adapter_is_left_aside_and_comes_back(
    make_trainer: Callable[..., Any], caplog: pytest.LogCaptureFixture, adapter: Any
) -> None:
    torch.manual_seed(0)
    student = get_peft_model(tiny.make_vlm(0), adapter)
    trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    with caplog.at_level("INFO"):
        trainer = make_trainer(model=student)
    assert TRIED in caplog.text
    assert {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad} == trainable
    layers = [module for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers and not any(layer.disable_adapters for layer in layers)
    make_trainer(model=get_peft_model(tiny.make_vlm(0), adapter), bf16=True)


# --- parts -----------------------------------------------------------------------------------------------------------
def test_the_text_is_what_both_read() -> None:
    tokenizer = tiny.make_tokenizer(extra=True)
    ids = text_ids(tokenizer, Vocabulary(size=len(tokenizer), shared_size=300, unreadable=(70,)))
    assert ids.shape == (1, 64) and int(ids.max()) < 300 and 70 not in ids
    spread = text_ids(lambda **_: {"input_ids": [5000]}, Vocabulary(size=320, shared_size=300, unreadable=(0,)))
    assert spread.shape == (1, 63) and int(spread.max()) == 299


# --- the head --------------------------------------------------------------------------------------------------------
def cohere_pair(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A VLM whose forward leaves out the logit scale that its config declares, and its LM, whose forward applies it."""
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    sizes = {**SIZES, "num_key_value_heads": 2, "logit_scale": 0.25, "layer_norm_eps": 1e-5}
    if kind == "aya_vision":
        config: Any = AyaVisionConfig(text_config=CohereConfig(**sizes), vision_config=vision, image_token_id=150)
        student: PreTrainedModel = AyaVisionForConditionalGeneration(config)
    else:
        text = Cohere2Config(**sizes, head_dim=16)
        student = Cohere2VisionForConditionalGeneration(
            Cohere2VisionConfig(text_config=text, vision_config=vision, image_token_id=150)
        )
    randomise_(student.eval(), seed=1)
    teacher = AutoModelForCausalLM.from_config(student.config.text_config).eval()
    teacher.model.load_state_dict(student.get_decoder().state_dict(), strict=True)
    teacher.tie_weights()
    return student, teacher


@pytest.mark.parametrize("kind", ["aya_vision", "cohere2_vision"])
def test_a_logit_scale_that_the_students_forward_leaves_out_is_said_and_trained_with(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = cohere_pair(kind)
    with torch.no_grad():  # control: the two differ by the scale alone, and the LM's is the declared one
        torch.testing.assert_close(student(IDS).logits * 0.25, teacher(IDS).logits, rtol=1e-3, atol=1e-3)
    assert head_of(student).scale == head_of(teacher).scale == 0.25
    self_check(student, teacher, IDS)
    assert "multiplies logits by 0.25" in caplog.text and "as at a temperature of 0.25" in caplog.text
    assert type(student).__name__ in caplog.text
    caplog.clear()
    student.config.text_config.logit_scale = teacher.config.logit_scale = teacher.logit_scale = 1.0
    self_check(student, teacher, IDS)
    assert "temperature" not in caplog.text  # control


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_head_that_does_more_than_its_config_says_is_refused_with_the_number(role: str) -> None:
    family = build_family("smolvlm")
    student, teacher = family.fresh_student(), family.make_teacher(identical=True)
    self_check(student, teacher, IDS)  # the control
    model: Any = student if role == "student" else teacher
    model.lm_head.register_forward_hook(lambda _, __, output: output.tanh())
    with pytest.raises(ValueError, match=rf"The {role}'s own logits are not what its head gives: they are off by \d"):
        self_check(student, teacher, IDS)

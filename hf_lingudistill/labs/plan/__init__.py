"""Memory per device and cost of a step, on paper: from two configs, without a weight and without a GPU.

    student, teacher = read_pair("Qwen/Qwen2.5-VL-7B-Instruct", None)
    plan = make_plan(student, teacher, Setup(seq_len=2048, engine="fsdp2", gpus=8))
    print(plan)

Parameters are counted exactly, on the models that transformers builds from the configs (`facts.py`). Everything else is
arithmetic: a step has five moments that can be its peak (`memory.py`), and the plan shows the largest; `cost.py` counts
operations. `benchmarks/plan_check.py` holds the sums against measured peaks; docs/scale.md says what they leave out.
"""

from .cost import step_cost, step_seconds
from .facts import LORA_TARGETS, ModelFacts, TowerFacts, model_facts, read_pair
from .known_models import BUILT_IN_PAIRS
from .memory import kv_bytes, layer_activations, teacher_bytes, trainable_parameters
from .plan import GIB, Plan, make_plan, smallest_plan
from .setup import ENGINES, QUANTIZATIONS, PlanError, Setup

__all__ = [
    "BUILT_IN_PAIRS",
    "ENGINES",
    "GIB",
    "LORA_TARGETS",
    "QUANTIZATIONS",
    "ModelFacts",
    "Plan",
    "PlanError",
    "Setup",
    "TowerFacts",
    "kv_bytes",
    "layer_activations",
    "make_plan",
    "model_facts",
    "read_pair",
    "smallest_plan",
    "step_cost",
    "step_seconds",
    "teacher_bytes",
    "trainable_parameters",
]

"""The teacher: loaded, quantised, placed."""

from __future__ import annotations

from .fault import Fault

FAULTS = (
    # ---- teacher.py, quantization.py, engines.py, machine.py
    Fault(
        "unshared-not-lowered",
        "teacher.py",
        "unshared=torch.tensor(unshared, device=head.weight.device) if unshared else None",
        "unshared=None",
        "tokens that the teacher does not know get its probability",
        ("tests/test_teacher.py::test_the_head_covers_the_students_vocabulary_and_keeps_the_teachers_distribution",),
    ),
    Fault(
        "new-rows-not-zero",
        "teacher.py",
        "weights[own_vocab:] = 0.0",
        "weights[own_vocab:] += 1.0",
        "rows that the teacher grows are not zero",
        ("tests/test_teacher.py::test_growing_leaves_the_teachers_own_tokens_and_hidden_states_exact",),
    ),
    Fault(
        "pickles-loaded",
        "teacher.py",
        '"use_safetensors": True,',
        '"use_safetensors": None,',
        "pickled weights are loaded",
        ("tests/test_teacher.py::test_pickled_weights_are_refused",),
    ),
    Fault(
        "trained-layer-packed",
        "quantization.py",
        "wanted = machine().bf16 and not trained",
        "wanted = machine().bf16",
        "a student's layers are packed, and lose their gradient",
        ("tests/test_quantization.py",),
    ),
    Fault(
        "columns-not-checked",
        "quantization.py",
        "fits = rows % PACKED_ROWS == 0 and columns",
        "fits = columns",
        "a layer that does not pack is packed",
        ("tests/test_quantization.py::test_a_layer_is_packed_where_it_fits_and_computes_in_bf16_anyway",),
    ),
    Fault(
        "quantised-sharded",
        "engines.py",
        'return teacher_sharding != "replicate" and sharding is not None and not quantised',
        'return teacher_sharding != "replicate" and sharding is not None',
        "packed weights are cut in pieces",
        ("tests/test_engines.py::test_teacher_sharding_is_resolved",),
    ),
    Fault(
        "placeholder-counts",
        "engines.py",
        "f.float().sum() * 0.0 for f",
        "f.float().sum() * 1e-3 for f",
        "the blank image of another process moves the logits",
        ("tests/test_engines.py::test_a_blank_image_reaches_every_weight_of_the_vision_tower_and_changes_no_logit",),
    ),
    Fault(
        "bf16-not-forced",
        "machine.py",
        'bf16=bool(forced["bf16"]) if "bf16" in forced else _multiplies_in_bf16(kind)',
        "bf16=_multiplies_in_bf16(kind)",
        "the variable does not reach what it forces",
        ("tests/test_machine.py::test_bf16_is_forced_either_way",),
    ),
    Fault(
        "stale-gradient",
        "engines.py",
        "self.images_in_step or self.leaves_gradients or not",
        "self.images_in_step or not",
        "under ZeRO-3 a step of text applies the tower's last gradient again",
        ("tests/test_engines.py::test_where_an_unused_weight_keeps_its_last_gradient_all_are_used",),
    ),
)

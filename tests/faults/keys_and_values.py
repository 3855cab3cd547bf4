"""What is recorded of the student and replayed to the teacher."""

from __future__ import annotations

from .fault import FAMILIES, FULL_LENGTH, TRAINER, VLM_TEACHER, Fault

KV_SOURCE = "tests/test_kv_source.py"
MASK_ROWS = "tests/test_mask_rows.py"
EYES = "tests/test_eyes.py"

FAULTS = (
    # ---- student_kv.py
    Fault(
        "record-not-detached",
        "student_kv.py",
        "= key.detach(), value.detach()",
        "= key, value",
        "the record keeps the student's graph alive",
        (f"{FAMILIES}::test_recording_leaves_gradients_alone_without_checkpointing",),
    ),
    Fault(
        "kv-not-released",
        "student_kv.py",
        "        self.values.clear()\n",
        "",
        "recorded values live through the backward pass",
        (f"{TRAINER}::test_recorded_keys_and_values_are_freed_before_the_divergence",),
    ),
    Fault(
        "record-left-behind",
        "student_kv.py",
        "_RECORDS.pop(id(config), None)",
        "_RECORDS.get(id(config), None)",
        "later forwards go on recording",
        (f"{FAMILIES}::test_recording_is_undone",),
    ),
    Fault(
        "recompute-recorded",
        "student_kv.py",
        "        with (\n            attention_switched(decoder, _record_name) as configs,\n"
        "            mixers_recorded(decoder, shared.mixed if keep_kv else None, shared.mixed_documents) as shared.mixer_layers,\n        ):\n"
        "            for config in configs:\n                _RECORDS[id(config)] = shared\n"
        "            try:\n                yield shared\n            finally:\n"
        "                for config in configs:\n                    _RECORDS.pop(id(config), None)\n",
        "        _RECORDS[0] = attention_switched(decoder, _record_name)\n"
        "        with mixers_recorded(decoder, shared.mixed if keep_kv else None, shared.mixed_documents) as shared.mixer_layers:\n"
        "            for config in _RECORDS[0].__enter__():\n                _RECORDS[id(config)] = shared\n"
        "            yield shared\n",
        "the recomputation of gradient checkpointing is recorded",
        (f"{FAMILIES}::test_activation_checkpointing_records_the_forward_and_not_the_backward",),
    ),
    Fault(
        "documents-joined",
        "student_kv.py",
        "starts = position_ids[0] == position_ids.min()",
        "starts = position_ids[0] == position_ids.max()",
        "packed documents begin at their last token",
        ("tests/test_flash.py::test_packed_documents_do_not_see_each_other",),
    ),
    # ---- replay.py
    Fault(
        "window-off-by-one",
        "replay.py",
        "seen &= keys > queries - layer.sliding_window",
        "seen &= keys >= queries - layer.sliding_window",
        "the sliding window is a token too wide",
        ("tests/test_mask_rows.py::test_rows_equal_those_of_the_dense_mask",),
    ),
    Fault(
        "causal-off-by-one",
        "replay.py",
        "seen &= keys <= queries\n",
        "seen &= keys <= queries + 1\n",
        "a query sees the token after it",
        ("tests/test_mask_rows.py::test_rows_equal_those_of_the_dense_mask",),
    ),
    Fault(
        "mask-dropped",
        "replay.py",
        "seen &= mask[rows].bool()[:, None, :]",
        "pass",
        "padding is seen where attention gets a padding mask",
        ("tests/test_mask_rows.py::test_rows_equal_those_of_the_dense_mask",),
    ),
    Fault(
        "boundary-off-by-one",
        "replay.py",
        "keys, right=True)",
        "keys, right=False)",
        "a packed document begins one token late",
        ("tests/test_mask_rows.py::test_packed_documents_do_not_see_each_other",),
    ),
    Fault(
        "mask-of-the-first-row",
        "replay.py",
        "return mask.transpose(1, 2)[batch, positions]",
        "return mask.transpose(1, 2)[batch * 0, positions]",
        "every row gets the mask of the first",
        ("tests/test_mask_rows.py::test_each_row_of_the_batch_gets_its_own_mask",),
    ),
    Fault(
        "groups-folded-wrong",
        "replay.py",
        "rows.to(dtype).repeat(1, 1, groups, 1)",
        "rows.to(dtype).repeat_interleave(groups, dim=2)",
        "mask rows of grouped queries stand in the wrong order",
        (FULL_LENGTH,),
    ),
    Fault(
        "groups-repeated-wrong",
        "replay.py",
        "key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)\n    seen =",
        "key, value = key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1)\n    seen =",
        "unfolded query heads read another head's keys",
        (f"{FAMILIES}::test_query_heads_that_are_not_folded_read_their_own_key_heads",),
    ),
    Fault(
        "rotary-of-the-first-row",
        "replay.py",
        "rotary.expand(plan.batch, -1, -1)[plan.rows, plan.positions]",
        "rotary.expand(plan.batch, -1, -1)[plan.rows * 0, plan.positions]",
        "padded rows are rotated as the first one",
        (FULL_LENGTH,),
    ),
    Fault(
        "own-in-the-wrong-row",
        "replay.py",
        'self.own_rows = torch.div(plan.flat[own], width, rounding_mode="floor")',
        'self.own_rows = torch.div(plan.flat[own], width, rounding_mode="floor").flip(0)',
        "the teacher's own keys lie in another row",
        (FULL_LENGTH,),
    ),
    Fault(
        "position-ids-compacted",
        "replay.py",
        "    positions = shared.position_ids\n",
        "    positions = None\n",
        "families that scale queries by position get places in the row for positions",
        (f"{FAMILIES}::test_the_teacher_is_told_the_students_positions",),
    ),
    Fault(
        "layers-shifted",
        "replay.py",
        "recorded = (shared.keys[layer_idx], shared.values[layer_idx])",
        "recorded = (shared.keys[max(layer_idx - 1, 0)], shared.values[max(layer_idx - 1, 0)])",
        "layers read the record of the layer below",
        (FULL_LENGTH,),
    ),
    Fault(
        "plain-rows-joined",
        "replay.py",
        '            slots -= begins[torch.div(plan.flat, width, rounding_mode="floor")]\n',
        "",
        "rows packed for a pass of its own see each other",
        (FULL_LENGTH, "tests/test_properties.py::test_without_sharing_the_teacher_reads_the_text_alone"),
    ),
    Fault(
        "packed-without-looking",
        "replay.py",
        "packs = teacher.config.get_text_config() is teacher.config",
        "packs = True",
        "a decoder that does not look for packed documents reads rows as one",
        (f"{VLM_TEACHER}::test_the_text_half_of_a_vlm_says_what_its_lm_says",),
    ),
    Fault(
        "text-half-of-the-whole",
        "teacher.py",
        "    if sees:\n        return AutoModelForImageTextToText\n",
        "    if True:\n        return AutoModelForImageTextToText\n",
        "the text half of a VLM keeps its tower in memory",
        (f"{VLM_TEACHER}::test_the_text_half_of_a_vlm_says_what_its_lm_says",),
    ),
    Fault(
        "images-of-the-first-row",
        "replay.py",
        "return hidden[plan.loss_rows, plan.loss_positions]",
        "return hidden[plan.loss_rows * 0, plan.loss_positions]",
        "a teacher with eyes judges every row by the first",
        (f"{VLM_TEACHER}::test_with_its_own_eyes_a_vlm_gives_its_plain_forward",),
    ),
    Fault(
        "other-pixels-pass",
        "image_check.py",
        "if distance > (ALLOWED if mine.is_floating_point() else 0):",
        "if distance > (ALLOWED if not mine.is_floating_point() else 10):",
        "a teacher whose processor normalises otherwise is let through",
        (f"{VLM_TEACHER}::test_a_teacher_whose_processor_prepares_other_images_is_refused",),
    ),
    # ---- the order in memory, and of cos and sin
    Fault(
        "answer-viewed",
        "replay.py",
        "return seen.reshape(R, H, W, value.shape[3])",
        "return seen.view(R, H, W, value.shape[3])",
        "attention that lays its answer out as CUDA's does stops the step",
        (f"{MASK_ROWS}::test_a_kernel_may_lay_its_answer_out_in_any_order",),
    ),
    Fault(
        "rotary-as-it-came",
        "rotary.py",
        "    if {given, wanted} != _REORDERED or not isinstance(rotary, tuple):\n",
        "    if True:\n",
        "a teacher whose cos and sin come in another order turns its queries into noise",
        ("tests/test_rotary.py::test_each_order_becomes_the_other_and_no_third",),
    ),
    Fault(
        "pairs-for-halves",
        "rotary.py",
        "torch.cat([part[..., 0::2]] * 2, dim=-1)",
        "torch.cat([part[..., 1::2].flip(-1)] * 2, dim=-1)",
        "angles go to other dimensions than theirs",
        ("tests/test_rotary.py::test_each_order_becomes_the_other_and_no_third",),
    ),
    # ---- what the VLM before lends
    Fault(
        "a-column-short",
        "anchor.py",
        "return {name: value[:, :columns] if",
        "return {name: value[:, : columns - 1] if",
        "the last token that the teacher reads is missing",
        (f"{KV_SOURCE}::test_the_first_columns_lend_what_the_whole_rows_would",),
    ),
    Fault(
        "lent-from-the-right",
        "replay.py",
        "nn.functional.pad(states, (0, 0, 0, behind))",
        "nn.functional.pad(states, (0, 0, behind, 0))",
        "lent keys and values lie under other tokens",
        (f"{KV_SOURCE}::test_the_first_columns_lend_what_the_whole_rows_would",),
    ),
    Fault(
        "text-not-tried",
        "anchor.py",
        """return self._same_without(inputs, columns) and self._same_without(
                {"input_ids": text, **kinds}, text.shape[1] // 2
            )""",
        "return self._same_without(inputs, columns)",
        "the prompt of a prefix LM is cut where the first batch does not show it",
        (f"{KV_SOURCE}::test_the_first_columns_lend_what_the_whole_rows_would",),
    ),
    Fault(
        "images-of-other-rows-cut",
        "queries.py",
        "read = images | (attended & ((~readable & ~labelled) | ((where <= last) & ~own)))",
        "read = attended & ((where <= last) & ~own)",
        "rows that are not marked lose image tokens, and pixels have no place",
        (f"{KV_SOURCE}::test_no_row_loses_an_image_token",),
    ),
    # ---- eyes.py
    Fault(
        "eyes-of-a-trained-tower",
        "eyes.py",
        "if any(weight.requires_grad for weight in self._parameters):",
        "if False:",
        "the VLM before is given features of a tower that is trained",
        (f"{EYES}::test_a_tower_that_is_trained_is_looked_through_by_each",),
    ),
    Fault(
        "eyes-not-looked-at-again",
        "eyes.py",
        "if touched != self._touched:",
        "if self._touched == -1:",
        "a tower whose weights were changed goes on being taken for the same",
        (f"{EYES}::test_a_tower_that_was_trained_for_a_while_is_another",),
    ),
    Fault(
        "eyes-with-dropout",
        "eyes.py",
        "        if _differs_in_training(self.student):\n            return False\n",
        "",
        "the teacher reads features with dropout",
        (f"{EYES}::test_a_tower_that_is_another_in_training_is_run_by_each",),
    ),
    Fault(
        "eyes-of-an-adapter",
        "eyes.py",
        "return all(own_name(self.student, name) is not None for name in self._ours)",
        "return True",
        "the VLM before is given features of a tower with its adapter on",
        (f"{EYES}::test_an_adapter_that_is_frozen_still_changes_the_tower",),
    ),
    Fault(
        "eyes-rounded",
        "eyes.py",
        "if first and any(ours.dtype != self._theirs[name].dtype for name, ours in self._ours.items()):",
        "if False:",
        "the student is trained on features of weights in half precision",
        (f"{EYES}::test_between_two_dtypes_the_student_keeps_its_own",),
    ),
    Fault(
        "vision-not-frozen",
        "step_mixin.py",
        "            freeze_vision(student)\n",
        "            pass\n",
        "freeze_vision freezes nothing",
        (f"{EYES}::test_a_frozen_tower_and_projector_end_as_they_began",),
    ),
    Fault(
        "eyes-compiled",
        "step_mixin.py",
        "compiled=bool(args.torch_compile),",
        "compiled=False,",
        "a compiled student is traced anew in every step",
        (f"{EYES}::test_of_a_compiled_student_each_looks_for_itself",),
    ),
)

"""What is measured and said: intervals, metrics, the plan, what may not be read or published."""

from __future__ import annotations

from .fault import FEATURES, FORMATS, TRAINER, Fault

STATISTICS = "tests/test_statistics.py"
METRICS = "tests/test_metrics.py"
TEST_PLAN = "tests/test_plan.py"
FROM_TRAINING = "tests/publish/test_from_training.py"

FAULTS = (
    # ---- labs/statistics.py
    Fault(
        "interval-of-two",
        "labs/statistics.py",
        "FEWEST = 6",
        "FEWEST = 2",
        "two items that agree make a sure difference",
        (f"{STATISTICS}::test_a_few_items_have_no_interval",),
    ),
    Fault(
        "agreement-is-certainty",
        "labs/statistics.py",
        "others = 1 - ((1 - self.level) / 2) ** (1 / count)",
        "others = 0.0",
        "answers that are all right leave no doubt about the next",
        (f"{STATISTICS}::test_where_every_item_agrees_the_ends_are_exact",),
    ),
    Fault(
        "narrow-percentiles",
        "labs/statistics.py",
        "tail = stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf((1 - self.level) / 2, count - 1))",
        "tail = (1 - self.level) / 2",
        "the interval of a few items is too narrow",
        (f"{STATISTICS}::test_few_items_are_covered_as_well_as_many",),
    ),
    # ---- labs/metrics
    Fault(
        "two-letters-are-one",
        "labs/metrics/multiple_choice/multiple_choice.py",
        "return None if _joins_letters(bare, letters) else letters.index(letter)",
        "return letters.index(letter)",
        "an answer that names two choices is taken for the first",
        (f"{METRICS}::test_what_a_sentence_names",),
    ),
    Fault(
        "stop-parts-words",
        "labs/metrics/vqa_accuracy/vqa_accuracy.py",
        r"|\.(?!\d)|(?<=\d),(?=\d)",
        r"|(?<=\d),(?=\d)",
        '"U.S." is another answer than "US"',
        (f"{METRICS}::test_vqa_accuracy_of_one_reference_is_exact_match_in_the_challenges_normal_form",),
    ),
    # ---- labs/plan
    Fault(
        "before-runs-whole",
        "labs/plan/cost.py",
        "return _forward_work(student.text, setup.batch * setup.image_tokens, setup.image_tokens / 2)",
        "return text",
        "the plan lets the VLM before run over whole rows",
        (f"{TEST_PLAN}::test_the_cost_of_a_step_tends_to_the_share_of_the_response",),
    ),
    Fault(
        "launches-for-nothing",
        "labs/plan/cost.py",
        "FLOPS, _LAUNCH_SECONDS = 4e14, 4e-5",
        "FLOPS, _LAUNCH_SECONDS = 4e14, 6e-6",
        "a small student on a GPU is planned five times too fast",
        (f"{TEST_PLAN}::test_launches_take_what_they_took_on_the_gpu",),
    ),
    # ---- what is asked too late, or may not be
    Fault(
        "changed-too-late",
        "step_mixin.py",
        "if moved := [name for name, value in self._made_of.items() if now[name] != value]:",
        "if moved := []:",
        "a weight of the loss that is changed after the trainer was made changes nothing, without a word",
        (f"{TRAINER}::test_an_option_of_the_step_that_is_changed_too_late_is_refused",),
    ),
    Fault(
        "grouped-by-pixels",
        "opening.py",
        "    _check_lengths(args, opened.train)\n",
        "",
        "grouping without lengths ends in transformers' words",
        (f"{FEATURES}::test_rows_are_grouped_by_a_length_that_is_there",),
    ),
    Fault(
        "nobody-signed-in",
        "hub/mixin.py",
        "not (token or self.args.hub_token or get_token())",
        "False",
        "that nobody is signed in comes out after the training",
        (f"{FROM_TRAINING}::test_a_push_that_nobody_is_signed_in_for_is_refused_before_the_training",),
    ),
    Fault(
        "adapter-is-the-model",
        "hub/run_facts.py",
        "if parameter.requires_grad if trained else own_name(model, name) is not None:",
        "if parameter.requires_grad or not trained:",
        "an adapter's parameters count as the model's",
        (f"{FROM_TRAINING}::test_an_adapters_parameters_are_not_the_models",),
    ),
    Fault(
        "gated-is-missing",
        "sentences.py",
        "while found is not None and not isinstance(found, GatedRepoError | RepositoryNotFoundError):",
        "while found is not None:",
        "a repository that is gated cannot be told from one that does not exist",
        ("tests/publish/test_access.py",),
    ),
    Fault(
        "lm-published",
        "hub/model.py",
        "if config and not any(map(is_vision_key, config)):",
        "if False:",
        "a language model is published as a restored VLM",
        ("tests/publish/test_files.py::test_a_language_model_is_not_published_as_a_restored_vlm",),
    ),
    # ---- data
    Fault(
        "video-dropped",
        "row_checks.py",
        "if _MEDIA.fullmatch(key) and not isinstance(value, bool | int | float):",
        "if False:",
        "a row about a video is trained on as text",
        (f"{FORMATS}::test_media_under_a_name_that_nobody_reads_are_not_dropped_in_silence",),
    ),
    Fault(
        "picture-dropped",
        "row_checks.py",
        "if not shown_images and _is_picture(key, value):",
        "if False:",
        "a row about a picture in a column `img` is trained on as text",
        (f"{FORMATS}::test_a_dataset_whose_pictures_nobody_reads_is_refused_before_the_first_step",),
    ),
    Fault(
        "system-dropped",
        "formats.py",
        'return [{"role": "system", "content": system}, *turns]',
        "return turns",
        "the system prompt of ShareGPT's rows is lost",
        (f"{FORMATS}::test_what_the_system_says_in_a_column_of_its_own_comes_first",),
    ),
    Fault(
        "source-unnamed",
        "mixtures.py",
        "new[SOURCE_COLUMN] = where = ",
        "where = ",
        "a bad row of a mixture is named by its number after joining",
        ("tests/test_sources.py::test_a_bad_row_of_a_mixture_is_named_by_its_source",),
    ),
    Fault(
        "header-trained",
        "answers.py",
        "spans.append((place + len(header) if place >= 0 else 0, len(after)))",
        "spans.append((0, len(after)))",
        "the header of a first answer is trained on",
        (f"{FORMATS}::test_an_answer_that_comes_first_is_trained_on_without_what_announces_it",),
    ),
    # ---- a run
    Fault(
        "stream-ended",
        "pace.py",
        "if state.global_step == self._first_step and control.should_training_stop and not self.started:",
        "if state.global_step == self._first_step:",
        "a stream that has gone round cannot be resumed",
        ("tests/test_checkpoints.py::test_a_stream_that_has_gone_round_is_resumed",),
    ),
    Fault(
        "others-removed-at-the-end",
        "resume.py",
        "self.args.save_total_limit = None if limit == 1 else limit",
        "pass",
        "the end of a run removes checkpoints of others",
        ("tests/test_checkpoints.py::test_the_end_of_a_run_that_keeps_its_best_alone_removes_no_others",),
    ),
    Fault(
        "logs-wait",
        "step_mixin.py",
        "if not (of_training or of_evaluation):",
        "if False:",
        "a log of the first process alone waits for the others for ever",
        (f"{TRAINER}::test_what_a_callback_logs_takes_none_of_the_trainers_sums",),
    ),
    Fault(
        "skipped-loss-stays",
        "finite.py",
        "        self._put_back(trainer)\n        # It is",
        "        # It is",
        "the loss and tokens of a skipped step stay in the log",
        ("tests/test_finite.py::test_a_skipped_step_is_in_no_loss_and_no_count_of_tokens",),
    ),
    Fault(
        "stale-samples",
        "resume.py",
        "trainer._step, trainer._buffered_inputs = 0, None",
        "pass",
        "samples of a training that broke off are trained on by the next",
        ("tests/test_on_policy.py::test_a_training_after_one_that_broke_off_trains_on_no_sample_of_it",),
    ),
    Fault(
        "options-shared",
        "step_mixin.py",
        'self.decided["kv_source"] = "student"',
        'args.kv_source = self.decided["kv_source"] = "student"',
        "what gave way in one trainer holds for another of the same options",
        (f"{TRAINER}::test_options_of_two_trainers_give_way_in_one_of_them_alone",),
    ),
    Fault(
        "plan-looks-twice",
        "labs/plan/cost.py",
        "looks = not setup.freeze_vision or setup.splits",
        "looks = True",
        "the plan lets the VLM before run a frozen tower",
        (f"{TEST_PLAN}::test_a_frozen_tower_is_run_once_and_has_no_gradient",),
    ),
)

"""What every test can rely on: no network, no user cache, one thread per worker, fixed seeds.

A *tiny* model in these tests has two to four layers, a width of 16 to 64 and random weights that are scaled up, so
that its logits have the size of a real model's. With the default initialisation it hardly sees its image, and a test
about sharing passes whatever the code does: hence the control beside each claim (other pixels must move the logits).
"""

from __future__ import annotations

import gc
import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Read when huggingface_hub, datasets and tokenizers are imported: set before anything below imports them.
_HF_HOME = tempfile.TemporaryDirectory(prefix="lingudistill-tests-", ignore_cleanup_errors=True)
os.environ.update(
    HF_HOME=_HF_HOME.name,  # a test that passes thanks to a model in the developer's cache would fail elsewhere
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
)

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores; threads on top of them only wait for each other

# A deadline measures the machine's other load, and a random search fails on the change that happens to be under test.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")


# Their processor came with transformers 5.23; `test_an_older_transformers_is_named` is about what happens without it
if find_spec("transformers.models.granite_docling") is None:
    collect_ignore = ["test_nanovlm.py", "test_nanovlm_inputs.py", "test_recipe_nanovlm.py"]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """A test's numbers do not depend on which tests ran before it, or in which worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def ctrl_c() -> Iterator[Callable[..., Any]]:
    """Press Ctrl-C, whatever is called with. A shell's background jobs begin with SIGINT ignored, and Python then has no handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda *_, **__: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m gpu` on a machine without one skips, and says why, rather than fails."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["bf16=1", "bf16=0"])
def cpu_mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test that asks for this runs twice: as on a CPU that multiplies in bf16, and as on one that does not. -> the mode."""
    monkeypatch.setenv("LINGUDISTILL_MACHINE", request.param)
    mode: str = request.param
    return mode


@pytest.fixture(scope="session")
def saved_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a tiny student (model and processor) and its teacher (model and tokenizer). Read-only."""
    import tiny

    return tiny.save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def _cheap_collections() -> None:
    """accelerate collects garbage at each `train()`: half a second for the objects of the imported libraries alone."""
    from hf_lingudistill import LinguDistillTrainer  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture
def make_trainer(tmp_path: Path, _cheap_collections: None) -> Callable[..., Any]:
    """Make a trainer (or an `SFTTrainer`, by `trainer_class`) of tiny models: on CPU, in fp32, quiet, one step long.

    `make_trainer(**arguments)`: those of the trainer go to it, all others to its config.
    """
    import tiny
    from trl import SFTTrainer

    from hf_lingudistill import LinguDistillConfig, LinguDistillTrainer, OnPolicyLinguDistillConfig
    from hf_lingudistill.config import LocalSFTConfig
    from hf_lingudistill.step_mixin import StepMixin

    of_trainer = ("model", "processing_class", "train_dataset", "eval_dataset", "callbacks", "data_collator")
    of_trainer += ("peft_config", "quantization_config", "compute_loss_func", "compute_metrics")
    of_trainer += ("teacher_model", "teacher_tokenizer", "formatting_func")

    def make(trainer_class: type[SFTTrainer] = LinguDistillTrainer, **arguments: Any) -> SFTTrainer:
        ours = issubclass(trainer_class, StepMixin)
        given = {name: arguments.pop(name) for name in of_trainer if name in arguments}
        if "train_dataset" not in given:
            given["train_dataset"] = tiny.make_dataset(8)
        if "model" not in given:
            given["model"] = tiny.make_vlm(0)
        if not isinstance(given["model"], str):
            given.setdefault("processing_class", tiny.make_processor())
        if ours and "teacher_model" not in given:
            given["teacher_model"] = tiny.make_lm(1)
        if ours and not isinstance(given["teacher_model"], str):
            given.setdefault("teacher_tokenizer", tiny.make_tokenizer(extra=False))
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_grad_norm": 0.0,  # no clipping: a gradient is what the loss makes it
            "optim": "sgd",  # a step is proportional to the gradient; Adam blows rounding up to the learning rate
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
        }
        config_class: Any = LocalSFTConfig
        if ours:
            # A teacher that reads text and image of a student that moves, and is gated: more can go wrong than with the defaults
            settings |= {"teacher_quantization": "none", "distill_tokens": "confident"}
            settings |= {"kv_sharing": "prompt", "kv_source": "student", "freeze_vision": False}
            config_class = LinguDistillConfig
        if ours and not issubclass(trainer_class, LinguDistillTrainer):
            settings |= {"max_completion_length": 8, "log_completions": False, "distill_tokens": "all"}
            config_class = OnPolicyLinguDistillConfig
        return trainer_class(args=config_class(**{**settings, **arguments}), **given)

    return make


def pytest_unconfigure() -> None:
    """By hand, because pytest-xdist's workers end without running exit handlers."""
    _HF_HOME.cleanup()


@pytest.fixture(scope="session")
def nanovlm_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[tuple[int, int, bool, str]], tuple[Path, Path]]:
    """case of `nanovlm_golden.CASES` -> (nanoVLM's folder, the converted folder), made once. Read-only."""
    import nanovlm_golden as golden

    from hf_lingudistill.labs.nanovlm import from_nanovlm

    root, made = tmp_path_factory.mktemp("nanovlm"), {}

    def get(case: tuple[int, int, bool, str]) -> tuple[Path, Path]:
        if case not in made:
            source = golden.write_nanovlm(root / golden.name_of(case), golden.config_of(*case))
            from_nanovlm(str(source), str(root / f"{golden.name_of(case)}-hf"))
            made[case] = source, root / f"{golden.name_of(case)}-hf"
        return made[case]

    return get


@pytest.fixture(scope="session")
def nanovlm_goldens() -> dict[str, torch.Tensor]:
    """What nanoVLM's own code made of those checkpoints."""
    import nanovlm_golden as golden

    return golden.load()

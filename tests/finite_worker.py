"""One process of two, of which the second poisons its batch in step 2. Arguments: a folder, and `on_nan`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import test_finite
import tiny
import torch

from hf_lingudistill import LinguDistillConfig, LinguDistillTrainer
from hf_lingudistill.finite import NotFinite


def main(folder: Path, on_nan: str) -> None:
    trainer = LinguDistillTrainer(
        model=tiny.make_vlm(0),
        teacher_model=tiny.make_lm(1),
        teacher_tokenizer=tiny.make_tokenizer(extra=False),
        processing_class=tiny.make_processor(),
        train_dataset=tiny.make_dataset(16),
        args=LinguDistillConfig(
            output_dir=str(folder / "out"),
            on_nan=on_nan,
            teacher_quantization="none",
            report_to="none",
            bf16=False,
            use_cpu=True,
            activation_checkpointing=False,
            save_strategy="no",
            logging_steps=1,
            **test_finite.SETTINGS,
        ),
    )
    if trainer.accelerator.process_index == 1:
        trainer.add_callback(test_finite.Poisoned(trainer._plain_student()))
    error = None
    try:
        trainer.train()
    except NotFinite as stopped:
        error = str(stopped)
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    facts = {"error": error, "steps": trainer.state.global_step, "skipped": trainer.skipped_steps}
    facts |= {"finite": bool(torch.isfinite(weights).all()), "sum": float(weights.double().sum())}
    (folder / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(facts))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""Cross-entropy on the mix that distillation would see: text replay, or plain fine-tuning. `trl.SFTTrainer` and nothing else.

    accelerate launch examples/baselines/text_replay.py --config examples/baselines/text_replay.yaml

Takes the same YAML as examples/distill.py: its `datasets:` with a `distill` flag a source, which means nothing here.
"""

from __future__ import annotations

import sys

from datasets import Image, List
from trl import ModelConfig, ScriptArguments, SFTTrainer, TrlParser, get_peft_config

from hf_lingudistill.checkpoints import check_output_dir
from hf_lingudistill.config import LocalSFTConfig
from hf_lingudistill.mixtures import DistillMixtureConfig, load_mixture
from hf_lingudistill.vision import freeze_vision


def main(argv: list[str] | None = None) -> None:
    parser = TrlParser((ScriptArguments, LocalSFTConfig, ModelConfig, DistillMixtureConfig))
    script_args, config, model_args, mixture = parser.parse_args_and_config(argv)
    check_output_dir(config.output_dir)
    dataset = load_mixture(mixture, seed=config.seed)["train"].remove_columns("distill")
    if "images" in dataset.column_names:  # TRL's collator wants them decoded; ours does it itself
        dataset = dataset.cast_column("images", List(Image()))
    config.model_init_kwargs = {"use_safetensors": True, "dtype": model_args.dtype}
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=config,
        train_dataset=dataset,
        peft_config=get_peft_config(model_args),
    )
    if not model_args.use_peft:
        freeze_vision(trainer.model)  # as a distilled run leaves it
    trainer.train()
    if model_args.use_peft:
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model(config.output_dir)
    trainer.processing_class.save_pretrained(config.output_dir)


if __name__ == "__main__":
    main(sys.argv[1:])

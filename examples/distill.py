"""Distil a VLM's original LM back into it; with `--demo`, run the embedded demo.

    accelerate launch examples/distill.py --demo --output_dir outputs/demo

    accelerate launch examples/distill.py --model_name_or_path VLM --teacher_model_name_or_path LM \\
        --dataset_name DATA --output_dir OUT

Every flag may stand in a YAML instead: `--config examples/recipes/selective_mix.yaml`.
"""

import sys

from hf_lingudistill.scripts.distill import main

if __name__ == "__main__":
    sys.exit(main())

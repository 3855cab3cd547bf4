"""Weight interpolation: a VLM whose language model is moved towards the original LM (WiSE-FT, Wortsman et al., CVPR 2022).

    python examples/baselines/interpolate.py --vlm ORG/VLM --lm ORG/LM --alpha 0.5 --output_dir out

Writes a VLM that loads with plain transformers. No training: seconds on a CPU. alpha is the share of the VLM: 1 leaves it as it
is, 0 gives it the original LM.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor


def interpolate(vlm_path: str | Path, lm_path: str | Path, alpha: float, output_dir: str | Path) -> None:
    """alpha * VLM + (1 - alpha) * LM on every weight that the LM has; rows of the VLM's own tokens stay the VLM's.

    Raises:
        ValueError: if alpha is outside [0, 1], or a weight of the LM has no counterpart of its shape.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1] (the share of the VLM), got {alpha}.")
    vlm = AutoModelForImageTextToText.from_pretrained(vlm_path, dtype=torch.float32)
    lm = AutoModelForCausalLM.from_pretrained(lm_path, dtype=torch.float32)
    pairs = [(vlm.get_decoder(), lm.get_decoder()), (vlm.get_output_embeddings(), lm.get_output_embeddings())]
    with torch.no_grad():
        done: set[int] = set()
        for mine, theirs in pairs:
            own = dict(mine.named_parameters())
            for name, weight in theirs.named_parameters():
                if name not in own or own[name].shape[1:] != weight.shape[1:] or len(own[name]) < len(weight):
                    raise ValueError(
                        f"{name}: {tuple(weight.shape)} in the LM, "
                        f"{tuple(own[name].shape) if name in own else 'missing'} in the VLM. Pass the LM that it was built from."
                    )
                if own[name].data_ptr() in done:  # a head tied to the embeddings
                    continue
                done.add(own[name].data_ptr())
                own[name][: len(weight)].lerp_(weight, 1 - alpha)
    vlm.save_pretrained(output_dir)
    AutoProcessor.from_pretrained(vlm_path).save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", required=True)
    parser.add_argument("--lm", required=True)
    parser.add_argument("--alpha", type=float, required=True, help="share of the VLM, 0 to 1")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    interpolate(args.vlm, args.lm, args.alpha, args.output_dir)
    print(f"Saved to {args.output_dir}: {args.alpha:g} of the VLM, {1 - args.alpha:g} of the LM.")


if __name__ == "__main__":
    main()

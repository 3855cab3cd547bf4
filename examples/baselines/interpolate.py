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

from hf_lingudistill import check_compatibility
from hf_lingudistill.folders import check, replacing
from hf_lingudistill.weights import load_whole


def interpolate(vlm_path: str | Path, lm_path: str | Path, alpha: float, output_dir: str | Path) -> None:
    """alpha * VLM + (1 - alpha) * LM on every weight that the LM has; rows of the VLM's own tokens stay the VLM's.

    Raises:
        NotOurs: if output_dir holds what this function did not write.
        ValueError: if alpha is outside [0, 1], or the two have other weights or weights of other shapes.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1] (the share of the VLM), got {alpha}.")
    out = Path(output_dir)
    check(out.parent, out.name, by="interpolate")
    vlm = load_whole(AutoModelForImageTextToText, vlm_path, dtype=torch.float32)
    lm = load_whole(AutoModelForCausalLM, lm_path, dtype=torch.float32)
    if _tied(vlm) and not _tied(lm):
        raise ValueError(
            "The VLM's head is tied to its embeddings, the LM's is not. Pass the LM that it was built from."
        )
    vocabulary = {id(module.weight) for module in (vlm.get_input_embeddings(), vlm.get_output_embeddings())}
    pairs = [(vlm.get_decoder(), lm.get_decoder()), (vlm.get_output_embeddings(), lm.get_output_embeddings())]
    with torch.no_grad():
        done: set[int] = set()
        for mine, theirs in pairs:
            own, original = dict(mine.named_parameters()), dict(theirs.named_parameters())
            for name in sorted({*own, *original}):
                ours, weight = own.get(name), original.get(name)
                # Only the vocabulary may have grown
                rows = len(weight) if weight is not None and id(ours) in vocabulary else None
                if ours is None or weight is None or ours[:rows].shape != weight.shape:
                    raise ValueError(
                        f"{name}: {_shape(weight)} in the LM, {_shape(ours)} in the VLM. Pass the LM that it was built from."
                    )
                if id(ours) in done:  # a head tied to the embeddings
                    continue
                done.add(id(ours))
                ours[:rows].lerp_(weight, 1 - alpha)
    if not Path(lm_path).is_dir() or (Path(lm_path) / "tokenizer_config.json").is_file():
        # Of one shape, embeddings may be of other tokens
        check_compatibility(str(vlm_path), str(lm_path)).raise_for_misfit()
    with replacing(out.parent, out.name, by="interpolate") as made:
        vlm.save_pretrained(made / out.name)
        AutoProcessor.from_pretrained(vlm_path).save_pretrained(made / out.name)


def _tied(model: torch.nn.Module) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _shape(weight: torch.Tensor | None) -> str:
    return "missing" if weight is None else str(tuple(weight.shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", required=True)
    parser.add_argument("--lm", required=True)
    parser.add_argument("--alpha", type=float, required=True, help="share of the VLM, 0 to 1")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    try:
        interpolate(args.vlm, args.lm, args.alpha, args.output_dir)
    except ValueError as error:
        parser.error(str(error))
    print(f"Saved to {args.output_dir}: {args.alpha:g} of the VLM, {1 - args.alpha:g} of the LM.")


if __name__ == "__main__":
    main()

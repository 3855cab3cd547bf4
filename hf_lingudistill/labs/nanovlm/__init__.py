"""nanoVLM checkpoints as transformers VLMs, and back: `lingudistill convert-nanovlm`. docs/nanovlm.md has the details."""

from .config import NanoVLMConfig, NanoVLMError
from .convert import Converted, from_nanovlm, to_nanovlm
from .inputs import NanoVLMProcessor

__all__ = ["Converted", "NanoVLMConfig", "NanoVLMError", "NanoVLMProcessor", "from_nanovlm", "to_nanovlm"]

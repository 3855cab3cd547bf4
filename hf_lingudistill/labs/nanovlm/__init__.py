"""nanoVLM checkpoints as transformers VLMs, and back: `lingudistill convert-nanovlm`. docs/nanovlm.md has the details."""

import transformers

from .config import NanoVLMConfig, NanoVLMError

try:
    from .convert import Converted, from_nanovlm, to_nanovlm
    from .inputs import NanoVLMProcessor
except ModuleNotFoundError as error:
    if "granite_docling" not in str(error):
        raise
    raise ModuleNotFoundError(
        "A converted nanoVLM is read by transformers' GraniteDocling processor, which came with 5.23; transformers "
        f"{transformers.__version__} is installed. Run: pip install 'transformers>=5.23'"
    ) from None

__all__ = ["Converted", "NanoVLMConfig", "NanoVLMError", "NanoVLMProcessor", "from_nanovlm", "to_nanovlm"]

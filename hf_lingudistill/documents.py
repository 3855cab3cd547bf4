"""Whether a model keeps documents apart that were joined to one row, in which positions start anew. Most of transformers' do, some decoders
do not look (Qwen2-VL's, gpt-oss): it is tried, since no list of families can know."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import nn

ALLOWED = 0.05  # of the length of the hidden states: half precision rounds, a document more changes all
LENGTHS = (7, 11)

_KEPT: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

Read = Callable[[list[torch.Tensor]], torch.Tensor]


def keeps_documents_apart(read: Read, vocabulary: int, device: torch.device) -> bool:
    """Whether the second of two documents is read in one row with the first as it is alone.

    read: n documents, (T_i,) token ids each, joined in this order -> (sum of T_i, H) hidden states.
    """
    ids = torch.linspace(0, vocabulary - 1, sum(LENGTHS), device=device).long()
    first, second = ids.split(LENGTHS)
    joined, alone = read([first, second])[LENGTHS[0] :].float(), read([second]).float()
    return bool((joined - alone).norm() <= ALLOWED * alone.norm())


def decoder_keeps_apart(decoder: nn.Module, vocabulary: int, device: torch.device) -> bool:
    """`keeps_documents_apart` of a text decoder that is told by positions alone; tried once for each."""
    if (known := _KEPT.get(decoder)) is None:

        def read(documents: list[torch.Tensor]) -> torch.Tensor:
            positions = torch.cat([torch.arange(len(one), device=device) for one in documents])
            hidden: torch.Tensor = decoder(
                input_ids=torch.cat(documents)[None], position_ids=positions[None], use_cache=False
            )[0]
            return hidden[0]

        known = _KEPT[decoder] = keeps_documents_apart(read, vocabulary, device)
    return known

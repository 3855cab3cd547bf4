"""Layers that mix tokens otherwise than by softmax attention: gated delta rules (Qwen3.5, Qwen3-Next) and gated short convolutions (LFM2).

Such a layer keeps no keys and values, but a state that every token before has written to. What a token writes is a projection of its
own hidden state, as keys and values are: these projections are recorded from the student and shared. The teacher then runs the layer's
own code over the whole row on the student's projections, with its own ones written over them where the plan says, so that the state is
computed anew by the teacher's own convolution, decay and norm. What a token *reads* with (queries, output gates) is the teacher's at
every position that it is asked about.

Cost: projections are computed at the queries alone, as in attention; the convolution and the scan run over the whole row.

Shapes: as in `queries.py`; P channels of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .queries import QueryPlan

# What the caller of a mixer says about documents packed into one row
_DOCUMENTS = ("cu_seq_lens_q", "seq_idx")

Recorded = dict[tuple[int, str], torch.Tensor]


@dataclass(frozen=True)
class Mixer:
    """One layer's mixer.

    written: names of its projections that others read. reads: by projection, the indices of the channels that the token itself reads with.
    own: names of projections that no other token sees. out: name of the projection behind the mixing.
    """

    module: nn.Module
    layer_idx: int
    written: tuple[str, ...]
    reads: dict[str, torch.Tensor]
    own: tuple[str, ...]
    out: str


def mixers_of(decoder: nn.Module) -> list[Mixer]:
    """The mixers of a decoder that can be followed, by the names that their projections have. Others show by what is not recorded."""
    found = []
    for module in (part for layer in getattr(decoder, "layers", ()) for part in layer.children()):
        parts, at = dict(module.named_children()), getattr(module, "layer_idx", None)
        if at is None or "out_proj" not in parts:
            continue
        if {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d"} <= parts.keys():
            reads = {"in_proj_qkv": torch.arange(int(module.key_dim))}
            written = ("in_proj_qkv", "in_proj_b", "in_proj_a")
            found.append(Mixer(module, int(at), written, reads, ("in_proj_z",), "out_proj"))
        elif {"in_proj_qkvz", "in_proj_ba", "conv1d"} <= parts.keys():
            reads = {"in_proj_qkvz": _queries_and_gates(module)}
            found.append(Mixer(module, int(at), ("in_proj_qkvz", "in_proj_ba"), reads, (), "out_proj"))
        elif parts.keys() == {"in_proj", "conv", "out_proj"} and type(module).__name__.endswith("ShortConv"):
            channels = int(module.conv.in_channels)  # of each of three: gate of the input, gate of the output, input
            reads = {"in_proj": torch.arange(channels, 2 * channels)}
            found.append(Mixer(module, int(at), ("in_proj",), reads, (), "out_proj"))
    return found


def _queries_and_gates(module: Any) -> torch.Tensor:
    """Indices of a projection that gives query, key, value and gate of each key head side by side."""
    key, value = int(module.head_k_dim), int(module.head_v_dim) * int(module.num_v_heads) // int(module.num_k_heads)
    head = torch.cat([torch.arange(key), torch.arange(2 * key + value, 2 * (key + value))])
    return (torch.arange(int(module.num_k_heads))[:, None] * 2 * (key + value) + head).flatten()


@contextmanager
def mixers_recorded(decoder: nn.Module, record: Recorded | None, documents: dict[str, Any]) -> Iterator[list[int]]:
    """Keep what the mixers' projections give in the forwards inside the context: (layer_idx, name) -> (B, T, P), detached.

    record: None = keep nothing. Yields the layers that have a mixer.
    """
    mixers, hooks = mixers_of(decoder), []

    def keep(key: tuple[int, str]) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> None:
            assert record is not None
            record[key] = output.detach()

        return hook

    def called(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        documents.update({name: kwargs[name] for name in _DOCUMENTS if kwargs.get(name) is not None})

    for mixer in mixers:
        hooks.append(mixer.module.register_forward_pre_hook(called, with_kwargs=True))
        for name in mixer.written if record is not None else ():
            hooks.append(mixer.module.get_submodule(name).register_forward_hook(keep((mixer.layer_idx, name))))
    try:
        yield [mixer.layer_idx for mixer in mixers]
    finally:
        for hook in hooks:
            hook.remove()


class _Given(nn.Module):
    """Stands for a projection whose output is known."""

    def __init__(self) -> None:
        super().__init__()
        self.states: torch.Tensor

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.states


class _AtQueries(nn.Module):
    """Stands for the projection behind the mixing: (R, T, P) -> (1, Q, H), at the queries alone."""

    def __init__(self, projection: nn.Module, rows: torch.Tensor, positions: torch.Tensor) -> None:
        super().__init__()
        self.project, self.rows, self.positions = projection.__call__, rows, positions

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.project(states[self.rows, self.positions][None])
        return found


@contextmanager
def mixers_replayed(
    decoder: nn.Module, recorded: Recorded | None, documents: dict[str, Any], plan: QueryPlan
) -> Iterator[None]:
    """Let the mixers of the teacher run over whole rows inside the context, while its hidden states are the packed queries (1, Q, H).

    recorded: of the student, by layer; None where every attended position is the teacher's own.

    Raises:
        ValueError: inside, if a projection of the student has another number of channels than the teacher's.
    """
    rows = torch.div(plan.flat, max(plan.slots.shape[1], 1), rounding_mode="floor")  # (Q,)
    hooks, swapped = [], []

    def prepare(mixer: Mixer, given: dict[str, _Given], projections: dict[str, nn.Module]) -> Any:
        def hook(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = args[0] if args else kwargs["hidden_states"]
            for name, projection in projections.items():
                mine, theirs = projection(hidden)[0], None  # (Q, P)
                if name in mixer.written and recorded is not None:
                    theirs = _written(recorded, mixer.layer_idx, name)
                    _check_channels(mixer.layer_idx, theirs.shape[-1], mine.shape[-1])
                given[name].states = _whole(mine, theirs, mixer, name)
            whole = hidden.new_zeros(1, 1, 1).expand(plan.asked_rows.numel(), plan.length, hidden.shape[-1])
            return (), {"hidden_states": whole, "attention_mask": None, **documents}

        return hook

    def _whole(mine: torch.Tensor, theirs: torch.Tensor | None, mixer: Mixer, name: str) -> torch.Tensor:
        """(Q, P) and (B, T, P) -> (R, T, P)."""
        if theirs is None:
            states = mine.new_zeros(plan.asked_rows.numel(), plan.length, mine.shape[1])
        else:
            states = theirs.index_select(0, plan.asked_rows).to(mine.dtype)
        if name in mixer.own:
            states[rows, plan.positions] = mine
            return states
        states[rows[plan.own], plan.positions[plan.own]] = mine[plan.own]
        if name in mixer.reads:
            part = mixer.reads[name].to(mine.device)
            states[rows[:, None], plan.positions[:, None], part] = mine[:, part]
        return states

    try:
        for mixer in mixers_of(decoder):
            projections = {name: mixer.module.get_submodule(name) for name in (*mixer.written, *mixer.own)}
            given = {name: _Given() for name in projections}
            behind = mixer.module.get_submodule(mixer.out)
            hooks.append(mixer.module.register_forward_pre_hook(prepare(mixer, given, projections), with_kwargs=True))
            swapped.append((mixer.module, {**projections, mixer.out: behind}))
            mixer.module._modules.update({**given, mixer.out: _AtQueries(behind, rows, plan.positions)})
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, parts in swapped:
            module._modules.update(parts)


def _written(recorded: Recorded, layer_idx: int, name: str) -> torch.Tensor:
    if (layer_idx, name) not in recorded:
        others = sorted(other for at, other in recorded if at == layer_idx)
        raise ValueError(
            f"Layer {layer_idx}: the teacher's mixer reads {name}, the student's writes {', '.join(others) or 'none that can be followed'}: "
            "they are of two kinds. Use the LM that the student was built from."
        )
    return recorded[layer_idx, name]


def _check_channels(layer_idx: int, ours: int, theirs: int) -> None:
    if ours != theirs:
        raise ValueError(
            f"Layer {layer_idx}: the teacher's mixer writes {theirs} channels, the student's {ours}: the teacher cannot read them. Use "
            "the LM that the student was built from."
        )

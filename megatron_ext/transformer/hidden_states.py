"""Hidden states as slices: the rows of the tokens that a layer treats alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class SlicedHiddenStates:
    """Hidden states [T / R, 1, h] as consecutive slices, the form in which one layer passes them to the next.

    Layers with the same slices then neither copy nor norm nor gather again what none of them changes.

    Attributes:
        sizes: rows of each slice.
        slices: the slices.
        kv_only: indices of the slices that were KV_ONLY in the layer before.
        kv_only_input: rows of these slices as the key and value projection takes them, normed without a weight and, on
            several tensor-parallel ranks, gathered. Its gradient is summed over the layers before it is reduced. None:
            there are none.
    """

    sizes: list[int]
    slices: list[Tensor]
    kv_only: list[int] = field(default_factory=list)
    kv_only_input: Tensor | None = None


def join(slices: Sequence[Tensor], like: Tensor) -> Tensor:
    """``slices`` concatenated; a single slice as it is, without a copy; without slices no rows of ``like``."""
    return slices[0] if len(slices) == 1 else torch.cat(list(slices)) if slices else like[:0]


def joined(hidden_states: Tensor | SlicedHiddenStates) -> Tensor:
    """Hidden states as one tensor [T / R, 1, h]."""
    if isinstance(hidden_states, SlicedHiddenStates):
        return join(hidden_states.slices, hidden_states.slices[0])
    return hidden_states


def cut(hidden_states: Tensor | SlicedHiddenStates, sizes: list[int]) -> list[Tensor]:
    """Hidden states as slices of ``sizes`` rows."""
    if isinstance(hidden_states, SlicedHiddenStates) and hidden_states.sizes == sizes:
        return list(hidden_states.slices)
    hidden_states = joined(hidden_states)
    return list(hidden_states.split(sizes)) if sizes else [hidden_states]


def kv_only_input(hidden_states: Tensor | SlicedHiddenStates, sizes: list[int], kv_only: list[int]) -> Tensor | None:
    """The projection's input of the slices ``kv_only`` of ``sizes`` rows, if the layer before had them too."""
    sliced = isinstance(hidden_states, SlicedHiddenStates)
    same = sliced and (hidden_states.sizes, hidden_states.kv_only) == (sizes, kv_only)
    return hidden_states.kv_only_input if same else None


def replace_slices(slices: list[Tensor], sizes: list[int], chosen: list[int], rows: Tensor | None) -> None:
    """Replace the ``chosen`` slices by ``rows``, which holds them one after the other."""
    if chosen:
        parts = rows.split([sizes[i] for i in chosen]) if len(chosen) > 1 else [rows]
        for i, part in zip(chosen, parts):
            slices[i] = part

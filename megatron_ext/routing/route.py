"""One micro-batch under a plan: what every layer needs to know of it, worked out once from integers.

Every pipeline stage and every tensor-parallel rank holds the same :class:`~megatron_ext.data.batch.Batch`, so each
works out the same route for itself; nothing of it travels with hidden states.
"""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ext.data.batch import Batch


@dataclass
class Route(PackedSeqParams):
    """The documents of a micro-batch whose rows are laid end to end, b rows of s tokens as t = b * s tokens.

    Derived from ``PackedSeqParams`` because an unmodified ``TransformerBlock`` hands that to every layer, under
    activation recomputation too. ``qkv_format`` stays None: queries, keys and values keep the shape [t, 1, heads, d].

    Attributes:
        lengths: tokens of each document in order; they add up to t. The padding of a row is a segment of its own.
        cu_seqlens_q, cu_seqlens_kv: cumulative lengths, [documents + 1], int32, on the batch's device.
        max_seqlen_q, max_seqlen_kv: the longest document.
    """

    lengths: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, batch: Batch) -> "Route":
        """The route of one micro-batch of [b, s] tokens."""
        lengths = document_lengths(batch.document)
        cumulative = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths.max())
        return cls(
            cu_seqlens_q=cumulative,
            cu_seqlens_kv=cumulative,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=lengths.tolist(),
        )


def document_lengths(document: Tensor) -> Tensor:
    """Lengths of the runs of equal numbers in ``document`` [b, s], row after row; int64. Rows never share a run."""
    rows, s = document.shape
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    first = starts.flatten().nonzero().flatten()
    return torch.diff(first, append=first.new_tensor([rows * s]))

"""The vectors of an image token's D codes: frozen, from the VQ tokenizer, or learned, one table for each depth.

Both kinds of vectors have two methods: calling them with codes [n, m] of the first m depths gives the sum of their
vectors [n, e], and ``prefixes`` of codes [n, D] the sums of the first 1 .. D - 1 of them [n, D - 1, e]. Sums are in
float32 at least: rounded to bf16 step by step, the sum of a token would depend on how it was computed.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class CodeVectors(torch.nn.Module):
    """The code vectors of a residual quantizer, the same for all depths (arXiv 2203.01941).

    Attributes:
        weight: float32 [K, e], a buffer: part of checkpoints, without gradient. Zeros until it is loaded.
    """

    def __init__(self, codebook_size: int, width: int):
        super().__init__()
        device = torch.cuda.current_device()
        self.register_buffer("weight", torch.zeros(codebook_size, width, dtype=torch.float32, device=device))

    def forward(self, codes: Tensor) -> Tensor:
        """[n, e] from ``codes`` [n, m]."""
        return torch.nn.functional.embedding_bag(codes, self.weight, mode="sum")

    def prefixes(self, codes: Tensor) -> Tensor:
        """[n, D - 1, e] from ``codes`` [n, D]."""
        return torch.nn.functional.embedding(codes[:, :-1], self.weight).cumsum(1)


class LearnedCodes(torch.nn.Module):
    """Learned vectors of the codes of each depth. With D = 1, sums are the rows of a plain embedding.

    Attributes:
        embedding: [D K, e]; code k of depth d, counted from 0, has row d K + k.
    """

    def __init__(self, config: TransformerConfig, depth: int, codebook_size: int, width: int):
        super().__init__()
        self.codebook_size = codebook_size
        device = torch.cuda.current_device()
        self.embedding = torch.nn.Embedding(depth * codebook_size, width, dtype=config.params_dtype, device=device)
        # Under sequence parallelism every rank sums the vectors of its own rows: Megatron-Core sums such parameters'
        # gradients over the tensor-parallel group.
        self.embedding.weight.sequence_parallel = config.sequence_parallel

    def forward(self, codes: Tensor) -> Tensor:
        """[n, e] from ``codes`` [n, m]."""
        return self._vectors(codes).sum(1)

    def prefixes(self, codes: Tensor) -> Tensor:
        """[n, D - 1, e] from ``codes`` [n, D]."""
        return self._vectors(codes[:, :-1]).cumsum(1)

    def _vectors(self, codes: Tensor) -> Tensor:
        """[n, m, e]"""
        first_rows = torch.arange(codes.shape[1], device=codes.device) * self.codebook_size
        vectors = self.embedding(codes + first_rows)
        return vectors.to(torch.promote_types(vectors.dtype, torch.float32))

"""The codebook of residual quantization in training: one book for all rounds, that follows what they quantize.

As in VILA-U and RQ-VAE (Lee et al., arXiv 2203.01941): each code follows the mean of the residuals that chose it
(exponential moving average), an unused code restarts at a random residual, and the rounds of a step update the book one
after the other, so each round uses the book that the one before it left. There, a code is unused if fewer than one
residual a round chooses it, of batches of many residuals for each code; in small ones that would restart codes in use,
so a tenth of a code's fair share is enough.
"""

import torch
from torch import Tensor

from megatron_ext.vq.codebook import nearest, residual_kmeans

EPSILON = 1e-5
"""Added to the counts, so that no code is divided by zero."""


class ResidualCodebook:
    """One codebook for ``depth`` rounds of residual quantization.

    Args:
        vectors: [k, d], updated in place.
        depth: codes of a latent.
        decay: of the moving averages.
        generator: chooses the residuals at which codes restart.
        restart: whether codes do.

    Attributes:
        counts: [k], moving average of how many residuals of a round chose each code.
        sums: [k, d], moving average of their sum.
    """

    def __init__(
        self, vectors: Tensor, depth: int, decay: float, generator: torch.Generator | None, restart: bool = True
    ):
        self.vectors, self.depth, self.decay = vectors, depth, decay
        self.generator, self.restart = generator, restart
        self.counts = torch.zeros(len(vectors))
        self.sums = vectors.detach().clone()

    @torch.no_grad()
    def start(self, latents: Tensor) -> None:
        """Place the codes by k-means of latents [m, d] and of what its centers leave."""
        vectors = residual_kmeans(latents, torch.ones(len(latents)), len(self.vectors), self.depth, self.generator)
        self.vectors[: len(vectors)] = vectors
        self.counts.fill_(max(1.0, len(latents) / len(self.vectors)))
        self.sums = self.vectors * self.counts[:, None]

    @torch.no_grad()
    def quantize(self, latents: Tensor) -> list[Tensor]:
        """Quantize latents [m, d] and follow them: the sums of their first 1, 2, ... vectors, each [m, d]."""
        residuals, sums = latents, [torch.zeros_like(latents)]
        for _ in range(self.depth):
            codes = nearest(residuals, self.vectors)
            chosen = self.vectors[codes]
            self._follow(residuals, codes)
            residuals = residuals - chosen
            sums.append(sums[-1] + chosen)
        return sums[1:]

    def _follow(self, residuals: Tensor, codes: Tensor) -> None:
        self.counts.mul_(self.decay).add_(torch.bincount(codes, minlength=len(self.counts)), alpha=1 - self.decay)
        new = torch.zeros_like(self.sums).index_add_(0, codes, residuals)
        self.sums.mul_(self.decay).add_(new, alpha=1 - self.decay)
        if self.restart:
            unused = self.counts < min(1.0, 0.1 * len(residuals) / len(self.counts))
            self.sums[unused] = self._random(residuals, int(unused.sum()))
            self.counts[unused] = 1
        total = self.counts.sum()
        counts = total * (self.counts + EPSILON) / (total + len(self.counts) * EPSILON)
        self.vectors.copy_(self.sums / counts[:, None])

    def _random(self, residuals: Tensor, count: int) -> Tensor:
        """``count`` residuals, none twice; with a little noise where there are too few."""
        if len(residuals) < count:
            residuals = residuals.repeat(-(-count // len(residuals)), 1)
            noise = torch.rand(residuals.shape, generator=self.generator)
            residuals = residuals + noise * (0.01 / residuals.shape[1] ** 0.5)
        return residuals[torch.randperm(len(residuals), generator=self.generator)[:count]]

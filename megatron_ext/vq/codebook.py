"""A VQ codebook: the nearest code to a latent, and how a codebook of unit vectors is trained.

The codebook is not trained by gradients. Each code follows the mean of the latents that chose it (exponential moving
average; van den Oord et al., arXiv 1711.00937, appendix A). The codes start from k-means over latents of a network that
has already learnt to reconstruct without them. A code that no latent chooses moves to a latent far from all codes: most
of a picture may be background, and codes that start at random latents would all encode shades of it (k-means++, Arthur
and Vassilvitskii 2007).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NEAREST_ELEMENTS = 1 << 26
"""Entries of the distance table that a look-up holds at once (256 MiB in float32)."""

KMEANS_ITERATIONS = 10


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook row with the least Euclidean distance to each vector.

    Args:
        vectors: [m, d].
        codebook: [k, d].

    Returns:
        int64 [m]; the first of equally near rows.
    """
    # |v - c|^2 = |v|^2 - 2 v.c + |c|^2, and the first term is the same for every c.
    bias = codebook.square().sum(1) / 2
    rows = max(1, NEAREST_ELEMENTS // len(codebook))
    return torch.cat([(chunk @ codebook.T - bias).argmax(1) for chunk in vectors.split(rows)])


def residual_codes(vectors: Tensor, codebook: Tensor, depth: int) -> Tensor:
    """The codes of residual quantization: each is the row nearest to what the rows before it leave of the vector.

    Args:
        vectors: [m, d], of the codebook's type.
        codebook: [k, d], shared by all rounds.

    Returns:
        int64 [m, depth].
    """
    codes = [nearest(vectors, codebook)]
    while len(codes) < depth:
        vectors = vectors - codebook[codes[-1]]
        codes.append(nearest(vectors, codebook))
    return torch.stack(codes, 1)


def kmeans(points: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Weighted k-means (Lloyd), started by k-means++.

    Args:
        points: float32 [m, d], of which ``count`` or more differ.
        weights: [m], how often each point counts.

    Returns:
        Centers [count, d], by falling weight of the points nearest to them.
    """
    first = torch.multinomial(weights, 1, generator=generator)
    centers = points[first]
    square = (points - centers).square().sum(1)
    while len(centers) < count:
        new = points[torch.multinomial(weights * square, 1, generator=generator)]
        centers = torch.cat([centers, new])
        square = torch.minimum(square, (points - new).square().sum(1))
    for _ in range(KMEANS_ITERATIONS):
        codes = nearest(points, centers)
        totals = torch.zeros(count).index_add_(0, codes, weights)
        sums = torch.zeros_like(centers).index_add_(0, codes, points * weights[:, None])
        # A center that no point is nearest to stays where it is.
        centers = torch.where(totals[:, None] > 0, sums / totals[:, None].clamp(min=1), centers)
    totals = torch.zeros(count).index_add_(0, nearest(points, centers), weights)
    return centers[totals.argsort(descending=True, stable=True)]


def residual_kmeans(points: Tensor, weights: Tensor, count: int, depth: int, generator: torch.Generator) -> Tensor:
    """Codes of residual quantization, shared by ``depth`` rounds: k-means of the points, of what its centers leave, and
    so on, an equal number of codes each.

    Args:
        points: float32 [m, d].
        weights: [m], how often each point counts.
        count: codes, ``depth`` or more.

    Returns:
        Up to ``count`` codes [k, d]: fewer if less points are left than centers wanted.
    """
    codebook = []
    for size in [count // depth + (number < count % depth) for number in range(depth)]:
        distinct = points.unique(dim=0)
        if len(distinct) <= size:
            # What is left are so few points that they are codes themselves.
            return torch.cat([*codebook, distinct])
        codebook.append(kmeans(points, weights, size, generator))
        points = points - codebook[-1][nearest(points, codebook[-1])]
    return torch.cat(codebook)


class MovingAverageCodebook:
    """A codebook of unit vectors that follows the latents.

    Args:
        vectors: [k, d], updated in place.
        decay: of the moving averages.
        generator: chooses the latents at which codes start.

    Attributes:
        counts: [k], moving average of how many latents of a batch chose each code.
        sums: [k, d], moving average of their sum.
    """

    def __init__(self, vectors: Tensor, decay: float, generator: torch.Generator):
        self.vectors, self.decay, self.generator = vectors, decay, generator
        self.counts = torch.ones(len(vectors))
        self.sums = torch.zeros_like(vectors)

    @torch.no_grad()
    def start(self, latents: Tensor) -> None:
        """Place the codes by k-means on the sphere over unit latents [m, d]."""
        self._place(torch.ones_like(self.counts, dtype=torch.bool), latents)
        for _ in range(KMEANS_ITERATIONS):
            codes = nearest(latents, self.vectors)
            self.counts = torch.bincount(codes, minlength=len(self.counts)).float()
            self.sums = torch.zeros_like(self.sums).index_add_(0, codes, latents)
            self.vectors.copy_(F.normalize(self.sums, dim=1))
            self._place(self.counts == 0, latents)

    @torch.no_grad()
    def follow(self, latents: Tensor, codes: Tensor) -> None:
        """Move the codes towards the unit latents [m, d] that chose them (``codes`` [m]), and restart dead codes."""
        self.counts.mul_(self.decay).add_(torch.bincount(codes, minlength=len(self.counts)), alpha=1 - self.decay)
        self.sums.mul_(self.decay).index_add_(0, codes, latents, alpha=1 - self.decay)
        self.vectors.copy_(F.normalize(self.sums, dim=1))
        # A code with less than a tenth of its fair share of latents is dead.
        dead = self.counts < 0.1 * len(latents) / len(self.counts)
        self._place(dead, latents)

    def _place(self, selected: Tensor, latents: Tensor) -> None:
        """Move the selected codes (bool [k]) to latents [m, d], sampled by squared distance from the other codes; one
        by one if there are no others."""
        indices = selected.nonzero().flatten()
        if not len(indices):
            return
        if len(indices) < min(len(selected), len(latents)):
            square = (2 - 2 * (latents @ self.vectors[~selected].T).max(1).values).clamp(min=0) + 1e-9
            self.vectors[indices] = latents[torch.multinomial(square, len(indices), generator=self.generator)]
        else:
            square = torch.full((len(latents),), 4.0)  # the largest between unit vectors
            for code in indices.tolist():
                self.vectors[code] = latents[torch.multinomial(square + 1e-9, 1, generator=self.generator)]
                square = torch.minimum(square, (2 - 2 * (latents @ self.vectors[code])).clamp(min=0))
        self.counts[selected] = fair = len(latents) / len(self.counts)
        self.sums[selected] = self.vectors[selected] * fair

"""Fitting a patch dictionary (:mod:`.patch_dictionary`): k-means over the distinct patches of the training images.

Most patches of flat pictures occur many times. A distinct patch counts as often as it occurs; if there are no more than
codes, they are the dictionary, and encoding loses nothing. With several codes a position, the dictionary is fitted to
the patches and to what its own codes leave of them, unless it has room for all patches and a vector of zeros, which the
further codes choose then.
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.vq.codebook import kmeans, residual_codes, residual_kmeans
from megatron_ext.vq.patch_dictionary import PatchDictionary, ResidualPatchDictionary
from megatron_ext.vq.pixels import from_bytes
from megatron_ext.vq.trained_folder import evaluate, publish, split_held_out
from megatron_ext.vq.training_config import DictionaryConfig

RESIDUAL_ITERATIONS = 20
"""Of each of the two ways in which a residual dictionary is improved."""

PATCHES_AT_ONCE = 1 << 16
"""Patches whose vectors are held in memory together, beside the patches themselves."""


def train_dictionary(images: Tensor, out: Path, config: DictionaryConfig) -> dict:
    """Fit a dictionary to ``images`` uint8 [n, 3, s, s] and save a tokenizer that :func:`megatron_ext.vq.load` reads.

    The dictionary has fewer than ``config.codebook_size`` codes if the images have fewer distinct patches. With one
    code a position, code 0 is the most frequent patch, or the center that most patches are nearest to.

    Returns:
        The contents of ``OUT/training.json``: that of :func:`.training.train`, with ``distinct_patches``.

    Raises:
        UserError: there are too few images.
    """
    held_out, images = split_held_out(images, config.held_out)
    patches, counts = distinct_patches(images, config.patch_size)
    facts = {"pictures": len(images), "distinct_patches": len(patches), "settings": config.settings()}
    sizes = {"image_size": config.image_size, "patch_size": config.patch_size}
    if config.depth > 1:
        vectors = _residual_vectors(from_bytes(patches.flatten(1)), counts, config)
        settings = {"model_type": ResidualPatchDictionary.kind, **sizes, "depth": config.depth}
        publish(out, {"vectors": vectors.view(-1, *patches.shape[1:])}, settings)
        return evaluate(out, held_out, facts)
    if len(patches) > config.codebook_size:
        generator = torch.Generator().manual_seed(config.seed)
        centers = kmeans(patches.flatten(1).float(), counts, config.codebook_size, generator)
        # Rounded to bytes, two centers may be equal.
        entries, _ = distinct_patches(centers.round().to(torch.uint8).view(-1, *patches.shape[1:]), config.patch_size)
    else:
        entries = patches
    publish(out, {"patches": entries}, {"model_type": PatchDictionary.kind, **sizes, "codebook_size": len(entries)})
    return evaluate(out, held_out, facts)


def _residual_vectors(patches: Tensor, counts: Tensor, config: DictionaryConfig) -> Tensor:
    """One dictionary for all codes of a position: [k, 3 p^2] for patches [m, 3 p^2] in [-1, 1].

    First each code moves to the mean of the residuals that choose it, then all codes to the least squares solution for
    the choices made. Choices are greedy, so either may make things worse: the best dictionary is kept.
    """
    if len(patches) < config.codebook_size:
        return torch.cat([patches, torch.zeros_like(patches[:1])])
    generator = torch.Generator().manual_seed(config.seed)
    vectors = residual_kmeans(patches, counts, config.codebook_size, config.depth, generator)
    best, least = vectors, math.inf
    for move in (_to_means, _to_least_squares):
        vectors = best
        for _ in range(RESIDUAL_ITERATIONS):
            codes = residual_codes(patches, vectors, config.depth)
            quantized = torch.cat([vectors[part].sum(1) for part in codes.split(PATCHES_AT_ONCE)])
            error = float(counts @ (patches - quantized).square().sum(1))
            if error < least:
                best, least = vectors, error
            vectors = move(patches, counts, vectors, codes)
    return best


def _to_means(patches: Tensor, counts: Tensor, vectors: Tensor, codes: Tensor) -> Tensor:
    sums, totals = torch.zeros_like(vectors), torch.zeros(len(vectors))
    for chosen in codes.unbind(1):
        sums.index_add_(0, chosen, patches * counts[:, None])
        totals.index_add_(0, chosen, counts)
        patches = patches - vectors[chosen]
    # A code that nothing chooses stays where it is.
    return torch.where(totals[:, None] > 0, sums / totals[:, None].clamp(min=1), vectors)


def _to_least_squares(patches: Tensor, counts: Tensor, vectors: Tensor, codes: Tensor) -> Tensor:
    size = len(vectors)
    together = torch.zeros(size * size, dtype=torch.float64)  # how often two codes are of the same patch
    sums = torch.zeros(vectors.shape, dtype=torch.float64)
    for part in range(0, len(patches), PATCHES_AT_ONCE):
        here = slice(part, part + PATCHES_AT_ONCE)
        weights = counts[here].double()
        weighted = patches[here].double() * weights[:, None]
        for chosen in codes[here].unbind(1):
            sums.index_add_(0, chosen, weighted)
            for other in codes[here].unbind(1):
                together.index_add_(0, chosen * size + other, weights)
    # A little weight on where the codes are: those that nothing chooses stay there.
    ridge = 1e-3 * float(counts.sum()) / size
    system = together.view(size, size) + ridge * torch.eye(size, dtype=torch.float64)
    return torch.linalg.solve(system, sums + ridge * vectors.double()).float()


def distinct_patches(images: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """The distinct patches uint8 [m, 3, p, p] of images uint8 [n, 3, s, s], the most frequent first, and how often each
    occurs, float32 [m]."""
    flat = F.pixel_unshuffle(images, patch_size).permute(0, 2, 3, 1).flatten(0, 2).contiguous()  # [n h w, 3 p^2]
    occurrences = Counter(row.tobytes() for row in flat.numpy()).most_common()
    rows = np.frombuffer(b"".join(patch for patch, _ in occurrences), np.uint8)
    patches = torch.from_numpy(rows.copy()).view(-1, 3, patch_size, patch_size)
    return patches, torch.tensor([float(count) for _, count in occurrences])

"""Fitting a patch dictionary (:mod:`.patch_dictionary`): k-means over the distinct patches of the training images.

Most patches of flat pictures occur many times. A distinct patch counts as often as it occurs; if there are no more than
codes, they are the dictionary, and encoding loses nothing.
"""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.vq.codebook import kmeans
from megatron_ext.vq.patch_dictionary import PatchDictionary
from megatron_ext.vq.trained_folder import evaluate, publish, split_held_out
from megatron_ext.vq.training_config import DictionaryConfig


def train_dictionary(images: Tensor, out: Path, config: DictionaryConfig) -> dict:
    """Fit a dictionary to ``images`` uint8 [n, 3, s, s] and save a tokenizer that :func:`megatron_ext.vq.load` reads.

    The dictionary has fewer than ``config.codebook_size`` codes if the images have fewer distinct patches. Code 0 is
    the most frequent patch, or its mean.

    Returns:
        The contents of ``OUT/training.json``: that of :func:`.training.train`, with ``distinct_patches``.

    Raises:
        UserError: there are too few images.
    """
    held_out, images = split_held_out(images, config.held_out)
    patches, counts = distinct_patches(images, config.patch_size)
    if len(patches) > config.codebook_size:
        generator = torch.Generator().manual_seed(config.seed)
        centers = kmeans(patches.flatten(1).float(), counts, config.codebook_size, generator)
        # Rounded to bytes, two centers may be equal.
        entries, _ = distinct_patches(centers.round().to(torch.uint8).view(-1, *patches.shape[1:]), config.patch_size)
    else:
        entries = patches
    settings = {"image_size": config.image_size, "patch_size": config.patch_size, "codebook_size": len(entries)}
    publish(out, {"patches": entries}, {"model_type": PatchDictionary.kind, **settings})
    facts = {"pictures": len(images), "distinct_patches": len(patches), "settings": asdict(config)}
    return evaluate(out, held_out, facts)


def distinct_patches(images: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """The distinct patches uint8 [m, 3, p, p] of images uint8 [n, 3, s, s], the most frequent first, and how often each
    occurs, float32 [m]."""
    flat = F.pixel_unshuffle(images, patch_size).permute(0, 2, 3, 1).flatten(0, 2).contiguous()  # [n h w, 3 p^2]
    occurrences = Counter(row.tobytes() for row in flat.numpy()).most_common()
    rows = np.frombuffer(b"".join(patch for patch, _ in occurrences), np.uint8)
    patches = torch.from_numpy(rows.copy()).view(-1, 3, patch_size, patch_size)
    return patches, torch.tensor([float(count) for _, count in occurrences])

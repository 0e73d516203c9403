"""VQ tokenizers that encode in a moment."""

from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from megatron_ext.vq import VQModel

CODES, PIXELS, GRID = 32, 16, 4


def make_vq(folder: Path) -> Path:
    """A random VQ tokenizer of 16 x 16 pixels and 4 x 4 codes that gives different pictures different codes."""
    torch.manual_seed(0)
    config = transformers.JanusVQVAEConfig(
        embed_dim=4,
        num_embeddings=CODES,
        latent_channels=4,
        num_patches=GRID,
        base_channels=32,
        channel_multiplier=[1, 1, 1],
        num_res_blocks=0,
    )
    network = transformers.JanusVQVAE(config)
    # The random network maps all pictures close together; spread the codebook there.
    torch.nn.init.normal_(network.quantize.embedding.weight)
    network.save_pretrained(folder)
    return folder


class ResidualPixels(VQModel):
    """16 x 16 pixels as 4 x 4 positions of ``depth`` residual codes, whose latents are the pixels themselves."""

    kind = "residual_pixels"

    def __init__(self, depth: int):
        network = nn.Module()
        vectors = 0.3 * torch.randn(CODES, 3 * (PIXELS // GRID) ** 2, generator=torch.Generator().manual_seed(0))
        network.quantize = nn.Embedding.from_pretrained(vectors)
        super().__init__(network, Path(self.kind), (GRID, GRID), (PIXELS, PIXELS), depth)

    def _codebook(self) -> Tensor:
        return self.network.quantize.weight

    def _latents(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, PIXELS // GRID)

    def _images(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, PIXELS // GRID)

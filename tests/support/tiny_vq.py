"""A VQ tokenizer that encodes in a moment."""

from pathlib import Path

import torch
import transformers

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

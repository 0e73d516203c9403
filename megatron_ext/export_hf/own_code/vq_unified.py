"""The VQ image tokenizer: pictures to codes and back, as the model's training data was made.

The networks are transformers' own, but not their ``encode``: codes are looked up in float32 or more, and Janus's at
unit length. All functions take the network as the model holds it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ChameleonVQVAE, Emu3VQVAE, JanusVQVAE

NETWORKS = {"janus_vqgan": JanusVQVAE, "chameleon_vqgan": ChameleonVQVAE, "emu3_vqgan": Emu3VQVAE}
LOOK_UP_ELEMENTS = 1 << 26  # of a table of distances


class PatchDictionary(nn.Module):
    """Codes are patches of p x p pixels; there is no network."""

    def __init__(self, codes, patch_size):
        super().__init__()
        self.register_buffer("patches", torch.zeros(codes, 3, patch_size, patch_size, dtype=torch.uint8))


def build_network(vq_config, codes):
    """The network of a configuration, without weights."""
    if vq_config["model_type"] == "patch_dictionary":
        return PatchDictionary(codes, vq_config["patch_size"])
    network_class = NETWORKS[vq_config["model_type"]]
    return network_class(network_class.config_class(**vq_config)).requires_grad_(False)


@torch.no_grad()
def encode(network, pixels):
    """Pixels [n, 3, H, W] in [-1, 1] to codes [n, h * w]."""
    if isinstance(network, PatchDictionary):
        codebook = network.patches.flatten(1).double()
        latents = F.pixel_unshuffle(_bytes(pixels), network.patches.shape[-1])
    else:
        pixels = pixels.to(next(network.parameters()).dtype)
        codebook = network.quantize.embedding.weight.float()
        latents = _latents(network, pixels)
        if isinstance(network, JanusVQVAE):
            codebook = F.normalize(codebook, dim=1)
    vectors = latents.to(codebook.dtype).permute(0, 2, 3, 1).flatten(0, 2)
    # |v - c|^2 = |v|^2 - 2 v.c + |c|^2, and the first term is the same for every c.
    bias = codebook.square().sum(1) / 2
    rows = max(1, LOOK_UP_ELEMENTS // len(codebook))
    codes = torch.cat([(chunk @ codebook.T - bias).argmax(1) for chunk in vectors.split(rows)])
    return codes.view(len(pixels), -1)


@torch.no_grad()
def decode(network, codes, grid, image_size):
    """Codes [n, h * w] to pixels [n, 3, H, W] in [-1, 1], float32."""
    if isinstance(network, ChameleonVQVAE):
        raise ValueError("Chameleon's VQ tokenizer only encodes: its decoder was never published")
    if isinstance(network, PatchDictionary):
        patches = network.patches.flatten(1)[codes] / 127.5 - 1
        return F.pixel_shuffle(patches.unflatten(1, grid).permute(0, 3, 1, 2), network.patches.shape[-1])
    codebook = network.quantize.embedding.weight.float()
    if isinstance(network, JanusVQVAE):
        codebook = F.normalize(codebook, dim=1)
    latents = F.embedding(codes, codebook).to(next(network.parameters()).dtype)
    latents = latents.unflatten(1, grid).permute(0, 3, 1, 2)
    if isinstance(network, Emu3VQVAE):  # a clip of one code frame
        latents = latents.unsqueeze(2)
        decoded = network.post_quant_conv(latents).permute(0, 2, 1, 3, 4)
        clips = network.decoder(decoded, latents.permute(0, 2, 1, 3, 4))
        pixels = clips.reshape(len(codes), -1, 3, *image_size)[:, 0]
    else:
        pixels = network.decoder(network.post_quant_conv(latents))
        if isinstance(network, JanusVQVAE):
            pixels = F.pixel_shuffle(pixels, _patch(network))
    return pixels.float().clamp(-1, 1)


def _latents(network, pixels):
    """[n, d, h, w]"""
    if isinstance(network, Emu3VQVAE):  # a clip of equal frames
        clips = pixels.unsqueeze(1).expand(-1, network.config.temporal_downsample_factor, -1, -1, -1).contiguous()
        return network.quant_conv(network.encoder(clips).permute(0, 2, 1, 3, 4)).squeeze(2)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    if isinstance(network, JanusVQVAE):
        pixels = F.pixel_unshuffle(pixels, _patch(network))
    return network.quant_conv(network.encoder(pixels))


def _patch(network):
    """Pixels along a side of a Janus network's input patches."""
    return math.isqrt(network.config.in_channels // 3)


def _bytes(pixels):
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class ImageTokensMixin:
    """Pictures and their tokens, for a model with ``config`` and ``vqmodel``."""

    def fill_placeholders(self, input_ids, pixel_values):
        """Ids [b, n] with the codes of pictures in the places of ``image_token_id``."""
        placeholder = input_ids == self.config.image_token_id
        if pixel_values is None or not placeholder.any():
            return input_ids
        codes = self.get_image_tokens(pixel_values).flatten()
        if placeholder.sum() != len(codes):
            raise ValueError(f"{int(placeholder.sum())} placeholders for {len(codes)} codes of images")
        return input_ids.masked_scatter(placeholder, codes)

    def get_image_tokens(self, pixel_values):
        """Pictures [n, 3, H, W] in [-1, 1] as tokens [n, h * w]."""
        return encode(self.vqmodel, pixel_values) + self.config.image_offset

    def decode_image_tokens(self, tokens):
        """Tokens [n, h * w] of images as pictures [n, 3, H, W] in [-1, 1], float32."""
        config = self.config
        return decode(self.vqmodel, tokens - config.image_offset, tuple(config.grid), tuple(config.image_size))

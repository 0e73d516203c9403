"""Adapters over the VQ tokenizers that transformers carries: Janus (LlamaGen's VQ-16), Emu3, Chameleon.

The networks are transformers' own; the codebook look-up is :func:`megatron_ext.vq.codebook.nearest`, in float32.
"""

import math
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from megatron_ext.errors import UserError
from megatron_ext.vq.model import VQModel

EMU3_IMAGE_SIZE = 512
"""Emu3's network accepts any size and its configuration names none. ``image_size`` in config.json, a number or
[height, width], replaces this one."""


class _Transformers(VQModel):
    network_class: ClassVar[type]

    @classmethod
    def from_folder(cls, folder: Path, config: dict) -> "VQModel":
        """Build the network from ``config`` and read its weights from ``folder``."""
        network = _read_network(cls.network_class, folder, config)
        return cls(network, folder, *cls._sizes(network.config))

    @staticmethod
    def _sizes(config) -> tuple[tuple[int, int], tuple[int, int]]:
        """(grid, image size)."""
        raise NotImplementedError


class JanusVQ(_Transformers):
    """Janus and LlamaGen VQ-16: codes are directions, so latents and codebook are compared at unit length.

    transformers' own ``encode`` does not normalize them, which is the same only for a codebook of unit vectors. A
    network with 3 p^2 input channels, as tools/train_vq.py trains, reads images in patches of p x p pixels.
    """

    kind = "janus_vqgan"
    network_class = transformers.JanusVQVAE

    @staticmethod
    def _sizes(config):
        side = config.num_patches
        pixels = side * _reduction(config) * _patch(config)
        return (side, side), (pixels, pixels)

    def _codebook(self):
        return F.normalize(self.network.quantize.embedding.weight.float(), dim=1)

    def _latents(self, images: Tensor) -> Tensor:
        images = F.pixel_unshuffle(images, _patch(self.network.config))
        return self.network.quant_conv(self.network.encoder(images))

    def _images(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.network.post_quant_conv.weight.dtype)
        decoded = self.network.decoder(self.network.post_quant_conv(latents))
        return F.pixel_shuffle(decoded, _patch(self.network.config))


class ResidualVQ(JanusVQ):
    """Janus's network with several codes a position (tools/train_vq.py --depth); the latents are no unit vectors."""

    kind = "residual_vqgan"

    @classmethod
    def from_folder(cls, folder: Path, config: dict) -> "ResidualVQ":
        """Build the network from ``config``, which is Janus's and has ``depth``, and read its weights from ``folder``.

        Raises:
            UserError: the depth or weights are missing.
        """
        config = dict(config)
        depth = config.pop("depth", None)
        if type(depth) is not int or depth < 1:
            raise UserError(f"{folder / 'config.json'}: depth is {depth!r}, must be a positive integer")
        network = _read_network(cls.network_class, folder, {**config, "model_type": JanusVQ.kind})
        return cls(network, folder, *cls._sizes(network.config), depth)

    def _codebook(self):
        return self.network.quantize.embedding.weight.float()


class ChameleonVQ(_Transformers):
    """Chameleon's image tokenizer. Its decoder was never published."""

    kind = "chameleon_vqgan"
    network_class = transformers.ChameleonVQVAE
    decodes = False

    @staticmethod
    def _sizes(config):
        pixels = config.resolution
        side = pixels // _reduction(config)
        return (side, side), (pixels, pixels)

    def _codebook(self):
        return self.network.quantize.embedding.weight.float()

    def _latents(self, images: Tensor) -> Tensor:
        return self.network.quant_conv(self.network.encoder(images))


class Emu3VQ(_Transformers):
    """Emu3's video tokenizer, used on still images: an image is a clip of equal frames with one code grid."""

    kind = "emu3_vqgan"
    network_class = transformers.Emu3VQVAE
    memory_format = torch.contiguous_format  # its convolutions are three-dimensional

    @staticmethod
    def _sizes(config):
        size = getattr(config, "image_size", EMU3_IMAGE_SIZE)
        height, width = (size, size) if isinstance(size, int) else size
        factor = _reduction(config)
        return (height // factor, width // factor), (height, width)

    def _codebook(self):
        return self.network.quantize.embedding.weight.float()

    def _latents(self, images: Tensor) -> Tensor:
        frames = self.network.config.temporal_downsample_factor
        clips = images.unsqueeze(1).expand(-1, frames, -1, -1, -1).contiguous()
        latents = self.network.encoder(clips).permute(0, 2, 1, 3, 4)  # [n, c, 1, h, w]
        return self.network.quant_conv(latents).squeeze(2)

    def _images(self, latents: Tensor) -> Tensor:
        latents = latents.to(next(self.network.decoder.parameters()).dtype).unsqueeze(2)  # [n, e, 1, h, w]
        decoded = self.network.post_quant_conv(latents).permute(0, 2, 1, 3, 4)
        clips = self.network.decoder(decoded, latents.permute(0, 2, 1, 3, 4))
        return clips.reshape(len(latents), -1, 3, *self.image_size)[:, 0]


ADAPTERS = {adapter.kind: adapter for adapter in (JanusVQ, ResidualVQ, Emu3VQ, ChameleonVQ)}


def _reduction(config) -> int:
    """Pixels (or patches) per code along a side."""
    return 2 ** (len(config.channel_multiplier) - 1)


def _patch(config) -> int:
    """Pixels along a side of a Janus network's input patches."""
    return math.isqrt(config.in_channels // 3)


def _read_network(network_class, folder: Path, config: dict):
    """A network with the weights in ``folder``, float32.

    Raises:
        UserError: the weights cannot be read, or some are missing.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a whole checkpoint has thousands of unused weights
    progress_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        network, info = network_class.from_pretrained(
            folder,
            config=network_class.config_class(**config),
            key_mapping={r"^(model\.)?vqmodel\.": ""},
            dtype="float32",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read as a {network_class.__name__} ({_one_line(error)})") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress_bars:
            transformers_logging.enable_progress_bar()
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{folder}: {len(missing)} weights of {network_class.__name__} are missing, e.g. {missing[0]}")
    return network


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

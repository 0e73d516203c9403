"""The interface of VQ image tokenizers."""

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.errors import UserError
from megatron_ext.vq.codebook import residual_codes
from megatron_ext.vq.image_decoder import Preparation


class VQModel(ABC):
    """A frozen VQ image tokenizer.

    The networks may run in bfloat16. The codebook look-up is float32 or more: rounded distances select other codes.

    Attributes:
        kind: ``model_type`` of the VQ network's configuration.
        codebook_size: number of codes, K.
        depth: codes of a position, D. With more than one they are residual: each is the nearest to what those before it
            leave of the latent, and the position's vector is the sum of theirs, all from one codebook.
        grid: (h, w), rows and columns of positions of an image.
        image_size: (H, W), pixels.
        device, dtype: of the networks.
        fingerprint: 16 hexadecimal digits that change with the kind, the image size, the depth or any weight, but not
            with how the weights are stored or converted.
    """

    kind: str
    decodes = True
    """Whether the published weights include a decoder."""
    memory_format = torch.channels_last
    preparation = Preparation()
    """How images are prepared for it."""

    def __init__(
        self, network: nn.Module, folder: Path, grid: tuple[int, int], image_size: tuple[int, int], depth: int = 1
    ):
        self.folder = folder
        self.grid, self.image_size, self.depth = grid, image_size, depth
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.network = network.eval().requires_grad_(False)
        self.codebook_size = len(self._codebook())
        self.fingerprint = _fingerprint(self.kind, image_size, depth, network)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "VQModel":
        """Move the networks to ``device`` and ``dtype``; the codebook stays float32."""
        self.device, self.dtype = torch.device(device), dtype
        for name, module in self.network.named_children():
            own_dtype = torch.float32 if name == "quantize" else dtype
            module.to(device=device, dtype=own_dtype, memory_format=self.memory_format)
        return self

    @property
    def metadata(self) -> dict:
        """The entry ``vq`` in the metadata of a data set with this tokenizer's codes."""
        metadata = {"fingerprint": self.fingerprint, "grid": list(self.grid), "codebook_size": self.codebook_size}
        # Data sets of one code a position stay as they are.
        return metadata | ({"depth": self.depth} if self.depth > 1 else {})

    @property
    def vectors(self) -> Tensor:
        """The codes' vectors, float32 [K, e]; those of a position add up to what is decoded."""
        return self._codebook().float()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [n, 3, H, W], float in [-1, 1], to codes [n, h*w*D], int64, row-major; the D codes of a position lie
        side by side.

        Raises:
            ValueError: the images are not of ``image_size``.
        """
        return residual_codes(self.latents(images), self._codebook(), self.depth).view(len(images), -1)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """What :meth:`encode` quantizes: images [n, 3, H, W] to [n*h*w, e], of the codebook's type."""
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != self.image_size:
            raise ValueError(f"images of shape {tuple(images.shape)}, expected [n, 3, {self._size_text()}]")
        images = images.to(self.device, self.dtype).contiguous(memory_format=self.memory_format)
        latents = self._latents(images).to(self._codebook().dtype)  # [n, e, h, w]
        return latents.permute(0, 2, 3, 1).flatten(0, 2)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [n, h*w*D], as :meth:`encode` orders them, to images [n, 3, H, W], float32 in [-1, 1].

        Raises:
            UserError: this tokenizer has no decoder.
            ValueError: the codes are not n whole grids.
        """
        if not self.decodes:
            raise UserError(f"{self.folder}: a {self.kind} tokenizer only encodes; it was published without a decoder")
        length = self.grid[0] * self.grid[1] * self.depth
        if codes.ndim != 2 or codes.shape[1] != length:
            raise ValueError(f"codes of shape {tuple(codes.shape)}, expected [n, {length}]")
        return self.decode_first(codes, self.depth)

    @torch.no_grad()
    def decode_first(self, codes: Tensor, count: int) -> Tensor:
        """As :meth:`decode`, from the first ``count`` codes of each position alone."""
        latents = self.quantized(codes, count).unflatten(1, self.grid).permute(0, 3, 1, 2)
        return self._images(latents).float().clamp(-1, 1)

    def quantized(self, codes: Tensor, count: int | None = None) -> Tensor:
        """Codes [n, h*w*D] to the sum of each position's vectors, or of its first ``count``: [n, h*w, e]."""
        codes = codes.to(self.device).view(len(codes), -1, self.depth)[..., :count]
        return F.embedding(codes, self._codebook()).sum(2)

    def _size_text(self) -> str:
        return f"{self.image_size[0]}, {self.image_size[1]}"

    @abstractmethod
    def _codebook(self) -> Tensor:
        """The codebook [codebook_size, e], float32 or float64; the vector nearest to a latent is its code."""

    @abstractmethod
    def _latents(self, images: Tensor) -> Tensor:
        """Images to latents [n, e, h, w] before quantisation."""

    def _images(self, latents: Tensor) -> Tensor:
        """Quantised latents [n, e, h, w], of the codebook's type, to images [n, 3, H, W]."""
        raise NotImplementedError


def _fingerprint(kind: str, image_size: tuple[int, int], depth: int, network: nn.Module) -> str:
    digest = hashlib.sha256(json.dumps([kind, image_size, *([depth] if depth > 1 else [])]).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().contiguous().numpy())
    return digest.hexdigest()[:16]

"""The interface of VQ image tokenizers."""

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_ext.errors import UserError
from megatron_ext.vq.codebook import nearest


class VQModel(ABC):
    """A frozen VQ image tokenizer.

    The networks may run in bfloat16. The codebook look-up is float32 or more: rounded distances select other codes.

    Attributes:
        kind: ``model_type`` of the VQ network's configuration.
        codebook_size: number of codes.
        grid: (h, w), rows and columns of codes of an image.
        image_size: (H, W), pixels.
        device, dtype: of the networks.
        fingerprint: 16 hexadecimal digits that change with the kind, the image size or any weight, but not with how the
            weights are stored or converted.
    """

    kind: str
    decodes = True
    """Whether the published weights include a decoder."""
    memory_format = torch.channels_last

    def __init__(self, network: nn.Module, folder: Path, grid: tuple[int, int], image_size: tuple[int, int]):
        self.folder = folder
        self.grid, self.image_size = grid, image_size
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.network = network.eval().requires_grad_(False)
        self.codebook_size = len(self._codebook())
        self.fingerprint = _fingerprint(self.kind, image_size, network)

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
        return {"fingerprint": self.fingerprint, "grid": list(self.grid), "codebook_size": self.codebook_size}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [n, 3, H, W], float in [-1, 1], to codes [n, h*w], int64, row-major.

        Raises:
            ValueError: the images are not of ``image_size``.
        """
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != self.image_size:
            raise ValueError(f"images of shape {tuple(images.shape)}, expected [n, 3, {self._size_text()}]")
        images = images.to(self.device, self.dtype).contiguous(memory_format=self.memory_format)
        codebook = self._codebook()
        latents = self._latents(images).to(codebook.dtype)  # [n, d, h, w]
        codes = nearest(latents.permute(0, 2, 3, 1).flatten(0, 2), codebook)
        return codes.view(len(images), -1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [n, h*w] to images [n, 3, H, W], float32 in [-1, 1].

        Raises:
            UserError: this tokenizer has no decoder.
            ValueError: the codes are not n whole grids.
        """
        if not self.decodes:
            raise UserError(f"{self.folder}: a {self.kind} tokenizer only encodes; it was published without a decoder")
        height, width = self.grid
        if codes.ndim != 2 or codes.shape[1] != height * width:
            raise ValueError(f"codes of shape {tuple(codes.shape)}, expected [n, {height * width}]")
        return self._images(codes.to(self.device)).float().clamp(-1, 1)

    def _size_text(self) -> str:
        return f"{self.image_size[0]}, {self.image_size[1]}"

    @abstractmethod
    def _codebook(self) -> Tensor:
        """The codebook [codebook_size, d], float32 or float64; the vector nearest to a latent is its code."""

    @abstractmethod
    def _latents(self, images: Tensor) -> Tensor:
        """Images to latents [n, d, h, w] before quantisation."""

    def _images(self, codes: Tensor) -> Tensor:
        """Codes [n, h*w] to images [n, 3, H, W]."""
        raise NotImplementedError


def _fingerprint(kind: str, image_size: tuple[int, int], network: nn.Module) -> str:
    digest = hashlib.sha256(json.dumps([kind, image_size]).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().contiguous().numpy())
    return digest.hexdigest()[:16]

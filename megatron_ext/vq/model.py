"""One interface over VQ image tokenizers, and the loader that recognises which one a folder holds."""

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_ext.errors import UserError

NEAREST_ELEMENTS = 1 << 26
"""Entries of the distance table that a codebook look-up holds at once (256 MiB in float32)."""


class VQModel(ABC):
    """A frozen VQ image tokenizer.

    The networks may run in bfloat16; the codebook look-up is always float32, since rounded distances pick other codes.

    Attributes:
        kind: ``model_type`` of the VQ network's configuration.
        codebook_size: number of codes.
        grid: (h, w), codes per column and row of an image.
        image_size: (H, W), pixels.
        fingerprint: 16 hexadecimal digits that change with the kind, the image size or any weight; the same however
            the weights are stored or converted.
    """

    kind: str
    decodes = True
    """Whether the published weights can turn codes back into pictures."""
    memory_format = torch.channels_last

    def __init__(self, network: nn.Module, folder: Path, grid: tuple[int, int], image_size: tuple[int, int]):
        self.folder = folder
        self.grid, self.image_size = grid, image_size
        self.network = network.eval().requires_grad_(False)
        self.codebook_size = len(self._codebook())
        self.fingerprint = _fingerprint(self.kind, image_size, network)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "VQModel":
        """Move the networks to ``device``, to compute in ``dtype``; the codebook stays float32."""
        self.network.to(device=device, dtype=dtype, memory_format=self.memory_format)
        self.network.quantize.float()
        return self

    @property
    def metadata(self) -> dict:
        """What a data set's metadata says of the VQ model that made its codes."""
        return {"fingerprint": self.fingerprint, "grid": list(self.grid), "codebook_size": self.codebook_size}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [n, 3, H, W], float in [-1, 1], to codes [n, h*w], int64, row-major.

        Raises:
            ValueError: the images are not of ``image_size``.
        """
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != self.image_size:
            raise ValueError(f"images of shape {tuple(images.shape)}, expected [n, 3, {self._pixels()}]")
        parameter = next(self.network.encoder.parameters())
        images = images.to(parameter.device, parameter.dtype).contiguous(memory_format=self.memory_format)
        latents = self._latents(images).float()  # [n, d, h, w]
        codes = nearest(latents.permute(0, 2, 3, 1).flatten(0, 2), self._codebook())
        return codes.view(len(images), -1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [n, h*w] to images [n, 3, H, W], float32 in [-1, 1].

        Raises:
            UserError: this tokenizer has no decoder.
            ValueError: the codes are not n whole grids.
        """
        if not self.decodes:
            raise UserError(f"{self.folder}: a {self.kind} tokenizer only encodes; its published form has no decoder")
        height, width = self.grid
        if codes.ndim != 2 or codes.shape[1] != height * width:
            raise ValueError(f"codes of shape {tuple(codes.shape)}, expected [n, {height * width}]")
        codes = codes.to(next(self.network.parameters()).device)
        return self._pictures(codes).float().clamp(-1, 1)

    def _pixels(self) -> str:
        return f"{self.image_size[0]}, {self.image_size[1]}"

    @abstractmethod
    def _codebook(self) -> Tensor:
        """The vectors [codebook_size, d] among which the nearest to a latent is its code, float32."""

    @abstractmethod
    def _latents(self, images: Tensor) -> Tensor:
        """Images to latents [n, d, h, w] before quantisation."""

    def _pictures(self, codes: Tensor) -> Tensor:
        """Codes [n, h*w] to images [n, 3, H, W]."""
        raise NotImplementedError


def load(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> VQModel:
    """The VQ tokenizer in a local folder, on ``device``; nothing is downloaded.

    The folder is one that transformers' ``save_pretrained`` wrote: the VQ network alone, or a whole Janus, Emu3 or
    Chameleon checkpoint, of which only the VQ network is read.

    Raises:
        UserError: there is no such tokenizer in the folder, or its weights are incomplete.
    """
    # transformers takes seconds to import, and many users of this package only need the type.
    from megatron_ext.vq.adapters import ADAPTERS

    folder = Path(folder)
    config = _read_config(folder)
    # A whole checkpoint keeps the tokenizer's configuration in a section of its own.
    config = config.get("vq_config") or config
    adapter = ADAPTERS.get(config.get("model_type"))
    if adapter is None:
        raise UserError(
            f"{folder / 'config.json'}: model_type {config.get('model_type')!r} is no VQ tokenizer known here; "
            f"expected one of {', '.join(ADAPTERS)}, or a checkpoint with such a 'vq_config'"
        )
    return adapter.from_folder(folder, config).to(device, dtype)


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook row with the least Euclidean distance to each vector.

    Args:
        vectors: [m, d].
        codebook: [k, d].

    Returns:
        int64 [m].
    """
    # |v - c|^2 = |v|^2 - 2 v.c + |c|^2, and the first term is the same for every c.
    bias = codebook.square().sum(1) / 2
    rows = max(1, NEAREST_ELEMENTS // len(codebook))
    return torch.cat([(chunk @ codebook.T - bias).argmax(1) for chunk in vectors.split(rows)])


def _read_config(folder: Path) -> dict:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: not found; a VQ folder holds config.json and model.safetensors") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: expected a JSON object")
    return config


def _fingerprint(kind: str, image_size: tuple[int, int], network: nn.Module) -> str:
    digest = hashlib.sha256(json.dumps([kind, image_size]).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().contiguous().numpy())
    return digest.hexdigest()[:16]

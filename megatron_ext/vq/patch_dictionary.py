"""A patch dictionary: an image tokenizer without a network.

A code is the entry of the dictionary nearest to a patch of p x p pixels, by the sum of squared differences of its
bytes, and decodes to that entry. The folder holds config.json (``model_type``, ``image_size`` and ``patch_size`` in
pixels along a side) and model.safetensors with ``patches``, uint8 [codebook_size, 3, p, p]; all entries differ.

With several codes a position (``depth``), a patch is the sum of as many entries, which are no bytes then: ``vectors``,
float32 of the same shape, of pixels in [-1, 1].
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megatron_ext.errors import UserError
from megatron_ext.files import read_json
from megatron_ext.vq.model import VQModel
from megatron_ext.vq.pixels import from_bytes, to_bytes

_EXPORTED = "vqmodel.patches"
"""The name of the patches in an exported model (``export_hf/``)."""


class PatchDictionary(VQModel):
    """A dictionary of patches. It computes in float32 and float64 whatever the dtype: bytes stay exact."""

    kind = "patch_dictionary"

    @classmethod
    def from_folder(cls, folder: Path, config: dict) -> "PatchDictionary":
        """Read the patches in ``folder``.

        Raises:
            UserError: the files do not hold a patch dictionary.
        """
        size, patch = _sizes(folder, config)
        return cls._of(from_bytes(_read_patches(folder, "patches", torch.uint8, patch)), folder, size)

    @classmethod
    def _of(cls, entries: Tensor, folder: Path, size: int, depth: int = 1) -> "PatchDictionary":
        network, side = nn.Module(), size // entries.shape[-1]
        network.quantize = nn.Embedding.from_pretrained(entries.flatten(1))
        return cls(network, folder, (side, side), (size, size), depth)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "PatchDictionary":
        """Move the dictionary to ``device``; it stays float32."""
        super().to(device)
        return self

    def _codebook(self) -> Tensor:
        # Sums of products of bytes are exact in float64, so equal patches always find each other.
        return to_bytes(self.network.quantize.weight).double()

    def _latents(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(to_bytes(images), self._patch_size)

    def _images(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(from_bytes(latents.float()), self._patch_size)

    @property
    def _patch_size(self) -> int:
        return self.image_size[0] // self.grid[0]


class ResidualPatchDictionary(PatchDictionary):
    """A dictionary of which several entries add up to a patch."""

    kind = "residual_patch_dictionary"

    @classmethod
    def from_folder(cls, folder: Path, config: dict) -> "ResidualPatchDictionary":
        """Read the vectors in ``folder``.

        Raises:
            UserError: the files do not hold a residual patch dictionary.
        """
        size, patch = _sizes(folder, config)
        vectors = _read_patches(folder, "vectors", torch.float32, patch)
        return cls._of(vectors, folder, size, _positive(folder, config, "depth"))

    def _codebook(self) -> Tensor:
        # In float64 the codes do not depend on how many images are encoded at once.
        return self.network.quantize.weight.double()

    def _latents(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, self._patch_size)

    def _images(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents.float(), self._patch_size)


DICTIONARIES = {dictionary.kind: dictionary for dictionary in (PatchDictionary, ResidualPatchDictionary)}


def _sizes(folder: Path, config: dict) -> tuple[int, int]:
    size, patch = (_positive(folder, config, key) for key in ("image_size", "patch_size"))
    if size % patch:
        raise UserError(f"{folder / 'config.json'}: image_size {size} is not a multiple of patch_size {patch}")
    return size, patch


def _positive(folder: Path, config: dict, key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise UserError(f"{folder / 'config.json'}: {key} is {value!r}, must be a positive integer")
    return value


def _read_patches(folder: Path, name: str, dtype: torch.dtype, patch: int) -> Tensor:
    file, patches = folder / "model.safetensors", None
    index = folder / "model.safetensors.index.json"  # of an exported model in shards
    if index.is_file():
        file = folder / read_json(index)["weight_map"].get(_EXPORTED, file.name)
    try:
        with safe_open(file, framework="pt") as tensors:
            for stored in {name, _EXPORTED} & {*tensors.keys()}:
                patches = tensors.get_tensor(stored)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
    if patches is None or patches.dtype != dtype or patches.shape[1:] != (3, patch, patch) or not len(patches):
        content = "no tensor of that name" if patches is None else f"{patches.dtype} {list(patches.shape)}"
        wanted = str(dtype).removeprefix("torch.")
        raise UserError(f"{file}: {name} must be {wanted} [codes, 3, {patch}, {patch}], found {content}")
    return patches

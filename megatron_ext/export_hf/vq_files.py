"""The VQ tokenizer in an exported folder: its network's weights under ``vqmodel.`` and its configuration."""

from collections.abc import Iterator

from torch import Tensor

from megatron_ext import files
from megatron_ext.vq.model import VQModel
from megatron_ext.vq.patch_dictionary import PatchDictionary
from megatron_ext.vq.pixels import to_bytes

PREFIX = "vqmodel."


def vq_keys(vq: VQModel) -> dict:
    """The keys of config.json about a VQ tokenizer."""
    config = files.read_json(vq.folder / "config.json")
    return {
        "grid": list(vq.grid),
        "image_size": list(vq.image_size),
        "vq_config": config.get("vq_config") or config,
        "vq_fingerprint": vq.fingerprint,
    }


def vq_tensors(vq: VQModel) -> Iterator[tuple[str, Tensor]]:
    """Its weights, float32 whatever the model's precision; patches are bytes."""
    if isinstance(vq, PatchDictionary):
        patch = vq.image_size[0] // vq.grid[0]
        yield f"{PREFIX}patches", to_bytes(vq.network.quantize.weight).view(-1, 3, patch, patch)
        return
    for name, tensor in vq.network.state_dict().items():
        yield PREFIX + name, tensor

"""Loading the VQ tokenizer that a local folder holds."""

from functools import cache
from pathlib import Path

import torch

from megatron_ext import files
from megatron_ext.errors import UserError
from megatron_ext.vq.model import VQModel
from megatron_ext.vq.patch_dictionary import DICTIONARIES


def load(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> VQModel:
    """Load the VQ tokenizer in a local folder onto ``device``; nothing is downloaded.

    The folder holds a patch dictionary, or is in the form of transformers' ``save_pretrained``: the VQ network alone,
    or a whole Janus, Emu3 or Chameleon checkpoint or an exported model
    (:mod:`megatron_ext.export_hf`), of which only the VQ network is read. Or it is VILA-U's vision tower, or the
    published folder around it.

    Raises:
        UserError: the folder holds no such tokenizer, or weights are missing.
    """
    folder, config = _network(Path(folder))
    if dictionary := DICTIONARIES.get(config.get("model_type")):
        return dictionary.from_folder(folder, config).to(device)
    # Importing transformers takes seconds.
    from megatron_ext.vq.adapters import ADAPTERS
    from megatron_ext.vq.vila_u import VilaUVisionTower

    adapters = {**ADAPTERS, VilaUVisionTower.kind: VilaUVisionTower}
    adapter = adapters.get(config.get("model_type"))
    if adapter is None:
        raise UserError(
            f"{folder / 'config.json'}: model_type {config.get('model_type')!r} is not a known VQ tokenizer; "
            f"expected one of {', '.join([*DICTIONARIES, *adapters])}, or a checkpoint with such a 'vq_config'"
        )
    return adapter.from_folder(folder, config).to(device, dtype)


@cache
def code_shape(folder: str) -> dict[str, int]:
    """What :func:`load` would find: codes of a position ("depth") and of the codebook ("codebook_size"), and the
    "width" of a code vector. A folder is read once, and of VILA-U's vision tower config.json alone: its weights have
    gigabytes.

    Raises:
        UserError: as :func:`load`.
    """
    try:
        tower = _network(Path(folder))[1]["rqvaesiglip"]
        sizes = tower["code_shape"][-1], tower["n_embed"], tower["latent_shape"][-1]
    except (KeyError, TypeError, IndexError):
        tokenizer = load(folder)
        sizes = tokenizer.depth, *tokenizer.vectors.shape
    return dict(zip(("depth", "codebook_size", "width"), sizes))


def _network(folder: Path) -> tuple[Path, dict]:
    """The folder and the configuration of the tokenizer's network."""
    config = _read_config(folder)
    if config.get("model_type") == "vila_u_llama":
        folder = folder / "vision_tower"
        config = _read_config(folder)
    # A whole checkpoint keeps the tokenizer's configuration in a section of its own.
    return folder, config.get("vq_config") or config


def _read_config(folder: Path) -> dict:
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{file}: not found; a VQ folder holds config.json and model.safetensors")
    config = files.read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"{file}: expected a JSON object")
    return config

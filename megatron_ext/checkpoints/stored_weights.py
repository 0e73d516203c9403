"""The weights in a checkpoint, read one by one, without a model or a process group."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ext import compat
from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.errors import UserError
from megatron_ext.transformer.norm import STORED_NAMES

CODE_VECTORS = "code_vectors.weight"


class StoredWeights(Mapping[str, Tensor]):
    """A checkpoint's parameters by name, with layers numbered over the whole model; each is read whole on access.

    Attributes:
        state: the state that was saved with it.
        dtype: of the parameters. Frozen code vectors, which are here too, are float32.
    """

    def __init__(self, path: Path):
        """
        Args:
            path: a complete checkpoint, saved under any layout. Every file is read once to verify its checksum.

        Raises:
            UserError: a file is missing or damaged.
        """
        marker = checkpoint_folder.read_marker(path)
        if reason := compat.why_unreadable(marker["versions"]):
            raise UserError(f"{path}: {reason}")
        if damage := checkpoint_folder.damage(path, marker["files"], sorted(marker["files"])):
            raise UserError(damage[0] + checkpoint_folder.remedy(path))
        self.state = marker["state"]
        self._reader = torch_checkpoint.FileSystemReader(path)
        entries = self._reader.read_metadata().state_dict_metadata
        self._stored = {
            _own_name(key): (key, entry)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
            and not key.startswith("optimizer.")
            and "_extra_state" not in key
        }
        (self.dtype,) = {x.properties.dtype for name, (_, x) in self._stored.items() if name != CODE_VECTORS}

    def __getitem__(self, name: str) -> Tensor:
        key, entry = self._stored[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        torch_checkpoint.load({key: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape, without reading it."""
        return tuple(self._stored[name][1].size)


def _own_name(key: str) -> str:
    for own, stored in STORED_NAMES.items():
        key = key.replace(stored, own)
    return key

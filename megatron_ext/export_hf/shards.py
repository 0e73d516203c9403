"""Weights as safetensors in shards, written while the tensors come in: memory holds one shard."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.files import write_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_size: int) -> dict:
    """Write named tensors to ``folder``: one file, or shards of at most ``shard_size`` bytes with an index. A tensor
    that is larger has a shard of its own.

    Returns:
        The number of "tensors", of "bytes" and of "files".
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_size = total = 0

    def flush() -> None:
        nonlocal pending, pending_size
        if pending:
            file = folder / f".shard-{len(shards)}"
            save_file(pending, file, metadata={"format": "pt"})
            file.chmod(0o644)  # safetensors lets nobody else read it
            shards.append(list(pending))
        pending, pending_size = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending_size + size > shard_size:
            flush()
        # A slice of a larger tensor would keep all of it in memory, and safetensors refuses slices of one tensor.
        pending[name] = tensor.clone(memory_format=torch.contiguous_format)
        pending_size += size
        total += size
    flush()
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for i, name in enumerate(names):
        (folder / f".shard-{i}").rename(folder / name)
    if count > 1:
        weight_map = {tensor: file for file, tensors in zip(names, shards) for tensor in tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return {"tensors": sum(map(len, shards)), "bytes": total, "files": len(names)}

"""Writes a trained checkpoint in the layout of the published VILA-U that it started from."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints.stored_weights import StoredWeights
from megatron_ext.conversion.vila_u import read_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.export_hf.form import Exported, why_not_stock
from megatron_ext.export_hf.shards import INDEX, write_shards
from megatron_ext.export_hf.weights import tensors
from megatron_ext.export_hf.write import read
from megatron_ext.files import read_json, write_json
from megatron_ext.hugging_face import vila_u_weights
from megatron_ext.hugging_face.loading import require_same_text
from megatron_ext.hugging_face.vila_u import LLM, PROJECTOR, TOWER, VilaUFolder
from megatron_ext.hugging_face.weights import TABLES


def export_vila_u(
    checkpoint: Path,
    published: Path,
    out: Path,
    dtype: str = "trained",
    shard_size: int = 5 << 30,
    vocabulary: Path | None = None,
    overrides: Sequence[str] = (),
) -> dict:
    """Write the model of a checkpoint to the folder ``out``; config.json comes last.

    Language model, projector and depth head are the checkpoint's. The rest of the vision tower, the rows of tokens that
    are not trained here, and all other files are those of ``published``.

    Args:
        checkpoint: a checkpoint, saved under any layout, or a run's folder, for its newest one.
        published: the folder of VILA-U that gave the checkpoint its shape and its VQ tokenizer.
        dtype, shard_size, vocabulary, overrides: as those of :func:`~megatron_ext.export_hf.write.export`.

    Returns:
        "dtype", and the numbers of :func:`~megatron_ext.export_hf.shards.write_shards` by folder.

    Raises:
        UserError: names the file or setting at fault.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not an empty folder; name another one")
    path = checkpoint_folder.of_run(checkpoint)
    weights, source = StoredWeights(path), VilaUFolder(published)
    exported = read(path, weights, dtype, vocabulary, overrides)
    _check(exported, source, path)
    own = getattr(torch, exported.dtype)
    head = {PROJECTOR: {}, TOWER: {}}
    for folder, name, tensor in vila_u_weights.tensors(weights, exported.model.image_codes.head):
        head[folder][name] = tensor.to(own)

    shutil.copytree(published, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    (out / "config.json").unlink()
    tower = ((name, head[TOWER].get(name, source.files[TOWER].rows(name))) for name in source.files[TOWER])
    llm = ((name, tensor.to(own)) for name, tensor in _language_model(weights, exported, source))
    streams = {LLM: llm, PROJECTOR: head[PROJECTOR].items(), TOWER: tower}
    numbers = {folder: write_shards(out / folder, stream, shard_size) for folder, stream in streams.items()}
    for folder in (LLM, PROJECTOR):
        _copy_config(published / folder / "config.json", out / folder / "config.json", exported.dtype)
    _copy_config(published / "config.json", out / "config.json", exported.dtype)
    return {"dtype": exported.dtype, **numbers}


def _check(exported: Exported, source: VilaUFolder, path: Path) -> None:
    """Refuse a model that VILA-U's classes do not compute, or another folder than that which it started from."""
    if reason := why_not_stock(exported):
        raise UserError(f"{path}: cannot take VILA-U's layout: {reason}")
    read_tokenizer(source)
    published, own = source.model.identity, exported.model.identity
    for key in dict.fromkeys((*published, *own)):
        if published.get(key) != own.get(key):
            raise UserError(
                f"{path}: its model.{key} is {own.get(key)}, that of {source.root} {published.get(key)}; name the "
                "folder that it started from"
            )
    require_same_text(source, exported.vocabulary)


def _copy_config(file: Path, target: Path, dtype: str) -> None:
    """Copy a config.json, byte for byte if it names ``dtype`` or none. The vision tower's names that of the weights
    that stay."""
    published = read_json(file)
    names = {"torch_dtype": dtype, "dtype": dtype, "model_dtype": f"torch.{dtype}"}
    config = {key: names.get(key, value) for key, value in published.items()}
    if config != published:
        write_json(target, config)
    else:
        shutil.copyfile(file, target)


def _language_model(weights: StoredWeights, exported: Exported, source: VilaUFolder) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``llm``. Both tables have VILA-U's rows: of text, of the tokens around images, and, as they were
    published, of those around videos. ``</s>`` has its own row, not that of ``<eod>``."""
    vocabulary, special = exported.vocabulary, source.special_rows(exported.vocabulary)
    for name, tensor in tensors(weights, exported.model, exported.plan.projections):
        if name in TABLES.values():
            table = source.rows(name).to(tensor)
            table[: vocabulary.text_size] = tensor[: vocabulary.text_size]
            for token in (vocabulary.boi, vocabulary.eoi):
                table[special[token]] = tensor[token]
            tensor = table
        yield name, tensor

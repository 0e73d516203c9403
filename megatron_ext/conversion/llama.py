"""Converts a Hugging Face Llama to a checkpoint from which training can start.

::

    row of embedding and head       initial value
    text 0 .. text_size-1           Llama's row of the same id: a vocabulary keeps the ids of Llama's pieces
    <eod>                           Llama's row of </s>, which ended documents in its training
    <pad> <boi> <eoi>, VQ codes,    this project's initial weights (from the seed and the parameter's name), scaled to
    rows of padding                 the standard deviation of Llama's text rows, separately in embedding and head

Initial weights have the standard deviation for training from scratch (``init_std``), which can differ from that of
trained rows. Without the scaling, new tokens would enter the first layer with a smaller or larger norm than text, and
their logits would spread less or more than those of text.
"""

import dataclasses
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megatron_ext import command_line, distributed, files
from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints.checkpointer import Checkpointer
from megatron_ext.config import Config, DataConfig, TrainingConfig
from megatron_ext.conversion.hugging_face import EMBEDDING, HEAD, LlamaFolder, named_weights
from megatron_ext.conversion.projections import single_process
from megatron_ext.errors import UserError
from megatron_ext.routing.flops import parameter_count
from megatron_ext.training.run import Progress, identity_of
from megatron_ext.transformer.model import build_chunks
from megatron_ext.transformer.resolved import padded_vocab_size, resolve
from megatron_ext.vocabulary import Vocabulary


def convert_llama(folder: Path, vocabulary: Vocabulary, out: Path, seed: int) -> dict:
    """Write a Llama's weights as ``out``/iter_0000000 and its shape as ``out``/model.yaml.

    The checkpoint holds only weights, in bf16 if all of Llama's have it, else in float32. Llama's weights are read one
    by one. Memory holds the model once, and its gate and up matrices (half the model) a second time during the save.
    Joins and leaves a process group of this process only.

    Args:
        folder: config.json and safetensors of ``LlamaForCausalLM``.
        vocabulary: a vocabulary with Llama's text pieces.
        out: a folder without checkpoints.
        seed: seed of the rows that Llama does not have.

    Returns:
        The written "checkpoint" and "config", the number of "parameters", the "precision", the number of "rows" of each
        kind, and the standard deviation of new rows in each table, "new_rows_std".

    Raises:
        UserError: names the file or setting that cannot be converted.
    """
    if present := checkpoint_folder.checkpoints(out):
        raise UserError(f"{out}: already holds checkpoints, such as {present[-1].name}; name another folder")
    llama = LlamaFolder(folder)
    _require_same_text(vocabulary, llama)
    config = Config(
        output=str(out),
        model=llama.model,
        data=DataConfig(vocabulary=str(vocabulary.folder)),
        training=TrainingConfig(precision=llama.precision, seed=seed),
    )
    vocab_size = padded_vocab_size(config, vocabulary)
    resolved = resolve(single_process(config), vocab_size)
    identity = identity_of(resolved, vocabulary)
    state = {"progress": dataclasses.asdict(Progress()), "config": dataclasses.asdict(config), "data": None, **identity}
    distributed.initialize(resolved.config)
    try:
        (model,) = build_chunks(resolved)
        stds = _fill(model, llama, vocabulary)
        Checkpointer(out, keep=0).save(0, [model], None, state)
    finally:
        distributed.shut_down()
    _write_model_section(out / "model.yaml", folder.name, identity["model"] | {"init_std": llama.model.init_std})
    llama_rows = vocabulary.text_size + (vocabulary.text.end is not None)
    return {
        "checkpoint": str(out / "iter_0000000"),
        "config": str(out / "model.yaml"),
        "parameters": parameter_count(llama.model, vocab_size, resolved.plan.projections),
        "precision": llama.precision,
        "rows": {
            "llama": llama_rows,
            "new": vocabulary.size - llama_rows,
            "padding": vocab_size - vocabulary.size,
            "left_out": llama.vocab_size - vocabulary.text_size,
        },
        "new_rows_std": stds,
    }


def _write_model_section(file: Path, name: str, section: dict) -> None:
    header = f"# The shape of {name}: lay it over a configuration that starts from its weights.\n"
    files.write_text(file, header + yaml.safe_dump({"model": section}, sort_keys=False))


def _require_same_text(vocabulary: Vocabulary, llama: LlamaFolder) -> None:
    """Refuse a vocabulary whose text ids stand for other pieces in Llama."""
    size, rows = vocabulary.text_size, llama.vocab_size
    differ = f"{vocabulary.folder}: has {size} text pieces, the embedding of {llama.folder} {rows} rows"
    if size > rows:
        raise UserError(
            f"{differ}; create a vocabulary from its tokenizer.model with tools/train_tokenizer.py --from-model"
        )
    tokenizer = llama.pieces()
    if tokenizer is None:
        if size < rows:
            raise UserError(f"{differ}, and no tokenizer.model shows which rows are pieces; add it")
        return
    file, pieces = tokenizer
    for i in range(size):
        own_piece, llama_piece = vocabulary.text.piece(i), pieces.get(i)
        if own_piece != llama_piece:
            raise UserError(
                f"{vocabulary.folder}: its text piece {i} is {own_piece!r}, that of {file} "
                f"{'missing' if llama_piece is None else repr(llama_piece)}; a vocabulary must have Llama's own pieces "
                "(tools/train_tokenizer.py --from-model, with its SentencePiece model)"
            )


@torch.no_grad()
def _fill(model: torch.nn.Module, llama: LlamaFolder, vocabulary: Vocabulary) -> dict[str, float]:
    """Copy Llama's weights into ``model``. Returns the standard deviation of new rows in each table."""
    parameters, stds = dict(model.named_parameters()), {}
    weights = named_weights(llama, llama.model)
    for name, weight in command_line.progress(weights, total=len(parameters), desc="weights", unit="parameter"):
        if name in (EMBEDDING, HEAD):
            stds[name] = _fill_rows(parameters[name], weight, vocabulary, llama.model.init_std)
        else:
            parameters[name].copy_(weight)
    return stds


def _fill_rows(table: Tensor, llama_table: Tensor, vocabulary: Vocabulary, init_std: float) -> float:
    """Copy Llama's rows into ``table`` and scale its other rows, which hold initial weights. Returns their standard
    deviation."""
    text = llama_table[: vocabulary.text_size]
    std = float(text.float().std())
    table.mul_(std / init_std)
    table[: vocabulary.text_size] = text
    end = vocabulary.text.end
    if end is not None:
        table[vocabulary.eod] = text[end]
    return std

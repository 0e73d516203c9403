"""A checkpoint to start from with the weights of a Hugging Face Llama.

::

    row of embedding and head       starts as
    text 0 .. text_size-1           Llama's row of the same id: a vocabulary takes its pieces' ids as they are
    <eod>                           Llama's row of </s>, which ended documents in its training
    <pad> <boi> <eoi>, VQ codes,    this project's initial weights (of the seed and the parameter's name), scaled to the
    rows of padding                 standard deviation of Llama's text rows, in embedding and head each

Initial weights have the spread that a model started at random wants (``init_std``), which need not be that of trained
rows. Of another size they would enter the stack fainter or louder than text does, and their logits would spread
less or more than those of text.
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
from megatron_ext.conversion.projections import alone
from megatron_ext.errors import UserError
from megatron_ext.routing.cost import parameter_count
from megatron_ext.training.run import Progress, identity_of
from megatron_ext.transformer.model import build_chunks
from megatron_ext.transformer.resolved import padded_vocab_size, resolve
from megatron_ext.vocabulary import Vocabulary


def convert_llama(folder: Path, vocabulary: Vocabulary, out: Path, seed: int) -> dict:
    """Write a Llama's weights as ``out``/iter_0000000 and its shape as ``out``/model.yaml.

    The checkpoint has weights alone, in bf16 where all of Llama's are, else in float32. Llama's weights are read one by
    one; the model is held in memory once, and its matrices of gate and up twice while they are written, half the model
    again. Joins a process group of its own, of this process alone, and leaves it.

    Args:
        folder: config.json and safetensors of ``LlamaForCausalLM``.
        vocabulary: has Llama's text pieces.
        out: a folder without checkpoints.
        seed: of the rows that Llama has not.

    Returns:
        "checkpoint" and "config" that were written, "parameters", "precision", the number of "rows" of each kind, and
        the standard deviation of new rows in each table, "new_rows_std".

    Raises:
        UserError: what cannot be converted, named.
    """
    if present := checkpoint_folder.checkpoints(out):
        raise UserError(f"{out}: holds checkpoints already, such as {present[-1].name}; name another folder")
    llama = LlamaFolder(folder)
    _require_same_text(vocabulary, llama)
    config = Config(
        output=str(out),
        model=llama.model,
        data=DataConfig(vocabulary=str(vocabulary.folder)),
        training=TrainingConfig(precision=llama.precision, seed=seed),
    )
    vocab_size = padded_vocab_size(config, vocabulary)
    resolved = resolve(alone(config), vocab_size)
    identity = identity_of(resolved, vocabulary)
    state = {"progress": dataclasses.asdict(Progress()), "config": dataclasses.asdict(config), "data": None, **identity}
    distributed.initialize(resolved.config)
    try:
        (model,) = build_chunks(resolved)
        spread = _fill(model, llama, vocabulary)
        Checkpointer(out, keep=0).save(0, [model], None, state)
    finally:
        distributed.shut_down()
    _write_model_section(out / "model.yaml", folder.name, identity["model"] | {"init_std": llama.model.init_std})
    of_llama = vocabulary.text_size + (_end(vocabulary) is not None)
    return {
        "checkpoint": str(out / "iter_0000000"),
        "config": str(out / "model.yaml"),
        "parameters": parameter_count(llama.model, vocab_size, resolved.plan.projections),
        "precision": llama.precision,
        "rows": {
            "llama": of_llama,
            "new": vocabulary.size - of_llama,
            "padding": vocab_size - vocabulary.size,
            "left_out": llama.vocab_size - vocabulary.text_size,
        },
        "new_rows_std": spread,
    }


def _write_model_section(file: Path, name: str, section: dict) -> None:
    header = f"# The shape of {name}, to be laid over a configuration that starts from its weights.\n"
    files.write_text(file, header + yaml.safe_dump({"model": section}, sort_keys=False))


def _require_same_text(vocabulary: Vocabulary, llama: LlamaFolder) -> None:
    """Refuse a vocabulary whose text ids mean something else to Llama."""
    size, rows = vocabulary.text_size, llama.vocab_size
    differ = f"{vocabulary.folder}: has {size} text pieces, the embedding of {llama.folder} {rows} rows"
    if size > rows:
        raise UserError(
            f"{differ}; make a vocabulary of its tokenizer.model with tools/train_tokenizer.py --from-model"
        )
    tokenizer = llama.pieces()
    if tokenizer is None:
        if size < rows:
            raise UserError(f"{differ}, and no tokenizer.model is there to tell which; add it")
        return
    file, pieces = tokenizer
    for i in range(size):
        ours, theirs = vocabulary.text.id_to_piece(i), pieces.get(i)
        if ours != theirs:
            raise UserError(
                f"{vocabulary.folder}: its text piece {i} is {ours!r}, that of {file} "
                f"{'missing' if theirs is None else repr(theirs)}; a vocabulary must have Llama's own pieces "
                "(tools/train_tokenizer.py --from-model, of a SentencePiece model)"
            )


@torch.no_grad()
def _fill(model: torch.nn.Module, llama: LlamaFolder, vocabulary: Vocabulary) -> dict[str, float]:
    """Give ``model`` Llama's weights; the standard deviation of new rows in each table."""
    parameters, spread = dict(model.named_parameters()), {}
    weights = named_weights(llama, llama.model)
    for name, weight in command_line.progress(weights, total=len(parameters), desc="weights", unit="parameter"):
        if name in (EMBEDDING, HEAD):
            spread[name] = _fill_rows(parameters[name], weight, vocabulary, llama.model.init_std)
        else:
            parameters[name].copy_(weight)
    return spread


def _fill_rows(table: Tensor, theirs: Tensor, vocabulary: Vocabulary, init_std: float) -> float:
    """Give ``table``, which holds initial weights, Llama's rows; the standard deviation that the others get."""
    text = theirs[: vocabulary.text_size]
    std = float(text.float().std())
    table.mul_(std / init_std)
    table[: vocabulary.text_size] = text
    end = _end(vocabulary)
    if end is not None:
        table[vocabulary.eod] = text[end]
    return std


def _end(vocabulary: Vocabulary) -> int | None:
    """Llama's end of a document, None where its pieces have none."""
    end = vocabulary.text.eos_id()
    return end if end >= 0 else None

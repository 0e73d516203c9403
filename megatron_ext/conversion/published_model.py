"""A published model as a checkpoint to start from, converted offline."""

import dataclasses
from pathlib import Path

import yaml
from torch import Tensor

from megatron_ext import distributed, files
from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints.checkpointer import Checkpointer
from megatron_ext.config import Config, DataConfig, TrainingConfig
from megatron_ext.conversion.projections import single_process
from megatron_ext.errors import UserError
from megatron_ext.hugging_face.folder import ModelFolder
from megatron_ext.hugging_face.loading import load_published, require_same_text
from megatron_ext.routing.flops import parameter_count
from megatron_ext.training.run import Progress, identity_of
from megatron_ext.transformer.model import build_chunks
from megatron_ext.transformer.resolved import padded_vocab_size, resolve, vocab_size
from megatron_ext.vocabulary import Vocabulary


def convert_published(folder: Path, vocabulary: Vocabulary, out: Path, seed: int) -> dict:
    """Write a published model's weights as ``out``/iter_0000000 and its shape as ``out``/model.yaml.

    The checkpoint holds only weights, in bf16 if all of the model's have it, else in float32. Memory holds the model
    once. Joins and leaves a process group of this process only.

    Args:
        folder: config.json and safetensors of a Llama, Mistral, Qwen2 or Qwen3.
        vocabulary: a vocabulary with its text tokens.
        out: a folder without checkpoints.
        seed: seed of the rows that the model does not have.

    Returns:
        The written "checkpoint" and "config", the number of "parameters", the "precision", the number of "rows" of each
        kind, and the standard deviation of new rows in each table, "new_rows_std".

    Raises:
        UserError: names the file or setting that cannot be converted.
    """
    require_no_checkpoints(out)
    source = ModelFolder(folder)
    require_same_text(source, vocabulary)  # before the minutes that building a large model takes
    return convert(source, vocabulary, out, seed)


def convert(
    source: ModelFolder, vocabulary: Vocabulary, out: Path, seed: int, code_vectors: Tensor | None = None
) -> dict:
    """:func:`convert_published` for an opened model.

    Args:
        code_vectors: of the VQ tokenizer, where the model has several codes an image token.
    """
    config = Config(
        output=str(out),
        model=source.model,
        data=DataConfig(vocabulary=str(vocabulary.folder)),
        training=TrainingConfig(precision=source.precision, seed=seed),
    )
    padded_size = padded_vocab_size(config, vocabulary)
    resolved = resolve(single_process(config), padded_size)
    identity = identity_of(resolved, vocabulary)
    state = {"progress": dataclasses.asdict(Progress()), "config": dataclasses.asdict(config), "data": None, **identity}
    distributed.initialize(resolved.config)
    try:
        chunks = build_chunks(resolved, code_vectors)
        rows = load_published(source, chunks, source.model, vocabulary)
        Checkpointer(out, keep=0).save(0, chunks, None, state, release=True)
    finally:
        distributed.shut_down()
    return {
        "checkpoint": str(out / "iter_0000000"),
        "config": str(write_shape(source, out / "model.yaml", converted=True)),
        "parameters": parameter_count(source.model, padded_size, resolved.plan.projections),
        "precision": source.precision,
        "rows": {
            "published": rows.published,
            "new": rows.new,
            "padding": padded_size - vocab_size(config, vocabulary),
            "left_out": rows.left_out,
        },
        "new_rows_std": rows.stds,
    }


def require_no_checkpoints(out: Path) -> None:
    """Refuse a folder that holds checkpoints.

    Raises:
        UserError: names one.
    """
    if present := checkpoint_folder.checkpoints(out):
        raise UserError(f"{out}: already holds checkpoints, such as {present[-1].name}; name another folder")


def write_shape(source: ModelFolder, file: Path, converted: bool = False) -> Path:
    """Write a published model's shape as YAML, to lay over the configuration of a run that starts from its weights.

    Args:
        converted: for a run that starts from the converted checkpoint, which has no positions inside images.
    """
    section = dataclasses.asdict(source.model)
    del section["implementation"]
    if not converted:
        del section["max_image_tokens"]
    if source.model.image_codes.depth == 1:  # what image tokens consist of is the run's choice
        del section["image_codes"]
    else:
        del section["image_codes"]["head"]["chunk"]
    header = f"# The shape of {source.name}: lay it over a configuration that starts from its weights.\n"
    files.write_text(file, header + yaml.safe_dump({"model": section}, sort_keys=False))
    return file

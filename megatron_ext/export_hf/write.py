"""Writes a trained checkpoint as a Hugging Face folder."""

import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from string import Template

import torch

from megatron_ext import config_file, files
from megatron_ext import vq as vq_package
from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints.checks import check_compatible
from megatron_ext.checkpoints.stored_weights import StoredWeights
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.export_hf.chat_format import Glue
from megatron_ext.export_hf.form import OWN_CLASS, Exported, choose_form, own_config, plain_config
from megatron_ext.export_hf.shards import write_shards
from megatron_ext.export_hf.tokenizer_files import drops_leading_space, write_tokenizer
from megatron_ext.export_hf.vq_files import vq_keys, vq_tensors
from megatron_ext.export_hf.weights import tensors
from megatron_ext.hugging_face.weights import EMBEDDING
from megatron_ext.routing.plan import Plan, with_roles
from megatron_ext.templates import NO_TEMPLATES, TEMPLATES
from megatron_ext.vocabulary import Vocabulary
from megatron_ext.vq.model import VQModel

OWN_CODE = Path(__file__).parent / "own_code"
DTYPES = ("trained", "float32", "bfloat16", "float16")


def export(
    checkpoint: Path,
    out: Path,
    vq: Path | None = None,
    form: str = "auto",
    dtype: str = "trained",
    shard_size: int = 5 << 30,
    vocabulary: Path | None = None,
    overrides: Sequence[str] = (),
) -> dict:
    """Write the model of a checkpoint to the folder ``out``; config.json, without which it does not load, comes last.

    Memory holds a shard and a projection of one layer. No process group is needed.

    Args:
        checkpoint: a checkpoint, saved under any layout, or a run's folder, for its newest one.
        vq: folder of the VQ tokenizer that the training data was made with; own code needs it.
        form: ``auto``, ``plain``, ``own``; see :func:`~megatron_ext.export_hf.form.choose_form`.
        dtype: one of :data:`DTYPES`.
        shard_size: most bytes of a file of weights.
        vocabulary: its folder; None: that of the run's configuration.
        overrides: ``plan.key=value``; they change the roles of tokens, not the projections.

    Returns:
        "form", "class", "dtype", and the numbers of :func:`~megatron_ext.export_hf.shards.write_shards`.

    Raises:
        UserError: names the file or setting at fault.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder")
    if (out / "config.json").exists():
        raise UserError(f"{out}: already holds a model; name another folder")
    path = checkpoint_folder.of_run(checkpoint)
    weights = StoredWeights(path)
    exported = read(path, weights, dtype, vocabulary, overrides)
    _require_own_form(exported, path)
    form = choose_form(exported, form)
    tokenizer = _vq(vq, exported.vocabulary) if vq else None
    if form == "own" and tokenizer is None:
        raise UserError(f"{path}: is exported with its VQ tokenizer; name its folder (--vq)")

    out.mkdir(parents=True, exist_ok=True)
    glue = write_tokenizer(out, exported.vocabulary, exported.sequence_length, with_images=form == "own")
    stream = tensors(weights, exported.model, exported.plan.projections)
    stream = ((name, tensor.to(getattr(torch, exported.dtype))) for name, tensor in stream)
    if form == "own":
        numbers = write_shards(out, chain(vq_tensors(tokenizer), stream), shard_size)
        description = own_config(exported, vq_keys(tokenizer))
        _write_processor(out, tokenizer, exported.vocabulary, glue)
        for file in sorted(OWN_CODE.glob("*_unified.py")):
            shutil.copyfile(file, out / file.name)
    else:
        numbers = write_shards(out, stream, shard_size)
        description = plain_config(exported)
    files.write_json(out / "generation_config.json", _generation_config(exported))
    files.write_text(out / "README.md", _readme(exported, form, path, description, glue))
    files.write_json(out / "config.json", description)
    return {"form": form, "class": description["architectures"][0], "dtype": exported.dtype, **numbers}


def read(
    path: Path, weights: StoredWeights, dtype: str, vocabulary_folder: Path | None, overrides: Sequence[str]
) -> Exported:
    """What is exported of a checkpoint; arguments as those of :func:`export`."""
    config = with_roles(config_file.from_tree(Config, weights.state["config"]), overrides)
    vocabulary = Vocabulary(vocabulary_folder or config.data.vocabulary)
    check_compatible(weights.state, {"fingerprints": {"vocabulary": vocabulary.fingerprint}}, path)
    return Exported(
        model=config.model,
        plan=Plan.from_config(config),
        vocabulary=vocabulary,
        vocab_size=weights.shape(EMBEDDING)[0],
        dtype=str(weights.dtype).removeprefix("torch.") if dtype == "trained" else dtype,
        sequence_length=config.data.sequence_length,
    )


def _require_own_form(exported: Exported, path: Path) -> None:
    """Refuse what neither form of :func:`export` can hold."""
    if (depth := exported.model.image_codes.depth) > 1:
        raise UserError(
            f"{path}: image tokens have {depth} codes (model.image_codes.depth), which VILA-U's layout alone has "
            "(--vila-u)"
        )
    if exported.vocabulary.templates != NO_TEMPLATES:
        raise UserError(f"{exported.vocabulary.folder / TEMPLATES}: an exported folder cannot follow it")


def _vq(folder: Path, vocabulary: Vocabulary) -> VQModel:
    vq = vq_package.load(folder)
    if vq.codebook_size != vocabulary.codebook_size:
        raise UserError(
            f"{folder}: has {vq.codebook_size} codes, the vocabulary in {vocabulary.folder} {vocabulary.codebook_size}"
        )
    return vq


def _write_processor(out: Path, vq: VQModel, vocabulary: Vocabulary, glue: Glue) -> None:
    auto_map = {
        "AutoProcessor": "processing_unified.UnifiedProcessor",
        "AutoImageProcessor": "processing_unified.UnifiedImageProcessor",
    }
    names = {"processor_class": "UnifiedProcessor", "auto_map": auto_map}
    processor = {
        "image_length": vq.grid[0] * vq.grid[1],
        "text_prefix": glue.alone,
        "repeats_leading_space": drops_leading_space(vocabulary),
    }
    files.write_json(out / "processor_config.json", names | processor)
    image_processor = {"image_processor_type": "UnifiedImageProcessor", "image_size": list(vq.image_size)}
    files.write_json(out / "preprocessor_config.json", names | image_processor)


def _readme(exported: Exported, form: str, checkpoint: Path, description: dict, glue: Glue) -> str:
    template = Template((Path(__file__).parent / "templates" / f"{form}.md").read_text())
    return template.substitute(
        checkpoint=checkpoint.name,
        plan=exported.plan.name,
        dtype=exported.dtype,
        class_name=description["architectures"][0],
        image_offset=exported.vocabulary.image_offset,
        codes=exported.vocabulary.codebook_size,
        prefix=glue.after_image,
        grid=" x ".join(map(str, description.get("grid", ()))),
    )


def _generation_config(exported: Exported) -> dict:
    vocabulary = exported.vocabulary
    return {
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.ends,
        "pad_token_id": vocabulary.pad,
        "do_sample": False,
    }


__all__ = ["DTYPES", "OWN_CLASS", "export"]

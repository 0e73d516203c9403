"""Building the mixture of a run: opening its sources and checking them against each other and the vocabulary."""

import dataclasses
import hashlib
import json

import torch.distributed as dist

from megatron_ext.config import DataConfig, SourceConfig
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.packed_tokens import MAX_VOCABULARY
from megatron_ext.data.rank_info import RankInfo
from megatron_ext.data.rendering import SpecialTokens
from megatron_ext.data.source import Source
from megatron_ext.data.vq_metadata import depth_of
from megatron_ext.errors import UserError
from megatron_ext.templates import TEMPLATES
from megatron_ext.token_classes import Layout

VALIDATION_SEED = 0
"""Validation rows do not depend on the seed of the run, so that runs can be compared."""


def build_mixture(
    sources: list[SourceConfig], data_config: DataConfig, vocabulary, train: bool, depth: int | None = None
) -> Mixture:
    """Open the sources and check them against the run. Collective.

    Every reader opens the files itself; the other ranks receive their description.

    Args:
        train: for training (caption dropout, the seed of the run) or for validation.
        depth: codes of the model's image tokens; None: as the data says.

    Raises:
        UserError: on every rank, if any reader cannot use a source (see :meth:`Source.open`), if images were encoded
            by different tokenizers or have another ``depth``, or if readers found different data.
    """
    special = SpecialTokens.of(vocabulary)
    seed, dropout = (data_config.seed, data_config.caption_dropout) if train else (VALIDATION_SEED, 0.0)
    opened, error = None, None
    if RankInfo.here().reads:
        try:
            opened = _open("data.train" if train else "data.validation", sources, data_config, vocabulary)
            _check_images(opened, depth)
            _check_dropout(opened, dropout)
        except UserError as refusal:
            error = str(refusal)
    shared = _share(opened, error)
    return Mixture(opened or shared, special, seed, dropout, data_config.generation_text, depth)


def _open(key: str, sources: list[SourceConfig], data_config: DataConfig, vocabulary) -> list[Source]:
    if not sources:
        raise UserError(f"config: '{key}' is empty; name at least one data set")
    if vocabulary.size > MAX_VOCABULARY:
        raise UserError(f"{vocabulary.folder}: {vocabulary.size} token ids, at most {MAX_VOCABULARY} are possible")
    if data_config.sequence_length < 2:
        raise UserError(f"config: 'data.sequence_length' is {data_config.sequence_length}, must be at least 2")
    return [
        Source.open(f"{key}[{i}]", source, vocabulary.fingerprint, data_config.sequence_length)
        for i, source in enumerate(sources)
    ]


def _check_images(sources: list[Source], depth: int | None) -> None:
    """Check that all images are of one tokenizer, and of the model's depth."""
    with_images = [source for source in sources if source.metadata["vq"]]
    for source in with_images:
        vq, first = source.metadata["vq"], with_images[0].metadata["vq"]
        if depth_of(vq) != depth_of(first):
            raise UserError(
                f"{source.path}: an image token has {depth_of(vq)} codes, in {with_images[0].path} {depth_of(first)}; "
                "encode one of them again"
            )
        if vq != first:
            raise UserError(
                f"{source.path}: images were encoded with VQ model {vq['fingerprint']}, those of "
                f"{with_images[0].path} with {first['fingerprint']}; encode one of them again"
            )
        if depth is not None and depth_of(vq) != depth:
            raise UserError(
                f"{source.path}: an image token has {depth_of(vq)} codes, 'model.image_codes.depth' is {depth}; "
                "set it to that, or encode the images again"
            )


def _check_dropout(opened: list[Source], dropout: float) -> None:
    """Refuse to drop captions that a chat template wrote: guidance puts an empty turn in their place, rendering
    nothing."""
    for source in opened:
        if dropout and source.layout == Layout.GENERATION and _has_conversations(source.metadata["source"]):
            raise UserError(
                f"config: 'data.caption_dropout' is {dropout:g}, must be 0: the captions of {source.path} are "
                f"conversations (its metadata has 'uses' of {TEMPLATES}), of which nothing can be dropped"
            )


def _has_conversations(source: dict) -> bool:
    """Whether a chat template wrote the captions of a data set, or of one that was merged into it."""
    if any(_has_conversations(shard["source"]) for shard in source.get("merged", [])):
        return True
    template = source.get("settings", {}).get("chat_template") or {}
    return template.get("uses", {}).get("captions") == "conversation"


def _share(opened: list[Source] | None, error: str | None) -> list[Source]:
    """The sources that rank 0 opened, without their open files; raises on all ranks if opening failed on any."""
    if not dist.is_initialized():
        if error:
            raise UserError(error)
        return opened
    # A digest: every rank receives that of every reader.
    digest = opened and hashlib.sha256(json.dumps([source.metadata["files"] for source in opened]).encode()).hexdigest()
    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (error, digest))
    for rank, (refusal, of_rank) in enumerate(outcomes):
        if refusal:
            raise UserError(refusal)
        if of_rank and of_rank != outcomes[0][1]:
            raise UserError(
                f"data: rank {rank} found other files than rank 0 at the same paths; copy the data sets again"
            )
    shared = [[dataclasses.replace(source, dataset=None) for source in opened] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]

"""What a configuration comes to on this machine, resolved once and passed on: plan, implementation, FP8, row layout."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_ext import cpu
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.routing.plan import Plan
from megatron_ext.transformer import fp8, transformer_engine
from megatron_ext.transformer.core_attention import varlen_supports
from megatron_ext.vocabulary import Vocabulary, padded_size


@dataclass(frozen=True)
class RowLayout:
    """How hidden states are stored; see the arguments of :meth:`~megatron_ext.routing.route.Route.arrays`.

    Attributes:
        ranks: ranks over which rows are split (sequence parallelism).
        multiple: the rows of each group on a rank are rounded up to a multiple of this.
        fixed_length: whether T depends on the size of a micro-batch alone, as pipeline stages need.
        fill: queries, keys and targets are filled up to a multiple of this.
        bucketed: whether attention gets similar segments together, filled up to equal lengths.
        context: number of context ranks, which share the tokens of each row.
    """

    ranks: int = 1
    multiple: int = 1
    fixed_length: bool = False
    fill: int = 1
    bucketed: bool = False
    context: int = 1

    def of_rank(self, context_rank: int) -> dict:
        """The arguments of ``Route.arrays`` for a context rank."""
        return {**vars(self), "context": (context_rank, self.context)}


@dataclass(frozen=True)
class ResolvedConfig:
    """A run's configuration with all that follows from it; :func:`resolve` makes it.

    Attributes:
        plan: the roles of tokens and the weights that image tokens use.
        padded_vocab_size: rows of the embedding, see :func:`padded_vocab_size`.
        implementation: of linear layers, norms and attention.
        fp8: recipe of FP8 GEMMs; ``none`` where it is not asked for or not possible.
        why_no_fp8: why ``training.fp8`` is not possible here; None where it is, or is not asked for.
        rows: layout of hidden states.
    """

    config: Config
    plan: Plan
    padded_vocab_size: int
    implementation: Literal["local", "transformer_engine"]
    fp8: str
    why_no_fp8: str | None
    rows: RowLayout


def resolve(config: Config, padded_vocab_size: int = 0) -> ResolvedConfig:
    """Resolve what the configuration leaves to the preset, the machine or the layout.

    Args:
        padded_vocab_size: of :func:`padded_vocab_size`; 0 where no model is built.

    Raises:
        UserError: the plan does not fit the model, or Transformer Engine is asked for and missing.
    """
    implementation = _implementation(config)
    why_no_fp8 = _why_no_fp8(config.training.fp8, implementation)
    recipe = "none" if why_no_fp8 else config.training.fp8
    rows = RowLayout(
        ranks=config.parallel.tensor if config.parallel.sequence else 1,
        multiple=math.lcm(fp8.row_multiple(recipe), config.training.row_multiple),
        fixed_length=config.parallel.pipeline > 1,
        fill=config.training.row_multiple,
        bucketed=implementation == "local" and not _varlen(config),
        context=config.parallel.context,
    )
    plan = Plan.from_config(config)
    return ResolvedConfig(config, plan, padded_vocab_size, implementation, recipe, why_no_fp8, rows)


def padded_vocab_size(config: Config, vocabulary: Vocabulary) -> int:
    """Rows of the embedding."""
    return padded_size(vocab_size(config, vocabulary), config.parallel.tensor)


def vocab_size(config: Config, vocabulary: Vocabulary) -> int:
    """Ids with a row in the embedding and the output layer: with several codes an image token, none of image tokens."""
    return vocabulary.size if config.model.image_codes.depth == 1 else vocabulary.image_offset


def _implementation(config: Config) -> str:
    """``local`` or ``transformer_engine``. ``auto`` is ``local`` in float32, where Transformer Engine's GEMMs are TF32
    and its attention knows half precision alone."""
    setting = config.model.implementation
    possible = not cpu.available() and transformer_engine.installed()
    if setting == "transformer_engine" and not possible:
        raise UserError(
            "config: 'model.implementation' is transformer_engine, which needs a GPU and "
            "Transformer Engine (docs/installation.md); 'local' works everywhere"
        )
    if setting != "auto":
        return setting
    return "transformer_engine" if possible and config.training.precision == "bf16" else "local"


def _varlen(config: Config) -> bool:
    """Whether torch's kernel for variable lengths computes attention."""
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    return varlen_supports(cpu.DEVICE.type if cpu.available() else "cuda", dtype, config.model.head_size)


def _why_no_fp8(recipe: str, implementation: str) -> str | None:
    if recipe == "none":
        return None
    if reason := fp8.why_not(recipe):
        return reason
    return "model.implementation is local" if implementation == "local" else None

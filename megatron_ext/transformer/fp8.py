"""FP8 by Transformer Engine: recipes, their requirements on sizes and plans, and grouped GEMMs for split projections.

Megatron-Core enters Transformer Engine's FP8 context around every layer, in which Transformer Engine's linear layers
compute in FP8. Split projections use grouped GEMMs over weights that may be computed for each micro-batch (W + D, or
only keys and values), so these are passed to Transformer Engine's grouped linear layer with every call.

The tokens of a micro-batch decide which of these GEMMs it has. This does not matter to recipes that scale by the
current tensor. It matters to delayed scaling: every module that is called adds its history of maxima to one tensor,
which is reduced over all replicas, so all replicas must call the same modules. Plans that do not ensure this are
refused.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext import cpu
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.routing.flops import key_width, query_width
from megatron_ext.routing.plan import Plan
from megatron_ext.transformer import transformer_engine
from megatron_ext.transformer.grouped import grouped_linear as plain_grouped_linear

_RECIPES = {"delayed": "delayed", "current": "tensorwise", "mxfp8": "mxfp8"}
_MULTIPLES = {"none": 1, "delayed": 16, "current": 16, "mxfp8": 32}


def settings(recipe: str) -> dict:
    """Megatron-Core's settings for a recipe of ``training.fp8``: E4M3 forward, E5M2 gradients; all E4M3 with MXFP8."""
    if recipe == "none":
        return {}
    return {"fp8": "e4m3" if recipe == "mxfp8" else "hybrid", "fp8_recipe": _RECIPES[recipe]}


def row_multiple(recipe: str) -> int:
    """The number of which the rows of every GEMM must be a multiple."""
    return _MULTIPLES[recipe]


def row_multiple_of(transformer) -> int:
    """:func:`row_multiple` for a model built with this configuration of Megatron-Core."""
    recipe = transformer.fp8_recipe if transformer.fp8 else None
    return next((row_multiple(name) for name, value in _RECIPES.items() if value == recipe), 1)


def why_not(recipe: str) -> str | None:
    """Why a recipe is not available on this machine; None if it is."""
    return "there is no GPU" if cpu.available() else transformer_engine.why_no_fp8(recipe)


def validate(config: Config, plan: Plan) -> None:
    """Refuse what ``training.fp8`` cannot compute.

    Raises:
        UserError: names the key, its value and what would do.
    """
    recipe, multiple = config.training.fp8, row_multiple(config.training.fp8)
    if config.training.precision != "bf16":
        raise UserError(f"config: 'training.fp8' is {recipe}, needs training.precision=bf16")
    if recipe == "delayed" and config.logging.gradient_alignment_interval:
        raise UserError(
            "config: 'logging.gradient_alignment_interval' would change the FP8 scales that training.fp8=delayed "
            "learns from every pass; take current or mxfp8, or 0"
        )
    for name, size in _gemm_sizes(config).items():
        if size % multiple:
            raise UserError(
                f"config: 'training.fp8' is {recipe}, whose matrices need multiples of {multiple} on every "
                f"tensor-parallel rank; {name} is {size}; change it, or set training.fp8=none"
            )
    if recipe == "delayed" and not plan.is_dense:
        raise UserError(
            "config: 'training.fp8' is delayed, whose history of scales needs the same products in every micro-batch; "
            f"under plan.preset={config.plan.preset} they depend on the data: take current, mxfp8 or none"
        )


def _gemm_sizes(config: Config) -> dict[str, int]:
    """Inner and outer sizes of a rank's matrices, named by their keys."""
    model, tensor = config.model, config.parallel.tensor
    return {
        "model.hidden_size": model.hidden_size,
        "model.head_size x model.num_attention_heads / parallel.tensor": query_width(model) // tensor,
        "model.head_size x model.num_query_groups / parallel.tensor": key_width(model) // tensor,
        "model.ffn_hidden_size / parallel.tensor": model.ffn_hidden_size // tensor,
    }


def grouped_linear(module: torch.nn.Module, rows: Tensor, counts: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
    """Consecutive groups of ``counts`` rows of [n, in], each times the transpose of its [out, in] matrix: [n, out].

    In FP8 when ``module.config`` says so. A group may have no rows: its matrix then has a gradient of zero.
    """
    if not module.config.fp8:
        return plain_grouped_linear(rows, counts, weights)
    # Not submodules: they have neither weights to save nor state between calls.
    kernels = module.__dict__.setdefault("_fp8_kernels", {})
    shape = (len(weights), *weights[0].shape)
    if shape not in kernels:
        groups, out_features, in_features = shape
        kernels[shape] = transformer_engine.grouped_linear()(groups, in_features, out_features, rows.dtype)
    return kernels[shape](rows, counts, weights)

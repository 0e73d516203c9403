"""FP8 by Transformer Engine: recipes, what they ask of sizes and plans, and grouped GEMMs for split projections.

Megatron-Core enters Transformer Engine's FP8 context around every layer; inside it Transformer Engine's linear layers
compute in FP8 by themselves. The products of split projections are grouped ones over weights that may be computed on
the way (W + D, keys and values alone), so Transformer Engine's grouped linear layer is given them with every call.

Which of these products a micro-batch has depends on its tokens. Recipes that scale by the tensor at hand do not mind.
Delayed scaling does: every module that is called adds its history of maxima to one tensor, which is reduced over all
replicas, so they must have called the same modules. It is refused where a plan does not always need the same ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext import cpu
from megatron_ext.config import Config
from megatron_ext.errors import UserError
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
    """What the rows of every GEMM must be a multiple of."""
    return _MULTIPLES[recipe]


def row_multiple_of(transformer) -> int:
    """The same for a model built with these settings of Megatron-Core's."""
    wanted = transformer.fp8_recipe if transformer.fp8 else None
    return next((row_multiple(name) for name, recipe in _RECIPES.items() if recipe == wanted), 1)


def why_not(recipe: str) -> str | None:
    """Why a recipe cannot be had on this machine; None when it can."""
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
    for what, size in _gemm_sizes(config).items():
        if size % multiple:
            raise UserError(
                f"config: 'training.fp8' is {recipe}, whose matrices need multiples of {multiple} on every "
                f"tensor-parallel rank; {what} is {size}; change it, or set training.fp8=none"
            )
    if recipe == "delayed" and not plan.is_dense:
        raise UserError(
            "config: 'training.fp8' is delayed, whose history of scales needs the same products in every micro-batch; "
            f"under plan.preset={config.plan.preset} they depend on the data: take current, mxfp8 or none"
        )


def _gemm_sizes(config: Config) -> dict[str, int]:
    """Inner and outer sizes of a rank's matrices, each under the keys that it is made of."""
    model, tensor = config.model, config.parallel.tensor
    kv_width = model.hidden_size // model.num_attention_heads * model.num_query_groups
    return {
        "model.hidden_size": model.hidden_size,
        "model.hidden_size / parallel.tensor": model.hidden_size // tensor,
        "head size x model.num_query_groups / parallel.tensor": kv_width // tensor,
        "model.ffn_hidden_size / parallel.tensor": model.ffn_hidden_size // tensor,
    }


def grouped_linear(module: torch.nn.Module, rows: Tensor, counts: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
    """Consecutive groups of ``counts`` rows of [n, in], each times the transpose of its [out, in] matrix: [n, out].

    In FP8 when ``module.config`` says so. A group may have no rows: its matrix then has a gradient of zero.
    """
    if not module.config.fp8:
        return plain_grouped_linear(rows, counts, weights)
    # Not submodules: they have no weights to be saved, and nothing of one call is of use to the next.
    kernels = module.__dict__.setdefault("_fp8_kernels", {})
    shape = (len(weights), *weights[0].shape)
    if shape not in kernels:
        groups, out_features, in_features = shape
        kernels[shape] = transformer_engine.grouped_linear()(groups, in_features, out_features, rows.dtype)
    return kernels[shape](rows, counts, weights)

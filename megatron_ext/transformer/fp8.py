"""FP8 by Transformer Engine: recipes, what they ask of the rows, and grouped GEMMs for split projections.

Megatron-Core enters Transformer Engine's FP8 context around every layer; inside it Transformer Engine's linear layers
compute in FP8 by themselves. The products of split projections are grouped ones over weights that may be computed on
the way (W + D, keys and values alone), so Transformer Engine's grouped linear layer is given them with every call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext import cpu
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
    if cpu.available():
        return "there is no GPU"
    try:
        from transformer_engine.pytorch import is_fp8_available, is_mxfp8_available
    except ImportError:
        return "Transformer Engine is not installed"
    able, reason = (is_mxfp8_available if recipe == "mxfp8" else is_fp8_available)(return_reason=True)
    return None if able else reason


def grouped_linear(module: torch.nn.Module, rows: Tensor, counts: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
    """Consecutive groups of ``counts`` rows of [n, in], each times the transpose of its [out, in] matrix: [n, out].

    In FP8 when ``module.config`` says so, with the scales of ``module``'s own history.
    """
    if not module.config.fp8:
        return plain_grouped_linear(rows, counts, weights)
    kernels = module.__dict__.setdefault("_fp8_kernels", {})  # not submodules: they have no weights to be saved
    shape = (len(weights), *weights[0].shape)
    if shape not in kernels:
        kernels[shape] = _kernel(*shape, rows.dtype)
    # For this call alone, and past torch.nn.Module, which would take some of them for its parameters.
    given = {f"weight{i}": weight for i, weight in enumerate(weights)}
    vars(kernels[shape]).update(given)
    try:
        return kernels[shape](rows, list(counts))
    finally:
        for name in given:
            del vars(kernels[shape])[name]


def _kernel(groups: int, out_features: int, in_features: int, dtype: torch.dtype) -> torch.nn.Module:
    """Transformer Engine's grouped linear layer without weights of its own."""
    from transformer_engine.pytorch import GroupedLinear

    kernel = GroupedLinear(groups, in_features, out_features, bias=False, params_dtype=dtype, device="cuda")
    for i in range(groups):
        delattr(kernel, f"weight{i}")
    return kernel

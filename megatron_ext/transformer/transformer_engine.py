"""Transformer Engine, which is optional: whether it is installed and usable, and what this package calls directly.

Its layers come through Megatron-Core's wrappers. Megatron-Core imports Transformer Engine during its own import, where
a broken installation would raise an error about a library's symbol; so :func:`check_before_megatron` checks an
installation first.
"""

import importlib
import os
import sys
from functools import cache
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

from packaging.version import Version

from megatron_ext.errors import UserError

WITHOUT = "WITHOUT_TRANSFORMER_ENGINE"
"""Environment variable; 1: ignore an installation."""

OLDEST = Version("2.11")
"""Older versions attend packed documents with unequal numbers of queries and keys with flash-attn only."""

_CUBLAS_OF_NEWER = Version("13.2")
"""Transformer Engine from 2.13 on calls a function that cuBLAS has from 13.2 on; torch's wheels for CUDA 13.0 have
13.1."""

_REMEDY = (
    "pip install --no-build-isolation 'transformer-engine[pytorch]==2.12.*' (docs/installation.md), or "
    "pip uninstall transformer-engine{,-torch,-cu12,-cu13} to train with torch's layers"
)


def installed() -> bool:
    """Whether the package is installed; imports nothing."""
    return find_spec("transformer_engine") is not None


def require_usable() -> None:
    """Import Transformer Engine, if it is installed.

    Raises:
        UserError: it is too old or cannot be loaded; names the version and a remedy.
    """
    if not installed():
        return
    version = _version_of("transformer-engine")
    name = f"Transformer Engine {version or '(version unknown)'}"
    if version and version < OLDEST:
        raise UserError(f"{name} is installed, {OLDEST} is the oldest that fits: {_REMEDY}")
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # the loader's, Python's, its own checks', those of CUDA's libraries
        raise UserError(f"{name} is installed and cannot be loaded ({_one_line(error)}): {_remedy(error)}") from error


def check_before_megatron() -> None:
    """Call :func:`require_usable` right before Megatron-Core is first imported."""
    if os.environ.get(WITHOUT) == "1":
        sys.modules["transformer_engine"] = None  # makes any import of it fail
    if "megatron.core" not in sys.modules:
        sys.meta_path.insert(0, _BeforeMegatron())


class _BeforeMegatron(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "megatron.core":
            require_usable()
            sys.meta_path.remove(self)
        return None


def why_no_fp8(recipe: str) -> str | None:
    """Why this machine cannot run a recipe of ``training.fp8``; None when it can."""
    if not installed():
        return "Transformer Engine is not installed"
    from transformer_engine.pytorch import is_fp8_available, is_mxfp8_available

    if recipe == "mxfp8":
        available, reason = is_mxfp8_available(return_reason=True)
    else:
        available, reason = is_fp8_available(return_reason=True)
    return None if available else reason


@cache
def grouped_linear() -> type:
    """Transformer Engine's module for several GEMMs in one call, with weights as arguments of the call."""
    from transformer_engine.pytorch import GroupedLinear

    class WeightlessGroupedLinear(GroupedLinear):
        def __init__(self, groups: int, in_features: int, out_features: int, dtype):
            # The module's own weights are not initialized: that would advance the generator with every new shape.
            options = {"bias": False, "params_dtype": dtype, "init_method": lambda weight: None, "device": "cuda"}
            super().__init__(groups, in_features, out_features, **options)
            for i in range(groups):
                delattr(self, f"weight{i}")

        def forward(self, rows, counts, weights):
            # Not by setattr, with which torch.nn.Module would register some of them as parameters.
            weights_by_name = {f"weight{i}": weight for i, weight in enumerate(weights)}
            vars(self).update(weights_by_name)
            try:
                return super().forward(rows, list(counts))
            finally:
                for name in weights_by_name:
                    del vars(self)[name]

    return WeightlessGroupedLinear


def _version_of(package: str) -> Version | None:
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def _remedy(error: Exception) -> str:
    cublas = _version_of("nvidia-cublas")
    if "cublasLt" in str(error) and cublas and cublas < _CUBLAS_OF_NEWER:
        needs = f"it needs nvidia-cublas {_CUBLAS_OF_NEWER}, {cublas} is installed"
        return f"{needs}; pip install 'nvidia-cublas>={_CUBLAS_OF_NEWER}', or {_REMEDY}"
    return _REMEDY


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

"""Transformer Engine, which is optional: whether it is there, whether it fits, and what this package asks of it itself.

Its layers come through Megatron-Core's wrappers. Megatron-Core tries to import it while it is imported itself, and an
installation that cannot be loaded would end that in an error about a symbol of a library; so the installation is looked
at first (:func:`check_before_megatron`), and only where there is one.
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
"""Environment variable; 1: an installation is left alone, as if there were none."""

OLDEST = Version("2.11")
"""Below it no kernel but flash-attn's attends packed documents whose queries and keys differ in number."""

_CUBLAS_OF_NEWER = Version("13.2")
"""Libraries from 2.13 on call a function of cuBLAS that 13.2 brought; torch's wheels for CUDA 13.0 bring 13.1."""

_WAY_OUT = (
    "pip install --no-build-isolation 'transformer-engine[pytorch]==2.12.*' (README, With GPUs), or "
    "pip uninstall transformer-engine{,-torch,-cu12,-cu13} to train with torch's layers"
)


def installed() -> bool:
    """Whether there is a package of that name; nothing is imported."""
    return find_spec("transformer_engine") is not None


def require_usable() -> None:
    """Import Transformer Engine, if it is installed.

    Raises:
        UserError: it is too old, or cannot be loaded; with what was found and what to do.
    """
    if not installed():
        return
    version = _version_of("transformer-engine")
    name = f"Transformer Engine {version or '(version unknown)'}"
    if version and version < OLDEST:
        raise UserError(f"{name} is installed, {OLDEST} is the oldest that fits: {_WAY_OUT}")
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # the loader's, Python's, its own checks', those of CUDA's libraries
        raise UserError(f"{name} is installed and cannot be loaded ({_one_line(error)}): {_remedy(error)}") from error


def check_before_megatron() -> None:
    """Have :func:`require_usable` called right before Megatron-Core is first imported."""
    if os.environ.get(WITHOUT) == "1":
        sys.modules["transformer_engine"] = None  # from here on it cannot be found
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
        able, reason = is_mxfp8_available(return_reason=True)
    else:
        able, reason = is_fp8_available(return_reason=True)
    return None if able else reason


@cache
def grouped_linear() -> type:
    """Transformer Engine's module for several GEMMs at once, over weights that come with every call."""
    from transformer_engine.pytorch import GroupedLinear

    class WeightlessGroupedLinear(GroupedLinear):
        def __init__(self, groups: int, in_features: int, out_features: int, dtype):
            # The weights that it makes are not drawn: that would move the generator whenever a new shape comes up.
            options = {"bias": False, "params_dtype": dtype, "init_method": lambda weight: None, "device": "cuda"}
            super().__init__(groups, in_features, out_features, **options)
            for i in range(groups):
                delattr(self, f"weight{i}")

        def forward(self, rows, counts, weights):
            # Past torch.nn.Module, which would take some of them for its parameters.
            given = {f"weight{i}": weight for i, weight in enumerate(weights)}
            vars(self).update(given)
            try:
                return super().forward(rows, list(counts))
            finally:
                for name in given:
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
        return f"{needs}; pip install 'nvidia-cublas>={_CUBLAS_OF_NEWER}', or {_WAY_OUT}"
    return _WAY_OUT


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

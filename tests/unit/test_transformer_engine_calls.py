"""Every call of Transformer Engine by this package and Megatron-Core fits its signatures, in two versions.

Transformer Engine has no build for CPUs, so signatures are read from its Python sources (a wheel of 1 MB, unpacked and
never installed), and calls from the sources of the callers.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import megatron.core
import pytest

from support.programs import ROOT
from support.source_calls import Caller
from support.source_signatures import Sources

SITE = Path(megatron.core.__file__).parents[2]

WHEELS = {
    "2.12.0": "5d0539c520c39445c62feab9d1fab774ed2e27a576d0feac2086ce86e0bff7c4",
    "2.20.2": "7dcfad943a1a55b2612db9a0e43697fe98c70f4c42ec391ba3a0f872f6ce2094",
}

MEGATRON = [
    "megatron.core.extensions.transformer_engine",
    "megatron.core.fp8_utils",
    "megatron.core.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.mlp",
    "megatron.core.transformer.transformer_block",
]
OURS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "megatron_ext").rglob("*.py")
    if "transformer_engine" in path.read_text() and path.name != "__init__.py"
)

# Megatron-Core works without these where they are missing, and this project does not use what they serve.
DISPENSABLE = {
    "_SplitAlongDim",
    "_SplitAlongDim.apply",
    "get_workspace",
    # Megatron-Core 0.19 over Transformer Engine 2.12: grouped tensors, the fused MLP, clipping of gradients.
    "GroupedTensor",
    "te.pytorch.ops.GroupedLinear",
    "te.pytorch.ops.ScaledSwiGLU",
    "multi_tensor_scale_tensor",
}


@pytest.fixture(scope="module", params=WHEELS)
def sources(request) -> Sources:
    version = request.param
    folder = Path(sys.prefix) / "transformer_engine_sources" / version
    if not folder.exists():
        download(version, folder)
    return Sources(version, folder, SITE, ROOT)


def download(version: str, folder: Path) -> None:
    """Unpack a version's wheel into ``folder``, atomically."""
    package = f"transformer-engine=={version}"
    settings = {k: v for k, v in os.environ.items() if k not in ("PIP_TARGET", "PIP_REQUIRE_HASHES", "PIP_CONSTRAINT")}
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "-d", scratch]
        process = subprocess.run([*command, package], env=settings, capture_output=True, text=True, timeout=300)
        wheels = list(Path(scratch).glob("*.whl"))
        if not wheels:
            reason = process.stderr.strip().rpartition("\n")[2]
            pytest.fail(f"{package} is needed, and pip download could not fetch it: {reason}", pytrace=False)
        if (digest := hashlib.sha256(wheels[0].read_bytes()).hexdigest()) != WHEELS[version]:
            pytest.fail(f"{wheels[0].name} has sha256 {digest}, must be {WHEELS[version]}", pytrace=False)
        zipfile.ZipFile(wheels[0]).extractall(Path(scratch) / "unpacked")
        (Path(scratch) / "unpacked").rename(folder)


@pytest.mark.parametrize("name", [*MEGATRON, *OURS])
def test_calls_fit_the_signatures(sources, name):
    errors = [error for call in Caller(sources, name).calls() if (error := call.error())]
    assert not errors, f"Transformer Engine {sources.version}: " + "\n".join(errors)


@pytest.mark.parametrize("name", [*MEGATRON, *OURS])
def test_names_are_there(sources, name):
    missing = Caller(sources, name).missing(DISPENSABLE)
    assert not missing, f"Transformer Engine {sources.version}: " + "\n".join(missing)


def test_the_calls_that_training_makes_are_among_them(sources):
    called = {call.target for name in [*MEGATRON, *OURS] for call in Caller(sources, name).calls()}
    endings = {target.partition("pytorch.")[2] or target.rpartition(".")[2] for target in called}
    assert {
        "module.linear.__init__",
        "module.linear.forward",
        "module.grouped_linear.__init__",
        "module.grouped_linear.forward",
        "attention.dot_product_attention.dot_product_attention.__init__",
        "attention.dot_product_attention.dot_product_attention.forward",
        "quantization.fp8_autocast",
        "quantization.is_fp8_available",
        "cross_entropy.parallel_cross_entropy",
        "distributed.checkpoint",
        "DelayedScaling",
        "Float8CurrentScaling",
        "MXFP8BlockScaling",
    } <= endings


LIBRARY = {
    "transformer_engine/__init__.py": "from . import pytorch\n",
    "transformer_engine/pytorch/__init__.py": "from .module import *\nfrom .module import cast\n",
    "transformer_engine/pytorch/module.py": (
        "class Base:\n    def forward(self, x): ...\n"
        "class Linear(Base):\n    def __init__(self, size, *, bias=True): ...\n"
        "def cast(x, dtype): ...\n"
    ),
}
WRAPPER = """
import transformer_engine as te
from megatron.core.utils import is_te_min_version
class Layer(te.pytorch.Linear):
    def __init__(self, size):
        extra = {}
        if is_te_min_version("3.0"):
            extra["device"] = "cuda"
        extra["bias"] = False
        super().__init__(size, **extra)
    def forward(self, x):
        return super().forward(te.pytorch.cast(x, dtype=None))
"""


@pytest.mark.parametrize(
    "version, change, error",
    [
        ("2.12.0", ("", ""), None),
        ("3.1.0", ("", ""), "module.__init__(size, *, bias=None): got an unexpected keyword argument 'device'"),
        ("2.12.0", ('extra["bias"]', 'extra["biases"]'), "wrapper:10: .*unexpected keyword argument 'biases'"),
        ("2.12.0", ("super().__init__(size, ", "super().__init__("), "missing a required argument: 'size'"),
        ("2.12.0", ("forward(te.pytorch.cast", "forward(None, te.pytorch.cast"), "forward(x): too many positional"),
        ("2.12.0", ("x, dtype=None", "x"), "wrapper:12: .*cast(x, dtype): missing a required argument: 'dtype'"),
        ("2.12.0", ("te.pytorch.cast", "te.pytorch.uncast"), "wrapper:12: te.pytorch.uncast is not there"),
        (
            "2.12.0",
            ("import transformer_engine as te", "from transformer_engine import common as te"),
            "te is not there",
        ),
    ],
)
def test_a_call_that_does_not_fit_is_found(tmp_path, version, change, error):
    for name, text in LIBRARY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "wrapper.py").write_text(WRAPPER.replace(*change) if change[0] else WRAPPER)
    caller = Caller(Sources(version, tmp_path), "wrapper")
    errors = [*caller.missing(), *filter(None, (call.error() for call in caller.calls()))]
    if error is None:
        assert not errors
        assert len(list(caller.calls())) == 3
    else:
        first, _, rest = error.partition(".*")
        assert any(first in line and rest in line for line in errors), errors

"""The machine and the versions that figures are measured with."""

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("megatron-core", "transformer-engine", "triton", "transformers", "nvidia-dali-cuda130")


def machine() -> dict[str, str]:
    """Card, versions and the command of this process."""
    facts = {"GPU": "none"}
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
        facts["driver"] = _driver()
    facts |= {"Python": platform.python_version(), "torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "none"
    program = Path(sys.argv[0]).with_suffix(".sh").name
    return facts | {"command": f"`bash benchmarks/{program} {shlex.join(sys.argv[1:])}`"}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"

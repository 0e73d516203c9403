"""The environment of a run for ``environment.json``: processes, device, versions."""

import os
import platform
from importlib import metadata

import torch
import torch.distributed as dist

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


def environment() -> dict:
    """World size, device and versions as plain data."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": versions,
    }

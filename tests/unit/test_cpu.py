"""Megatron-Core on CPUs leaves the rest of torch as it was."""

import os
import subprocess
import sys

PROGRAM = """
import torch
from megatron_ext import cpu
cpu.enter()
with torch.device("meta"):
    assert torch.arange(3).is_meta and torch.nn.Linear(2, 2).weight.is_meta
assert torch.zeros(3, device="cuda").device.type == "cpu"
"""


def test_a_block_under_a_device_still_makes_its_tensors_there():
    # In a separate process: torch learns once what such a block is for.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, timeout=100)

"""Megatron-Core on CPUs leaves the rest of torch as it was."""

from support.forked_programs import run_forked

PROGRAM = """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch
from torch.utils import _device
from megatron_ext import cpu
assert not _device._device_constructors.cache_info().currsize  # torch learns once what such a block is for
cpu.enter()
with torch.device("meta"):
    assert torch.arange(3).is_meta and torch.nn.Linear(2, 2).weight.is_meta
assert torch.zeros(3, device="cuda").device.type == "cpu"
"""


def test_a_block_under_a_device_still_makes_its_tensors_there(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    run_forked([tmp_path / "program.py"])

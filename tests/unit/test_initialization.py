"""Initial weights: drawn by rows, they are the numbers of a single call, whatever the slice."""

import dataclasses
import hashlib

import pytest
import torch

from megatron_ext.config import PlanConfig
from megatron_ext.transformer import initialization
from megatron_ext.transformer.model import build_chunks
from megatron_ext.transformer.resolved import resolve


@pytest.mark.parametrize("rows, columns", [(48, 20), (1000, 28), (24, 3), (40, 6), (8, 4)])
@pytest.mark.parametrize(
    "name", ["linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "image_positions.weight"]
)
def test_a_matrix_drawn_by_rows_is_that_of_a_single_call(monkeypatch, rows, columns, name):
    monkeypatch.setattr(initialization, "_BLOCK", 100)
    digest = hashlib.sha256(f"3:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    whole = torch.empty(rows, columns).normal_(std=0.02, generator=generator)
    for size in (1, 2):
        if columns % size:
            continue
        monkeypatch.setattr(
            initialization.parallel_state, "get_tensor_model_parallel_world_size", lambda size=size: size
        )
        for rank in range(size):
            monkeypatch.setattr(initialization.parallel_state, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
            expected = initialization.shard(whole, name)
            drawn = torch.full_like(expected, torch.nan)
            initialization._fill_random(drawn, name, 0.02, seed=3)
            assert torch.equal(drawn, expected)


def test_a_seed_starts_every_method_with_the_same_weights(one_process):
    config, models = one_process("model.num_layers=2"), {}
    for preset in ("dense_lossless", "hmgen", "himix_hmgen_share_partial"):
        (model,) = build_chunks(resolve(dataclasses.replace(config, plan=PlanConfig(preset)), 64))
        models[preset] = dict(model.named_parameters())
    dense = models.pop("dense_lossless")
    for preset, weights in models.items():
        assert weights.keys() > dense.keys()
        assert all(torch.equal(weights[name], weight) for name, weight in dense.items()), preset

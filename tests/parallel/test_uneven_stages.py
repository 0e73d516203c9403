"""Pipeline stages with different numbers of layers train alike, and continue as any other layout."""

from pathlib import Path

import pytest

from support.ranks import world

SETTINGS = [
    "model.num_layers=8",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "plan.preset=himix_hmgen_share_partial",
    "data.sequence_length=32",
    "training.micro_batch_size=1",
    "training.global_batch_size=4",
    "training.iterations=1000",
    "optimizer.lr=0.01",
]
UNEVEN = ["parallel.pipeline=2", "parallel.layout=Et*3|t*5L"]
INTERLEAVED = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.layout=Et|t*2|t*3|t*2L"]


def test_a_run_goes_through_uneven_stages_to_even_ones_and_to_one_process(tmp_path):
    (expected,) = world(1, _train, tmp_path / "one", [[]], 4, folder=tmp_path)
    moved = world(2, _train, tmp_path / "moved", [UNEVEN, INTERLEAVED, ["parallel.pipeline=2"]], 1, folder=tmp_path)
    (last,) = world(1, _train, tmp_path / "moved", [[]], 1, folder=tmp_path)
    assert moved[0] == moved[1] and len(set(expected)) == len(expected) == 8
    assert moved[0] + last == pytest.approx(expected, rel=2e-6)


def _train(folder: Path, layouts: list[list[str]], steps: int) -> list[float]:
    """Loss and gradient norm of so many steps under each layout, each from the newest checkpoint, if there is one."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ext import config_file
    from megatron_ext.checkpoints.checkpointer import Checkpointer
    from megatron_ext.config import Config
    from megatron_ext.training.config_checks import validate
    from megatron_ext.training.prepare import prepare
    from megatron_ext.training.setup import build_model, build_optimizer
    from megatron_ext.training.step import train_step
    from megatron_ext.transformer.resolved import resolve
    from parity import VOCABULARY, packed_batch

    checkpointer, figures = Checkpointer(folder, keep=0), []
    for layout in layouts:
        config = config_file.load(Config, [], [*SETTINGS, *layout])
        validate(config, torch.distributed.get_world_size())
        parallel, newest = config.parallel, checkpointer.newest()
        parallel_state.destroy_model_parallel()
        virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        parallel_state.initialize_model_parallel(1, parallel.pipeline, virtual)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        chunks = build_model(resolve(config, VOCABULARY))
        optimizer, done = build_optimizer(config, chunks), 0
        if newest:
            done = checkpointer.load(newest, chunks, optimizer)["done"]
        for step in range(done, done + steps):
            batch = packed_batch(config.training.global_batch_size, config.data.sequence_length, seed=step)
            result = train_step(chunks, optimizer, prepare(batch, resolve(config)), config)
            figures += [result.loss, result.grad_norm]
        checkpointer.save(done + steps, chunks, optimizer, {"done": done + steps})
    return figures

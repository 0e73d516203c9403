"""Weights that are gathered during the next forward pass are whole wherever they are read."""

from functools import partial

import pytest

from megatron_ext.transformer.resolved import resolve
from support.ranks import world

SETTINGS = [
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "plan.preset=himix_hmgen_share_partial",
    "data.sequence_length=32",
    "training.micro_batch_size=1",
    "training.global_batch_size=4",
    "training.iterations=1000",
    "optimizer.lr=0.1",
    "parallel.distributed_optimizer=true",
]
BUCKET = 4000
"""Parameters: a layer has more, so layers wait for buckets of their own."""


@pytest.mark.parametrize(
    "layout, size", [([], 2), (["parallel.pipeline=2", "parallel.virtual_pipeline=2"], 4)], ids=["dp2", "pp2-vp2-dp2"]
)
def test_overlap_changes_neither_losses_nor_weights(layout, size, tmp_path):
    plain, overlapped = (
        world(size, _train, [*SETTINGS, *layout, f"parallel.overlap={overlap}"], folder=tmp_path)
        for overlap in ("false", "true")
    )
    assert max(buckets for *_, buckets in overlapped) > 4
    for (losses, validation, weights, _), (overlapped_losses, overlapped_validation, overlapped_weights, _) in zip(
        plain, overlapped
    ):
        assert losses == pytest.approx(overlapped_losses, rel=1e-5) and len(set(losses)) == len(losses)
        assert validation == pytest.approx(overlapped_validation, rel=1e-5)
        assert weights == pytest.approx(overlapped_weights, rel=1e-5)


def _train(settings: list[str]) -> tuple[list[float], list[float], dict[str, float], int]:
    """Losses of three steps and of the validation after the second, a sum over each weight as a checkpoint stores it,
    and the number of buckets."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig

    from megatron_ext import config_file
    from megatron_ext.checkpoints.state import model_state, parameters
    from megatron_ext.config import Config
    from megatron_ext.training import setup
    from megatron_ext.training.prepare import prepare
    from megatron_ext.training.step import evaluate_step, evaluation_mode, train_step
    from parity import VOCABULARY, packed_batch

    setup.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=BUCKET)
    config = config_file.load(Config, [], settings)
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        1, parallel.pipeline, parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    )
    _seed(config.training.seed)
    chunks = setup.build_model(resolve(config, VOCABULARY))
    optimizer = setup.build_optimizer(config, chunks)
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    rows = config.training.global_batch_size // replicas
    losses, validation = [], []
    for step in range(3):
        batch = packed_batch(config.training.global_batch_size, config.data.sequence_length, seed=step)
        inputs = prepare(batch.rows(replica * rows, (replica + 1) * rows), resolve(config))
        losses.append(train_step(chunks, optimizer, inputs, config).loss)
        if step == 1:  # the first step's weights are gathered by the second
            with evaluation_mode(chunks):
                validation.append(float(evaluate_step(chunks, inputs, config)[0].sum()))
    setup.gather_weights(chunks)
    weights = {t.key: float(t.data.double().square().sum()) for t in parameters(model_state(chunks))}
    return losses, validation, weights, sum(len(chunk.bucket_groups) for chunk in chunks)


def _seed(seed: int) -> None:
    import torch
    from megatron.core import tensor_parallel

    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)

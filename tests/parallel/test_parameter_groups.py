"""Frozen parameters and rates of their own: the same training under every layout, and after a restart."""

from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.transformer.resolved import resolve
from support.ranks import world

SETTINGS = [
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "data.sequence_length=32",
    "training.micro_batch_size=1",
    "training.global_batch_size=4",
    "training.iterations=1000",
    "optimizer.lr=0.01",
]
FROZEN = ("embedding.", "decoder.layers.0.", "decoder.layers.1.")
"""All that the first of two pipeline stages has."""
GROUPS = (
    "optimizer.groups=[{parameters: embedding.*, lr_multiplier: 0}, {parameters: 'decoder.layers.[01].*', "
    "lr_multiplier: 0}, {parameters: output_layer.weight, lr_multiplier: 0.25}]"
)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Losses and norms of one process."""
    folder = tmp_path_factory.mktemp("one")
    ((figures, _, moved, _),) = world(1, _train, [*SETTINGS, GROUPS], folder, folder=folder)
    assert moved and not any(name.startswith(FROZEN) for name in moved)
    return figures


@pytest.mark.parametrize(
    "settings",
    [
        ["parallel.tensor=2", "parallel.sequence=true", "training.recompute=full"],
        ["parallel.pipeline=2"],
        ["parallel.pipeline=2", "parallel.distributed_optimizer=true", "training.recompute=full"],
        ["parallel.distributed_optimizer=true", "parallel.overlap=true"],
    ],
    ids=["tp2-sp-recomputed", "pp2", "pp2-distributed-recomputed", "dp2-overlap"],
)
def test_a_partly_frozen_model_trains_alike_under_every_layout_and_resumes_bit_for_bit(tmp_path, one_process, settings):
    for figures, resumed, moved, states in world(2, _train, [*SETTINGS, GROUPS, *settings], tmp_path, folder=tmp_path):
        assert figures == pytest.approx(one_process, rel=1e-5) and len(set(figures)) == len(figures)
        assert resumed == figures[-4:]
        assert not any(name.startswith(FROZEN) for name in (*moved, *states))


def _train(settings: list[str], folder: Path) -> tuple[list[float], list[float], list[str], list[str]]:
    """Loss and gradient norm of four steps; those of the last two after a restart; the parameters that have moved, and
    those in the checkpoint's optimizer state."""
    from megatron_ext.checkpoints.checkpointer import Checkpointer
    from megatron_ext.transformer.initialization import global_parameters

    config, chunks, optimizer, step = _build(settings)
    before = {name: p.detach().clone() for chunk in chunks for name, p in global_parameters(chunk.module)}
    checkpointer = Checkpointer(folder, keep=0)
    figures = step(0) + step(1)
    checkpointer.save(2, chunks, optimizer, {})
    figures += step(2) + step(3)
    moved = [n for chunk in chunks for n, p in global_parameters(chunk.module) if not p.equal(before[n])]
    states = _states(checkpointer.newest())

    _, chunks, optimizer, step = _build([*settings, "training.seed=2"], initialized=True)
    checkpointer.load(checkpointer.newest(), chunks, optimizer)
    return figures, step(2) + step(3), moved, states


def _build(settings: list[str], initialized: bool = False):
    """A configuration, its chunks and optimizer, and a function that does a step: [loss, gradient norm]."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ext import config_file
    from megatron_ext.config import Config
    from megatron_ext.training.prepare import prepare
    from megatron_ext.training.setup import build_model, build_optimizer
    from megatron_ext.training.step import train_step
    from parity import VOCABULARY, packed_batch

    config = config_file.load(Config, [], settings)
    if not initialized:
        parallel_state.initialize_model_parallel(config.parallel.tensor, config.parallel.pipeline)
        torch.manual_seed(1)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunks = build_model(resolve(config, VOCABULARY))
    optimizer = build_optimizer(config, chunks)
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    rows = config.training.global_batch_size // replicas

    def step(number: int) -> list[float]:
        batch = packed_batch(config.training.global_batch_size, config.data.sequence_length, seed=number)
        inputs = prepare(batch.rows(replica * rows, (replica + 1) * rows), resolve(config))
        result = train_step(chunks, optimizer, inputs, config)
        return [result.loss, result.grad_norm]

    return config, chunks, optimizer, step


def _states(checkpoint: Path) -> list[str]:
    """Global names of the parameters whose moments the checkpoint holds."""
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    prefix = "optimizer.state.exp_avg."
    keys = [tensor.key for tensor in load_sharded_metadata(str(checkpoint)).values()]
    assert any(key.startswith(prefix) for key in keys)
    return [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]


def test_a_group_is_trained_at_its_multiple_of_the_rate(tmp_path):
    ((moved, rate),) = world(1, _first_update, folder=tmp_path)
    # Adam's first update is the rate times the gradient's sign.
    assert moved == {"output_layer.weight": pytest.approx(rate / 4, rel=1e-3), "others": pytest.approx(rate, rel=1e-3)}


def _first_update() -> tuple[dict[str, float], float]:
    from megatron_ext.training.schedule import build_scheduler
    from megatron_ext.transformer.initialization import global_parameters

    config, chunks, optimizer, step = _build([*SETTINGS, GROUPS, "optimizer.weight_decay=0"])
    build_scheduler(optimizer, config.optimizer, config.training.iterations)
    before = {name: p.detach().clone() for name, p in global_parameters(chunks[0].module)}
    step(0)
    moved = {n: float((p - before[n]).abs().max()) for n, p in global_parameters(chunks[0].module)}
    output = moved.pop("output_layer.weight")
    return {"output_layer.weight": output, "others": max(moved.values())}, config.optimizer.lr / 10


def test_a_run_that_trains_what_was_frozen_does_not_resume(tmp_path):
    for refusal in world(2, _thaw, tmp_path, folder=tmp_path):
        assert "was frozen, and this run trains it" in refusal


def _thaw(folder: Path) -> str:
    from megatron_ext.checkpoints.checkpointer import Checkpointer

    settings = [*SETTINGS, "parallel.pipeline=2"]
    _, chunks, optimizer, step = _build([*settings, GROUPS])
    step(0)
    checkpointer = Checkpointer(folder)
    checkpointer.save(1, chunks, optimizer, {})
    _, chunks, optimizer, _ = _build(settings, initialized=True)
    with pytest.raises(UserError) as refused:
        checkpointer.load(checkpointer.newest(), chunks, optimizer)
    return str(refused.value)


BOTH_TABLES = "[{parameters: embedding.*, lr_multiplier: 0.1}, {parameters: output_layer.*, lr_multiplier: 0.1}]"
REFUSED = {
    "[{parameters: decoder.*}, {parameters: depth_head.*}]": "'optimizer.groups[1].parameters' is 'depth_head.*'",
    "[{parameters: '*', lr_multiplier: 0}]": "'optimizer.groups' freeze every parameter",
    "[{parameters: embedding.*, lr_multiplier: 0.1}, {parameters: output_layer.*, lr_multiplier: 0}]": (
        "which matches only parameters of earlier groups, such as embedding.word_embeddings.weight of "
        "optimizer.groups[0] ('embedding.*')"
    ),
    "[{parameters: '*.3.*linear_qkv.weight', lr_multiplier: 0}]": (
        "freeze decoder.layers.3.self_attention.linear_qkv.weight but not "
        "decoder.layers.3.self_attention.linear_qkv.bias"
    ),
}
"""For a tied model with biases."""


def test_groups_that_do_not_fit_are_refused_on_every_rank(tmp_path):
    for refusals in world(2, _refusals, folder=tmp_path):
        assert all(message in refusal for message, refusal in zip(REFUSED.values(), refusals, strict=True)), refusals


def _refusals() -> list[str]:
    settings = [*SETTINGS, "parallel.pipeline=2", "model.tie_embeddings=true", "model.qkv_bias=true"]
    refusals = []
    for number, groups in enumerate(REFUSED):
        with pytest.raises(UserError) as refused:
            _build([*settings, f"optimizer.groups={groups}"], initialized=number > 0)
        refusals.append(str(refused.value))
    _build([*settings, f"optimizer.groups={BOTH_TABLES}"], initialized=True)
    return refusals

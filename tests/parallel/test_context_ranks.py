"""What context ranks compute together is what one process computes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support.data_sets import write_pairs
from support.ranks import world

SETTINGS = ["plan.preset=himix_hmgen_share_partial", "model.num_layers=4", "model.hidden_size=32"]


def test_tokens_that_are_not_full_leave_every_layer_bit_for_bit(tmp_path):
    before, after, roles, order = zip(*world(2, _around_layers, tmp_path, folder=tmp_path))
    assert all((place >= 0).any() for place in order)
    for rank in range(2):
        idle = 0
        for layer in range(4):
            full = roles[rank][layer]
            assert np.array_equal(before[rank][layer][~full], after[rank][layer][~full])
            assert (before[rank][layer][full] != after[rank][layer][full]).any(1).all()
            idle += (~full).sum()
        assert idle


def _around_layers(folder: Path) -> tuple:
    """Hidden states before and after each layer, which stored rows are FULL in it, and the tokens of the rows."""
    from megatron.core import parallel_state

    from megatron_ext import config_file
    from megatron_ext.config import Config
    from megatron_ext.routing.plan import Plan
    from megatron_ext.routing.roles import Role
    from megatron_ext.routing.route import Route
    from megatron_ext.transformer.hidden_states import joined
    from megatron_ext.transformer.model import build_chunks
    from megatron_ext.transformer.resolved import resolve
    from parity import BASE, VOCABULARY, packed_batch, perturb
    from support import reference

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    config = config_file.load(Config, [], [*BASE, *SETTINGS, "parallel.context=2"])
    (model,) = build_chunks(resolve(config, VOCABULARY))
    perturb([SimpleNamespace(module=model)])
    plan, batch, states = Plan.from_config(config), packed_batch(2, 64, seed=2), []
    route = Route.of(batch, plan, context=(parallel_state.get_context_parallel_rank(), 2))
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(
            lambda *given: states.append(joined(given[2]["hidden_states"])), with_kwargs=True
        )
        layer.register_forward_hook(lambda *given: states.append(joined(given[2][0])))
    with torch.no_grad():
        model(route)
    assert all(route.layers[n].exchange.received for n in range(4))
    rows = [state.squeeze(1).numpy() for state in states]
    order = route.order.numpy()
    full = [(np.array(reference.roles_of(plan, n, batch)).ravel()[order] == Role.FULL) & (order >= 0) for n in range(4)]
    return [x[order >= 0] for x in rows[::2]], [x[order >= 0] for x in rows[1::2]], [f[order >= 0] for f in full], order


def test_context_ranks_validate_and_compare_gradients_as_replicas_do(tmp_path):
    for context, replicas in world(2, _validate_and_compare, tmp_path, folder=tmp_path):
        assert context == pytest.approx(replicas, rel=1e-4)


def _validate_and_compare(folder: Path) -> list[list[float]]:
    """Sums of losses, counts, and how alike the tasks' gradients are, with two context ranks and with two replicas."""
    from megatron_ext.analysis.gradients import alignment
    from megatron_ext.training.prepare import prepare
    from megatron_ext.training.step import evaluate_step, evaluation_mode
    from megatron_ext.transformer.resolved import resolve

    figures = []
    for context in (2, 1):
        chunks, _, config = _build(context)
        step = prepare(_own_rows(4), resolve(config))
        with evaluation_mode(chunks):
            sums, counts = evaluate_step(chunks, step, config)
        measured = alignment(chunks, step, resolve(config))["all"]
        figures.append([*sums.tolist(), *counts.tolist(), *(measured[name] for name in sorted(measured))])
    return figures


def test_each_context_rank_gets_its_own_part_of_the_same_rows(tmp_path, vocabulary):
    path = write_pairs(tmp_path / "pairs", vocabulary, [["two red circle " * (1 + n % 4)] for n in range(40)])
    (whole,) = world(1, _labels_of_a_step, vocabulary.folder, path, 1, folder=tmp_path)
    parts = world(2, _labels_of_a_step, vocabulary.folder, path, 2, folder=tmp_path)
    assert [opened for opened, *_ in parts] == [True, False]  # one reader
    assert parts[0][2:] == parts[1][2:] == whole[2:]
    for of_ranks, together in zip(zip(*(labels for _, labels, *_ in parts)), whole[1]):
        assert all(of_ranks) and sorted(sum(of_ranks, [])) == sorted(together)


def _labels_of_a_step(vocabulary_folder: str, path: str, context: int) -> tuple:
    """Whether this rank opened files, the labels of each micro-batch, and counts of a step."""
    from megatron.core import parallel_state

    from megatron_ext import config_file
    from megatron_ext.config import Config, SourceConfig
    from megatron_ext.data import build_mixture, step_batches
    from megatron_ext.training.prepare import Preparation, own_share
    from megatron_ext.transformer.resolved import resolve
    from megatron_ext.vocabulary import Vocabulary

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(context_parallel_size=context)
    loader = ["data.sequence_length=64", "data.loader=plain", "data.workers=1"]
    config = config_file.load(Config, [], [*SETTINGS, *loader, f"parallel.context={context}"])
    vocabulary = Vocabulary(vocabulary_folder)
    mixture = build_mixture([SourceConfig(path, "generation")], config.data, vocabulary, train=True)
    prepare = Preparation.of(resolve(config), vocabulary.size, vocabulary.pad)
    steps = step_batches(mixture, config.data, 4, 3, prepare=prepare, own_share=own_share)
    step = next(steps)
    steps.close()
    labels = [micro_batch.labels.tolist() for micro_batch in step.micro_batches]
    opened = any(source.dataset for source in mixture.sources)
    return opened, labels, step.loss_tokens.tolist(), step.tokens, step.flops


@pytest.mark.slow
def test_a_run_goes_from_context_ranks_to_replicas_and_back_with_the_same_losses(tmp_path):
    for whole, moved in world(2, _move, tmp_path, folder=tmp_path):
        assert len(whole) == len(set(whole)) == 20
        assert moved == pytest.approx(whole, rel=1e-5)


def _move(folder: Path) -> tuple[list[float], list[float]]:
    """Losses of 20 steps under two context ranks; and of 20 steps, half of them under two replicas."""
    from megatron_ext.checkpoints.checkpointer import Checkpointer

    chunks, optimizer, config = _build(2)
    whole = _train(chunks, optimizer, config, range(20))
    checkpointer, moved = Checkpointer(folder / "checkpoints"), []
    for turn, context in enumerate((2, 1, 2)):
        chunks, optimizer, config = _build(context)
        if turn:
            checkpointer.load(checkpointer.newest(), chunks, optimizer)
        steps = [range(5), range(5, 15), range(15, 20)][turn]
        moved += _train(chunks, optimizer, config, steps)
        checkpointer.save(steps.stop, chunks, optimizer, {})
    return whole, moved


def _build(context: int) -> tuple:
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ext import config_file
    from megatron_ext.config import Config
    from megatron_ext.training.setup import build_model, build_optimizer
    from megatron_ext.transformer.resolved import resolve
    from parity import BASE, VOCABULARY

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(context_parallel_size=context)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    sharded = ["parallel.distributed_optimizer=true", f"parallel.context={context}", "training.global_batch_size=4"]
    config = config_file.load(Config, [], [*BASE, *SETTINGS, *sharded])
    chunks = build_model(resolve(config, VOCABULARY))
    return chunks, build_optimizer(config, chunks), config


def _train(chunks: list, optimizer, config, steps: range) -> list[float]:
    from megatron_ext.training.prepare import prepare
    from megatron_ext.training.step import train_step
    from megatron_ext.transformer.resolved import resolve

    inputs = (prepare(_own_rows(seed), resolve(config)) for seed in steps)
    return [train_step(chunks, optimizer, step, config).loss for step in inputs]


def _own_rows(seed: int):
    """This replica's rows of a global batch of 4."""
    from megatron.core import parallel_state

    from parity import packed_batch

    rows = 4 // parallel_state.get_data_parallel_world_size()
    first = parallel_state.get_data_parallel_rank() * rows
    return packed_batch(4, 64, seed).rows(first, first + rows)

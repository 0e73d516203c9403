"""A run resumes from its checkpoint: bit for bit under the same layout, with equal losses under any other."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support.gpt import Layout, TrainedGPT
from support.ranks import world


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, dropout=0.1),
        Layout(pipeline=2, dropout=0.1),
        Layout(pipeline=2, virtual_pipeline=2, tied=False, dropout=0.1),
        Layout(tensor=2, distributed_optimizer=True, dropout=0.1),
        Layout(pipeline=2, distributed_optimizer=True, dropout=0.1),
        Layout(distributed_optimizer=True, bf16=True, dropout=0.1),
        Layout(bf16=True, dropout=0.1),
    ],
    ids=str,
)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path, layout):
    for uninterrupted, resumed in world(2, _interrupt_and_resume, tmp_path, layout, folder=tmp_path):
        assert resumed == uninterrupted


def _interrupt_and_resume(folder: Path, layout: Layout):
    from megatron_ext.checkpoints.checkpointer import Checkpointer

    checkpointer = Checkpointer(folder / "checkpoints")
    state = {"rows": 8, "losses": [4.5, 0.1 + 0.2], "nothing": None, "nested": {"seed": 2**70}}
    run = TrainedGPT(layout)
    run.train(1, 2)
    checkpointer.save(2, run.chunks, run.optimizer, state)
    uninterrupted = (run.train(3, 5), run.weights(), _draw(), state)

    again = TrainedGPT(layout, seed=2)
    loaded = checkpointer.load(checkpointer.newest(), again.chunks, again.optimizer)
    return uninterrupted, (again.train(3, 5), again.weights(), _draw(), loaded)


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


RING = [
    Layout(tensor=2),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(distributed_optimizer=True),
    Layout(tensor=2),
    Layout(tensor=2, distributed_optimizer=True),
    Layout(pipeline=2, virtual_pipeline=2, distributed_optimizer=True),
]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_iteration_under_another_layout_gives_the_losses_of_one_layout(tmp_path, tied):
    reference, moved = world(
        2, _move_through, tmp_path, [Layout(**{**vars(c), "tied": tied}) for c in RING], folder=tmp_path
    )[0]
    (last,) = world(1, _continue_alone, tmp_path, Layout(tied=tied), len(RING) + 1, folder=tmp_path)
    assert [*moved, last] == pytest.approx(reference, rel=1e-5)
    assert len(set(reference)) == len(reference)


def _move_through(folder: Path, layouts: list[Layout]):
    """Losses of iterations 2 .. n + 2 under one layout; and of iterations 2 .. n + 1, each under the next layout."""
    from megatron_ext.checkpoints.checkpointer import Checkpointer

    checkpointer = Checkpointer(folder / "checkpoints", keep=0)
    run = TrainedGPT(Layout(tied=layouts[0].tied))
    run.train(1, 1)
    checkpointer.save(1, run.chunks, run.optimizer, {})
    reference = run.train(2, len(layouts) + 2)
    moved = []
    for iteration, layout in enumerate(layouts, start=2):
        run = TrainedGPT(layout, seed=iteration)
        checkpointer.load(checkpointer.newest(), run.chunks, run.optimizer)
        moved += run.train(iteration, iteration)
        checkpointer.save(iteration, run.chunks, run.optimizer, {})
    return reference, moved


def _continue_alone(folder: Path, layout: Layout, done: int) -> float:
    from megatron_ext.checkpoints.checkpointer import Checkpointer

    checkpointer = Checkpointer(folder / "checkpoints")
    run = TrainedGPT(layout, seed=99)
    assert checkpointer.newest().name == f"iter_{done:07d}"
    checkpointer.load(checkpointer.newest(), run.chunks, run.optimizer)
    return run.train(done + 1, done + 1)[0]


def test_master_weights_move_between_the_two_optimizers(tmp_path):
    losses = world(2, _switch_optimizer, tmp_path, folder=tmp_path)[0]
    for reference, switched in losses:
        assert switched == reference


def _switch_optimizer(folder: Path):
    from megatron_ext.checkpoints.checkpointer import Checkpointer

    losses = []
    for before in (True, False):
        checkpointer = Checkpointer(folder / f"distributed_{before}")
        run = TrainedGPT(Layout(bf16=True, distributed_optimizer=before))
        run.train(1, 2)
        checkpointer.save(2, run.chunks, run.optimizer, {})
        reference = run.train(3, 5)
        run = TrainedGPT(Layout(bf16=True, distributed_optimizer=not before), seed=2)
        checkpointer.load(checkpointer.newest(), run.chunks, run.optimizer)
        losses.append((reference, run.train(3, 5)))
    return losses


def test_weights_alone_start_a_new_run_under_another_layout(tmp_path):
    for trained, fresh, steps in world(2, _start_from_weights, tmp_path, folder=tmp_path):
        assert fresh == pytest.approx(trained, rel=1e-5)
        assert steps == (0, 1)


def _start_from_weights(folder: Path):
    from megatron_ext.checkpoints.checkpointer import Checkpointer, load_weights
    from megatron_ext.checkpoints.state import steps_taken

    run = TrainedGPT(Layout(tensor=2))
    run.train(1, 2)
    Checkpointer(folder / "checkpoints").save(2, run.chunks, run.optimizer, {})
    trained = run.train(3, 3)
    run = TrainedGPT(Layout(pipeline=2), seed=2)
    load_weights(folder / "checkpoints" / "iter_0000002", run.chunks)
    before = steps_taken(run.optimizer)
    return trained, run.train(3, 3), (before, steps_taken(run.optimizer))


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
def test_hyperparameters_are_the_resuming_runs_own(tmp_path, distributed):
    layout = Layout(distributed_optimizer=distributed)
    (rates,) = world(1, _resume_with_another_learning_rate, tmp_path, layout, folder=tmp_path)
    assert rates == {(1e-2, 1e-2)}


def _resume_with_another_learning_rate(folder: Path, layout: Layout) -> set[tuple[float, float]]:
    from megatron_ext.checkpoints.checkpointer import Checkpointer

    checkpointer = Checkpointer(folder / "checkpoints")
    run = TrainedGPT(layout)
    run.train(1, 1)
    for group in run.optimizer.param_groups:
        group["lr"] = group["max_lr"] = 0.5
    checkpointer.save(1, run.chunks, run.optimizer, {})
    run = TrainedGPT(layout, seed=2)
    checkpointer.load(checkpointer.newest(), run.chunks, run.optimizer)
    return {(group["lr"], group["max_lr"]) for group in run.optimizer.param_groups}


SHAPE = "model={num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 4}"
FEATURES = [
    SHAPE,
    "model={qkv_bias: true, qk_norm: true, head_size: 12}",
    "plan={preset: himix_hmgen_share_partial, projections: {rank: 4, modules: [qkv, proj, fc1, fc2]}}",
]
SEVERAL_CODES = [
    SHAPE,
    "model.image_codes={depth: 4, codebook: random, codebook_size: 48, width: 6}",
    "model.image_codes.head={num_layers: 1, hidden_size: 16, num_attention_heads: 4}",
]
LEARNED_CODES = [*SEVERAL_CODES, "model.image_codes.codebook=''", "model.image_codes.width=null"]


@pytest.mark.parametrize(
    "settings, size, saved, loaded, has",
    [
        (FEATURES, 2, (2, 1), [(1, 1)], {"bias", "q_layernorm", "k_layernorm"}),
        (SEVERAL_CODES, 4, (2, 2), [(1, 1), (4, 1)], {"projector", "depth_head", "code_vectors"}),
        (LEARNED_CODES, 2, (1, 2), [(2, 1)], {"code_embedding", "depth_head"}),
    ],
    ids=["bias and norms", "several codes", "learned codes"],
)
def test_every_tensor_of_the_model_moves_to_another_layout(tmp_path, settings, size, saved, loaded, has):
    """Also the bias of queries, keys and values, which is cut, and their norms, which are not; and code vectors, which
    the first and the last stage have."""
    for moves in world(size, _from_layout_to_layouts, tmp_path, settings, saved, loaded, folder=tmp_path):
        assert len(moves) == len(loaded)
        for moved, expected in moves:
            assert moved.keys() == expected.keys()
            assert has <= {part for name in moved for part in name.split(".")}
            for name in moved:
                assert np.array_equal(moved[name], expected[name]), name


def _from_layout_to_layouts(folder: Path, settings: list[str], saved: tuple[int, int], loaded: list) -> list[tuple]:
    """For each layout, (tensor, pipeline), the model as loaded from a checkpoint that was saved under another one, and
    as made there."""
    from megatron_ext.checkpoints.checkpointer import Checkpointer, load_weights

    Checkpointer(folder / "checkpoints").save(1, _perturbed(settings, *saved), None, {})
    moves = []
    for layout in loaded:
        (model,) = _perturbed(settings, *layout)
        expected = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if tensor is not None}
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_()
        load_weights(folder / "checkpoints" / "iter_0000001", [model])
        moved = {name: tensor for name, tensor in model.state_dict().items() if tensor is not None}
        # Arrays travel whole; a tensor's memory would have to outlive the rank that sends it.
        moves.append(tuple({name: x.numpy() for name, x in of.items()} for of in (moved, expected)))
    return moves


def _perturbed(settings: list[str], tensor: int, pipeline: int) -> list:
    """The model in a layout, with values that depend on a parameter's name alone."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ext import config_file
    from megatron_ext.config import Config
    from megatron_ext.transformer.model import build_chunks
    from megatron_ext.transformer.resolved import resolve
    from parity import VOCABULARY, perturb

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor, pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    layout = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    config = config_file.load(Config, [], [*settings, *layout])
    codes, vectors = config.model.image_codes, None
    if codes.width:
        vectors = torch.randn(codes.codebook_size, codes.width, generator=torch.Generator().manual_seed(0))
    chunks = build_chunks(resolve(config, VOCABULARY), vectors)
    perturb([SimpleNamespace(module=chunk) for chunk in chunks])
    return chunks

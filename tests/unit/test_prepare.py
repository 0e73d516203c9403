"""A step's input is prepared ahead in worker processes, arrives as a whole, and equals the input prepared here."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_ext import config_file
from megatron_ext.config import Config, DataConfig
from megatron_ext.data import step_batches
from megatron_ext.data.packed_rows import PackedRows
from megatron_ext.data.serialization import ALIGNMENT, from_bytes, to_bytes
from megatron_ext.data.transfer import to_device
from megatron_ext.routing.plan import PRESETS
from megatron_ext.token_classes import Task
from megatron_ext.training.prepare import NO_TASK, Preparation
from megatron_ext.transformer.resolved import resolve
from parity import packed_batch

ROWS, LENGTH = 6, 64


def preparation(*overrides: str) -> Preparation:
    settings = [f"data.sequence_length={LENGTH}", "training.micro_batch_size=2", *overrides]
    return Preparation.of(resolve(config_file.load(Config, [], settings)), vocab_size=200, pad=100)


def leaves(value, path: str = "") -> dict:
    """Everything in a nested structure by its place, arrays and tensors as lists."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {place: leaf for key, v in items for place, leaf in leaves(v, f"{path}.{key}").items()}
    return {path: value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value}


@pytest.mark.parametrize("loader, workers", [("plain", 0), ("plain", 1), ("dali", 1)])
@pytest.mark.parametrize("preset", ["dense", "himix_hmgen_share_partial"])
def test_the_input_of_a_step_from_a_worker_is_that_made_here(blend, loader, workers, preset):
    prepare = preparation(f"plan.preset={preset}")
    config = DataConfig(sequence_length=LENGTH, loader=loader, workers=workers, prefetch=2)
    steps = step_batches(blend, config, ROWS, start_step=2, num_steps=5, prepare=prepare)
    rows = PackedRows(blend, LENGTH)
    for number in range(2, 5):
        steps.prefetch()
        here = prepare(rows.packed_tokens(number * ROWS, (number + 1) * ROWS), number)
        step = next(steps)
        assert isinstance(step.micro_batches[0].labels, torch.Tensor)
        assert leaves(step) == leaves(here)
        assert len(step.micro_batches) == 3 and 0 < step.flops <= step.dense_flops
    assert next(steps, None) is None
    steps.close()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_structure_comes_back_from_bytes_and_what_was_shared_stays_shared(preset):
    step = preparation(f"plan.preset={preset}").step_input(packed_batch(4, LENGTH, seed=1))
    again = from_bytes(to_bytes(step))
    assert leaves(again) == leaves(step)
    moved = to_device(again, "cpu")
    assert leaves(moved) == leaves(step)
    for layers in (again.micro_batches[0].route.layers, moved.micro_batches[0].route.layers):
        distinct = len({id(layer) for layer in step.micro_batches[0].route.layers})
        assert len({id(layer) for layer in layers}) == distinct < len(layers)


def test_arrays_lie_aligned_in_their_buffer():
    step = from_bytes(to_bytes(preparation().step_input(packed_batch(4, LENGTH, seed=1))))
    addresses = [x.ctypes.data for x in (step.loss_tokens, *(m.labels for m in step.micro_batches))]
    assert {address % ALIGNMENT for address in addresses} == {addresses[0] % ALIGNMENT}


def test_another_device_gets_every_array_in_one_copy():
    step = preparation("plan.preset=himix").step_input(packed_batch(4, LENGTH, seed=1))
    there = step.to("meta")
    arrays = [x for micro_batch in there.micro_batches for x in (micro_batch.labels, micro_batch.route.tokens)]
    assert all(x.device.type == "meta" for x in (there.loss_tokens, *arrays))
    assert len({x.untyped_storage()._cdata for x in arrays}) == 1
    assert [m.labels.shape for m in there.micro_batches] == [m.labels.shape for m in step.micro_batches]


def test_rows_are_filled_up_so_that_shapes_repeat():
    prepare = preparation("plan.preset=himix_hmgen_share_all", "training.row_multiple=16")
    for seed in range(4):
        for micro_batch in prepare.step_input(packed_batch(4, LENGTH, seed)).micro_batches:
            route = micro_batch.route
            assert all(size % 16 == 0 for layer in route.layers for size in layer.slices.sizes)
            assert all(x.size % 16 == 0 for layer in route.layers for x in (layer.query_positions, layer.key_positions))
            assert micro_batch.labels.size == micro_batch.tasks.size == route.head_rows.index.size
            assert micro_batch.labels.size % 16 == 0
            fillers = micro_batch.tasks == NO_TASK
            assert ((route.head_rows.index < 0) == fillers).all()


def test_micro_batches_of_rows_by_task_are_of_one_task_where_they_can_be():
    batch = packed_batch(6, LENGTH, seed=0)
    batch.task[:] = torch.tensor([2, 0, 1, 0, 1, 2])[:, None]
    step = preparation("data.rows=by_task").step_input(batch)
    assert [set(m.tasks.tolist()) for m in step.micro_batches] == [{int(task)} for task in Task]


def test_the_processes_that_pack_rows_do_not_wait_for_torch():
    program = "import sys, megatron_ext.training.prepare, megatron_ext.data.workers; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "False"

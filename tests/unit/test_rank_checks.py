"""Slow ranks, replicas that differ, and numbers that are not finite are traced to ranks and parameters."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.callbacks.replica_check import odd_ranks, sum_of_bits
from megatron_ext.callbacks.stragglers import Stragglers, has_peers, relative_speeds
from megatron_ext.training import loop
from megatron_ext.training.callback import Callback, StepRecord
from megatron_ext.training.run import build_run
from megatron_ext.training.schedule_timers import ScheduleTimers
from support.data_sets import write_pairs
from support.tiny_vq import GRID


def test_speeds_compare_ranks_of_the_same_stage():
    assert relative_speeds([1.0, 2.0, 0.5, 2.0], [8] * 4, [0, 1, 0, 1]) == {0: 1.0, 1: 1.0, 2: 0.5, 3: 1.0}
    assert has_peers([0, 1, 0, 1]) and not has_peers([0, 1, 1])


def test_replicas_with_few_rows_or_none_are_not_slow():
    """Five replicas of steps of four rows, one of them much shorter."""
    assert relative_speeds([0.0, 1.0, 0.8, 0.1, 1.0], [0, 10, 8, 1, 9], [0] * 5) == {1: 1.0, 2: 0.8, 3: 1.0, 4: 1.0}


def test_ranks_are_only_compared_after_all_steps_of_a_comparison(one_process):
    config = one_process()
    timers = ScheduleTimers()
    chunk = torch.nn.Identity()
    chunk.config = SimpleNamespace(timers=timers)
    run = SimpleNamespace(config=config, chunks=[chunk], progress=SimpleNamespace(iteration=95))
    stragglers, compared = Stragglers(), {}
    stragglers.on_train_begin(run)
    while run.progress.iteration < 200:
        stragglers.before_step(run, SimpleNamespace(flops=1.0))
        timers("forward-compute").start()
        timers("forward-compute").stop()
        run.progress.iteration += 1
        record = StepRecord({"iteration": run.progress.iteration})
        stragglers.after_step(run, record)
        if len(record.metrics) > 1:
            compared[run.progress.iteration] = record.metrics["slowest_rank_speed"]
    assert compared == {200: 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_flipped_bit_changes_the_sum(dtype):
    weight = torch.randn(5, 3).to(dtype)
    flipped = weight.clone()
    flipped.view(torch.int32 if dtype == torch.float32 else torch.int16)[2, 1] ^= 1
    assert sum_of_bits(weight) != sum_of_bits(flipped)


def test_the_minority_of_replicas_is_named_and_all_of_them_without_one():
    assert odd_ranks("w", [5, 5, 7], [0, 4, 8]) == "w on rank 8"
    assert odd_ranks("w", [5, 7], [0, 4]) == "w on ranks 0, 4"


class Spoil(Callback):
    """Makes one gradient not a number in the second step."""

    def __init__(self):
        self.records = []

    def before_step(self, run, step):
        self.weight = next(run.chunks[0].module.decoder.layers[0].mlp.linear_fc2.parameters())
        scale = float("nan") if run.progress.iteration == 1 else 1.0
        self.hook = self.weight.register_hook(lambda gradient: gradient * scale)

    def after_step(self, run, record):
        self.hook.remove()
        self.records.append(copy.deepcopy(record.metrics))


@pytest.fixture
def trained(one_process, tmp_path, vocabulary):
    write_pairs(tmp_path / "pairs", vocabulary, [["a red circle"]] * 20, grid=(GRID, GRID))
    sources = [{"path": str(tmp_path / "pairs"), "task": "generation"}]
    settings = [
        f"output={tmp_path / 'run'}",
        *("model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2", "training.micro_batch_size=1"),
        *(f"data.vocabulary={vocabulary.folder}", f"data.train={json.dumps(sources)}", "parallel.overlap=true"),
        *("data.workers=0", "data.sequence_length=64", "training.global_batch_size=2", "training.iterations=4"),
        "optimizer.warmup_iterations=1",
    ]

    config = one_process(*settings)

    def train():
        spoil = Spoil()
        loop.train(build_run(config), [spoil])
        return spoil.records, spoil.weight.detach().clone()

    return train


def test_the_parameter_whose_gradient_is_not_finite_is_named_and_looking_for_it_changes_nothing(trained, monkeypatch):
    records, weight = trained()
    assert [record.get("non_finite") is not None for record in records] == [False, True, False, False]
    assert "gradients that are not finite: rank 0" in records[1]["non_finite"]
    assert "decoder.layers.0.mlp.linear_fc2.weight" in records[1]["non_finite"]
    monkeypatch.setattr(loop, "locate", lambda *unused: "")
    again, weight_without = trained()
    assert [r["loss"] for r in records] == [r["loss"] for r in again] and torch.equal(weight, weight_without)

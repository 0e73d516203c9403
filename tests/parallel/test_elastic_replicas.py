"""Replicas with unequal shares of a step, or with none, train what one process trains on the same rows."""

import pytest

from support.data_sets import captions, texts
from support.ranks import world

SETTINGS = [
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "plan.preset=himix_hmgen_share_partial",
    "data.sequence_length=64",
    "training.iterations=1000",
    "optimizer.lr=0.01",
]
SEVEN = ["training.global_batch_size=7", "training.micro_batch_size=2"]
TWO = ["training.global_batch_size=2", "training.micro_batch_size=2", "data.rows=by_task"]
ONE = ["training.global_batch_size=1", "training.micro_batch_size=1"]
SHARDED = ["parallel.distributed_optimizer=true", "parallel.overlap=true"]
BALANCED = "data.composition=balanced"
INTERLEAVED = ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("sources")
    pairs, plain = captions(folder / "pairs", 40), texts(folder / "plain", 20, longest=60)
    return [(pairs, "generation", 1.0), (pairs, "understanding", 1.0), (plain, "text", 1.0)]


@pytest.fixture(scope="module")
def alone(sources, tmp_path_factory) -> list:
    """What one process measures."""
    [measured] = world(1, _measure, [SEVEN, TWO, ONE], sources, folder=tmp_path_factory.mktemp("alone"))
    return measured


def test_three_replicas_share_seven_rows_then_two_of_one_task_each(alone, sources, tmp_path):
    runs = [[*SEVEN, *SHARDED], [*SEVEN, *SHARDED, BALANCED], [*TWO, *SHARDED]]
    ranks = world(3, _measure, runs, sources, folder=tmp_path)
    for measured in ranks:
        _assert_equal(measured, [alone[0], alone[0], alone[1]])
    assert [rank[0]["micro_batches"] for rank in ranks] == [1, 1, 2]
    rows, tasks = ([rank[2][key] for rank in ranks] for key in ("rows", "tasks"))
    assert rows == [0, 1, 1] and len(tasks[1]) == len(tasks[2]) == 1  # so a replica has no image, or no text to learn
    assert any(rank[2]["tasks"] != ranks[1][2]["tasks"] for rank in ranks)


def test_two_pipelines_share_seven_rows_and_two_context_groups_a_single_one(alone, sources, tmp_path):
    single = [*SEVEN, "training.micro_batch_size=1"]
    runs = [
        [*single, "parallel.pipeline=2"],
        [*single, *INTERLEAVED, *SHARDED, BALANCED],
        [*ONE, "parallel.context=2", *SHARDED],
    ]
    ranks = world(4, _measure, runs, sources, folder=tmp_path)
    for measured in ranks:
        _assert_equal(measured, [alone[0], alone[0], alone[2]])
    shares = {rank[0]["replica"]: [of_run["micro_batches"] for of_run in rank] for rank in ranks}
    # To three micro-batches an empty one is added where interleaved stages need an even number, and to none at all one.
    assert shares == {0: [3, 4, 1], 1: [4, 4, 1]}


def _assert_equal(measured: list, expected: list) -> None:
    for of_run, of_one in zip(measured, expected, strict=True):
        assert of_run["losses"] == pytest.approx(of_one["losses"], rel=1e-6)
        assert of_run["norms"] == pytest.approx(of_one["norms"], rel=1e-4)
        assert of_run["validation"] == pytest.approx(of_one["validation"], rel=1e-6)


def _measure(runs: list[list[str]], sources: list) -> list[dict]:
    """What this rank measures in three steps of each run, of the rows that the replica takes itself."""
    import numpy as np
    import torch
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ext import config_file
    from megatron_ext.config import Config
    from megatron_ext.data.composition import Composition
    from megatron_ext.data.packed_rows import NO_ROW, PackedRows
    from megatron_ext.data.step_rows import StepRows
    from megatron_ext.routing.row_costs import RowCosts
    from megatron_ext.token_classes import Task
    from megatron_ext.training.prepare import Preparation, own_share
    from megatron_ext.training.setup import build_model, build_optimizer
    from megatron_ext.training.step import evaluate_step, evaluation_mode, train_step
    from megatron_ext.transformer.resolved import resolve
    from support.data_sets import SPECIAL, mixture

    results = []
    for settings in runs:
        config = config_file.load(Config, [], [*SETTINGS, *settings])
        parallel, training = config.parallel, config.training
        parallel_state.destroy_model_parallel()
        virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        parallel_state.initialize_model_parallel(1, parallel.pipeline, virtual, context_parallel_size=parallel.context)
        torch.manual_seed(training.seed)
        tensor_parallel.model_parallel_cuda_manual_seed(training.seed)
        resolved = resolve(config, 256)
        prepare = Preparation.of(resolved, 256, SPECIAL.pad)
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        costs = RowCosts(resolved.plan, config.model, 256) if config.data.composition == "balanced" else None
        composition = Composition(training.micro_batch_size, config.micro_batch_multiple, costs)
        packed = PackedRows(mixture(*sources), 64, by_task=config.data.rows == "by_task")
        rows = StepRows(packed, training.global_batch_size, replica, replicas, composition)
        chunks = build_model(resolved)
        optimizer = build_optimizer(config, chunks)
        steps = [own_share(prepare(rows[number], number)).to("cpu") for number in range(3)]
        results_of_steps = [train_step(chunks, optimizer, step, config) for step in steps]
        with evaluation_mode(chunks):
            sums, _ = evaluate_step(chunks, steps[0], config)
        tasks = {int(task) for m in steps[0].micro_batches for task in np.unique(m.tasks) if task < len(Task)}
        own = composition.row_numbers(packed, 0, training.global_batch_size, replica, replicas)
        results.append(
            {
                "replica": replica,
                "rows": int((own != NO_ROW).sum()),
                "tasks": tasks,
                "micro_batches": len(steps[0].micro_batches),
                "losses": [result.loss for result in results_of_steps],
                "norms": [result.grad_norm for result in results_of_steps],
                "validation": sums.tolist(),
            }
        )
    return results

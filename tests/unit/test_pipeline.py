"""Pipelines: the simulated schedule, and which layers are where."""

import itertools
import random

import pytest
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.routing.balance_summary import summarize_balance
from megatron_ext.routing.pipeline import group_size, order, peak, simulate
from megatron_ext.routing.pipeline_balance import ModelCosts, balance
from megatron_ext.routing.pipeline_layout import layers_of_chunks, layout_string, stage_layers


@pytest.mark.parametrize(("pipeline", "virtual", "micro_batches"), [(4, 1, 8), (2, 2, 4), (4, 2, 8), (4, 4, 16)])
def test_equal_costs_leave_the_known_bubble(pipeline, virtual, micro_batches):
    step = simulate([[1.0] * micro_batches] * (pipeline * virtual), pipeline, virtual)
    assert step.over_ideal == pytest.approx(1 + (pipeline - 1) / (micro_batches * virtual), abs=1e-12)
    assert step.idle == pytest.approx([3 * (pipeline - 1)] * pipeline)


def test_a_rank_keeps_as_many_micro_batches_as_ranks_follow_and_one():
    step = simulate([[1.0] * 8] * 4, 4)
    assert step.peak_alive == [[4], [3], [2], [1]]
    assert simulate([[1.0] * 3] * 4, 4).peak_alive == [[3], [3], [2], [1]]
    for rank in range(4):
        tasks = order(rank, 4, 2, 8)
        assert sum(simulate([[1.0] * 8] * 8, 4, 2).peak_alive[rank]) == peak(tasks, [1, 1]) == 2 * (3 - rank) + 4 + 1


def test_the_group_is_the_smallest_that_megatron_core_takes():
    assert [group_size(m, 2) for m in (2, 3, 4, 5, 7)] == [2, 3, 2, 3, 4]
    assert [group_size(m, 4) for m in (4, 5, 6, 7, 9, 10)] == [4, 5, 6, 7, 5, 5]
    with pytest.raises(ValueError, match="3 micro-batches"):
        group_size(3, 4)


@pytest.mark.parametrize(
    "text", ["Et*3|t*5L", "Et|t*3|t*2|t*2L", "E,(t|)*3,t,L", "E(t|tt|)*2t*3L", "EttL", layout_string([9, 1, 1])]
)
def test_layout_strings_mean_what_megatron_core_reads_in_them(text):
    """Its own parser and its own numbering, for every number of stages that divides the chunks."""
    counts = layers_of_chunks(text)
    for pipeline in (n for n in range(1, len(counts) + 1) if len(counts) % n == 0):
        theirs = PipelineParallelLayerLayout(text, pipeline)
        theirs.validate_layer_layout(sum(counts), None)
        ours = stage_layers(sum(counts), pipeline, len(counts) // pipeline, text)
        for rank, chunks in enumerate(theirs.layout):
            assert [chunk.count(LayerType.decoder) for chunk in chunks] == counts[rank::pipeline]
            starts = [sum(counts[: v * pipeline + rank]) for v in range(len(chunks))]
            sizes = counts[rank::pipeline]
            assert ours[rank] == [n for start, size in zip(starts, sizes) for n in range(start, start + size)]


def random_costs(seed: int, layers: int, micro_batches: int) -> ModelCosts:
    drawn = random.Random(seed)
    rows = [[drawn.randint(1, 9) for _ in range(micro_batches)] for _ in range(layers)]
    return ModelCosts(rows, [drawn.randint(0, 9)] * micro_batches, [drawn.randint(0, 20)] * micro_batches)


def partitions(layers: int, chunks: int) -> list[list[int]]:
    """All ways to give each chunk some of the layers."""
    borders = itertools.combinations(range(1, layers), chunks - 1)
    return [[b - a for a, b in itertools.pairwise([0, *inner, layers])] for inner in borders]


@pytest.mark.parametrize("seed", range(20))
def test_one_chunk_per_rank_gets_the_best_of_all_partitions(seed):
    """Against all of them; with a limit on what each stage holds, too."""
    costs, drawn = random_costs(seed, 9, 2), random.Random(seed)
    limit = [drawn.randint(2, 5) for _ in range(4)]
    for fits in (None, lambda rank, chunks: len(chunks[0]) <= limit[rank]):
        allowed = [c for c in partitions(9, 4) if not fits or all(n <= most for n, most in zip(c, limit))]
        stages = {tuple(c): [sum(chunk) for chunk in costs.of_chunks(c)] for c in allowed}
        if not allowed:
            assert balance(costs, 4, fits=fits) is None
            continue
        least = min(map(max, stages.values()))
        found = balance(costs, 4, fits=fits)
        assert max(stages[tuple(found)]) == least
        assert found[0] == min(c[0] for c, of_stages in stages.items() if max(of_stages) == least)


@pytest.mark.parametrize("seed", range(4))
def test_several_chunks_per_rank_are_close_to_the_best_of_all_partitions(seed):
    costs = random_costs(seed, 9, 6)
    steps = {tuple(c): costs.simulate(c, 2).makespan for c in partitions(9, 4)}
    assert steps[tuple(balance(costs, 2, 2))] <= 1.05 * min(steps.values())
    held = balance(costs, 2, 2, fits=lambda rank, chunks: sum(map(len, chunks)) <= (4, 5)[rank])
    assert (held[0] + held[2], held[1] + held[3]) == (4, 5)
    assert balance(costs, 2, 2, fits=lambda rank, chunks: rank == 0) is None


def test_balanced_stages_are_a_tenth_faster_than_even_ones_where_two_chunks_a_stage_meet_token_reduction():
    """And the layout that is printed is one of Megatron-Core's."""
    settings = ["plan.preset=himix_hmgen_share_partial", "parallel.pipeline=4", "parallel.virtual_pipeline=2"]
    config = config_file.load(Config, ["examples/configs/llama-2-7b.yaml"], settings)
    mix = "understanding: 576 image, 60 text, 40 answer; generation: 40 text, 576 image"
    layouts = summarize_balance(config, 32_000, mix, micro_batches=32)["layouts"]
    assert layouts["balanced"]["of_even"] < 0.91 and layouts["even"]["layout"] == "Et*4|t*4|t*4|t*4|t*4|t*4|t*4|t*4L"
    PipelineParallelLayerLayout(layouts["balanced"]["layout"], 4).validate_layer_layout(32, None)

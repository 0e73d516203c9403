"""Pipelines: the simulated schedule, and which layers are where."""

import pytest
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_ext.routing.pipeline import group_size, order, peak, simulate
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

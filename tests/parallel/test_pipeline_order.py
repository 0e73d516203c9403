"""Megatron-Core's own schedules, recorded on gloo ranks, against those that are simulated."""

import pytest

from megatron_ext.routing.pipeline import order
from support.ranks import world

SCHEDULES = {
    2: [(1, 1), (1, 5), (2, 2), (2, 4), (2, 5), (3, 3), (3, 7)],  # (virtual, micro-batches)
    4: [(1, 2), (1, 6), (2, 8), (2, 6), (2, 9)],
}


@pytest.mark.parametrize("pipeline", SCHEDULES)
def test_every_rank_works_in_the_order_that_megatron_core_gives_it(tmp_path, pipeline):
    for rank, recorded in enumerate(world(pipeline, _record, pipeline, SCHEDULES[pipeline], folder=tmp_path)):
        for (virtual, micro_batches), (tasks, gradients) in zip(SCHEDULES[pipeline], recorded):
            assert tasks == order(rank, pipeline, virtual, micro_batches)
            # Each chunk multiplies by its weight 2: the gradient is that of all micro-batches, each once.
            assert gradients == [sum(range(1, micro_batches + 1)) * 2 ** (pipeline * virtual - 1)] * virtual


def _record(pipeline: int, schedules: list[tuple[int, int]]) -> list:
    """The tasks of this rank in each schedule, and the gradient of each of its chunks."""
    from pipeline_steps import schedule

    recorded = []
    for virtual, micro_batches in schedules:
        tasks = []
        chunks = schedule.chunks(pipeline, virtual, micro_batches, tasks.append)
        schedule.step(chunks, micro_batches)
        recorded.append((tasks, [chunk.weight.grad.item() for chunk in chunks]))
    return recorded

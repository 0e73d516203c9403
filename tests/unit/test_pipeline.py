"""The simulated pipeline: its bubble, its order, what is alive."""

import pytest

from megatron_ext.routing.pipeline import group_size, order, peak, simulate


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

"""Bad steps are recognised, counted over resumptions, and end a run that has too many."""

import math

import pytest

from megatron_ext.errors import UserError
from megatron_ext.run_config import BadStepConfig
from megatron_ext.training.bad_steps import BadSteps


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, 1.0, "the loss is inf"),
        (2.0, math.nan, "the gradient norm is nan"),
        (2.0, math.inf, "the gradient norm is inf"),
        (2.0, 1e6, None),
    ],
)
def test_at_first_only_numbers_that_are_not_finite_are_bad(loss, grad_norm, reason):
    assert BadSteps(BadStepConfig()).judge(loss, grad_norm) == reason


def with_window(losses, **config):
    steps = BadSteps(BadStepConfig(spike_window=len(losses), **config))
    for loss in losses:
        assert steps.judge(loss, 1.0) is None
    return steps


def test_a_jump_is_a_spike_once_the_window_is_full():
    steps = BadSteps(BadStepConfig(spike_window=4))
    assert steps.judge(2.0, 1.0) is None
    assert steps.judge(100.0, 1.0) is None, "the window is not full"
    assert "spike" in with_window([2.0, 2.1, 1.9, 2.0]).judge(100.0, 1.0)


def test_a_spike_is_many_deviations_and_a_large_part_of_the_mean():
    quiet = with_window([2.0, 2.001, 1.999, 2.0])
    assert quiet.judge(2.9, 1.0) is None, "hundreds of deviations, but under half of the mean"
    noisy = with_window([1.0, 3.0, 1.0, 3.0])
    assert noisy.judge(3.5, 1.0) is None, "three quarters of the mean, but 1.5 deviations"


def test_a_spike_does_not_enter_the_window():
    steps = with_window([2.0, 2.1, 1.9, 2.0])
    assert [steps.judge(50.0, 1.0) is not None for _ in range(3)] == [True] * 3


def test_a_falling_loss_is_never_a_spike():
    steps = with_window([9.0, 8.0, 7.0, 6.0])
    assert all(steps.judge(loss, 1.0) is None for loss in (0.1, 0.0, 6.0))


def test_a_window_of_zero_disables_the_spike_rule():
    steps = BadSteps(BadStepConfig(spike_window=0))
    assert [steps.judge(loss, 1.0) for loss in (1.0, 1.0, 1e9)] == [None] * 3


def test_too_many_in_a_row_end_the_run_and_a_good_step_resets_the_count():
    steps = BadSteps(BadStepConfig(max_consecutive=2, max_total=50))
    for loss in (math.nan, math.nan, 1.0, math.nan, math.nan):
        steps.judge(loss, 1.0)
        steps.enforce_limits(7)
    steps.judge(math.nan, 1.0)
    with pytest.raises(UserError, match="iteration 8: 3 bad steps in a row, 'bad_steps.max_consecutive' allows 2"):
        steps.enforce_limits(8)


def test_too_many_in_all_end_the_run():
    steps = BadSteps(BadStepConfig(max_consecutive=2, max_total=0))
    steps.judge(math.nan, 1.0)
    with pytest.raises(UserError, match="1 bad step in all, 'bad_steps.max_total' allows 0"):
        steps.enforce_limits(1)


def test_counts_and_window_survive_a_checkpoint():
    config = BadStepConfig(spike_window=4, max_total=1)
    before = BadSteps(config)
    for loss in (2.0, 2.1, math.nan, 1.9, 2.0):
        before.judge(loss, 1.0)
    after = BadSteps(config)
    after.load_state_dict(before.state_dict())
    assert (after.total, after.consecutive) == (1, 0)
    assert after.judge(100.0, 1.0) is not None
    with pytest.raises(UserError):
        after.enforce_limits(6)

"""The learning rate that each iteration is taken with."""

from types import SimpleNamespace

import pytest

from megatron_ext.config import OptimizerConfig
from megatron_ext.training.schedule import build_scheduler


def rates(config, iterations, done=0):
    optimizer = SimpleNamespace(param_groups=[{"lr": 123.0}])
    scheduler = build_scheduler(optimizer, config, iterations, done)
    used = []
    for _ in range(done, iterations):
        used.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    return used


def test_cosine_warms_up_and_ends_at_the_minimum():
    used = rates(OptimizerConfig(lr=1.0, min_lr=0.1, warmup_iterations=4, schedule="cosine"), 24)
    assert used[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert used[13] == pytest.approx(0.55)  # half way between iterations 4 and 24
    assert used[-1] == pytest.approx(0.1)
    assert used[4:] == sorted(used[4:], reverse=True)


def test_wsd_is_flat_until_its_decay():
    used = rates(OptimizerConfig(lr=1.0, min_lr=0.1, warmup_iterations=2, schedule="wsd", wsd_decay_iterations=4), 20)
    assert used[1:16] == [1.0] * 15
    assert used[16] == pytest.approx(0.1 + 0.9 * (1 - (1 / 4) ** 0.5))
    assert used[-1] == pytest.approx(0.1)


def test_constant_stays():
    assert rates(OptimizerConfig(lr=1.0, warmup_iterations=0, schedule="constant"), 5) == [1.0] * 5


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_resumed_run_takes_the_same_rates(schedule):
    config = OptimizerConfig(schedule=schedule, warmup_iterations=3, wsd_decay_iterations=5)
    assert rates(config, 12, done=5) == rates(config, 12)[5:]


def test_groups_without_decay_stay_so():
    optimizer = SimpleNamespace(param_groups=[{"wd_mult": 1.0}, {"wd_mult": 0.0}])
    build_scheduler(optimizer, OptimizerConfig(weight_decay=0.1), 100)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]

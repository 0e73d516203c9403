"""Whether pictures show what their prompts ask for: shares of facts, and a control with other pictures' prompts."""

import numpy as np
import pytest

from megatron_ext.evaluation.faithfulness import ALL, NAMED, SHUFFLES, WHOLE, control_order, measure
from megatron_ext.picture_world.captions import caption
from megatron_ext.picture_world.check import KINDS, compare, summary
from megatron_ext.picture_world.detected import DetectedObject, DetectedScene
from megatron_ext.picture_world.facts import read_caption
from megatron_ext.picture_world.world import make_scene

SCENES = [make_scene(5, "test", index) for index in range(40)]
FACTS = [read_caption(caption(scene)) for scene in SCENES]


def faultless(scene) -> DetectedScene:
    """The detected scene of a picture without mistakes."""
    objects = [
        DetectedObject(o.shape, o.color, o.size, o.row, o.column, o.x, o.y, o.radius, explained=1.0)
        for o in scene.objects
    ]
    return DetectedScene(scene.background.color, tuple(objects))


SEEN = [faultless(scene) for scene in SCENES]


def test_right_pictures_are_far_above_the_control():
    result = measure(SEEN, FACTS)
    assert set(result.right.values()) == {100.0}
    assert result.control[WHOLE] == 0 and result.control["color"] < 40
    for row, (low, high) in result.interval.items():
        assert 0 < low <= 100 - result.control[row] <= high, row


def test_pictures_of_other_prompts_are_not_above_the_control():
    # Faultless pictures, each of another prompt: many facts are right by chance, and the control measures how many.
    result = measure(SEEN[1:] + SEEN[:1], FACTS)
    assert result.right[ALL] > 5
    low, high = result.interval[ALL]
    assert low < 0 < high


def test_shares_equal_those_of_the_check():
    pictures = SEEN[3:] + SEEN[:3]
    result = measure(pictures, FACTS)
    expected = summary(map(compare, pictures, FACTS))
    assert result.right[WHOLE] == pytest.approx(100 * expected["all_right"])
    for kind in KINDS:
        assert result.right[kind] == pytest.approx(100 * expected[kind]["right"])
        assert result.facts[kind] == expected[kind]["facts"]
    assert result.facts[ALL] == sum(result.facts[kind] for kind in KINDS)
    objects = sum(len(seen.objects) for seen in pictures)
    extra = expected["extra_objects"] * len(pictures)
    assert result.facts[NAMED] == objects and result.right[NAMED] == pytest.approx(100 * (1 - extra / objects))


def test_a_missing_picture_has_no_fact_right():
    whole, without = measure(SEEN, FACTS), measure([None] * 10 + SEEN[10:], FACTS)
    assert without.right[WHOLE] == 75 and without.facts[ALL] == whole.facts[ALL]
    assert without.control[ALL] < whole.control[ALL]


def test_the_interval_is_as_wide_as_the_spread_of_new_samples():
    # Half of the pictures follow their prompts.
    def sample(seed: int):
        random = np.random.default_rng(seed)
        scenes = [make_scene(seed, "test", index) for index in range(30)]
        seen = [faultless(scenes[i] if random.random() < 0.5 else scenes[i - 1]) for i in range(30)]
        return measure(seen, [read_caption(caption(scene)) for scene in scenes])

    samples = [sample(seed) for seed in range(12)]
    spread = np.std([sampled.right["color"] - sampled.control["color"] for sampled in samples], ddof=1)
    width = np.mean([high - low for low, high in (sampled.interval["color"] for sampled in samples)])
    assert 0.5 < width / (2 * 1.96 * spread) < 2


@pytest.mark.parametrize("count", [2, 3, 9, 50])
def test_the_control_gives_a_picture_neither_its_own_prompt_nor_another_twice(count):
    orders = control_order(count)
    assert orders.shape == (min(SHUFFLES, count - 1), count)
    for order in orders:
        assert sorted(order) == list(range(count))
    for picture, prompts in enumerate(orders.T):
        assert picture not in prompts and len(set(prompts)) == len(prompts)
    assert (orders == control_order(count)).all()


def test_one_picture_has_no_control():
    result = measure(SEEN[:1], FACTS[:1])
    assert result.right[ALL] == 100 and not result.control and not result.interval

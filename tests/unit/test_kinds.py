"""Accuracy by kind of question, beside chance."""

from pathlib import Path

import pytest

from megatron_ext.evaluation.benchmark import Item
from megatron_ext.evaluation.gqa import GQA
from megatron_ext.evaluation.kinds import Accuracy, by_kind, overall


def items(kind: str, *answers: str) -> list[Item]:
    return [Item(f"{kind}{n}", Path("x.jpg"), "?", answer, kind=kind) for n, answer in enumerate(answers)]


PLACES = items("place", "top", "top", "bottom", "left")
YES = items("existence", "yes", "no")


def test_each_kind_has_its_accuracy_and_missing_answers_are_wrong():
    answers = {"place0": "Top.", "place2": "left", "place3": "left", "existence0": "yes", "existence1": "no"}
    kinds = by_kind(GQA, [*PLACES, *YES, *items("", "yes")], answers)
    assert {kind: (a.right, a.questions) for kind, a in kinds.items()} == {"place": (0.5, 4), "existence": (1.0, 2)}


def test_chance_is_that_of_the_most_frequent_right_answer():
    kinds = by_kind(GQA, [*PLACES, *YES], {})
    assert kinds["place"].chance == 0.5 and kinds["existence"].chance == 0.5
    constant = by_kind(GQA, PLACES, {item.id: "top" for item in PLACES})["place"]
    assert constant.right == constant.chance


@pytest.mark.parametrize(
    ("right", "questions", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)]
)
def test_intervals_are_those_of_wilson(right, questions, low, high):
    accuracy = Accuracy.of(right, questions, 0.5)
    assert (accuracy.low, accuracy.high) == pytest.approx((low, high), abs=1e-4)


def test_all_kinds_together_count_every_question_once():
    together = overall([Accuracy.of(3, 4, 0.25), Accuracy.of(1, 8, 0.5)])
    assert (together.right, together.questions) == (4 / 12, 12)
    assert together.chance == pytest.approx((4 * 0.25 + 8 * 0.5) / 12)

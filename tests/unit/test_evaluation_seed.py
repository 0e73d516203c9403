"""SEED-Bench: questions about images, by letter and by the likelihood of the choices."""

import json
import math
import random

import pytest

from megatron_ext.errors import UserError
from megatron_ext.evaluation.answers import AnswersWriter
from megatron_ext.evaluation.score_table import score_file
from megatron_ext.evaluation.seed import SEED

TYPES = {"Scene Understanding": 1, "Instances Counting": 5, "Action Prediction": 11}


def question(id, answer, type_id=1, data_type="image", **more):
    choices = {f"choice_{name}": f"option {name} of {id}" for name in "abcd"}
    entry = {"question_id": id, "data_id": f"image_{id}", "data_type": data_type, "question": f"What is {id}?"}
    return {**entry, **choices, "answer": answer, "question_type_id": type_id, **more}


def release(folder, questions):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "SEED-Bench.json").write_text(json.dumps({"question_type": TYPES, "questions": questions}))
    return folder


FOUR = [
    question("101", "A"),
    question("102", "B", type_id=5, choice_b=2),
    question("v1", "C", type_id=11, data_type="video"),
    question("103", "C", type_id=5),
    question("104", "D"),
]


def test_the_questions_about_images_are_read(tmp_path):
    release(tmp_path, FOUR)
    (tmp_path / "SEED-Bench-image").mkdir()
    (tmp_path / "SEED-Bench-image" / "image_101").touch()
    items = SEED.read(tmp_path)
    assert [item.id for item in items] == ["101", "102", "103", "104"]
    assert items[0].image.is_file(), "as released, without a suffix"
    assert items[1].image == tmp_path / "SEED-Bench-image" / "image_102", "which need not exist"
    assert items[1].question.split("\n") == [
        "What is 102?",
        "A. option a of 102",
        "B. 2",
        "C. option c of 102",
        "D. option d of 102",
        "Answer with the option's letter from the given choices directly.",
    ]
    assert [item.groups for item in items[:2]] == [("Scene Understanding",), ("Instances Counting",)]


def test_known_answers_have_known_scores(tmp_path):
    items = SEED.read(release(tmp_path, FOUR))
    scores = SEED.score(items, {"101": "(A)", "102": "Two", "103": "all of them", "v1": "C"})
    assert scores.headline == {"SEED": 50.0}
    assert scores.details == {
        "Scene Understanding": {"accuracy": 50.0, "questions": 2},
        "Instances Counting": {"accuracy": 50.0, "questions": 2},
    }
    assert (scores.questions, scores.missing, scores.invalid) == (4, 1, 1)


def test_the_likeliest_choice_is_the_answer(tmp_path):
    items = SEED.read(release(tmp_path, FOUR))
    likelihoods = {"101": [-1, -2.5, -3, -4], "102": [-2.0, -1.0, -math.inf, -1.0], "103": [-1, -2, math.nan, -3]}
    scores = SEED.score_likelihoods(items, likelihoods)
    assert scores.headline == {"SEED-likelihood": 50.0}
    assert (scores.missing, scores.invalid) == (1, 1)


def test_likelihoods_in_an_answers_file_are_scored_beside_its_letters(tmp_path):
    items = SEED.read(release(tmp_path, [question("1", "A"), question("2", "B")]))
    with AnswersWriter(tmp_path / "all.jsonl") as every, AnswersWriter(tmp_path / "one.jsonl") as partly:
        every.write("1", "A", likelihoods=[-1, -2, -3, -4])
        every.write("2", "C", likelihoods=[-2, -1, -3, -4])
        partly.write("1", "A", likelihoods=[-1, -2, -3, -4])
        partly.write("2", "B")
    complete = score_file(SEED, items, tmp_path / "all.jsonl", "x").scores
    assert complete.headline == {"SEED": 50.0, "SEED-likelihood": 100.0}
    assert complete.details["Scene Understanding (SEED-likelihood)"] == {"accuracy": 100.0, "questions": 2}
    assert complete.notes == ()
    partial = score_file(SEED, items, tmp_path / "one.jsonl", "x").scores
    assert partial.headline == {"SEED": 100.0, "SEED-likelihood": 50.0}
    assert partial.notes == ("SEED-likelihood: 1 questions without likelihoods, 0 with unusable ones",)


@pytest.mark.parametrize("unusable", [[], [-1.0] * 3, [-math.inf] * 4, "abcd", None, [None] * 4, [-1.0] * 5])
def test_likelihoods_that_rank_nothing_are_invalid_and_wrong(tmp_path, unusable):
    items = SEED.read(release(tmp_path, [question("1", "A")]))
    scores = SEED.score_likelihoods(items, {"1": unusable})
    assert (scores.headline["SEED-likelihood"], scores.invalid) == (0.0, 1)


def test_random_answers_score_as_a_few_lines_count_them(tmp_path):
    rng = random.Random(11)
    questions = [question(str(n), rng.choice("ABCD"), rng.choice([1, 5])) for n in range(200)]
    items = SEED.read(release(tmp_path, questions))
    chosen = {q["question_id"]: rng.choice("ABCD") for q in questions if rng.random() < 0.9}
    forms = ["{0}", "{0}.", "({0})", "{0}: it", " {1}\n", "{0} {1}"]
    answers = {
        id: rng.choice(forms).format(letter, f"Option {letter.lower()} of {id}") for id, letter in chosen.items()
    }
    likelihoods = {id: [rng.uniform(-9, -1) for _ in "ABCD"] for id in chosen}
    for id, letter in chosen.items():
        likelihoods[id]["ABCD".index(letter)] = -0.5
    right = [chosen.get(q["question_id"]) == q["answer"] for q in questions]
    scores = SEED.score(items, answers)
    assert 0 < sum(right) < 200
    assert scores.headline["SEED"] == pytest.approx(sum(right) / 2)
    for name in ("Scene Understanding", "Instances Counting"):
        of_type = [r for q, r in zip(questions, right) if q["question_type_id"] == TYPES[name]]
        assert scores.details[name] == pytest.approx(
            {"accuracy": 100 * sum(of_type) / len(of_type), "questions": len(of_type)}
        )
    assert SEED.score_likelihoods(items, likelihoods).headline["SEED-likelihood"] == scores.headline["SEED"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"question_type": TYPES}, r"SEED-Bench\.json: has no list 'questions'"),
        ({"questions": [question("v", "A", data_type="video")]}, r"SEED-Bench\.json: holds no questions"),
        ({"questions": [question("1", "E")]}, r"json: question 1: the answer is 'E', not 'A' or 'B' or 'C' or 'D'"),
        ({"questions": [question("1", "A", choice_d=" ")]}, r"json: question 1: 'choice_d' is missing, empty"),
        ({"questions": [question("1", "A", data_id=["a", "b"])]}, r"json: question 1: 'data_id' is missing"),
        ({"questions": [question("1", "A"), {}]}, r"json: entry 2 of 'questions': 'question_id' is missing"),
        ({"questions": [question("1", "A")] * 2}, r"json: question 1 occurs twice"),
    ],
)
def test_a_malformed_file_is_named_with_the_question(tmp_path, content, message):
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        SEED.read(tmp_path)

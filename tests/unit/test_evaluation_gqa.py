"""GQA: the released file, exact match after normalisation."""

import json
import random
import re

import pytest

from megatron_ext.errors import UserError
from megatron_ext.evaluation.gqa import GQA

TYPES = {"structural": "query", "semantic": "attr", "detailed": "material"}
QUESTIONS = {
    "201": {
        "question": "What is it made of?",
        "imageId": "n1",
        "answer": "t-shirt",
        "types": TYPES,
        "isBalanced": True,
    },
    "202": {"question": "Is it red?", "imageId": "n2", "answer": "no", "types": {**TYPES, "structural": "verify"}},
    "203": {"question": "Who is it?", "imageId": "n3", "answer": "woman", "types": {**TYPES, "semantic": "rel"}},
    "204": {"question": "What?", "imageId": "n4", "answer": "two", "types": TYPES},
    "205": {"question": "Which?", "imageId": "n4", "answer": "left", "types": TYPES},
}


def release(folder, questions=QUESTIONS):
    (folder / "images").mkdir(parents=True)
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    return folder


def test_the_released_file_is_read(tmp_path):
    first, second, *_ = items = GQA.read(release(tmp_path))
    assert [item.id for item in items] == list(QUESTIONS)
    assert first.image == tmp_path / "images" / "n1.jpg", "which need not exist"
    assert first.question == "What is it made of?\nAnswer the question using a single word or phrase."
    assert first.answer == "t-shirt"
    assert first.groups == ("structural: query", "semantic: attr", "open")
    assert second.groups == ("structural: verify", "semantic: attr", "binary")


def test_the_file_may_lie_in_the_folder_that_the_archive_makes(tmp_path):
    release(tmp_path / "gqa")
    (tmp_path / "gqa" / "questions1.2").mkdir()
    name = "testdev_balanced_questions.json"
    (tmp_path / "gqa" / name).rename(tmp_path / "gqa" / "questions1.2" / name)
    assert GQA.read(tmp_path / "gqa")[0].image == tmp_path / "gqa" / "images" / "n1.jpg"


def test_known_answers_have_known_scores(tmp_path):
    items = GQA.read(release(tmp_path))
    scores = GQA.score(items, {"201": "T-shirt.", "202": "The no", "203": "man", "204": "  .", "unknown": "left"})
    # Of one kind, with five right answers: (0.4 - 0.2) / (1 - 0.2).
    assert scores.headline == {"GQA": 40.0, "GQA, chance-corrected": 25.0}
    assert (scores.questions, scores.missing, scores.invalid) == (5, 1, 1)
    assert scores.details == {
        "plain string match": {"accuracy": 20.0, "questions": 5},
        "structural: query": {"accuracy": 25.0, "questions": 4},
        "semantic: attr": {"accuracy": 50.0, "questions": 4},
        "open": {"accuracy": 25.0, "questions": 4},
        "structural: verify": {"accuracy": 100.0, "questions": 1},
        "binary": {"accuracy": 100.0, "questions": 1},
        "semantic: rel": {"accuracy": 0.0, "questions": 1},
    }


def test_questions_without_types_have_an_overall_score_alone(tmp_path):
    questions = {id: {**q, "types": None} for id, q in QUESTIONS.items()}
    scores = GQA.score(GQA.read(release(tmp_path, questions)), {"205": "left"})
    assert scores.headline == {"GQA": 20.0}
    assert list(scores.details) == ["plain string match"]


def test_random_answers_score_as_a_few_lines_count_them(tmp_path):
    rng = random.Random(5)
    answer_texts = ["dog", "red car", "two", "no", "t-shirt"]
    forms = ["{}", "The {}.", "{}!", "a  {}", "{} s"]
    questions = {str(n): {"question": "?", "imageId": "n", "answer": rng.choice(answer_texts)} for n in range(300)}
    answers = {id: rng.choice(forms).format(rng.choice(answer_texts)).upper() for id in questions if rng.random() < 0.9}

    def plain(text):
        return re.sub(r"\b(the|a)\b|[^a-z0-9]", "", text.lower().replace("two", "2"))

    right = sum(plain(answers.get(id, "-")) == plain(q["answer"]) for id, q in questions.items())
    scores = GQA.score(GQA.read(release(tmp_path, questions)), answers)
    assert 20 < right < 280
    assert scores.headline["GQA"] == pytest.approx(100 * right / 300)
    assert scores.missing == 300 - len(answers)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"testdev_balanced_questions\.json: no such file"),
        ("[", r"testdev_balanced_questions\.json: "),
        ("[]", r"testdev_balanced_questions\.json: is not an object"),
        ("{}", r"testdev_balanced_questions\.json: holds no questions"),
        ('{"7": {"question": "q", "imageId": "n"}}', r"\.json: question 7: 'answer' is missing"),
        ('{"7": 3}', r"\.json: question 7: 'imageId' is missing"),
    ],
)
def test_a_missing_or_malformed_file_is_named_with_the_entry(tmp_path, content, message):
    if content is not None:
        (tmp_path / "testdev_balanced_questions.json").write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        GQA.read(tmp_path)
    assert "\n" not in str(raised.value)


def test_constant_answers_score_nothing_above_chance(tmp_path):
    kinds = {"a": "yes", "b": "yes", "c": "no", "d": "left", "e": "right"}
    questions = {
        id: {**QUESTIONS["202"], "answer": answer, "types": {**TYPES, "detailed": "side" if id > "c" else "presence"}}
        for id, answer in kinds.items()
    }
    items = GQA.read(release(tmp_path, questions))
    perfect, constant = (GQA.score(items, answers).headline for answers in (kinds, dict.fromkeys(kinds, "yes")))
    assert perfect["GQA, chance-corrected"] == 100
    assert constant["GQA, chance-corrected"] == pytest.approx(100 * (0 - 1) / 2)  # right at chance, and always wrong

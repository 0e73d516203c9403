"""POPE: three splits, held against scikit-learn."""

import json
import random

import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from megatron_ext.errors import UserError
from megatron_ext.evaluation.pope import PARTS, POPE

SUFFIX = "Answer the question using a single word or phrase."


def release(folder, labels: dict[str, list[str]]):
    folder.mkdir(parents=True, exist_ok=True)
    for split, of_split in labels.items():
        entries = [
            {"question_id": n, "image": f"COCO_val2014_{n:012}.jpg", "text": f"Is there a thing {n}?", "label": label}
            for n, label in enumerate(of_split, start=1)
        ]
        (folder / f"coco_pope_{split}.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def test_the_released_files_are_read(tmp_path):
    release(tmp_path / "coco", dict.fromkeys(PARTS, ["yes", "no"]))
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "COCO_val2014_000000000001.jpg").touch()
    items = POPE.read(tmp_path)
    assert [item.id for item in items] == [f"{split}/{n}" for split in PARTS for n in (1, 2)]
    assert items[0].image.is_file()
    assert not items[1].image.exists(), "which stops nothing"
    assert items[1].question == f"Is there a thing 2?\n{SUFFIX}"
    assert [item.answer for item in items[:2]] == ["yes", "no"]
    assert [item.id for item in POPE.read(tmp_path, ["popular"])] == ["popular/1", "popular/2"]


def test_known_answers_have_known_scores(tmp_path):
    labels = {"random": ["yes"] * 4 + ["no"] * 4, "popular": ["yes", "no"], "adversarial": ["yes", "no"]}
    items = POPE.read(release(tmp_path, labels))
    texts = ["Yes", "yes.", "no", "perhaps", "No", "Yes, it is", "no", None]
    answers = {f"random/{n}": text for n, text in enumerate(texts, start=1) if text}
    answers |= {"popular/1": "yes", "popular/2": "no", "other/1": "yes"}
    scores = POPE.score(items, answers)
    assert scores.details["random"] == pytest.approx(
        {"accuracy": 50, "precision": 200 / 3, "recall": 50, "f1": 400 / 7, "yes": 37.5, "questions": 8}
    )
    assert scores.details["popular"] == {
        **{"accuracy": 100.0, "precision": 100.0, "recall": 100.0, "f1": 100.0},
        **{"yes": 50.0, "questions": 2},
    }
    # Nothing was answered.
    assert scores.details["adversarial"] == {
        **{"accuracy": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0},
        **{"yes": 0.0, "questions": 2},
    }
    assert scores.headline == pytest.approx(
        {
            **{"POPE-A": 50, "POPE-P": (200 / 3 + 100) / 3, "POPE-R": 50},
            **{"POPE-F1": (400 / 7 + 100) / 3, "POPE-yes": 87.5 / 3},
        }
    )
    assert (scores.questions, scores.missing, scores.invalid) == (12, 3, 1)
    assert not scores.notes


def test_a_left_out_split_is_noted_and_not_averaged(tmp_path):
    items = POPE.read(release(tmp_path, {"random": ["yes", "no"]}), ["random"])
    scores = POPE.score(items, {"random/1": "yes", "random/2": "no"})
    assert scores.notes == ("POPE without the split popular, adversarial",)
    assert scores.headline["POPE-A"] == 100.0


@pytest.mark.parametrize("seed", range(20))
def test_random_answers_score_as_scikit_learn_says(tmp_path, seed):
    rng = random.Random(seed)
    labels = {split: rng.choices(["yes", "no"], k=rng.randint(1, 60)) for split in PARTS}
    items = POPE.read(release(tmp_path, labels))
    bias = rng.random()
    # scikit-learn counts an answer that is neither yes nor no as a third class: wrong, and not a yes.
    choices = {item.id: rng.choices(["yes", "no", "neither"], [bias, 1 - bias, 0.1])[0] for item in items}
    written = {"yes": ["Yes", "yes.", "Yes, it is"], "no": ["No", "no, not one"], "neither": ["", "a dog", "maybe"]}
    answers = {id: rng.choice(written[word]) for id, word in choices.items()}
    for id in [id for id, word in choices.items() if word == "neither" and rng.random() < 0.5]:
        del answers[id]
    scores = POPE.score(items, answers)
    columns = {"POPE-A": "accuracy", "POPE-P": "precision", "POPE-R": "recall", "POPE-F1": "f1", "POPE-yes": "yes"}
    expected = {}
    for split in PARTS:
        predicted = [choices[item.id] for item in items if item.groups == (split,)]
        of_yes = precision_recall_fscore_support(labels[split], predicted, labels=["yes"], zero_division=0)
        precision, recall, f1 = (float(figure[0]) for figure in of_yes[:3])
        accuracy, yes = accuracy_score(labels[split], predicted), predicted.count("yes") / len(predicted)
        shares = {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1, "yes": yes}
        expected[split] = {name: 100 * share for name, share in shares.items()}
        figures = scores.details[split]
        assert {name: figures[name] for name in shares} == pytest.approx(expected[split], abs=1e-9)
    means = {column: sum(figures[name] for figures in expected.values()) / 3 for column, name in columns.items()}
    assert scores.headline == pytest.approx(means, abs=1e-9)
    assert scores.missing == len(items) - len(answers)
    assert scores.missing + scores.invalid == list(choices.values()).count("neither")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": 2', r"coco_pope_random\.json: line 2: "),
        ('{"question_id": 2, "image": "x", "text": "t"}', r"random\.json: line 2: 'label' is missing"),
        ('{"question_id": 2, "image": "x", "text": "t", "label": "maybe"}', r"line 2: the label is 'maybe', not 'yes'"),
        (
            '{"question_id": 1, "image": "x", "text": "t", "label": "no"}',
            r"random\.json: question random/1 occurs twice",
        ),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    file = release(tmp_path, dict.fromkeys(PARTS, ["yes"])) / "coco_pope_random.json"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(UserError, match=message):
        POPE.read(tmp_path)


def test_a_missing_split_is_named(tmp_path):
    release(tmp_path, {"random": ["yes"], "popular": ["no"]})
    with pytest.raises(UserError, match=r"coco_pope_adversarial\.json: no such file"):
        POPE.read(tmp_path)

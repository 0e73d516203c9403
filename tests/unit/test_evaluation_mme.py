"""MME: both released forms, accuracy and accuracy+ of every subtask."""

import random
from dataclasses import replace

import pytest

from megatron_ext.errors import UserError
from megatron_ext.evaluation.mme import COGNITION, MME, PARTS, PERCEPTION

SUFFIX = "Please answer yes or no."


def rows(image):
    return [(f"Is {image} this? {SUFFIX}", "Yes"), (f"Is {image} that? {SUFFIX}", "No")]


def flat(folder, subtask, images):
    (folder / subtask).mkdir(parents=True)
    for image in images:
        (folder / subtask / f"{image}.png").touch()
        (folder / subtask / f"{image}.txt").write_text("".join(f"{q}\t{a}\n" for q, a in rows(image)) + "\n")


def nested(folder, subtask, images):
    flat(folder, subtask, images)
    for name, pattern in (("images", "*.png"), ("questions_answers_YN", "*.txt")):
        (folder / subtask / name).mkdir()
        for file in (folder / subtask).glob(pattern):
            file.rename(folder / subtask / name / file.name)


def listed(folder, subtask, images):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{image}.png\t{q}\t{a}\n" for image in images for q, a in rows(image)]
    (folder / f"{subtask}.txt").write_text("".join(lines))
    (folder / subtask / "images").mkdir(parents=True)
    for image in images:
        (folder / subtask / "images" / f"{image}.png").touch()


def test_all_released_forms_hold_the_same_questions(tmp_path):
    read = {}
    for form in (flat, nested, listed):
        form(tmp_path / form.__name__, "color", ["001", "002"])
        read[form] = MME.read(tmp_path / form.__name__)
        assert all(item.image.is_file() and item.image.name == f"{item.id.split('/')[1]}.png" for item in read[form])
    without_image = {form: [replace(item, image=None) for item in items] for form, items in read.items()}
    assert without_image[flat] == without_image[nested] == without_image[listed]
    assert [item.id for item in read[flat]] == ["color/001/1", "color/001/2", "color/002/1", "color/002/2"]
    assert read[flat][1].question == f"Is 001 that? {SUFFIX}", "which ends in the prompt's suffix as released"
    assert read[flat][1].answer == "no"


def test_a_question_without_the_suffix_gets_it(tmp_path):
    (tmp_path / "OCR").mkdir()
    (tmp_path / "OCR" / "1.txt").write_text("Is it?\tYes\r\nIs it not?\tno")
    assert [item.question for item in MME.read(tmp_path)] == [f"Is it?\n{SUFFIX}", f"Is it not?\n{SUFFIX}"]
    assert MME.read(tmp_path)[0].image == tmp_path / "OCR" / "1.jpg", "which need not exist"


def test_the_folders_of_the_archive_are_searched(tmp_path):
    release = tmp_path / "MME_Benchmark_release_version"
    nested(release / "MME_Benchmark", "scene", ["1"])
    flat(release, "OCR", ["2"])
    (release / "OCR" / "._2.txt").write_text("what a system left")
    (release / "eval_tool" / "Your_Results").mkdir(parents=True)
    listed(release / "eval_tool" / "Your_Results", "count", ["3"])
    (release / "OCR.txt").write_text("what is in the folder as well")
    items = MME.read(tmp_path)
    assert [item.id for item in items] == [f"{name}/{n}" for name in ("count/3", "scene/1", "OCR/2") for n in (1, 2)]
    assert {item.id[:3] for item in MME.read(tmp_path, ["OCR"])} == {"OCR"}


def test_known_answers_have_known_scores(tmp_path):
    flat(tmp_path, "color", ["1", "2", "3", "4"])
    listed(tmp_path, "code_reasoning", ["1"])
    answers = {
        **{"color/1/1": "Yes", "color/1/2": "no."},  # both
        **{"color/2/1": "yes", "color/2/2": "Yes, it is"},  # one
        **{"color/3/1": "yes", "color/3/2": "Not sure"},  # one, and an invalid one
        **{"color/4/2": "yes"},  # a missing one, and a wrong one
        **{"code_reasoning/1/1": "yes", "code_reasoning/1/2": "no", "color/5/1": "yes"},
    }
    scores = MME.score(MME.read(tmp_path), answers)
    assert scores.details == {
        "color": {"accuracy": 50.0, "accuracy_plus": 25.0, "score": 75.0, "questions": 8, "images": 4},
        "code_reasoning": {"accuracy": 100.0, "accuracy_plus": 100.0, "score": 200.0, "questions": 2, "images": 1},
    }
    assert scores.headline == {"MME-P": 75.0, "MME-C": 200.0}
    assert (scores.questions, scores.missing, scores.invalid) == (10, 1, 1)
    perception, cognition = scores.notes
    assert "at most 200" in perception and all(name in perception for name in PERCEPTION if name != "color")
    assert "at most 200" in cognition and all(name in cognition for name in COGNITION[:3])


def test_all_right_is_2000_and_800(tmp_path):
    for subtask in PARTS:
        flat(tmp_path, subtask, ["1", "2"])
    items = MME.read(tmp_path)
    scores = MME.score(items, {item.id: item.answer for item in items})
    assert scores.headline == {"MME-P": 2000.0, "MME-C": 800.0}
    assert not scores.notes


def test_random_answers_score_as_a_few_lines_count_them(tmp_path):
    rng = random.Random(3)
    for subtask in PARTS:
        flat(tmp_path, subtask, map(str, range(rng.randint(3, 9))))
    items = MME.read(tmp_path)
    answers = {item.id: rng.choice(["Yes", "no", "No.", "yes!", "maybe"]) for item in items if rng.random() < 0.9}
    totals = {PERCEPTION: 0.0, COGNITION: 0.0}
    for subtasks in totals:
        for subtask in subtasks:
            marks = []
            for image in {item.id.split("/")[1] for item in items if item.groups == (subtask,)}:
                first, second = (answers.get(f"{subtask}/{image}/{n}", "").lower().strip(".!") for n in (1, 2))
                marks.append((first == "yes") + (second == "no"))
            totals[subtasks] += 100 * (sum(marks) / 2 + marks.count(2)) / len(marks)
    scores = MME.score(items, answers)
    assert scores.headline == pytest.approx({"MME-P": totals[PERCEPTION], "MME-C": totals[COGNITION]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Is it?\tYes\n", r"OCR/1\.txt: has 1 questions; MME asks two"),
        ("Is it?\tYes\nIs it? No\n", r"OCR/1\.txt: line 2: does not have MME.s 2 columns"),
        ("Is it?\tYes\nIs it?\tperhaps\n", r"OCR/1\.txt: line 2: the answer is 'perhaps', not 'yes' or 'no'"),
    ],
)
def test_a_malformed_file_is_named_with_the_line(tmp_path, content, message):
    (tmp_path / "OCR").mkdir()
    (tmp_path / "OCR" / "1.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        MME.read(tmp_path)


def test_a_malformed_list_is_named_with_the_image(tmp_path):
    (tmp_path / "count.txt").write_text("1.jpg\tIs it?\tYes\n2.jpg\tIs it?\tYes\n2.jpg\tIs it?\tNo\n")
    with pytest.raises(UserError, match=r"count\.txt: image 1\.jpg: has 1 questions"):
        MME.read(tmp_path)


def test_a_folder_without_a_subtask_and_a_wrong_subtask_are_refused(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: holds no questions"):
        MME.read(tmp_path)
    with pytest.raises(UserError, match="mme has no part 'colour'; it has existence, count"):
        MME.read(tmp_path, ["colour"])

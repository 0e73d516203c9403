"""Which tokens show an object, and which objects a question names: on scenes whose answers are known by hand."""

import numpy as np
import pytest

from megatron_ext.analysis.scene_objects import DocumentObjects, asked, shown, write
from megatron_ext.analysis.token_sets import ObjectTokens
from megatron_ext.data.batch import Batch
from megatron_ext.picture_world.world import RADIUS, Background, Scene, SceneObject
from megatron_ext.token_classes import Modality


def item(color: str, shape: str, size: str, row: int, column: int) -> SceneObject:
    """An object in the middle of its cell."""
    return SceneObject(shape, color, size, row, column, (column + 0.5) / 3, (row + 0.5) / 3, RADIUS[size], 0.0)


OBJECTS = (
    item("red", "circle", "large", 0, 2),
    item("blue", "circle", "small", 1, 1),
    item("red", "cross", "small", 2, 0),
)
SCENE = Scene(1, "validation", 0, Background("gray", "plain", 0, 0.0), OBJECTS)


def tokens_of(number: int, grid: int) -> set[tuple[int, int]]:
    return {divmod(token, grid) for token, bits in enumerate(shown(SCENE, (grid, grid)).tolist()) if bits >> number & 1}


def test_an_object_is_shown_by_the_tokens_of_its_cell():
    assert tokens_of(0, 9) == {(row, column) for row in (0, 1, 2) for column in (6, 7, 8)}
    assert tokens_of(1, 9) == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}
    assert tokens_of(0, 6) == {(0, 4), (0, 5), (1, 4), (1, 5)}
    assert [tokens_of(number, 3) for number in range(3)] == [{(0, 2)}, {(1, 1)}, {(2, 0)}]
    # 0.092 around the center of 15 x 15 tokens reaches the second token beside it, but not diagonally.
    assert tokens_of(1, 15) == {(7 + y, 7 + x) for y in range(-1, 2) for x in range(-1, 2)}


@pytest.mark.parametrize(
    "question, numbers",
    [
        ("What color is the cross?", {2}),
        ("What shape is the blue object?", {1}),
        ("Where is the red circle?", {0}),
        ("How many circles are there?", {0, 1}),
        ("How many objects are there?", set()),
        ("Are there more red objects than crosses?", {0, 2}),
        ("Is the red cross left of the blue object?\nAnswer the question using a single word or phrase.", {1, 2}),
        ("Is there a green circle?", set()),
        ("Is there a circle that is not red?", {0, 1}),
        ("What color is the background?", set()),
        ("Which object is there?\nA. a red circle\nB. a green star", set()),
    ],
)
def test_a_question_names_objects_by_color_shape_or_both(question, numbers):
    assert asked(SCENE, question) == sum(1 << number for number in numbers)


@pytest.mark.parametrize("ends_user_turns", [True, False], ids=["chat template", "plain"])
def test_a_turn_is_about_its_own_question_up_to_the_end_of_its_answer(ends_user_turns):
    """E ends answers and, in ChatML, the user's turns, which are not learnt; I is an image token, A learnt."""
    text = "BIIIIqEaAEqEaAEa" if ends_user_turns else "BIIIIqqaAEqqaAEa"
    own = np.arange(len(text)) < len(text)
    learnt = [number for number, letter in enumerate(text[1:]) if letter == "A" or text[number] == "A"]
    zeros = np.zeros((1, len(text)), dtype=np.int64)
    batch = Batch(
        tokens=np.array([[9 if letter == "E" else 1 for letter in text]]),
        labels=zeros,
        loss_mask=np.isin(np.arange(len(text)), learnt)[None].astype(np.float32),
        positions=np.arange(len(text))[None],
        modality=np.array([[Modality.IMAGE if letter == "I" else Modality.TEXT for letter in text]]),
        task=zeros,
        document=zeros,
    )
    objects = ObjectTokens(zeros.copy(), zeros.copy())
    write(objects, batch, 0, own, DocumentObjects(np.array([1, 2, 2, 0]), (1, 2)), answer_end=9)
    assert objects.about[0].tolist() == [1] * 10 + [2] * 5 + [0]
    assert objects.shows[0].tolist() == [0, 1, 2, 2, 0] + [0] * 11

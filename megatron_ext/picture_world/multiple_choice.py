"""Questions with four choices about a scene, of SEED-Bench's kinds; exactly one choice is true."""

import random
from collections.abc import Callable, Sequence

from megatron_ext.picture_world.captions import article, pair_name
from megatron_ext.picture_world.questions import Question, ask
from megatron_ext.picture_world.splits import HELD_OUT
from megatron_ext.picture_world.world import Scene

CHOICES = 4
Draft = tuple[str, str, Sequence[str]] | None
"""Question, correct choice, and candidates for wrong ones; None if the scene allows no question."""


def choose(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of one of :data:`KINDS` with four choices in random order; None if the scene allows none."""
    draft = KINDS[kind](scene, rng)
    if not draft:
        return None
    text, answer, wrong = draft
    choices = [answer, *rng.sample(list(wrong), CHOICES - 1)]
    rng.shuffle(choices)
    return Question(kind, text, answer, tuple(choices))


def absent_like(scene: Scene, pair: tuple[str, str]) -> list[tuple[str, str]]:
    """(shape, color) pairs that are not in the scene, held out if and only if ``pair`` is. Held-out pairs are frequent
    in test pictures, so naming one must not reveal that it is there."""
    present = {(o.shape, o.color) for o in scene.objects}
    return [
        (s, c)
        for s in scene.world.shapes
        for c in scene.world.colors
        if (s, c) not in present and ((s, c) in HELD_OUT) == (pair in HELD_OUT)
    ]


def _identity(scene: Scene, rng: random.Random) -> Draft:
    item = rng.choice(scene.objects)
    absent = absent_like(scene, (item.shape, item.color))
    if len(absent) < CHOICES - 1:
        return None
    return "Which object is there?", article(pair_name(item)), [article(f"{c} {s}") for s, c in absent]


def _open_question(*kinds: str) -> Callable[[Scene, random.Random], Draft]:
    """An open question of one of these kinds, with its other answers as wrong choices."""

    def make(scene: Scene, rng: random.Random) -> Draft:
        question = ask(scene, rng.choice(kinds), rng)
        return question and (question.text, question.answer, [c for c in question.choices if c != question.answer])

    return make


def _reasoning(scene: Scene, rng: random.Random) -> Draft:
    """What there is most of; wrong choices are from the picture where possible."""
    question = ask(scene, "most", rng)
    if not question:
        return None
    values = {value for o in scene.objects for value in (o.color, o.shape)} - {question.answer}
    present = [choice for choice in question.choices if choice in values][: CHOICES - 1]
    absent = [choice for choice in question.choices if choice not in values | {question.answer}]
    return question.text, question.answer, present + rng.sample(absent, CHOICES - 1 - len(present))


KINDS: dict[str, Callable[[Scene, random.Random], Draft]] = {
    "Scene Understanding": _open_question("background"),
    "Instance Identity": _identity,
    "Instance Attributes": _open_question("color", "shape"),
    "Instance Location": _open_question("place"),
    "Instances Counting": _open_question("counting"),
    "Spatial Relation": _open_question("direction"),
    "Visual Reasoning": _reasoning,
}

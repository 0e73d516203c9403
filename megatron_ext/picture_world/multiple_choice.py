"""Questions with four choices about a scene, of the kinds that SEED-Bench has; exactly one choice is true."""

import random
from collections.abc import Callable, Sequence

from megatron_ext.picture_world.captions import article, pair_name
from megatron_ext.picture_world.questions import Question, ask
from megatron_ext.picture_world.world import HELD_OUT, Scene

CHOICES = 4
Chosen = tuple[str, str, Sequence[str]] | None
"""Question, right choice, and wrong ones to draw from."""


def choose(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of one of :data:`KINDS` with four choices in random order; None where the scene allows none."""
    chosen = KINDS[kind](scene, rng)
    if not chosen:
        return None
    text, answer, wrong = chosen
    choices = [answer, *rng.sample(list(wrong), CHOICES - 1)]
    rng.shuffle(choices)
    return Question(kind, text, answer, tuple(choices))


def absent_like(scene: Scene, pair: tuple[str, str]) -> list[tuple[str, str]]:
    """(shape, color) pairs that are not in the scene, held out if ``pair`` is and not if it is not: in test pictures
    held-out pairs are frequent, so that to hear one must not mean that it is there."""
    there = {(o.shape, o.color) for o in scene.objects}
    return [
        (s, c)
        for s in scene.world.shapes
        for c in scene.world.colors
        if (s, c) not in there and ((s, c) in HELD_OUT) == (pair in HELD_OUT)
    ]


def _identity(scene: Scene, rng: random.Random) -> Chosen:
    item = rng.choice(scene.objects)
    absent = absent_like(scene, (item.shape, item.color))
    if len(absent) < CHOICES - 1:
        return None
    return "Which object is there?", article(pair_name(item)), [article(f"{c} {s}") for s, c in absent]


def _asked(*kinds: str) -> Callable[[Scene, random.Random], Chosen]:
    """A kind of open question, with its other answers as wrong choices."""

    def make(scene: Scene, rng: random.Random) -> Chosen:
        question = ask(scene, rng.choice(kinds), rng)
        return question and (question.text, question.answer, [c for c in question.choices if c != question.answer])

    return make


def _reasoning(scene: Scene, rng: random.Random) -> Chosen:
    """What there is most of; wrong choices are in the picture as far as there are such."""
    question = ask(scene, "most", rng)
    if not question:
        return None
    said = {value for o in scene.objects for value in (o.color, o.shape)} - {question.answer}
    present = [choice for choice in question.choices if choice in said][: CHOICES - 1]
    absent = [choice for choice in question.choices if choice not in said | {question.answer}]
    return question.text, question.answer, present + rng.sample(absent, CHOICES - 1 - len(present))


KINDS: dict[str, Callable[[Scene, random.Random], Chosen]] = {
    "Scene Understanding": _asked("background"),
    "Instance Identity": _identity,
    "Instance Attributes": _asked("color", "shape"),
    "Instance Location": _asked("place"),
    "Instances Counting": _asked("counting"),
    "Spatial Relation": _asked("direction"),
    "Visual Reasoning": _reasoning,
}

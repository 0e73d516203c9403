"""Questions that can only be answered by looking at the scene. Where possible the answer is selected first, so that
answers are balanced."""

import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from megatron_ext.picture_world.attributes import PLACES
from megatron_ext.picture_world.captions import (
    NUMBERS,
    article,
    exactly,
    number_of_groups,
    pair_name,
    plural,
    relation_words,
    unique_objects,
)
from megatron_ext.picture_world.world import Scene, SceneObject

YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Question:
    """A question with its answer and all possible answers (empty: too many to list)."""

    kind: str
    text: str
    answer: str
    choices: tuple[str, ...]


def questions(scene: Scene, count: int, only: Collection[str] = ()) -> list[Question]:
    """``count`` questions (fewer if the scene allows no more), with kinds in the proportions of :data:`SHARES`.

    Questions of :data:`DESCRIPTIVE` kinds come last, because their answers give away those of other questions.

    Args:
        only: kinds of questions; empty: all.
    """
    rng = scene.random("questions")
    shares = {kind: max(1, SHARES[kind]) for kind in SHARES if kind in only} or SHARES
    kinds = [kind for kind, share in shares.items() for _ in range(share)]
    rng.shuffle(kinds)
    selected: list[Question] = []
    for _ in range(4):
        for kind in kinds:
            if (
                len(selected) < count
                and (question := ask(scene, kind, rng))
                and question.text not in {q.text for q in selected}
            ):
                selected.append(question)
    return sorted(selected, key=lambda question: question.kind in DESCRIPTIVE)


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of one kind; None if the scene allows none."""
    draft = KINDS[kind](scene, rng)
    return Question(kind, *draft) if draft else None


Draft = tuple[str, str, tuple[str, ...]] | None
"""Text, answer and possible answers; None if the scene allows no question."""


def _presence(scene: Scene, rng: random.Random) -> Draft:
    """Whether there is a shape, or an object of a color: one attribute, so it is learnt before :func:`_existence`."""
    answer = rng.choice(YES_NO)
    attribute, values = rng.choice([("color", scene.world.colors), ("shape", scene.world.shapes)])
    present = {getattr(o, attribute) for o in scene.objects}
    candidates = [value for value in values if (value in present) == (answer == "yes")]
    if not candidates:
        return None
    value = rng.choice(candidates)
    return (f"Is there {article(value if attribute == 'shape' else f'{value} object')}?", answer, YES_NO)


def _existence(scene: Scene, rng: random.Random) -> Draft:
    answer = rng.choice(YES_NO)
    pair = _present(scene, rng) if answer == "yes" else _absent(scene, rng)
    return (f"Is there {_name(pair)}?", answer, YES_NO)


def _counting(scene: Scene, rng: random.Random) -> Draft:
    """The number of objects of a color, of a shape, or of all; selected among the numbers that occur in the scene."""
    counts: dict[int, list[str]] = {}
    by_color, by_shape = (Counter(getattr(o, a) for o in scene.objects) for a in ("color", "shape"))
    for color in scene.world.colors:
        counts.setdefault(by_color[color], []).append(f"{color} objects")
    for shape in scene.world.shapes:
        counts.setdefault(by_shape[shape], []).append(plural(shape, 2))
    counts.setdefault(len(scene.objects), []).append("objects")
    number = rng.choice(sorted(counts))
    return (f"How many {rng.choice(counts[number])} are there?", _number(number), tuple(map(_number, range(7))))


def _color(scene: Scene, rng: random.Random) -> Draft:
    item = _single(scene, rng, lambda o: o.shape)
    return item and (f"What color is the {item.shape}?", item.color, scene.world.colors)


def _shape(scene: Scene, rng: random.Random) -> Draft:
    item = _single(scene, rng, lambda o: o.color)
    return item and (f"What shape is the {item.color} object?", item.shape, scene.world.shapes)


def _place(scene: Scene, rng: random.Random) -> Draft:
    items = unique_objects(scene)
    if not items:
        return None
    item = rng.choice(items)
    places = tuple(place for row in PLACES for place in row)
    return (f"Where is the {_unique_name(scene, item, rng)}?", item.place, places)


def _background(scene: Scene, rng: random.Random) -> Draft:
    return ("What color is the background?", scene.background.color, scene.world.background_colors)


def _layout(scene: Scene, rng: random.Random) -> Draft:
    """All objects in reading order; every word of the answer depends on the picture."""
    items = sorted(scene.objects, key=lambda o: (o.row, o.column))
    return ("What is where?", ", ".join(f"{o.place}: {pair_name(o)}" for o in items), ())


def _comparison(scene: Scene, rng: random.Random) -> Draft:
    """Numbers of two colors or shapes, or sizes of two objects; their order decides the answer."""
    answer = rng.choice(YES_NO)
    pairs = [(a, b) for a in unique_objects(scene) for b in unique_objects(scene) if a.size > b.size]  # small > large
    if pairs and rng.random() < 0.5:
        small, large = rng.choice(pairs)
        first, second = (large, small) if answer == "yes" else (small, large)
        names = [_unique_name(scene, item, rng) for item in (first, second)]
        return (f"Is the {names[0]} larger than the {names[1]}?", answer, YES_NO)
    attribute, form = rng.choice([("color", "{} objects"), ("shape", "{}")])
    counts = Counter(getattr(o, attribute) for o in scene.objects)
    unequal = [(a, b) for a in sorted(counts) for b in sorted(counts) if counts[a] > counts[b]]
    if not unequal:
        return None
    more, less = rng.choice(unequal)
    first, second = (more, less) if answer == "yes" else (less, more)
    named = [form.format(x) if attribute == "color" else plural(x, 2) for x in (first, second)]
    return (f"Are there more {named[0]} than {named[1]}?", answer, YES_NO)


def _relation(scene: Scene, rng: random.Random) -> Draft:
    if not (pair := _unique_pair(scene, rng)):
        return None
    a, b = pair
    word, inverse = rng.choice(relation_words(a, b))
    answer = rng.choice(YES_NO)
    names = [_unique_name(scene, item, rng) for item in (a, b)]
    return (f"Is the {names[0]} {word if answer == 'yes' else inverse} the {names[1]}?", answer, YES_NO)


def _side(scene: Scene, rng: random.Random) -> Draft:
    """A relation that only uses the words "left of" and "above". If the inverse words were equally frequent, neither
    word nor place alone would carry information about the answer, and a small model would get no signal to start from.
    """
    if not (pair := _unique_pair(scene, rng)):
        return None
    a, b = pair
    word, inverse = rng.choice(relation_words(a, b))
    true = word in ("left of", "above")
    names = [_unique_name(scene, item, rng) for item in (a, b)]
    return (f"Is the {names[0]} {word if true else inverse} the {names[1]}?", "yes" if true else "no", YES_NO)


def _direction(scene: Scene, rng: random.Random) -> Draft:
    """The complete direction: two words for objects that share neither row nor column."""
    if not (pair := _unique_pair(scene, rng)):
        return None
    a, b = pair
    words = [word for word, _ in relation_words(a, b)]
    straight = [[word] for word in ("left of", "right of", "above", "below")]
    diagonal = [[x, y] for x in ("left of", "right of") for y in ("above", "below")]
    answer, *choices = (
        " and ".join(f"{word} it" for word in direction)
        for direction in (words, *(straight if len(words) == 1 else diagonal))
    )
    names = [_unique_name(scene, item, rng) for item in (a, b)]
    return (f"Where is the {names[0]}, as seen from the {names[1]}?", answer, tuple(choices))


def _around(scene: Scene, rng: random.Random) -> Draft:
    """Directions to all other uniquely named objects; each is a comparison of two places."""
    items = sorted(unique_objects(scene), key=lambda o: (o.row, o.column))
    if len(items) < 2:
        return None
    center = rng.choice(items)
    directions = [
        f"the {pair_name(o)} " + " and ".join(f"{word} it" for word, _ in relation_words(o, center))
        for o in items
        if o is not center
    ]
    return (f"Where is what, as seen from the {_unique_name(scene, center, rng)}?", ", ".join(directions), ())


def _most(scene: Scene, rng: random.Random) -> Draft:
    attribute, values = rng.choice([("color", scene.world.colors), ("shape", scene.world.shapes)])
    ranks = Counter(getattr(o, attribute) for o in scene.objects).most_common()
    if len(ranks) < 2 or ranks[0][1] == ranks[1][1]:
        return None
    return (f"Which {attribute} is there most of?", ranks[0][0], values)


def _logic(scene: Scene, rng: random.Random) -> Draft:
    answer = rng.choice(YES_NO)
    form = rng.choice(["and", "or", "not"])
    if form == "not":
        return _other_color(scene, rng, answer)
    # The truth of both parts is random, so that neither part gives the answer away more than necessary.
    truth = {("and", "yes"): [True, True], ("or", "no"): [False, False]}.get((form, answer), [True, False])
    rng.shuffle(truth)
    parts = [_present(scene, rng) if true else _absent(scene, rng) for true in truth]
    if parts[0] == parts[1]:
        return None
    return (f"Is there {_name(parts[0])} {form} {_name(parts[1])}?", answer, YES_NO)


def _statement(scene: Scene, rng: random.Random) -> Draft:
    """A yes-or-no question about an exact number, or the color of a shape."""
    answer = rng.choice(YES_NO)
    if rng.random() < 0.5:
        item = _single(scene, rng, lambda o: o.shape)
        if not item:
            return None
        others = [c for c in scene.world.colors if c != item.color and scene.speakable(item.shape, c)]
        return (f"Is the {item.shape} {item.color if answer == 'yes' else rng.choice(others)}?", answer, YES_NO)
    groups = number_of_groups(scene)
    # Neighboring numbers, either of which may be the correct one.
    pairs = [(right, wrong) for n in (1, 2, 3) for right, wrong in ((n, n + 1), (n + 1, n)) if right in groups]
    if not pairs:
        return None
    right, wrong = rng.choice(pairs)
    return (exactly(right if answer == "yes" else wrong, rng.choice(groups[right])), answer, YES_NO)


def _other_color(scene: Scene, rng: random.Random, answer: str) -> Draft:
    """Is there a circle that is not red? (No if all circles are red.)"""
    colors = {shape: {o.color for o in scene.objects if o.shape == shape} for shape in {o.shape for o in scene.objects}}
    if answer == "yes":
        candidates = [(s, c) for s in sorted(colors) for c in sorted(colors[s]) if len(colors[s]) > 1]
        candidates = candidates or [(s, c) for s in sorted(colors) for c in scene.world.colors if c not in colors[s]]
    else:
        candidates = [(s, c) for s in sorted(colors) for c in colors[s] if len(colors[s]) == 1]
    candidates = [(s, c) for s, c in candidates if scene.speakable(s, c)]
    if not candidates:
        return None
    shape, color = rng.choice(candidates)
    return (f"Is there a {shape} that is not {color}?", answer, YES_NO)


KINDS: dict[str, Callable[[Scene, random.Random], Draft]] = {
    "presence": _presence,
    "existence": _existence,
    "counting": _counting,
    "color": _color,
    "shape": _shape,
    "place": _place,
    "comparison": _comparison,
    "relation": _relation,
    "side": _side,
    "direction": _direction,
    "around": _around,
    "logic": _logic,
    "statement": _statement,
    "background": _background,
    "layout": _layout,
    "most": _most,
}

SHARES = {
    "presence": 1,
    "existence": 2,
    "counting": 2,
    "color": 1,
    "shape": 1,
    "place": 2,
    "comparison": 2,
    "relation": 3,
    "side": 0,
    "direction": 2,
    "around": 2,
    "logic": 2,
    "statement": 3,
    "background": 1,
    "layout": 2,
    "most": 1,
}
"""Relative frequency of each kind in training; kinds that take longer to learn are more frequent. 0: only if the kind
is requested by name."""

DESCRIPTIVE = ("layout", "around")
"""Kinds whose answers give the places of many objects."""


def _number(count: int) -> str:
    return "zero" if count == 0 else NUMBERS[count]


def _name(pair: tuple[str, str]) -> str:
    return article(f"{pair[1]} {pair[0]}")


def _unique_name(scene: Scene, item: SceneObject, rng: random.Random) -> str:
    """A name that identifies one of :func:`unique_objects`: color and shape, or one of them if that is enough, because
    models learn to look for a single attribute sooner."""
    names = [pair_name(item)]
    if sum(o.shape == item.shape for o in scene.objects) == 1:
        names.append(item.shape)
    if sum(o.color == item.color for o in scene.objects) == 1:
        names.append(f"{item.color} object")
    return rng.choice(names)


def _unique_pair(scene: Scene, rng: random.Random) -> tuple[SceneObject, SceneObject] | None:
    """Two different objects of :func:`unique_objects` in random order."""
    items = unique_objects(scene)
    return tuple(rng.sample(items, 2)) if len(items) > 1 else None


def _present(scene: Scene, rng: random.Random) -> tuple[str, str]:
    item = rng.choice(scene.objects)
    return item.shape, item.color


def _absent(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A (shape, color) that no object has. Half the time it is a near miss: both are in the picture, on different
    objects, or if there is no such pair, one of them is."""
    present = {(o.shape, o.color) for o in scene.objects}
    shapes, colors = {s for s, _ in present}, {c for _, c in present}
    pairs = [(s, c) for s in scene.world.shapes for c in scene.world.colors]
    anywhere = [pair for pair in pairs if pair not in present and scene.speakable(*pair)]
    near = [(s, c) for s, c in anywhere if s in shapes and c in colors]
    near = near or [(s, c) for s, c in anywhere if s in shapes or c in colors]
    if scene.split == "test":
        # Held-out pairs are frequent in test pictures, so naming one must not imply yes.
        anywhere = sorted(set(scene.world.held_out) - present) or anywhere
    return rng.choice(near if near and rng.random() < 0.5 else anywhere)


def _single(scene: Scene, rng: random.Random, by: Callable[[SceneObject], str]) -> SceneObject | None:
    """A random object that is the only one with its value of an attribute."""
    counts = Counter(by(o) for o in scene.objects)
    items = [o for o in scene.objects if counts[by(o)] == 1]
    return rng.choice(items) if items else None

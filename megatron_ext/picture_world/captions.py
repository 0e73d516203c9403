"""Captions and short reasoning texts about scenes. Every statement is true of its scene."""

import random
from collections import Counter

from megatron_ext.picture_world.world import Scene, SceneObject

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def caption(scene: Scene) -> str:
    """A caption that names every object by number, color and shape, often with sizes, places, relations, background."""
    rng = scene.random("caption")
    sentences = [_census(rng, scene)]
    extras = [_sizes(rng, scene), _relation(rng, scene), _background(rng, scene)]
    rng.shuffle(extras)
    sentences += [sentence for sentence in extras[: rng.randint(0, 2)] if sentence]
    return " ".join(sentences)


def text(scene: Scene) -> str:
    """A plain text that reasons about a scene without a picture: counts and their sum, relations and inverses."""
    rng = scene.random("text")
    sentences = []
    groups = _groups(scene)
    if len(groups) > 1:
        (first, count), (second, other) = rng.sample(groups, 2)
        total = NUMBERS[count + other]
        sentences.append(
            f"There {_be(count)} {NUMBERS[count]} {plural(first, count)} and {NUMBERS[other]} {plural(second, other)}, "
            f"so together they are {total}."
        )
        if count != other:
            more, less = (first, second) if count > other else (second, first)
            sentences.append(f"There are more {plural(more, 2)} than {plural(less, 2)}.")
    else:
        ((name, count),) = groups
        everything = f"All {NUMBERS[count]} objects are {plural(name, 2)}."
        sentences.append(everything if count > 1 else f"The only object is {article(name)}.")
    for a, b in _distinct_pairs(rng, scene)[:2]:
        words = relation_words(a, b)
        if words:
            word, inverse = rng.choice(words)
            name, other_name = pair_name(a), pair_name(b)
            sentences.append(f"The {name} is {word} the {other_name}, so the {other_name} is {inverse} the {name}.")
    rng.shuffle(sentences)
    return " ".join(sentences)


def pair_name(item: SceneObject) -> str:
    """``red circle``."""
    return f"{item.color} {item.shape}"


def article(name: str) -> str:
    """``a red circle``, ``an orange circle``."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str, count: int) -> str:
    """``red circles``, ``red crosses``; the singular for one."""
    if count == 1:
        return name
    return name + ("es" if name.endswith("s") else "s")


def relation_words(a: SceneObject, b: SceneObject) -> list[tuple[str, str]]:
    """The relations of ``a`` to ``b``, each with its inverse; by cell, so that they are clearly visible."""
    words = []
    if a.column != b.column:
        words.append(("left of", "right of") if a.column < b.column else ("right of", "left of"))
    if a.row != b.row:
        words.append(("above", "below") if a.row < b.row else ("below", "above"))
    return words


def unique_objects(scene: Scene) -> list[SceneObject]:
    """Objects that no other object equals in color and shape."""
    counts = Counter(pair_name(item) for item in scene.objects)
    return [item for item in scene.objects if counts[pair_name(item)] == 1]


def number_of_groups(scene: Scene) -> dict[int, list[str]]:
    """Number -> the groups of this size (objects of a color, of a shape, or all), named in the singular."""
    colors, shapes = (Counter(getattr(o, a) for o in scene.objects) for a in ("color", "shape"))
    named = [(f"{c} object", n) for c, n in sorted(colors.items())] + sorted(shapes.items())
    groups: dict[int, list[str]] = {}
    for name, number in [*named, ("object", len(scene.objects))]:
        groups.setdefault(number, []).append(name)
    return groups


def exactly(number: int, name: str) -> str:
    """``Is there exactly one circle?``"""
    return f"{'Is' if number == 1 else 'Are'} there exactly {NUMBERS[number]} {plural(name, number)}?"


def _groups(scene: Scene) -> list[tuple[str, int]]:
    return sorted(Counter(pair_name(item) for item in scene.objects).items())


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _census(rng: random.Random, scene: Scene) -> str:
    """One sentence that names every object."""
    groups = _groups(scene)
    rng.shuffle(groups)
    parts = [article(name) if count == 1 else f"{NUMBERS[count]} {plural(name, count)}" for name, count in groups]
    places = {pair_name(item): item.place for item in unique_objects(scene)}
    if rng.random() < 0.6:
        parts = [f"{part} at the {places[name]}" if name in places else part for part, (name, _) in zip(parts, groups)]
    listed = _listed(parts)
    first_is_one = groups[0][1] == 1
    total = len(scene.objects)
    return rng.choice(
        [
            f"There {'is' if first_is_one else 'are'} {listed}.",
            f"A picture of {listed}.",
            f"{listed[0].upper()}{listed[1:]}.",
            f"This picture shows {listed}.",
            f"{NUMBERS[total].capitalize()} object{'s' * (total > 1)}: {listed}.",
        ]
    )


def _sizes(rng: random.Random, scene: Scene) -> str | None:
    if len(scene.world.sizes) == 1:
        return None
    sizes = {item.size for item in scene.objects}
    if len(sizes) == 1 and len(scene.objects) > 1:
        return f"All objects are {sizes.pop()}."
    candidates = unique_objects(scene)
    if not candidates:
        return None
    item = rng.choice(candidates)
    return f"The {pair_name(item)} is {item.size}."


def _relation(rng: random.Random, scene: Scene) -> str | None:
    for a, b in _distinct_pairs(rng, scene):
        if words := relation_words(a, b):
            return f"The {pair_name(a)} is {rng.choice(words)[0]} the {pair_name(b)}."
    return None


def _background(rng: random.Random, scene: Scene) -> str:
    background = scene.background
    return rng.choice(
        [f"The background is {background.pattern} {background.color}.", f"The background is {background.color}."]
    )


def _distinct_pairs(rng: random.Random, scene: Scene) -> list[tuple[SceneObject, SceneObject]]:
    items = unique_objects(scene)
    pairs = [(a, b) for a in items for b in items if a is not b]
    rng.shuffle(pairs)
    return pairs

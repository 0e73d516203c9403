"""Checking pictures against captions: which facts of a caption agree with what :mod:`.detection` finds in the picture.

As in GenEval, the looks of a picture do not matter, only whether it shows the objects, colors, numbers and places of
its caption.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ext.picture_world.captions import NUMBERS, article, plural
from megatron_ext.picture_world.detected import DetectedObject, DetectedScene
from megatron_ext.picture_world.detection import detect
from megatron_ext.picture_world.facts import CaptionFacts, Pair, read_caption

KINDS = ("object", "color", "count", "place", "size", "relation", "background")


@dataclass(frozen=True)
class CheckedFact:
    """One fact of a caption: its kind of :data:`KINDS`, in words (``red circle at the top left``), and whether the
    picture shows it."""

    kind: str
    words: str
    right: bool


@dataclass(frozen=True)
class Verdict:
    """How a picture compares with its caption.

    Attributes:
        checked: the caption's facts, in the order of :data:`KINDS`.
        extra: detected objects that the caption does not name, and what is no object at all.
    """

    checked: tuple[CheckedFact, ...]
    extra: int

    @property
    def facts(self) -> dict[str, tuple[int, int]]:
        """(correct facts, facts) by kind of :data:`KINDS`."""
        counts = dict.fromkeys(KINDS, (0, 0))
        for fact in self.checked:
            right, total = counts[fact.kind]
            counts[fact.kind] = (right + fact.right, total + 1)
        return counts

    @property
    def all_right(self) -> bool:
        """Whether every fact is correct and there is no extra object."""
        return self.extra == 0 and all(fact.right for fact in self.checked)


def check(picture, caption: str) -> Verdict:
    """Check a picture, in any form that :func:`~.detection.detect` accepts, against a caption of the picture world.

    Raises:
        UserError: the text is not a caption of the picture world.
    """
    return compare(detect(picture), read_caption(caption))


def compare(seen: DetectedScene, facts: CaptionFacts) -> Verdict:
    """Compare detected objects with the facts of a caption. The facts by kind, and when they are correct:

    * object: one object of the caption; an object of its shape, of any color, is detected (each counts once);
    * color: one object of the caption; one of its shape *and* color is detected;
    * count: one number ("two red circles"); exactly as many are detected;
    * place, size: every detected object of this color and shape has the place or size, and there is one;
    * relation: the two objects have this relation, by their cells;
    * background: its color.
    """
    pairs = Counter((o.color, o.shape) for o in seen.objects)
    caption_pairs, caption_shapes = Counter(facts.counts), Counter()
    for (_, shape), count in facts.counts.items():
        caption_shapes[shape] += count
    shapes = Counter(o.shape for o in seen.objects)
    checked = [
        *_each("object", caption_shapes, shapes, str),
        *_each("color", caption_pairs, pairs, _name),
    ]
    for pair, count in facts.counts.items():
        checked.append(CheckedFact("count", f"{NUMBERS[count]} {plural(_name(pair), count)}", pairs[pair] == count))
    for pair, place in facts.places:
        checked.append(CheckedFact("place", f"{_name(pair)} at the {place}", _all(seen, pair, "place", place)))
    for pair, size in facts.sizes:
        words = f"{size} {_name(pair)}" if pair else f"only {size} objects"
        checked.append(CheckedFact("size", words, _all(seen, pair, "size", size)))
    for pair, word, other in facts.relations:
        words = f"{_name(pair)} {word} {_name(other)}"
        checked.append(CheckedFact("relation", words, _related(seen, pair, word, other)))
    if facts.background:
        checked.append(CheckedFact("background", f"{facts.background} background", seen.background == facts.background))
    return Verdict(tuple(checked), (pairs - caption_pairs).total() + seen.unknown)


def summary(verdicts: Iterable[Verdict]) -> dict:
    """Summarise the verdicts of many pictures.

    Returns:
        ``pictures``; ``all_right``, the share of pictures that fully agree with their captions; ``extra_objects`` per
        picture; and for every kind the share of correct facts (None without facts) and the number of facts.
    """
    verdicts = list(verdicts)
    kinds = {}
    for kind in KINDS:
        right, total = (sum(v.facts[kind][i] for v in verdicts) for i in (0, 1))
        kinds[kind] = {"right": right / total if total else None, "facts": total}
    pictures = len(verdicts)
    return {
        "pictures": pictures,
        "all_right": sum(v.all_right for v in verdicts) / pictures if pictures else None,
        "extra_objects": sum(v.extra for v in verdicts) / pictures if pictures else None,
        **kinds,
    }


def _name(pair: Pair) -> str:
    return " ".join(pair)


def _each(kind: str, stated: Counter, detected: Counter, name: Callable[[Any], str]) -> Iterator[CheckedFact]:
    """A fact for each object of the caption: as many are correct as are detected."""
    for thing, count in stated.items():
        for number in range(count):
            words = f"another {name(thing)}" if number else article(name(thing))
            yield CheckedFact(kind, words, number < detected[thing])


def _matching(seen: DetectedScene, pair: Pair | None) -> list[DetectedObject]:
    return [o for o in seen.objects if pair is None or (o.color, o.shape) == pair]


def _all(seen: DetectedScene, pair: Pair | None, attribute: str, value: str) -> bool:
    items = _matching(seen, pair)
    return bool(items) and all(getattr(o, attribute) == value for o in items)


def _related(seen: DetectedScene, pair: Pair, word: str, other: Pair) -> bool:
    return any(_lies(a, word, b) for a in _matching(seen, pair) for b in _matching(seen, other))


def _lies(a: DetectedObject, word: str, b: DetectedObject) -> bool:
    match word:
        case "left of":
            return a.column < b.column
        case "right of":
            return a.column > b.column
        case "above":
            return a.row < b.row
        case "below":
            return a.row > b.row
    raise ValueError(word)

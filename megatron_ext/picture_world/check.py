"""Pictures against captions, by what :mod:`.detection` sees in them: which of a caption's facts are true of the
picture.

The idea is GenEval's: not how a picture looks, but whether the objects, colors, numbers and places that were asked for
are there.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_ext.picture_world.detection import DetectedObject, DetectedScene, detect
from megatron_ext.picture_world.facts import CaptionFacts, Pair, read_caption

KINDS = ("object", "color", "count", "place", "size", "relation", "background")


@dataclass(frozen=True)
class Verdict:
    """How a picture compares with its caption.

    Attributes:
        facts: kind -> (facts that are right, facts said), of :data:`KINDS`.
        extra: objects seen that the caption does not name.
        all_right: every fact is right and there is no extra object.
    """

    facts: dict[str, tuple[int, int]]
    extra: int
    all_right: bool


def check(picture, caption: str) -> Verdict:
    """A picture, in any of :func:`detect`'s forms, against a caption of the picture world.

    Raises:
        UserError: the caption is not one of the picture world's.
    """
    return compare(detect(picture), read_caption(caption))


def compare(seen: DetectedScene, facts: CaptionFacts) -> Verdict:
    """What was seen against what was said. By kind, a fact is:

    object: one object said, right if an object of its shape is seen, in whatever color (none stands for two);
    color: one object said, right if one of its shape *and* color is seen;
    count: one number said ("two red circles"), right if exactly so many are seen;
    place, size: right if every object of that color and shape is there or of that size, and there is one;
    relation: right if so lie the two, by their cells; background: its color.
    """
    pairs = Counter((o.color, o.shape) for o in seen.objects)
    said, wanted_shapes = Counter(facts.counts), Counter()
    for (_, shape), count in facts.counts.items():
        wanted_shapes[shape] += count
    shapes = Counter(o.shape for o in seen.objects)
    total = said.total()
    results = {
        "object": ((wanted_shapes & shapes).total(), total),
        "color": ((said & pairs).total(), total),
        "count": _right(pairs[pair] == count for pair, count in said.items()),
        "place": _right(_all(seen, pair, "place", place) for pair, place in facts.places),
        "size": _right(_all(seen, pair, "size", size) for pair, size in facts.sizes),
        "relation": _right(_related(seen, *relation) for relation in facts.relations),
        "background": _right([seen.background == facts.background] if facts.background else []),
    }
    extra = (pairs - said).total()
    return Verdict(results, extra, extra == 0 and all(right == count for right, count in results.values()))


def summary(verdicts: Iterable[Verdict]) -> dict:
    """The numbers of many pictures.

    Returns:
        ``pictures``; ``all_right``, the share of pictures that are as their captions say; ``extra_objects`` per
        picture; and for every kind the share of its facts that are right (None if none was said) with their number.
    """
    verdicts = list(verdicts)
    kinds = {}
    for kind in KINDS:
        right, said = (sum(v.facts[kind][i] for v in verdicts) for i in (0, 1))
        kinds[kind] = {"right": right / said if said else None, "facts": said}
    pictures = len(verdicts)
    return {
        "pictures": pictures,
        "all_right": sum(v.all_right for v in verdicts) / pictures if pictures else None,
        "extra_objects": sum(v.extra for v in verdicts) / pictures if pictures else None,
        **kinds,
    }


def _right(checks: Iterable[bool]) -> tuple[int, int]:
    checks = list(checks)
    return sum(checks), len(checks)


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

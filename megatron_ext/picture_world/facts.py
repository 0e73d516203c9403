"""The facts of a caption of the picture world, parsed from its text."""

import re
from dataclasses import dataclass

from megatron_ext.errors import UserError
from megatron_ext.picture_world.attributes import BACKGROUND_COLORS, BACKGROUND_PATTERNS, COLORS, PLACES, SHAPES, SIZES
from megatron_ext.picture_world.captions import NUMBERS, plural

Pair = tuple[str, str]
"""(color, shape)."""
RELATIONS = ("left of", "right of", "above", "below")

_SINGULAR = {form: shape for shape in SHAPES for form in (shape, plural(shape, 2))}
_COLOR, _SHAPE = "|".join(COLORS), "|".join(sorted(_SINGULAR, key=len, reverse=True))
_PAIR = rf"({_COLOR}) ({_SHAPE})"
_PLACE = "|".join(sorted((place for row in PLACES for place in row), key=len, reverse=True))
_PART = re.compile(rf"(an?|{'|'.join(NUMBERS[1:])}) {_PAIR}(?: at the ({_PLACE}))?")
_OPENING = re.compile(rf"(?:there (?:is|are)|a picture of|this picture shows|(?:{'|'.join(NUMBERS[1:])}) objects?:) ")
_SIZE = re.compile(rf"the {_PAIR} is ({'|'.join(SIZES)})")
_ALL_SIZES = re.compile(rf"all objects are ({'|'.join(SIZES)})")
_RELATION = re.compile(rf"the {_PAIR} is ({'|'.join(RELATIONS)}) the {_PAIR}")
_BACKGROUND = re.compile(rf"the background is (?:(?:{'|'.join(BACKGROUND_PATTERNS)}) )?({'|'.join(BACKGROUND_COLORS)})")


@dataclass(frozen=True)
class CaptionFacts:
    """The facts of a caption.

    Attributes:
        counts: number of objects by color and shape; there are no others.
        places: unique objects and the names of their cells.
        sizes: objects and their sizes; None stands for all objects.
        relations: object, relation (:data:`RELATIONS`), other object.
        background: its color, or None if the caption does not mention it. The pattern is not a fact.
    """

    counts: dict[Pair, int]
    places: tuple[tuple[Pair, str], ...]
    sizes: tuple[tuple[Pair | None, str], ...]
    relations: tuple[tuple[Pair, str, Pair], ...]
    background: str | None


def read_caption(caption: str) -> CaptionFacts:
    """Parse the facts of a caption.

    Raises:
        UserError: a sentence does not have a form of :func:`.captions.caption`.
    """
    census, *extras = [sentence.lower() for sentence in caption.removesuffix(".").split(". ")]
    counts, places = _census(census, caption)
    sizes, relations, background = [], [], None
    for sentence in extras:
        if match := _SIZE.fullmatch(sentence):
            sizes.append(((match[1], _SINGULAR[match[2]]), match[3]))
        elif match := _ALL_SIZES.fullmatch(sentence):
            sizes.append((None, match[1]))
        elif match := _RELATION.fullmatch(sentence):
            relations.append(((match[1], _SINGULAR[match[2]]), match[3], (match[4], _SINGULAR[match[5]])))
        elif match := _BACKGROUND.fullmatch(sentence):
            background = match[1]
        else:
            raise UserError(f"caption '{caption}': cannot read '{sentence}'; it must be one of the picture world's")
    return CaptionFacts(counts, tuple(places), tuple(sizes), tuple(relations), background)


def _census(sentence: str, caption: str) -> tuple[dict[Pair, int], list[tuple[Pair, str]]]:
    counts, places = {}, []
    for part in re.split(", | and ", _OPENING.sub("", sentence, count=1)):
        match = _PART.fullmatch(part)
        if not match:
            raise UserError(f"caption '{caption}': cannot read '{part}'; it must be one of the picture world's")
        pair = (match[2], _SINGULAR[match[3]])
        counts[pair] = counts.get(pair, 0) + (NUMBERS.index(match[1]) if match[1] in NUMBERS else 1)
        if match[4]:
            places.append((pair, match[4]))
    return counts, places

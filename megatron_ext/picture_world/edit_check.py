"""Checking an edited picture object by object: what the edit changes must be right, and all else must be kept."""

from dataclasses import dataclass

from megatron_ext.picture_world.attributes import PLACES
from megatron_ext.picture_world.captions import article, pair_name
from megatron_ext.picture_world.check import CheckedFact
from megatron_ext.picture_world.detected import DetectedScene
from megatron_ext.picture_world.world import Scene, SceneObject

CHANGED, KEPT = "changed", "kept"
ATTRIBUTES = ("shape", "color", "size")


@dataclass(frozen=True)
class EditVerdict:
    """How a picture compares with the scene after an edit.

    Attributes:
        checked: the facts; their kinds are :data:`CHANGED` and :data:`KEPT`.
        extra: detected objects in cells that are empty before and after the edit.
    """

    checked: tuple[CheckedFact, ...]
    extra: int

    def facts(self, kind: str | None = None) -> tuple[int, int]:
        """(correct facts, facts) of a kind; of both for None."""
        right = [fact.right for fact in self.checked if kind in (None, fact.kind)]
        return sum(right), len(right)

    @property
    def all_right(self) -> bool:
        """Whether every fact is correct and there is no extra object."""
        return self.extra == 0 and all(fact.right for fact in self.checked)


def check_edit(seen: DetectedScene | None, before: Scene, after: Scene) -> EditVerdict:
    """Compare what a picture shows with the scene after an edit, cell by cell.

    The shape, the color and the size of each object of the scene after the edit are a fact each: kept if the cell had
    the same before, changed if not. A cell that the edit empties is a changed fact. The background's color is kept. A
    fact about an object is correct if the picture shows one object in its cell, with this attribute.

    Args:
        seen: None for a picture that is missing, for which no fact is correct.
    """
    old, new = _by_cell(before), _by_cell(after)
    shown: dict[tuple[int, int], list] = {}
    for item in seen.objects if seen else ():
        shown.setdefault((item.row, item.column), []).append(item)
    checked = []
    for cell in sorted(old.keys() | new.keys()):
        here, place = shown.get(cell, []), PLACES[cell[0]][cell[1]]
        if cell not in new:
            checked.append(CheckedFact(CHANGED, f"nothing at the {place}", seen is not None and not here))
            continue
        item, earlier = new[cell], old.get(cell)
        for attribute in ATTRIBUTES:
            value = getattr(item, attribute)
            kind = KEPT if earlier and getattr(earlier, attribute) == value else CHANGED
            words = f"{article(f'{item.size} {pair_name(item)}')} at the {place}: {attribute}"
            checked.append(CheckedFact(kind, words, len(here) == 1 and getattr(here[0], attribute) == value))
    color = after.background.color
    checked.append(CheckedFact(KEPT, f"{color} background", seen is not None and seen.background == color))
    return EditVerdict(tuple(checked), sum(len(here) for cell, here in shown.items() if cell not in old | new))


def _by_cell(scene: Scene) -> dict[tuple[int, int], SceneObject]:
    return {(item.row, item.column): item for item in scene.objects}

"""Edits of scenes: an instruction ("Make the red circle blue.") between the scene before it and the scene after it.

An edit is well defined: exactly one object has the name that the instruction uses, a new place is free, and the result
differs. Both scenes belong to the same split, so no picture of another split is ever drawn.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from megatron_ext.picture_world.attributes import PLACES
from megatron_ext.picture_world.captions import article, pair_name
from megatron_ext.picture_world.splits import split_of
from megatron_ext.picture_world.world import GRID, RICHEST, Scene, SceneObject, World, make_object, make_scene

SEED_OFFSET = 2_000_003
"""Edits start from other scenes than the captions and questions: those of the seed plus this number."""
SCENES = 1000
"""Distance between the first scenes of two conversations: each is made from the first suitable scene from there on,
which is found among fewer."""
STEPS = {"to the left": (0, -1), "to the right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Directions of a move by one cell: (rows, columns)."""


@dataclass(frozen=True)
class Edit:
    """A change of a scene, of a kind of :data:`KINDS`."""

    kind: str
    instruction: str
    before: Scene
    after: Scene


def make_edits(
    seed: int, split: str, index: int, world: World = RICHEST, kinds: Collection[str] = (), turns: int = 1
) -> list[Edit]:
    """Conversation ``index`` of a split: edits of which each starts from the result of the one before it.

    A pure function of its arguments. All kinds occur equally often as the first edit.

    Args:
        kinds: of :data:`KINDS`; empty: all of them.
        turns: most edits; a conversation has 1 to ``turns``.
    """
    names = [kind for kind in KINDS if not kinds or kind in kinds]
    for number in itertools.count(SCENES * index):
        scene = make_scene(seed + SEED_OFFSET, split, number, world)
        rng = scene.random("edits")
        kind, edits = names[index % len(names)], []
        for _ in range(rng.randint(1, turns)):
            edit = make_edit(scene, kind, rng)
            if edit is None:
                break
            edits.append(edit)
            scene, kind = edit.after, rng.choice(names)
        if edits:
            return edits


def make_edit(scene: Scene, kind: str, rng: random.Random) -> Edit | None:
    """A random edit of a kind; None if the scene allows none, or none whose result belongs to its split."""
    change = KINDS[kind](scene, rng)
    if change is None:
        return None
    instruction, objects = change
    after = replace(scene, objects=tuple(objects))
    if scene.split != "test" and (any(item.held_out for item in objects) or split_of(after.arrangement) != scene.split):
        return None
    return Edit(kind, instruction, scene, after)


Change = tuple[str, list[SceneObject]] | None
"""An instruction and the objects after it; None if the scene allows none."""


def _recolor(scene: Scene, rng: random.Random) -> Change:
    if not (target := _target(scene, rng)):
        return None
    item, name = target
    color = rng.choice([color for color in scene.world.colors if color != item.color])
    instruction = rng.choice([f"Make {name} {color}.", f"Change the color of {name} to {color}."])
    return instruction, [replace(o, color=color) if o is item else o for o in scene.objects]


def _move(scene: Scene, rng: random.Random) -> Change:
    if not (target := _target(scene, rng)):
        return None
    item, name = target
    cells = _free_cells(scene)
    ways = [(way, (item.row + down, item.column + right)) for way, (down, right) in STEPS.items()]
    ways = [(way, cell) for way, cell in ways if cell in cells]
    if not ways or rng.random() < 0.5:
        row, column = rng.choice(cells)
        ways = [(f"to the {PLACES[row][column]}", (row, column))]
    way, (row, column) = rng.choice(ways)
    x, y = item.x + (column - item.column) / GRID, item.y + (row - item.row) / GRID
    moved = replace(item, row=row, column=column, x=round(x, 4), y=round(y, 4))
    return f"Move {name} {way}.", [moved if o is item else o for o in scene.objects]


def _remove(scene: Scene, rng: random.Random) -> Change:
    if len(scene.objects) < 2 or not (target := _target(scene, rng)):
        return None
    item, name = target
    return rng.choice([f"Remove {name}.", f"Take {name} away."]), [o for o in scene.objects if o is not item]


def _add(scene: Scene, rng: random.Random) -> Change:
    if len(scene.objects) == scene.world.objects:
        return None
    pairs = [(s, c) for s in scene.world.shapes for c in scene.world.colors if scene.speakable(s, c)]
    item = make_object(rng, *rng.choice(pairs), *rng.choice(_free_cells(scene)), scene.world)
    return f"Add {article(f'{item.size} {pair_name(item)}')} at the {item.place}.", [*scene.objects, item]


KINDS: dict[str, Callable[[Scene, random.Random], Change]] = {
    "recolor": _recolor,
    "move": _move,
    "remove": _remove,
    "add": _add,
}


def _target(scene: Scene, rng: random.Random) -> tuple[SceneObject, str] | None:
    """An object, and a name that no other object has; None without such an object."""
    shapes, pairs = (Counter(map(of, scene.objects)) for of in (lambda o: o.shape, pair_name))
    names = [(o, f"the {o.shape}") for o in scene.objects if shapes[o.shape] == 1]
    names += [(o, f"the {pair_name(o)}") for o in scene.objects if pairs[pair_name(o)] == 1]
    return rng.choice(names) if names else None


def _free_cells(scene: Scene) -> list[tuple[int, int]]:
    taken = {(o.row, o.column) for o in scene.objects}
    return [cell for cell in itertools.product(range(GRID), range(GRID)) if cell not in taken]

"""The content of a picture: objects in the cells of a 3 x 3 grid, on a background; neither text nor pixels.

:func:`make_scene` is a pure function of (seed, split, index).
"""

import itertools
import math
import random
from dataclasses import asdict, dataclass

from megatron_ext.errors import UserError
from megatron_ext.picture_world.attributes import (
    BACKGROUND_COLORS,
    BACKGROUND_PATTERNS,
    COLORS,
    COMPOSED_COLORS,
    COMPOSED_SHAPES,
    PLACES,
    SHAPES,
    SIZES,
)
from megatron_ext.picture_world.splits import HELD_OUT, SPLITS, split_of

GRID = 3
RADIUS = {"small": 0.092, "large": 0.152}
"""Radius of an object's circumscribed circle, as a fraction of the picture's side."""
MARGIN = 0.005
"""Least distance of an object from the border of its cell."""
OBJECT_COUNTS = {1: 2, 2: 4, 3: 5, 4: 5, 5: 4, 6: 3}
"""Number of objects in a scene: relative frequency."""


@dataclass(frozen=True)
class World:
    """The variety of scenes; small models learn to see sooner in a world with less variety.

    Attributes:
        kinds: number of shapes and of colors: all 8, or every other one (4), so that each has a held-out pair; 4 in a
            compositional world.
        objects: most objects in a scene, 2 .. 6.
        variation: 0 .. 1, how much the looks of equal objects differ: their offset from the middle of the cell, their
            rotation, their radius within one size, and the share of backgrounds with a pattern. It does not change
            which captions and questions are true, but at 0 every pixel of an object follows from its description and
            its cell.
        backgrounds: number of background colors, 2 .. 5.
        compositional: objects are mosaics whose tiles tell neither shape nor color (:mod:`.mosaic`), all of one size
            and without variation.
    """

    kinds: int = len(SHAPES)
    objects: int = max(OBJECT_COUNTS)
    variation: float = 1.0
    backgrounds: int = len(BACKGROUND_COLORS)
    compositional: bool = False

    def __post_init__(self):
        if self.kinds not in (len(SHAPES) // 2, len(SHAPES)):
            raise UserError(f"world: kinds is {self.kinds}, must be {len(SHAPES) // 2} or {len(SHAPES)}")
        if self.compositional and (self.kinds != len(COMPOSED_SHAPES) or self.variation):
            kinds = f"kinds is {self.kinds} and variation {self.variation:g}"
            raise UserError(f"world: {kinds}, must be {len(COMPOSED_SHAPES)} and 0 in a compositional world")
        if not 2 <= self.objects <= max(OBJECT_COUNTS):
            raise UserError(f"world: objects is {self.objects}, must be from 2 to {max(OBJECT_COUNTS)}")
        if not 0 <= self.variation <= 1:
            raise UserError(f"world: variation is {self.variation}, must be from 0 to 1")
        if not 2 <= self.backgrounds <= len(BACKGROUND_COLORS):
            raise UserError(f"world: backgrounds is {self.backgrounds}, must be from 2 to {len(BACKGROUND_COLORS)}")

    @property
    def shapes(self) -> tuple[str, ...]:
        if self.compositional:
            return COMPOSED_SHAPES
        return SHAPES[:: len(SHAPES) // self.kinds]

    @property
    def colors(self) -> tuple[str, ...]:
        if self.compositional:
            return COMPOSED_COLORS
        step = len(COLORS) // self.kinds
        return COLORS[step - 1 :: step]

    @property
    def sizes(self) -> tuple[str, ...]:
        return SIZES[-1:] if self.compositional else SIZES

    @property
    def background_colors(self) -> tuple[str, ...]:
        last, gaps = len(BACKGROUND_COLORS) - 1, self.backgrounds - 1
        return tuple(BACKGROUND_COLORS[last * i // gaps] for i in range(self.backgrounds))

    @property
    def held_out(self) -> list[tuple[str, str]]:
        """The (shape, color) pairs that only test has."""
        return sorted((s, c) for s, c in HELD_OUT if s in self.shapes and c in self.colors)


RICHEST = World()


@dataclass(frozen=True)
class PlacedObject:
    """The attributes and place of an object. ``x``, ``y`` (center) and ``radius`` are fractions of the side, y down."""

    shape: str
    color: str
    size: str
    row: int
    column: int
    x: float
    y: float
    radius: float

    @property
    def place(self) -> str:
        """Name of its cell, such as ``top left``."""
        return PLACES[self.row][self.column]


@dataclass(frozen=True)
class SceneObject(PlacedObject):
    """One object of a scene; rotation in degrees."""

    rotation: float

    @property
    def held_out(self) -> bool:
        """Whether its shape and color are a held-out pair."""
        return (self.shape, self.color) in HELD_OUT


@dataclass(frozen=True)
class Background:
    """A pattern in two tones of one color, with ``direction`` (0 .. 3) and ``phase`` (0 .. 1)."""

    color: str
    pattern: str
    direction: int
    phase: float


@dataclass(frozen=True)
class Scene:
    """The content of a picture; ``seed``, ``split`` and ``index`` identify it."""

    seed: int
    split: str
    index: int
    background: Background
    objects: tuple[SceneObject, ...]
    world: World = RICHEST

    def random(self, stream: str) -> random.Random:
        """A random generator for this scene and ``stream``; streams are independent of each other."""
        return _random(self.seed, self.split, self.index, stream)

    @property
    def key(self) -> str:
        """Name of the sample: without dots, sorts by index."""
        return f"{self.split}-{self.index:09d}"

    @property
    def arrangement(self) -> str:
        """The objects and their cells as a canonical text; splits have no arrangement in common."""
        return ";".join(sorted(f"{o.size} {o.color} {o.shape} {o.row}{o.column}" for o in self.objects))

    def speakable(self, shape: str | None, color: str | None) -> bool:
        """Whether texts of this scene's split may name the pair; only test may name held-out pairs."""
        return self.split == "test" or (shape, color) not in HELD_OUT

    def to_dict(self) -> dict:
        """Plain data for JSON, with the place of each object."""
        tree = asdict(self)
        tree["objects"] = [{**asdict(o), "place": o.place} for o in self.objects]
        return tree

    @classmethod
    def from_dict(cls, tree: dict) -> "Scene":
        """The scene that :meth:`to_dict` describes."""
        objects = tuple(SceneObject(**{k: v for k, v in o.items() if k != "place"}) for o in tree["objects"])
        background, world = Background(**tree["background"]), World(**tree["world"])
        return cls(tree["seed"], tree["split"], tree["index"], background, objects, world)


def make_scene(seed: int, split: str, index: int, world: World = RICHEST) -> Scene:
    """Scene ``index`` of a split.

    Raises:
        UserError: ``split`` is not one of :data:`SPLITS`.
    """
    if split not in SPLITS:
        raise UserError(f"split '{split}': must be one of {', '.join(SPLITS)}")
    rng = _random(seed, split, index, "world")
    patterned = _random(seed, split, index, "pattern").random() < world.variation
    while True:
        scene = Scene(seed, split, index, _background(rng, patterned, world), _objects(rng, split, world), world)
        if split == "test" or split == split_of(scene.arrangement):
            return scene


def _random(seed: int, split: str, index: int, stream: str) -> random.Random:
    # Text seeds are hashed with SHA-512: the same on every machine, and unrelated for neighboring indices.
    return random.Random(f"{seed}/{split}/{index}/{stream}")


def _background(rng: random.Random, patterned: bool, world: World) -> Background:
    color, pattern = rng.choice(world.background_colors), rng.choice(BACKGROUND_PATTERNS)
    return Background(color, pattern if patterned else "plain", rng.randrange(4), round(rng.random(), 4))


def _objects(rng: random.Random, split: str, world: World) -> tuple[SceneObject, ...]:
    """Objects of few shapes and colors, so that equal objects are frequent and counting is not trivial."""
    counts = {count: times for count, times in OBJECT_COUNTS.items() if count <= world.objects}
    (count,) = rng.choices(list(counts), list(counts.values()))
    pairs: list[tuple[str, str]] = []
    while not pairs:
        shapes, colors = rng.sample(world.shapes, rng.randint(1, 4)), rng.sample(world.colors, rng.randint(1, 4))
        pairs = [pair for pair in itertools.product(shapes, colors) if pair not in HELD_OUT]
    selected = [rng.choice(pairs) for _ in range(count)]
    if split == "test":
        # One held-out pair, beside objects that may share its shape or its color.
        shape, color = rng.choice(world.held_out)
        selected = [(shape, color)] + [rng.choice([pair, (shape, pair[1]), (pair[0], color)]) for pair in selected[1:]]
    cells = rng.sample(range(GRID * GRID), count)
    return tuple(make_object(rng, *pair, *divmod(cell, GRID), world) for pair, cell in zip(selected, cells))


def make_object(rng: random.Random, shape: str, color: str, row: int, column: int, world: World) -> SceneObject:
    """An object in a cell, of random size, and of random looks as far as the world's variation allows."""
    size, variation = rng.choice(world.sizes), world.variation
    radius = RADIUS[size] * rng.uniform(1 - 0.05 * variation, 1.0)
    slack = variation * (0.5 / GRID - radius - MARGIN)
    x, y = ((i + 0.5) / GRID + rng.uniform(-slack, slack) for i in (column, row))
    rotation = variation * rng.uniform(-9, 9)
    return SceneObject(shape, color, size, row, column, *(_floor4(v) for v in (x, y, radius, rotation)))


def _floor4(value: float) -> float:
    return math.floor(value * 1e4) / 1e4

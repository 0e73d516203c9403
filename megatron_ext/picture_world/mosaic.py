"""Objects of the compositional world: glyphs of 3 x 3 tiles, striped in two inks.

A picture has 9 x 9 tiles, and the cell of an object has 3 x 3. The *shape* is which of these tiles are inked; the
*color* is which two inks alternate from column to column, as in a mosaic seen from afar: purple is red and blue. Each
tile of a cell is inked in two of the four shapes, each ink is in two of the four colors, and either may come first.
So a tile and its place leave two shapes and two colors: where image tokens are tiles, attributes are facts about
several tokens.
"""

import numpy as np
from PIL import Image, ImageDraw

from megatron_ext.picture_world.attributes import COMPOSED_COLORS, COMPOSED_SHAPES
from megatron_ext.picture_world.world import GRID, Scene, SceneObject

TILES = 3
"""Tiles along a side of a cell."""
SIDE = GRID * TILES
"""Tiles along a side of a picture."""
INKS = {"r": (236, 64, 72), "y": (232, 200, 80), "b": (44, 84, 190), "w": (226, 232, 238)}
EDGE = 0.45
"""Color of an edge, as a fraction of the ink's color."""
MIXTURES = dict(zip(COMPOSED_COLORS, ("rb", "by", "yw", "wr")))
GLYPHS = {
    shape: np.array([[tile == "#" for tile in row] for row in rows.split()])
    for shape, rows in zip(COMPOSED_SHAPES, ("#.# .#. #.#", "..# .## ..#", ".#. #.# .#.", "##. #.. ##."))
}
"""Inked tiles [3, 3] of each shape."""


def stripes(color: str, first: int) -> str:
    """The inks of a cell's three columns; ``first`` (0 or 1) is the ink of the first and last."""
    inks = MIXTURES[color]
    return "".join(inks[(first + column) % 2] for column in range(TILES))


def draw_objects(picture: Image.Image, scene: Scene) -> None:
    """Draw the objects of a scene on a picture whose side is a multiple of 9 pixels."""
    draw = ImageDraw.Draw(picture)
    for item in scene.objects:
        first = scene.random(f"mosaic {item.row} {item.column}").randrange(2)
        _draw_object(draw, item, stripes(item.color, first), picture.width // SIDE)


def _draw_object(draw: ImageDraw.ImageDraw, item: SceneObject, inks: str, tile: int) -> None:
    for row, column in np.argwhere(GLYPHS[item.shape]):
        left, top = (tile * (TILES * cell + int(at)) for cell, at in ((item.column, column), (item.row, row)))
        ink = INKS[inks[column]]
        edge = tuple(int(EDGE * part) for part in ink)
        draw.rectangle((left, top, left + tile - 1, top + tile - 1), fill=ink, outline=edge)

"""Objects of the compositional world: glyphs of 3 x 3 tiles, striped in two inks.

A picture has 9 x 9 tiles, and the cell of an object has 3 x 3. The *shape* is which of these tiles are inked; the
*color* is which two inks alternate from column to column, as in a mosaic seen from afar: orange is red and yellow. Every
ink occurs in several colors, and either ink may come first, so a tile tells neither; its dark edges show which of its
four neighbors are inked. Where image tokens are tiles, attributes are therefore facts about several tokens, not symbols.
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
MIXTURES = dict(zip(COMPOSED_COLORS, ("ry", "bw", "yb", "wr", "yw", "rb")))
GLYPHS = {
    shape: np.array([[tile == "#" for tile in row] for row in rows.split()])
    for shape, rows in zip(
        COMPOSED_SHAPES, (".#. ### .#.", "### ### ###", "#.# ### .#.", "### #.. ###", ".#. #.# .#.", "#.# .#. #.#")
    )
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
    glyph = np.pad(GLYPHS[item.shape], 1)
    for row, column in np.argwhere(GLYPHS[item.shape]):
        left, top = (tile * (TILES * cell + int(at)) for cell, at in ((item.column, column), (item.row, row)))
        right, bottom = left + tile - 1, top + tile - 1
        ink = INKS[inks[column]]
        draw.rectangle((left, top, right, bottom), fill=ink)
        edge = tuple(int(EDGE * part) for part in ink)
        up, down, before, after = glyph[[row, row + 2, row + 1, row + 1], [column + 1, column + 1, column, column + 2]]
        for inked, line in (
            (up, (left, top, right, top)),
            (down, (left, bottom, right, bottom)),
            (before, (left, top, left, bottom)),
            (after, (right, top, right, bottom)),
        ):
            if not inked:
                draw.line(line, fill=edge)

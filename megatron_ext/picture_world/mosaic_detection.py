"""Detecting the objects of a picture of the compositional world, from the inks of its tiles (:mod:`.mosaic`)."""

import itertools

import numpy as np

from megatron_ext.picture_world.detected import DetectedObject, DetectedScene
from megatron_ext.picture_world.mosaic import GLYPHS, INKS, MIXTURES, SIDE, TILES, stripes
from megatron_ext.picture_world.render import BACKGROUND_RGB
from megatron_ext.picture_world.world import GRID, RADIUS

NEAREST, UNEVEN = 24.0, 12.0
"""Most distance of a tile from its color, and most standard deviation inside its edges, both of 0 .. 255."""
LEAST_RIGHT = TILES * TILES - 1
"""Of the nine tiles of a cell, how many must be those of an object. One wrong tile may leave two objects, and then none
is seen: hearts and stars of two colors differ by their center alone."""
LEAST_BACKGROUND = 8 / 9
"""Share of the tiles without ink that must have the background's color."""
PALETTE = np.array([*INKS.values(), *BACKGROUND_RGB.values()], dtype=np.float64)
NAMES = (*INKS, *BACKGROUND_RGB)
_TEMPLATES = [
    (shape, color, np.where(glyph, np.array(list(stripes(color, first)))[None], ""))
    for (shape, glyph), color, first in itertools.product(GLYPHS.items(), MIXTURES, (0, 1))
]
"""Shape, color and inks [3, 3] ("" for none) of every object."""


def read_tiles(pixels: np.ndarray) -> np.ndarray | None:
    """The name of each tile's ink or background, [9, 9], of a picture float64 [side, side, 3] of 0 .. 255.

    None if a tile has another color or is not plain: in pictures of other worlds, contours run through tiles.
    """
    tile, rest = divmod(len(pixels), SIDE)
    if rest or tile < 4:
        return None
    inside = pixels.reshape(SIDE, tile, SIDE, tile, 3)[:, 1:-1, :, 1:-1].transpose(0, 2, 1, 3, 4)
    inside = inside.reshape(SIDE, SIDE, -1, 3)
    distances = np.linalg.norm(inside.mean(2)[..., None, :] - PALETTE, axis=-1)
    plain = (distances.min(-1) < NEAREST) & (inside.std(2).max(-1) < UNEVEN)
    return np.array(NAMES)[distances.argmin(-1)] if plain.all() else None


def detect(tiles: np.ndarray) -> DetectedScene:
    """The background and the objects of a picture.

    A cell shows an object if at most one of its tiles is wrong, and no other object fits as well. Any other cell with
    ink shows something unknown.

    Args:
        tiles: of :func:`read_tiles`.
    """
    colors, counts = np.unique(tiles[np.isin(tiles, list(BACKGROUND_RGB))], return_counts=True)
    one = len(counts) and counts.max() >= LEAST_BACKGROUND * counts.sum()
    inks = np.where(np.isin(tiles, list(INKS)), tiles, "")
    cells = inks.reshape(GRID, TILES, GRID, TILES).transpose(0, 2, 1, 3)
    inked = [cell for cell in np.ndindex(GRID, GRID) if (cells[cell] != "").any()]
    objects = tuple(item for cell in inked if (item := _object(cells[cell], *cell)))
    return DetectedScene(str(colors[counts.argmax()]) if one else "", objects, len(inked) - len(objects))


def _object(cell: np.ndarray, row: int, column: int) -> DetectedObject | None:
    right = [int((cell == inks).sum()) for _, _, inks in _TEMPLATES]
    best = max(right)
    fitting = {_TEMPLATES[n][:2] for n, tiles in enumerate(right) if tiles == best}
    if best < LEAST_RIGHT or len(fitting) > 1:
        return None
    ((shape, color),) = fitting
    x, y = ((n + 0.5) / GRID for n in (column, row))
    return DetectedObject(shape, color, "large", row, column, x, y, RADIUS["large"], best / TILES**2)

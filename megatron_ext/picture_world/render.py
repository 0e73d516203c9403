"""Rendering scenes: flat shapes with a dark outline on a patterned background, anti-aliased by supersampling."""

import math

import numpy as np
from PIL import Image, ImageDraw

from megatron_ext.errors import UserError
from megatron_ext.picture_world import mosaic
from megatron_ext.picture_world.world import Background, Scene, SceneObject

RGB = {
    "red": (208, 24, 34),
    "orange": (250, 128, 8),
    "yellow": (255, 228, 40),
    "green": (22, 140, 48),
    "blue": (24, 92, 238),
    "purple": (122, 34, 168),
    "pink": (255, 112, 184),
    "white": (255, 255, 255),
}
BACKGROUND_RGB = {
    "gray": (150, 152, 156),
    "beige": (206, 182, 142),
    "mint": (146, 196, 172),
    "lavender": (170, 160, 208),
    "navy": (38, 48, 82),
}
TONE = 13
"""Distance of a pattern's two tones from the background color."""
OUTLINE = 0.012
"""Width of an outline, as a fraction of the side."""
SUPERSAMPLING = 4


def render(scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB picture of ``size`` x ``size`` pixels (16 or more).

    Raises:
        UserError: a compositional world needs a multiple of 9 pixels, 36 or more.
    """
    if scene.world.compositional:
        return _render_mosaic(scene, size)
    fine = size * SUPERSAMPLING
    # Enlarging by whole pixels and reducing again leaves the background as it was.
    picture = _background(scene.background, size).resize((fine, fine), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for item in scene.objects:
        _render_object(draw, item, fine, snapped=scene.world.variation == 0)
    return picture.reduce(SUPERSAMPLING)


def _render_mosaic(scene: Scene, size: int) -> Image.Image:
    if size % mosaic.SIDE or size < 4 * mosaic.SIDE:
        raise UserError(
            f"size is {size}; pictures of a compositional world need a multiple of {mosaic.SIDE}, 36 or more"
        )
    picture = _background(scene.background, size)
    mosaic.draw_objects(picture, scene)
    return picture


def _render_object(draw: ImageDraw.ImageDraw, item: SceneObject, fine: int, snapped: bool) -> None:
    """Draw on the fine grid. Snapped: around the nearest corner of pixels, so that equal objects in different cells
    have equal pixels."""
    cos, sin = math.cos(math.radians(item.rotation)), math.sin(math.radians(item.rotation))
    half = OUTLINE / 2
    scale = (item.radius - half) * fine
    center = [v * fine for v in (item.x, item.y)]
    if snapped:
        center = [SUPERSAMPLING * round(v / SUPERSAMPLING) for v in center]
    # Offsets in units of 2^-10, so that adding them to whole pixels is exact.
    offsets = [(scale * (x * cos - y * sin), scale * (x * sin + y * cos)) for x, y in OUTLINES[item.shape]]
    points = [(center[0] + round(u * 1024) / 1024, center[1] + round(v * 1024) / 1024) for u, v in offsets]
    fill = RGB[item.color]
    draw.polygon(points, fill=fill)
    edge = tuple(c * 45 // 100 for c in fill)
    draw.line(points + points[:2], fill=edge, width=max(1, round(OUTLINE * fine)), joint="curve")


def _background(background: Background, size: int) -> Image.Image:
    fine = 2 * size
    v, u = (np.mgrid[0:fine, 0:fine] + 0.5) / fine
    tone = _tone(background, u, v).reshape(size, 2, size, 2).mean((1, 3))
    rgb = np.array(BACKGROUND_RGB[background.color]) + TONE * tone[..., None]
    return Image.fromarray(np.rint(rgb).clip(0, 255).astype(np.uint8), "RGB")


def _tone(background: Background, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The pattern at the points (u, v) of the unit square, about -1 .. 1."""
    along = ((1.0, 0.0), (0.0, 1.0), (0.75, 0.75), (0.75, -0.75))[background.direction]
    across = (-along[1], along[0])
    a, b = (u * d[0] + v * d[1] + background.phase for d in (along, across))
    match background.pattern:
        case "plain":
            return np.zeros_like(u)
        case "striped":
            return np.where(np.floor(8 * a) % 2 == 0, 1.0, -1.0)
        case "checkered":
            return np.where((np.floor(6 * a) + np.floor(6 * b)) % 2 == 0, 1.0, -1.0)
        case "dotted":
            distance = np.hypot(7 * a % 1 - 0.5, 7 * b % 1 - 0.5)
            return np.where(distance < 0.3, 1.4, -0.6)
        case "shaded":
            # A ramp over the whole picture, in one of four directions, rising or falling.
            ramp = u * along[0] + v * along[1]
            ramp = 2 * (ramp - ramp.min()) / (ramp.max() - ramp.min()) - 1
            return 2 * ramp if background.phase < 0.5 else -2 * ramp
    raise ValueError(background.pattern)


def _star() -> list[tuple[float, float]]:
    radii = (1.0, 0.46)
    return [(radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 48 for i in range(48)]
    return [
        (
            16 * math.sin(t) ** 3 / 17.5,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5) / 17.5,
        )
        for t in turns
    ]


def _moon() -> list[tuple[float, float]]:
    """A crescent open to the right: an arc of the unit circle, and back along a smaller circle."""
    outer = [math.radians(d) for d in range(48, 313, 12)]
    tip = (math.cos(outer[0]), math.sin(outer[0]))
    # The smaller circle goes through both tips and through (bay, 0).
    bay = -0.12
    center = (1 - bay**2) / (2 * (tip[0] - bay))
    radius = center - bay
    opening = math.atan2(tip[1], tip[0] - center)
    inner = [opening + (2 * math.pi - 2 * opening) * i / 20 for i in range(1, 20)]
    points = [(math.cos(a), math.sin(a)) for a in outer]
    points += [(center + radius * math.cos(a), radius * math.sin(a)) for a in reversed(inner)]
    return [(0.9 * (x + 0.16), 0.9 * y) for x, y in points]


_ARM = 0.32
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [(0.86 * math.cos(i * math.pi / 24), 0.86 * math.sin(i * math.pi / 24)) for i in range(48)],
    "square": [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)],
    "triangle": [(0.0, -0.9), (0.83, 0.55), (-0.83, 0.55)],
    "diamond": [(0.0, -1.0), (0.66, 0.0), (0.0, 1.0), (-0.66, 0.0)],
    "star": _star(),
    "cross": [
        (-_ARM, -0.92), (_ARM, -0.92), (_ARM, -_ARM), (0.92, -_ARM), (0.92, _ARM), (_ARM, _ARM),
        (_ARM, 0.92), (-_ARM, 0.92), (-_ARM, _ARM), (-0.92, _ARM), (-0.92, -_ARM), (-_ARM, -_ARM),
    ],
    "heart": _heart(),
    "moon": _moon(),
}  # fmt: skip
"""Polygons inside the unit circle, y downwards."""

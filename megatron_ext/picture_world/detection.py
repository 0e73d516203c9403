"""Detecting the objects of a picture of the picture world from its pixels alone: classical, without trained weights.

The border gives the background color. Patches of one palette color propose places of objects. At each place, templates
of every shape, size, rotation and sharpness are matched in every color, and the template that explains the picture best
names the object. :func:`~.render.render` draws the templates, so they include the outline and the anti-aliasing.
Pictures of the compositional world are read tile by tile (:mod:`.mosaic_detection`).
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from megatron_ext.picture_world import mosaic_detection
from megatron_ext.picture_world.attributes import COLORS, SHAPES
from megatron_ext.picture_world.detected import DetectedObject, DetectedScene
from megatron_ext.picture_world.render import BACKGROUND_RGB, RGB, TONE, render
from megatron_ext.picture_world.world import GRID, RADIUS, Background, Scene, SceneObject

EDGE = 0.45
"""Color of an outline, as a fraction of the fill's color."""
RADII = (0.955, 0.99)
ROTATIONS = (-8, -4, 0, 4, 8)
BLURS = (0.0, 0.012, 0.022)
"""Standard deviations of the templates' blur, as fractions of the side."""
REACH = 0.18
"""Half the side of an object's matching window, as a fraction of the picture's side."""
OFFSETS = (-0.7, 0.0, 0.7)
"""Pixels by which a template is shifted along each axis."""
SMALLEST_PATCH = 0.0012
"""Area of the smallest patch of one color that is considered, as a fraction of the picture's area."""
SMALLEST_REST = 0.004
"""The same for patches that only differ from the background."""
LEAST_EXPLAINED = 0.6
"""Share of the difference from the background that a template must explain to be accepted."""
BACKGROUND_LABEL = 2 * len(COLORS)
PALETTE = np.array([RGB[color] for color in COLORS], dtype=np.float64)


def detect(picture) -> DetectedScene:
    """Detect the background and the objects of a picture.

    Args:
        picture: a PIL image, a uint8 array [side, side, 3], or a float tensor [3, side, side] in [-1, 1]; at least 32
            pixels along a side.

    Raises:
        ValueError: the picture has another form.
    """
    pixels = as_pixels(picture)
    if (tiles := mosaic_detection.read_tiles(pixels)) is not None:
        return mosaic_detection.detect(tiles)
    base = _border_color(pixels)
    claimed = np.zeros(pixels.shape[:2], dtype=bool)
    labels = _labels(pixels, base)
    objects = _objects(pixels, base, _patches(np.where(labels < len(COLORS), labels, -1), SMALLEST_PATCH), claimed)
    # Strong compression removes the color patch of a small object, but not its difference from the background.
    rest = np.where((labels < BACKGROUND_LABEL) & ~claimed, 0, -1)
    objects += _objects(pixels, base, _patches(rest, SMALLEST_REST), claimed)
    objects.sort(key=lambda o: (o.row, o.column, o.y, o.x))
    return DetectedScene(_background_name(base), tuple(objects))


def _objects(pixels, base, patches: list[np.ndarray], claimed: np.ndarray) -> list[DetectedObject]:
    """The objects at patches [side, side], large patches first; marks their pixels in ``claimed``."""
    objects = []
    remaining = sorted(patches, key=np.sum)
    while remaining:
        patch = remaining.pop()
        if (patch & claimed).sum() > 0.4 * patch.sum():
            continue
        others = functools.reduce(np.logical_or, remaining, claimed)
        if match := _match(pixels, base, patch, claimed, others):
            item, support = match
            objects.append(item)
            claimed |= support
    return objects


def as_pixels(picture) -> np.ndarray:
    """A picture in any of :func:`detect`'s forms, as float64 [side, side, 3] in 0 .. 255."""
    if isinstance(picture, torch.Tensor):
        if not picture.is_floating_point() or picture.dim() != 3 or picture.shape[0] != 3:
            raise ValueError(f"a tensor must be float [3, side, side] in [-1, 1], not {tuple(picture.shape)}")
        pixels = (picture.detach().cpu().double().numpy().transpose(1, 2, 0).clip(-1, 1) + 1) * 127.5
    else:
        pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"an array must be uint8 [side, side, 3], not {pixels.dtype} {pixels.shape}")
        pixels = pixels.astype(np.float64)
    if pixels.shape[0] != pixels.shape[1] or len(pixels) < 32:
        raise ValueError(f"a picture must be square, 32 pixels or more, not {pixels.shape[0]} x {pixels.shape[1]}")
    return pixels


def _border_color(pixels: np.ndarray) -> np.ndarray:
    """Median of the outermost pixels: objects do not touch the border, and patterns vary around their color."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    return np.median(border, axis=0)


def _split_gray(colors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colors [..., 3] as their gray part [...] and the rest [..., 3]; patterns only change the gray part."""
    gray = colors.mean(-1)
    return gray, colors - gray[..., None]


def _background_name(base: np.ndarray) -> str:
    """The nearest background of the palette; the variation of a pattern counts little."""

    def distance(name: str) -> float:
        gray, rest = _split_gray(base - np.array(BACKGROUND_RGB[name], dtype=np.float64))
        return float(np.hypot(np.linalg.norm(rest), max(abs(gray) - 2 * TONE, 0.0) + 0.2 * abs(gray)))

    return min(BACKGROUND_RGB, key=distance)


def _difference(pixels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Distances [..., n] of pixels [..., 3] from colors [n, 3]; brightness counts less than hue."""
    gray, rest = _split_gray(pixels[..., None, :] - colors)
    return np.sqrt((rest**2).sum(-1) + 0.75 * gray**2)


def _labels(pixels: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The label nearest to each pixel: the index of a palette color, then of an outline, and from
    :data:`BACKGROUND_LABEL` on the background."""
    backgrounds = base + np.array([-2, -1, 0, 1, 2])[:, None] * TONE
    return _difference(pixels, np.concatenate([PALETTE, EDGE * PALETTE, backgrounds])).argmin(-1)


def _patches(labels: np.ndarray, smallest: float) -> list[np.ndarray]:
    """Connected sets of pixels with the same label (0 or more), as masks [side, side]; sets smaller than the fraction
    ``smallest`` of the picture are left out."""
    components = _components(labels)
    ids, sizes = np.unique(components[labels >= 0], return_counts=True)
    return [components == i for i, size in zip(ids, sizes) if size >= max(4, smallest * labels.size)]


def _components(labels: np.ndarray) -> np.ndarray:
    """Number of each pixel's 4-connected component of equal labels."""
    component = np.arange(labels.size).reshape(labels.shape)
    down, right = labels[1:] == labels[:-1], labels[:, 1:] == labels[:, :-1]
    while True:
        before = component.copy()
        for low, high, joined in (
            (component[:-1], component[1:], down),
            (component[:, :-1], component[:, 1:], right),
        ):
            np.maximum(low, high, out=low, where=joined)
            np.maximum(low, high, out=high, where=joined)
        if (component == before).all():
            return component


@dataclass(frozen=True)
class _Templates:
    """Coverage of every pixel of a window by fill and by outline, each [n, window * window], and the (shape, size,
    radius) that each template shows.

    The center of mass of a template's fill is in the middle of the window; ``shifts`` [n, 2] (x, y in pixels) lead from
    there to the object's center.
    """

    fill: np.ndarray
    edge: np.ndarray
    shifts: np.ndarray
    names: tuple[tuple[str, str, float], ...]
    window: int

    @functools.cached_property
    def products(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums over pixels of fill * fill, fill * edge and edge * edge."""
        return tuple((a * b).sum(1) for a, b in ((self.fill,) * 2, (self.fill, self.edge), (self.edge,) * 2))


@functools.lru_cache(maxsize=4)
def _templates(side: int) -> _Templates:
    half = round(REACH * side)
    fills, edges, shifts, names = [], [], [], []
    for shape in SHAPES:
        for size in RADIUS:
            for factor in RADII:
                for rotation in ROTATIONS:
                    radius = RADIUS[size] * factor
                    fill, edge = _coverage(shape, size, radius, rotation, side)
                    for blur in BLURS:
                        blurred = [_blur(part, blur * side) for part in (fill, edge)]
                        x, y = _center(blurred[0])
                        windows = [_window(part[None], x, y, half)[0] for part in blurred]
                        fills.append(windows[0].ravel())
                        edges.append(windows[1].ravel())
                        shifts.append((side / 2 - x, side / 2 - y))
                        names.append((shape, size, radius))
    fills, edges = (np.array(part, dtype=np.float32) for part in (fills, edges))
    return _Templates(fills, edges, np.array(shifts), tuple(names), 2 * half + 1)


def _coverage(shape: str, size: str, radius: float, rotation: float, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of each pixel by the fill and the outline of an object in the middle, each [side, side]."""
    item = SceneObject(shape, "red", size, 1, 1, 0.5, 0.5, radius, rotation)
    picture = render(Scene(0, "test", 0, Background("gray", "plain", 0, 0.0), (item,)), side)
    base = np.array(BACKGROUND_RGB["gray"], dtype=np.float64)
    red = np.array(RGB["red"], dtype=np.float64)
    # Every pixel is a mixture of three known colors.
    mixture = np.stack([red - base, EDGE * red - base], axis=1)
    parts = (np.asarray(picture, dtype=np.float64) - base) @ np.linalg.pinv(mixture).T
    parts[np.abs(parts) < 0.02] = 0
    return parts[..., 0], parts[..., 1]


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    if sigma == 0:
        return image
    reach = int(np.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        image = np.apply_along_axis(np.convolve, axis, image, weights, mode="same")
    return image


def _center(mass: np.ndarray) -> tuple[float, float]:
    """Center of mass (x, y) in pixels, where pixel 0 extends from 0 to 1."""
    mass = mass.clip(0)
    v, u = np.mgrid[0 : len(mass), 0 : len(mass)] + 0.5
    return float((u * mass).sum() / mass.sum()), float((v * mass).sum() / mass.sum())


def _window(channels: np.ndarray, x: float, y: float, half: int) -> np.ndarray:
    """Channels [c, side, side] sampled around (x, y) bilinearly: [c, window, window]; zero outside."""
    steps = np.arange(-half, half + 1)
    padded = np.pad(channels, ((0, 0), (half + 3,) * 2, (half + 3,) * 2))
    u, v = x - 0.5 + steps + half + 3, y - 0.5 + steps + half + 3
    left, top = int(np.floor(u[0])), int(np.floor(v[0]))
    a, b = u[0] - left, v[0] - top
    n = len(steps)
    part = padded[:, top : top + n + 1, left : left + n + 1]
    rows = (1 - b) * part[:, :-1] + b * part[:, 1:]
    return (1 - a) * rows[:, :, :-1] + a * rows[:, :, 1:]


def _match(pixels, base, patch, claimed, others) -> tuple[DetectedObject, np.ndarray] | None:
    """The object at a patch, and the pixels that it covers; None if no template fits.

    ``claimed`` are the pixels of earlier objects, ``others`` these and the pixels of other patches.
    """
    side = len(pixels)
    templates = _templates(side)
    half = templates.window // 2
    x, y = _center(patch.astype(np.float64))
    local = _local_background(pixels, base, x, y)
    difference = (pixels - local).transpose(2, 0, 1)
    difference[:, claimed] = 0
    moves = [(x + dx, y + dy) for dy in OFFSETS for dx in OFFSETS]
    moves = [(u, v) for u, v in moves if 0 < u < side and 0 < v < side]
    windows = (
        np.stack([_window(difference, u, v, half) for u, v in moves]).reshape(len(moves), 3, -1).astype(np.float32)
    )
    # |difference - fill * f - edge * e|^2, multiplied out, for every template, place and color at once.
    f, e = ((part - local).astype(np.float32) for part in (PALETTE, EDGE * PALETTE))
    toward_f, toward_e = (np.einsum("mcp,kc->pmk", windows, part).reshape(windows.shape[2], -1) for part in (f, e))
    ff, fe, ee = templates.products
    own = ff[:, None] * (f * f).sum(1) + 2 * fe[:, None] * (f * e).sum(1) + ee[:, None] * (e * e).sum(1)
    fit = 2 * (templates.fill @ toward_f + templates.edge @ toward_e)
    gain = fit.reshape(len(own), len(moves), len(COLORS)) - own[:, None]
    template, move, color = np.unravel_index(gain.argmax(), gain.shape)
    return _accept(templates, template, moves[move], COLORS[color], gain.max(), difference, others)


def _accept(templates, template, place, color, gain, difference, others) -> tuple[DetectedObject, np.ndarray] | None:
    """The object that a template shows and its pixels; None if the template explains too little of the picture."""
    side, half = difference.shape[1], templates.window // 2
    shape, size, radius = templates.names[template]
    window = (templates.fill[template] + templates.edge[template]).reshape(templates.window, -1)
    v, u = np.mgrid[0:side, 0:side] + 0.5
    # Map the window back onto the picture's pixels.
    columns = np.rint(u - place[0]).astype(int) + half
    rows = np.rint(v - place[1]).astype(int) + half
    inside = (columns >= 0) & (columns < templates.window) & (rows >= 0) & (rows < templates.window)
    support = np.zeros((side, side), dtype=bool)
    support[inside] = window[rows[inside], columns[inside]] > 0.15
    energy = (difference**2).sum(0)
    near = support | (inside & ~others & (np.hypot(u - place[0], v - place[1]) < side * 1.1 * radius))
    explained = gain / max(energy[near].sum(), 1e-9)
    if explained < LEAST_EXPLAINED:
        return None
    x, y = (np.array(place) + templates.shifts[template]) / side
    row, column = (min(max(int(c * GRID), 0), GRID - 1) for c in (y, x))
    item = DetectedObject(
        shape, color, size, row, column, float(x), float(y), float(radius), float(min(max(explained, 0), 1))
    )
    return item, support


def _local_background(pixels: np.ndarray, base: np.ndarray, x: float, y: float) -> np.ndarray:
    """The background color around a place: the mean of nearby pixels that differ from it at most by a pattern."""
    v, u = np.mgrid[0 : len(pixels), 0 : len(pixels)] + 0.5
    near = np.hypot(u - x, v - y) < REACH * len(pixels)
    gray, rest = _split_gray(pixels - base)
    plain = near & (np.linalg.norm(rest, axis=-1) < 22) & (np.abs(gray) < 2.5 * TONE)
    return pixels[plain].mean(0) if plain.sum() >= 8 else base

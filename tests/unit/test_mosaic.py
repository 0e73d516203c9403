"""The compositional world: what its tiles tell, and reading its pictures."""

import io
import itertools
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from megatron_ext.errors import UserError
from megatron_ext.evaluation.faithfulness import ALL, STRICT, measure
from megatron_ext.picture_world.captions import caption
from megatron_ext.picture_world.check import check
from megatron_ext.picture_world.detected import DetectedObject, DetectedScene
from megatron_ext.picture_world.detection import as_pixels, detect
from megatron_ext.picture_world.facts import read_caption
from megatron_ext.picture_world.mosaic import GLYPHS, INKS, SIDE, TILES, stripes
from megatron_ext.picture_world.mosaic_detection import detect as detect_tiles
from megatron_ext.picture_world.mosaic_detection import read_tiles
from megatron_ext.picture_world.questions import questions
from megatron_ext.picture_world.render import render
from megatron_ext.picture_world.world import Scene, World, make_scene

WORLD = World(kinds=4, objects=3, variation=0, backgrounds=2, compositional=True)
SCENES = [make_scene(5, split, index, WORLD) for split in ("train", "test") for index in range(60)]


ALL_PAIRS = set(itertools.product(WORLD.shapes, WORLD.colors))


def tiles_of(scene: Scene) -> np.ndarray:
    """The pixels of each tile [9, 9, 6, 6, 3]."""
    return np.asarray(render(scene, 54)).reshape(SIDE, 6, SIDE, 6, 3).transpose(0, 2, 1, 3, 4)


@pytest.mark.parametrize("pairs, most", [(ALL_PAIRS, 1 / 2), (ALL_PAIRS - set(WORLD.held_out), 2 / 3)])
def test_a_tile_and_its_place_leave_two_shapes_and_two_colors(pairs, most):
    seen = defaultdict(list)
    for (shape, color), first in itertools.product(pairs, (0, 1)):
        for row, column in np.ndindex(TILES, TILES):
            ink = stripes(color, first)[column] if GLYPHS[shape][row, column] else ""
            seen[row, column, ink].append((shape, color))
    for objects in seen.values():
        for values in zip(*objects):
            assert max(Counter(values).values()) / len(values) <= most


@pytest.mark.parametrize("quality", [None, 95], ids=["exact", "JPEG"])
def test_rendered_scenes_are_read_exactly(quality):
    for scene in SCENES:
        picture = render(scene, 54)
        if quality:
            file = io.BytesIO()
            picture.save(file, format="JPEG", quality=quality, subsampling=0)
            picture = Image.open(file)
        seen = detect(picture)
        found = [(o.shape, o.color, o.row, o.column) for o in seen.objects]
        assert found == sorted(((o.shape, o.color, o.row, o.column) for o in scene.objects), key=lambda o: o[2:])
        assert seen.background == scene.background.color
        assert check(picture, caption(scene)).all_right


def test_pictures_of_the_other_worlds_are_not_read_as_tiles():
    for world in (World(), World(kinds=4, variation=0, backgrounds=2)):
        for index in range(100):
            assert read_tiles(as_pixels(render(make_scene(5, "train", index, world), 54))) is None


@pytest.mark.parametrize("shape", WORLD.shapes)
def test_an_object_may_have_one_wrong_tile_and_not_two(shape):
    scene = next(s for s in SCENES if len(s.objects) == 1 and s.objects[0].shape == shape)
    (item,) = scene.objects
    pixels = np.asarray(render(scene, 54)).copy()
    background = pixels[-1 if item.row == 0 else 0, 0].copy()
    # The center last: a heart or a star without it may have either of two colors.
    inked = sorted(np.argwhere(GLYPHS[shape]).tolist(), key=lambda tile: tile == [1, 1])
    for (row, column), objects in zip(inked, ([(shape, item.color)], [])):
        top, left = (6 * (TILES * cell + tile) for cell, tile in ((item.row, row), (item.column, column)))
        pixels[top : top + 6, left : left + 6] = background
        seen = detect(pixels)
        assert [(o.shape, o.color) for o in seen.objects] == objects
        assert seen.unknown == 1 - len(objects)


def test_what_is_no_object_is_not_overlooked():
    scene = next(s for s in SCENES if len(s.objects) == 1)
    pixels = np.asarray(render(scene, 54)).copy()
    row, column = next(cell for cell in np.ndindex(3, 3) if cell != (scene.objects[0].row, scene.objects[0].column))
    pixels[18 * row : 18 * row + 6, 18 * column : 18 * column + 6] = INKS["r"]
    verdict = check(pixels, caption(scene))
    assert (verdict.extra, verdict.all_right) == (1, False)
    tiles = read_tiles(as_pixels(render(scene, 54)))
    tiles[tiles == scene.background.color] = "navy"
    tiles[np.indices(tiles.shape).sum(0) % 2 == 0] = "gray"
    assert detect_tiles(tiles).background == ""


def test_it_does_not_pay_to_draw_every_color_instead_of_guessing_one():
    facts = [read_caption(caption(scene)) for scene in SCENES]
    cells, rng = list(np.ndindex(3, 3)), random.Random(0)
    guessed, greedy = [], []
    for scene in SCENES:
        one = [(o.shape, rng.choice(WORLD.colors), (o.row, o.column)) for o in scene.objects]
        pairs = itertools.product(sorted({o.shape for o in scene.objects}), WORLD.colors)
        every = [(*pair, cells[number % 9]) for number, pair in enumerate(pairs)]
        for drawn, objects in ((guessed, one), (greedy, every)):
            detected = (DetectedObject(shape, color, "large", *cell, 0, 0, 0, 1) for shape, color, cell in objects)
            drawn.append(DetectedScene(scene.background.color, tuple(detected)))
    guessed, greedy = (measure(drawn, facts) for drawn in (guessed, greedy))
    assert greedy.right[ALL] - greedy.control[ALL] > guessed.right[ALL] - guessed.control[ALL] + 10
    assert greedy.right[STRICT] - greedy.control[STRICT] < guessed.right[STRICT] - guessed.control[STRICT] + 1


def test_texts_do_not_mention_sizes():
    texts = [caption(scene) for scene in SCENES]
    texts += [q.text for scene in SCENES for q in questions(scene, 5)]
    assert not [text for text in texts if "small" in text or "large" in text]


@pytest.mark.parametrize(
    "settings",
    [{"kinds": 4, "variation": 0.5}, {"kinds": 8, "variation": 0}],
)
def test_a_world_that_cannot_be_is_refused(settings):
    with pytest.raises(
        UserError, match=f"kinds is {settings['kinds']} and variation {settings['variation']}, must be 4"
    ):
        World(**settings, compositional=True)


def test_a_size_that_tiles_do_not_divide_is_refused():
    with pytest.raises(UserError, match="size is 64; .* multiple of 9"):
        render(SCENES[0], 64)

"""The compositional world: what its tiles tell, and reading its pictures."""

import io
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from megatron_ext.errors import UserError
from megatron_ext.picture_world.captions import caption
from megatron_ext.picture_world.check import check
from megatron_ext.picture_world.detection import as_pixels, detect
from megatron_ext.picture_world.mosaic import GLYPHS, SIDE, TILES
from megatron_ext.picture_world.mosaic_detection import read_tiles
from megatron_ext.picture_world.questions import questions
from megatron_ext.picture_world.render import render
from megatron_ext.picture_world.world import Scene, World, make_scene

WORLD = World(kinds=4, objects=3, variation=0, backgrounds=2, compositional=True)
SCENES = [make_scene(5, split, index, WORLD) for split in ("train", "test") for index in range(60)]


def tiles_of(scene: Scene) -> np.ndarray:
    """The pixels of each tile [9, 9, 6, 6, 3]."""
    return np.asarray(render(scene, 54)).reshape(SIDE, 6, SIDE, 6, 3).transpose(0, 2, 1, 3, 4)


def best_guess(attribute: str) -> float:
    """How often an attribute is right if it is guessed from one tile and its place in the object, with all that the
    scenes show about them."""
    seen = defaultdict(Counter)
    for scene in SCENES:
        tiles = tiles_of(scene)
        for item in scene.objects:
            for place in np.ndindex(TILES, TILES):
                tile = tiles[TILES * item.row + place[0], TILES * item.column + place[1]].tobytes()
                seen[place, scene.background.color, tile][getattr(item, attribute)] += 1
    return sum(max(counts.values()) for counts in seen.values()) / sum(counts.total() for counts in seen.values())


def test_a_tile_and_its_place_leave_two_shapes_and_two_colors():
    assert best_guess("shape") == pytest.approx(0.5, abs=0.1)
    assert best_guess("color") < 0.55  # less, where the tile is not inked


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


def test_an_object_may_have_one_wrong_tile_and_not_two():
    scene = next(scene for scene in SCENES if len(scene.objects) == 1)
    (item,) = scene.objects
    pixels = np.asarray(render(scene, 54)).copy()
    background = pixels[-1 if item.row == 0 else 0, 0].copy()
    inked = np.argwhere(GLYPHS[item.shape]) + (TILES * item.row, TILES * item.column)
    for (row, column), objects in zip(inked, ([(item.shape, item.color)], [])):
        pixels[6 * row : 6 * row + 6, 6 * column : 6 * column + 6] = background
        assert [(o.shape, o.color) for o in detect(pixels).objects] == objects


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

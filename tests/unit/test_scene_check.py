"""The check of pictures: rendered objects are detected, captions are read, and the two are compared."""

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from megatron_ext.errors import UserError
from megatron_ext.picture_world.attributes import COLORS, SHAPES
from megatron_ext.picture_world.captions import caption
from megatron_ext.picture_world.check import check, compare, summary
from megatron_ext.picture_world.detected import DetectedScene
from megatron_ext.picture_world.detection import detect
from megatron_ext.picture_world.facts import read_caption
from megatron_ext.picture_world.render import render
from megatron_ext.picture_world.world import Background, Scene, SceneObject, World, make_scene

SCENES = [make_scene(3, split, index) for split in ("train", "test") for index in range(25)]
PLAIN = [make_scene(3, split, index, World(variation=0.0)) for split in ("train", "test") for index in range(25)]


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer)


def noisy(picture: Image.Image, sigma: float) -> Image.Image:
    noise = np.random.default_rng(len(picture.tobytes())).normal(0, sigma, (*picture.size, 3))
    return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))


def objects(scene: Scene | DetectedScene, *attributes: str) -> Counter:
    return Counter(tuple(getattr(o, a) for a in attributes) for o in scene.objects)


def rates(scenes, size, degrade=lambda picture: picture) -> dict[str, float]:
    """Shares of rendered objects (and of backgrounds) that are detected as rendered, in their cell; the share of
    detected objects that were rendered; and the share of pictures without any mistake."""
    totals = Counter()
    for scene in scenes:
        seen = detect(degrade(render(scene, size)))
        rendered = objects(scene, "color", "shape", "row", "column")
        detected = objects(seen, "color", "shape", "row", "column")
        sized = ("color", "shape", "row", "column", "size")
        totals["rendered"] += rendered.total()
        totals["seen"] += detected.total()
        totals["both"] += (rendered & detected).total()
        totals["sized"] += (objects(scene, *sized) & objects(seen, *sized)).total()
        totals["backgrounds"] += seen.background == scene.background.color
        totals["perfect"] += rendered == detected
    return {
        "detected": totals["both"] / totals["rendered"],
        "true": totals["both"] / totals["seen"],
        "sized": totals["sized"] / totals["rendered"],
        "background": totals["backgrounds"] / len(scenes),
        "perfect": totals["perfect"] / len(scenes),
    }


@pytest.mark.parametrize("size, scenes", [(48, SCENES), (64, SCENES), (48, PLAIN)], ids=["48", "64", "48 plain"])
def test_rendered_objects_are_detected(size, scenes):
    measured = rates(scenes, size)
    assert min(measured.values()) > 0.97, measured


@pytest.mark.parametrize(
    "degrade",
    [
        lambda picture: picture.filter(ImageFilter.GaussianBlur(0.7)),
        lambda picture: jpeg(picture, 60),
        lambda picture: noisy(picture, 8),
        lambda picture: jpeg(noisy(picture.filter(ImageFilter.GaussianBlur(0.7)), 5), 75),
    ],
    ids=["blur", "jpeg", "noise", "all"],
)
def test_a_degraded_picture_is_still_read(degrade):
    measured = rates(SCENES[::3], 64, degrade)
    assert min(measured["detected"], measured["true"]) > 0.93, measured


def test_an_empty_picture_has_no_objects():
    for pattern in ("plain", "striped", "checkered", "dotted", "shaded"):
        for color in ("gray", "navy", "beige", "mint", "lavender"):
            seen = detect(render(Scene(0, "test", 0, Background(color, pattern, 1, 0.3), ()), 64))
            assert seen.objects == () and seen.background == color


def test_a_picture_is_the_same_in_every_form():
    picture = render(SCENES[0], 64)
    tensor = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 127.5 - 1
    seen = detect(picture)
    assert seen == detect(np.asarray(picture))
    assert objects(seen, "color", "shape", "place") == objects(detect(tensor), "color", "shape", "place")
    for wrong in (
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 48, 3), np.uint8),
        torch.zeros(64, 64, 3),
        np.ones((64, 64, 3)),
    ):
        with pytest.raises(ValueError):
            detect(wrong)


def test_captions_are_read_as_written():
    for split in ("train", "test"):
        for index in range(200):
            scene = make_scene(4, split, index)
            facts = read_caption(caption(scene))
            assert facts.counts == objects(scene, "color", "shape")
            for pair, place in facts.places:
                assert objects(scene, "color", "shape", "place")[(*pair, place)] == 1
            for pair, size in facts.sizes:
                assert {o.size for o in scene.objects if pair in (None, (o.color, o.shape))} == {size}
            for (color, shape), word, other in facts.relations:
                (a,) = [o for o in scene.objects if (o.color, o.shape) == (color, shape)]
                (b,) = [o for o in scene.objects if (o.color, o.shape) == other]
                axis, sign = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}[word]
                assert sign * (getattr(b, axis) - getattr(a, axis)) > 0
            assert facts.background in (None, scene.background.color)


def test_every_kind_of_fact_is_read_somewhere():
    read = [read_caption(caption(scene)) for scene in SCENES]
    for kind in ("counts", "places", "sizes", "relations", "background"):
        assert sum(bool(getattr(facts, kind)) for facts in read) > 10, kind


@pytest.mark.parametrize(
    "wrong", ["A red house.", "Two red circles. The sky is blue.", "", "A picture of a red circles dog."]
)
def test_a_caption_of_another_world_is_refused(wrong):
    with pytest.raises(UserError, match="picture world"):
        read_caption(wrong)


ITEMS = (
    SceneObject("circle", "red", "large", 1, 1, 0.5, 0.5, 0.15, 0.0),
    SceneObject("circle", "red", "small", 2, 2, 0.83, 0.83, 0.09, 0.0),
    SceneObject("star", "blue", "large", 0, 0, 0.17, 0.17, 0.15, 0.0),
)
SAYING = "There are two red circles and a blue star at the top left. The blue star is large. The background is gray."


def picture_of(items, background="gray") -> Image.Image:
    return render(Scene(0, "test", 0, Background(background, "striped", 1, 0.2), tuple(items)), 64)


def wrong_kinds(verdict) -> set[str]:
    return {kind for kind, (right, stated) in verdict.facts.items() if right < stated}


def test_a_picture_as_its_caption_says_is_all_right():
    verdict = check(picture_of(ITEMS), SAYING)
    assert verdict.all_right and verdict.extra == 0 and not wrong_kinds(verdict)
    assert verdict.facts["object"] == verdict.facts["color"] == (3, 3)
    assert verdict.facts["count"] == (2, 2) and verdict.facts["place"] == verdict.facts["size"] == (1, 1)


@pytest.mark.parametrize(
    ("picture", "wrong", "extra"),
    [
        (picture_of([*ITEMS[:2], replace(ITEMS[2], color="green")]), {"color", "count", "place", "size"}, 1),
        (picture_of(ITEMS[1:]), {"object", "color", "count"}, 0),
        (picture_of([*ITEMS, replace(ITEMS[1], column=0, x=0.17)]), {"count"}, 1),
        (picture_of([*ITEMS, SceneObject("moon", "pink", "small", 2, 0, 0.17, 0.83, 0.09, 0.0)]), set(), 1),
        (picture_of([*ITEMS[:2], replace(ITEMS[2], column=2, x=0.83)]), {"place"}, 0),
        (picture_of([*ITEMS[:2], replace(ITEMS[2], size="small", radius=0.09)]), {"size"}, 0),
        (picture_of(ITEMS, "navy"), {"background"}, 0),
    ],
    ids=["color", "missing", "an extra object", "unnamed", "place", "size", "background"],
)
def test_mistakes_of_a_picture_are_named(picture, wrong, extra):
    verdict = check(picture, SAYING)
    assert wrong_kinds(verdict) == wrong and verdict.extra == extra and not verdict.all_right


def test_every_fact_is_named_and_judged():
    verdict = check(picture_of([*ITEMS[:2], replace(ITEMS[2], color="green")]), SAYING)
    assert [(fact.kind, fact.words, fact.right) for fact in verdict.checked] == [
        ("object", "a circle", True),
        ("object", "another circle", True),
        ("object", "a star", True),
        ("color", "a red circle", True),
        ("color", "another red circle", True),
        ("color", "a blue star", False),
        ("count", "two red circles", True),
        ("count", "one blue star", False),
        ("place", "blue star at the top left", False),
        ("size", "large blue star", False),
        ("background", "gray background", True),
    ]
    assert verdict.facts["color"] == (2, 3) and verdict.facts["relation"] == (0, 0)


def test_relations_are_by_place():
    facts = read_caption("A red circle and a blue star. The red circle is left of the blue star.")
    red = SceneObject("circle", "red", "large", 1, 0, 0.17, 0.5, 0.15, 0.0)
    blue = SceneObject("star", "blue", "large", 1, 2, 0.83, 0.5, 0.15, 0.0)
    assert compare(detect(picture_of([red, blue])), facts).all_right
    swapped = compare(detect(picture_of([replace(red, column=2, x=0.83), replace(blue, column=0, x=0.17)])), facts)
    assert wrong_kinds(swapped) == {"relation"}


def test_pictures_match_their_captions_and_not_those_of_others():
    seen = [detect(render(scene, 64)) for scene in SCENES]
    facts = [read_caption(caption(scene)) for scene in SCENES]
    own = summary(compare(s, f) for s, f in zip(seen, facts))
    shuffled = summary(compare(s, f) for s, f in zip(seen, facts[7:] + facts[:7]))
    assert own["all_right"] > 0.95 and own["extra_objects"] < 0.05
    assert shuffled["all_right"] == 0
    for kind, most in (("object", 0.5), ("color", 0.3), ("count", 0.3), ("place", 0.2), ("background", 0.5)):
        assert own[kind]["right"] > 0.95 and shuffled[kind]["right"] < most, (kind, own, shuffled)
        assert own[kind]["facts"] == shuffled[kind]["facts"]


def test_every_shape_in_every_color_is_distinguished():
    for size in ("small", "large"):
        for i, shape in enumerate(SHAPES):
            items = [
                SceneObject(
                    shape,
                    color,
                    size,
                    n // 3,
                    n % 3,
                    (n % 3 + 0.5) / 3,
                    (n // 3 + 0.5) / 3,
                    0.09 if size == "small" else 0.15,
                    n * 2.0 - 8,
                )
                for n, color in enumerate(COLORS)
            ]
            seen = detect(picture_of(items, ("gray", "navy", "beige", "mint", "lavender")[i % 5]))
            assert objects(seen, "shape", "color", "size", "place") == Counter(
                (shape, o.color, size, o.place) for o in items
            )

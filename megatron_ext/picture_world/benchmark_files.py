"""Benchmarks from the pictures of a split, in the formats of real benchmarks, so that the same evaluators read them.

::

    OUT/pope/coco_pope_{random,popular,adversarial}.json   an object a line; pictures in OUT/pope/val2014/
    OUT/mme/SUBTASK/KEY.txt, KEY.jpg                        two lines ``question TAB answer`` beside each picture
    OUT/gqa/testdev_balanced_questions.json, images/ID.jpg
    OUT/seed/SEED-Bench.json, SEED-Bench-image/ID           pictures without a file ending, as in the release
    OUT/mjhq/meta_data.json, CATEGORY/ID.jpg                captions as prompts; categories by number of objects
    OUT/edits/edits.json, images/, references/              instructions to edit pictures (:mod:`.edit_files`)
    OUT/benchmarks.json                                     the manifest, written last: settings and fingerprint

The questions are worded as in training, and their answers are balanced. The same settings give the same bytes.
"""

import itertools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ext.command_line import progress
from megatron_ext.errors import UserError, check_names
from megatron_ext.files import read_json, write_json
from megatron_ext.picture_world import multiple_choice
from megatron_ext.picture_world.captions import (
    NUMBERS,
    article,
    caption,
    exactly,
    number_of_groups,
    pair_name,
    plural,
    relation_words,
    unique_objects,
)
from megatron_ext.picture_world.conversations import YES_OR_NO
from megatron_ext.picture_world.edit_files import EditConfig, write_edit_benchmark
from megatron_ext.picture_world.multiple_choice import absent_like
from megatron_ext.picture_world.questions import KINDS, ask
from megatron_ext.picture_world.render import render
from megatron_ext.picture_world.split_files import fingerprint
from megatron_ext.picture_world.splits import HELD_OUT
from megatron_ext.picture_world.world import OBJECT_COUNTS, RICHEST, Scene, SceneObject, World, make_scene

POPE_EACH = 3
"""Questions answered yes, and as many answered no, per picture (fewer if there are fewer kinds of objects)."""
GQA_TYPES = {
    "presence": ("verify", "obj"),
    "existence": ("verify", "obj"),
    "color": ("query", "attr"),
    "shape": ("query", "cat"),
    "place": ("query", "global"),
    "comparison": ("compare", "attr"),
    "relation": ("verify", "rel"),
    "logic": ("logical", "obj"),
    "counting": ("query", "obj"),
    "background": ("query", "global"),
}
"""Kind of question -> GQA's structural and semantic type."""
SEED_TYPES = {
    "Scene Understanding": 1,
    "Instance Identity": 2,
    "Instance Attributes": 3,
    "Instance Location": 4,
    "Instances Counting": 5,
    "Spatial Relation": 6,
    "Instance Interaction": 7,
    "Visual Reasoning": 8,
    "Text Understanding": 9,
}
COUNTS = (1, 2, 1, 3, 2)
"""The smaller number in MME's questions about numbers, picture by picture, as far as the world has so many objects;
more than four equal objects are rare."""
MME_SCENES = 1000
"""Most scenes that are searched for a picture of MME."""
GQA_CANDIDATES = 8
"""Candidate questions per kind, of which the one with the least frequent answer so far is selected."""
NAMES = ("pope", "mme", "gqa", "seed", "mjhq", "edits")
MANIFEST = "benchmarks.json"


@dataclass(frozen=True)
class BenchmarkConfig:
    """``pictures`` per benchmark (per subtask of MME), of ``size`` x ``size`` pixels, from a split.

    Attributes:
        names: the benchmarks to write, of :data:`NAMES`.
        kinds: the kinds of questions in GQA, of :data:`GQA_TYPES`; others are ignored. Empty: all of them.
    """

    pictures: int = 60
    size: int = 64
    seed: int = 1234
    split: str = "test"
    world: World = RICHEST
    names: tuple[str, ...] = NAMES
    kinds: tuple[str, ...] = ()

    def __post_init__(self):
        check_names("benchmarks", self.names, NAMES)
        check_names("kinds", self.kinds, KINDS)


def write_benchmarks(folder: Path, config: BenchmarkConfig) -> dict:
    """Write all benchmarks into ``folder``, unless they are there with these settings.

    Returns:
        The manifest (the settings, the number of questions of each benchmark, and a fingerprint of every byte written),
        with ``created``, whether this call wrote them.

    Raises:
        UserError: the folder holds other files.
    """
    settings = json.loads(json.dumps(asdict(config)))
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and was not made by this program; name another folder")
    if (folder / MANIFEST).is_file() and (manifest := read_json(folder / MANIFEST))["settings"] == settings:
        return {**manifest, "created": False}
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    counts = {}
    for name in progress(config.names, desc="benchmarks", leave=False):
        (partial / name).mkdir(parents=True)
        counts[name] = WRITERS[name](partial / name, config)
    manifest = {"settings": settings, "items": counts, "fingerprint": fingerprint(partial)}
    write_json(partial / MANIFEST, manifest)
    shutil.rmtree(folder, ignore_errors=True)  # its manifest shows that it was generated
    os.replace(partial, folder)
    return {**manifest, "created": True}


def _scenes(config: BenchmarkConfig) -> Iterator[Scene]:
    return (make_scene(config.seed, config.split, index, config.world) for index in itertools.count())


def _save(scene: Scene, config: BenchmarkConfig, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    render(scene, config.size).save(file, format="JPEG", quality=95, subsampling=0)


Pair = tuple[str, str]
"""(shape, color)."""


def _is_there(pair: Pair) -> str:
    return f"Is there {article(f'{pair[1]} {pair[0]}')}?"


def _pope(folder: Path, config: BenchmarkConfig) -> int:
    scenes = list(itertools.islice(_scenes(config), config.pictures))
    frequency = Counter(pair for scene in scenes for pair in {(o.shape, o.color) for o in scene.objects})
    for scene in scenes:
        _save(scene, config, folder / "val2014" / f"{scene.key}.jpg")
    total = 0
    for name in ("random", "popular", "adversarial"):
        lines = []
        for scene in scenes:
            rng = scene.random("pope")  # the same positives in all three
            present = sorted({(o.shape, o.color) for o in scene.objects})
            positives = rng.sample(present, min(POPE_EACH, len(present)))
            for pair, negative in zip(positives, _negatives(name, scene, positives, frequency, rng)):
                for named, label in ((pair, "yes"), (negative, "no")):
                    record = {"question_id": len(lines) + 1, "image": f"{scene.key}.jpg"}
                    lines.append({**record, "text": _is_there(named), "label": label})
        (folder / f"coco_pope_{name}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        total += len(lines)
    return total


def _negatives(
    name: str, scene: Scene, positives: list[Pair], frequency: Counter[Pair], rng: random.Random
) -> list[Pair]:
    """As many absent pairs as positives, all different."""
    shapes, colors = {o.shape for o in scene.objects}, {o.color for o in scene.objects}
    present = {(o.shape, o.color) for o in scene.objects}
    pairs = [(s, c) for s in scene.world.shapes for c in scene.world.colors]
    absent = [pair for pair in pairs if pair not in present and scene.speakable(*pair)]
    rng.shuffle(absent)
    match name:
        case "random":
            negatives: list[Pair] = []
            for pair in positives:
                alike = [p for p in absent_like(scene, pair) if p not in negatives]
                negatives.append(rng.choice(alike or [p for p in absent if p not in negatives]))
            return negatives
        case "popular":
            return sorted(absent, key=lambda p: -frequency[p])[: len(positives)]
        case "adversarial":
            # Objects that co-occur in this world have the colors and shapes of objects in the picture.
            return sorted(absent, key=lambda p: -(p[0] in shapes) - (p[1] in colors))[: len(positives)]
    raise ValueError(name)


def _mme(folder: Path, config: BenchmarkConfig) -> int:
    for subtask, make in MME.items():
        count = 0
        for scene in itertools.islice(_scenes(config), MME_SCENES * config.pictures):
            if count == config.pictures:
                break
            pair = make(scene, scene.random(f"mme {subtask}"), count)
            if not pair:
                continue
            _save(scene, config, folder / subtask / f"{scene.key}.jpg")
            lines = [f"{q} {YES_OR_NO}\t{a}\n" for q, a in zip(pair, ("Yes", "No"))]
            (folder / subtask / f"{scene.key}.txt").write_text("".join(lines))
            count += 1
        else:
            raise UserError(f"MME, {subtask}: only {count} of {MME_SCENES * config.pictures} scenes of this world fit")
    return 2 * len(MME) * config.pictures


YesNoPair = tuple[str, str] | None
"""A question with the answer yes and one with the answer no; None if the scene allows none."""


def _existence(scene: Scene, rng: random.Random, number: int) -> YesNoPair:
    item = rng.choice(scene.objects)
    absent = absent_like(scene, (item.shape, item.color))
    return (_is_there((item.shape, item.color)), _is_there(rng.choice(absent))) if absent else None


def _count(scene: Scene, rng: random.Random, number: int) -> YesNoPair:
    """Two neighboring numbers; the correct one is the smaller in every other picture, the larger in the others."""
    counts = [count for count in COUNTS if count < scene.world.objects]
    smaller = counts[number // 2 % len(counts)]
    right, wrong = (smaller, smaller + 1) if number % 2 == 0 else (smaller + 1, smaller)
    names = number_of_groups(scene).get(right)
    if not names:
        return None
    name = rng.choice(names)
    return exactly(right, name), exactly(wrong, name)


def _position(scene: Scene, rng: random.Random, number: int) -> YesNoPair:
    items = unique_objects(scene)
    pairs = [(a, b) for a in items for b in items if a is not b and relation_words(a, b)]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return tuple(f"Is the {pair_name(a)} {word} the {pair_name(b)}?" for word in rng.choice(relation_words(a, b)))


def _color(scene: Scene, rng: random.Random, number: int) -> YesNoPair:
    """The color of a shape. In the test split a held-out color is the correct one in every other picture, and the wrong
    one in the others."""
    shapes = Counter(o.shape for o in scene.objects)
    held_out = scene.split == "test" and number % 2 == 0
    items: list[SceneObject] = [o for o in scene.objects if shapes[o.shape] == 1 and o.held_out == held_out]
    if not items:
        return None
    item = rng.choice(items)
    wrong = [c for c in scene.world.colors if c != item.color]
    if scene.split == "test":
        wrong = [c for c in wrong if held_out or (item.shape, c) in HELD_OUT]
    else:
        wrong = [c for c in wrong if scene.speakable(item.shape, c)]
    return tuple(f"Is the {item.shape} {color}?" for color in (item.color, rng.choice(wrong)))


MME: dict[str, Callable[[Scene, random.Random, int], YesNoPair]] = {
    "existence": _existence,
    "count": _count,
    "position": _position,
    "color": _color,
}


def _gqa(folder: Path, config: BenchmarkConfig) -> int:
    entries: dict[str, dict] = {}
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in GQA_TYPES}
    for scene in itertools.islice(_scenes(config), config.pictures):
        rng = scene.random("gqa")
        _save(scene, config, folder / "images" / f"{scene.key}.jpg")
        for kind, (structural, semantic) in GQA_TYPES.items():
            if config.kinds and kind not in config.kinds:
                continue
            candidates = [question for question in (ask(scene, kind, rng) for _ in range(GQA_CANDIDATES)) if question]
            if candidates:
                question = min(candidates, key=lambda q: answers[kind][q.answer])
                answers[kind][question.answer] += 1
                entries[f"{len(entries) + 1:08d}"] = {
                    "question": question.text,
                    "imageId": scene.key,
                    "answer": question.answer,
                    "isBalanced": True,
                    "types": {"structural": structural, "semantic": semantic, "detailed": kind},
                }
    if not entries:
        raise UserError(f"GQA: no question of the kinds {', '.join(config.kinds)} about {config.pictures} pictures")
    write_json(folder / "testdev_balanced_questions.json", entries)
    return len(entries)


def _seed(folder: Path, config: BenchmarkConfig) -> int:
    entries = []
    for scene in itertools.islice(_scenes(config), config.pictures):
        rng = scene.random("seed")
        _save(scene, config, folder / "SEED-Bench-image" / scene.key)
        for kind in multiple_choice.KINDS:
            if question := multiple_choice.choose(scene, kind, rng):
                entries.append(
                    {
                        "answer": "ABCD"[question.choices.index(question.answer)],
                        **{f"choice_{letter}": choice for letter, choice in zip("abcd", question.choices)},
                        "data_id": scene.key,
                        "data_type": "image",
                        "question": question.text,
                        "question_id": str(len(entries) + 1),
                        "question_type_id": SEED_TYPES[kind],
                    }
                )
    write_json(folder / "SEED-Bench.json", {"questions": entries, "question_type": SEED_TYPES})
    return len(entries)


def _mjhq(folder: Path, config: BenchmarkConfig) -> int:
    """Equally many pictures of each number of objects, so that every category has enough for a distance."""
    counts = [count for count in OBJECT_COUNTS if count <= config.world.objects]
    missing = dict.fromkeys(counts, -(-config.pictures // len(counts)))
    entries = {}
    for scene in _scenes(config):
        count = len(scene.objects)
        if missing[count]:
            missing[count] -= 1
            category = f"{NUMBERS[count]}_{plural('object', count)}"
            entries[scene.key] = {"category": category, "prompt": caption(scene)}
            _save(scene, config, folder / category / f"{scene.key}.jpg")
        if not any(missing.values()):
            break
    write_json(folder / "meta_data.json", entries)
    return len(entries)


def _edits(folder: Path, config: BenchmarkConfig) -> int:
    settings = {"size": config.size, "world": config.world, "seed": config.seed}
    return write_edit_benchmark(folder, EditConfig(config.split, config.pictures, **settings))


WRITERS = {"pope": _pope, "mme": _mme, "gqa": _gqa, "seed": _seed, "mjhq": _mjhq, "edits": _edits}

"""Edits of the picture world: well defined, written as conversations and as a benchmark, checked object by object."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_ext.errors import UserError
from megatron_ext.evaluation import edits as evaluation
from megatron_ext.picture_world.attributes import PLACES
from megatron_ext.picture_world.captions import pair_name
from megatron_ext.picture_world.detection import detect
from megatron_ext.picture_world.edit_check import CHANGED, KEPT, check_edit
from megatron_ext.picture_world.edit_files import EditConfig, write_edit_benchmark, write_edits
from megatron_ext.picture_world.edits import KINDS, STEPS, make_edits
from megatron_ext.picture_world.render import render
from megatron_ext.picture_world.splits import split_of
from megatron_ext.picture_world.world import World
from megatron_ext.preprocess import units
from megatron_ext.preprocess.samples import ReadOptions

EASY = World(kinds=4, objects=2, variation=0, backgrounds=2)
SIZE = 54


def described(words: str, scene) -> list:
    """The objects of a scene that have every attribute in some words, found by reading them one by one."""
    return [
        item
        for item in scene.objects
        if item.shape in words.split()
        and (item.color in words.split() or not set(scene.world.colors) & set(words.split()))
    ]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("world", [EASY, World()], ids=["easy", "rich"])
def test_an_edit_names_one_object_and_changes_it_alone_into_a_scene_of_its_split(split, world):
    conversations = [make_edits(7, split, index, world, turns=2) for index in range(60)]
    for edit in (edit for conversation in conversations for edit in conversation):
        before, after = (Counter(scene.objects) for scene in (edit.before, edit.after))
        gone, new = list((before - after).elements()), list((after - before).elements())
        assert (len(gone), len(new)) == {"remove": (1, 0), "add": (0, 1)}.get(edit.kind, (1, 1))
        cells = [(item.row, item.column) for item in edit.after.objects]
        assert len(set(cells)) == len(cells) and edit.after.background == edit.before.background
        words = edit.instruction.removesuffix(".")
        if edit.kind == "recolor":
            assert replace(gone[0], color=new[0].color) == new[0] and words.endswith(new[0].color)
            words = words.removesuffix(new[0].color)
        if edit.kind == "move":
            assert pair_name(gone[0]) == pair_name(new[0]) and gone[0].size == new[0].size
            step = new[0].row - gone[0].row, new[0].column - gone[0].column
            assert words.endswith(f"to the {new[0].place}") or words.endswith(
                next((w for w in STEPS if STEPS[w] == step), "-")
            )
        if edit.kind == "add":
            assert words.endswith(f"{new[0].size} {pair_name(new[0])} at the {new[0].place}")
        else:
            assert described(words.lower(), edit.before) == gone
        if split != "test":
            assert split_of(edit.after.arrangement) == split
            assert not any(item.held_out for item in edit.after.objects)
    assert {conversation[0].kind for conversation in conversations} == set(KINDS)
    assert any(second.before == first.after for first, *rest in conversations for second in rest)


def test_the_result_has_every_fact_and_the_input_lacks_exactly_the_changed_ones():
    for index in range(12):
        (edit,) = make_edits(3, "validation", index, EASY, [list(KINDS)[index % len(KINDS)]])
        done = check_edit(detect(render(edit.after, SIZE)), edit.before, edit.after)
        assert done.all_right and done.facts(CHANGED)[1] > 0
        same = check_edit(detect(render(edit.before, SIZE)), edit.before, edit.after)
        assert same.facts(CHANGED)[0] == 0 and same.facts(KEPT) == done.facts(KEPT)
        nothing = check_edit(None, edit.before, edit.after)
        assert nothing.facts()[0] == 0 and nothing.facts()[1] == done.facts()[1]


def test_facts_are_counted_object_by_object():
    edit = next(
        e for i in range(50) for e in make_edits(3, "train", i, EASY, ["recolor"]) if len(e.before.objects) == 2
    )
    right = check_edit(detect(render(edit.after, SIZE)), edit.before, edit.after)
    assert right.facts(CHANGED) == (1, 1) and right.facts(KEPT) == (6, 6)
    (changed,) = set(edit.after.objects) - set(edit.before.objects)
    # The other object is lost, and a third one appears.
    free = next(
        (r, c) for r in range(3) for c in range(3) if (r, c) not in {(o.row, o.column) for o in edit.after.objects}
    )
    stray = replace(changed, row=free[0], column=free[1], x=(free[1] + 0.5) / 3, y=(free[0] + 0.5) / 3)
    wrong = check_edit(detect(render(replace(edit.after, objects=(changed, stray)), SIZE)), edit.before, edit.after)
    assert wrong.facts(CHANGED) == (1, 1) and wrong.facts(KEPT) == (3, 6) and wrong.extra == 1 and not wrong.all_right
    assert {PLACES[o.row][o.column] in f.words for f in wrong.checked for o in [changed] if f.kind == CHANGED} == {True}


def test_conversations_are_llava_records_with_the_picture_to_draw_in_the_answer(tmp_path):
    config = EditConfig("train", 12, turns=2, size=SIZE, world=EASY)
    first, again = write_edits(tmp_path, config), write_edits(tmp_path, config)
    assert first["created"] and not again["created"] and first["fingerprint"] == again["fingerprint"]
    file = tmp_path / "train" / "edits.json"
    records = json.loads(file.read_text())
    (unit,) = units.plan([file], len(records))
    samples = list(units.read(unit, ReadOptions(None, "conversation")))
    for index, (record, sample) in enumerate(zip(records, samples, strict=True)):
        edits = make_edits(config.seed, "train", index, EASY, turns=2)
        scenes = [edits[0].before, *(edit.after for edit in edits)]
        pictures = [np.asarray(Image.open(tmp_path / "train" / name)) for name in record["image"]]
        assert all(np.array_equal(p, np.asarray(render(s, SIZE))) for p, s in zip(pictures, scenes, strict=True))
        instructions = [edit.instruction for edit in edits]
        assert [mode for mode, _ in sample.segments] == [1, *[0, 3] * len(edits)]  # IMAGE, TEXT, DRAWN, TEXT, ...
        assert [text for mode, text in sample.segments if mode == 0] == instructions


def test_folders_of_edited_pictures_are_scored_against_their_inputs(tmp_path):
    count = write_edit_benchmark(_folder(tmp_path / "data"), EditConfig("validation", 8, size=SIZE, world=EASY))
    items = evaluation.read(tmp_path / "data")
    assert count == len(items) == 8 and [item.category for item in items[:4]] == list(KINDS)
    for name, of in (("done", "reference"), ("same", "image")):
        for item in items:
            file = _folder(tmp_path / name / item.category) / f"{item.id}.png"
            file.write_bytes(getattr(item, of).read_bytes())
    (tmp_path / "done" / items[0].category / f"{items[0].id}.png").unlink()
    done, same = (
        evaluation.score_folder(tmp_path / "data", None, tmp_path / name, name).scores for name in ("done", "same")
    )
    assert done.missing == 1 and done.headline[evaluation.WHOLE_COLUMN] == pytest.approx(100 * 7 / 8)
    assert same.headline[evaluation.DIFFERENCE] == 0 and same.details["changed facts"]["right"] == 0
    assert same.details["kept facts"]["right"] == 100 and same.headline[evaluation.WHOLE_COLUMN] == 0
    assert done.details["changed facts"]["from"] > 50 and done.details["move, whole pictures"]["right"] == 100
    assert done.details["recolor, whole pictures"]["facts"] == 2
    only = evaluation.score_folder(tmp_path / "data", ["move"], tmp_path / "done", "moves").scores
    assert only.questions == 2 and only.headline[evaluation.COLUMN] == 100
    with pytest.raises(UserError, match=r"edits\.json: has no kind 'paint'; it has add, move"):
        evaluation.read(tmp_path / "data", ["paint"])


def _folder(path):
    path.mkdir(parents=True, exist_ok=True)
    return path

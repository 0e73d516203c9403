"""Preparing the picture world: complete pieces are kept, stopped ones continued, changed ones made again."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_ext import config_file
from megatron_ext.analysis.scene_objects import object_batches
from megatron_ext.config import Config, SourceConfig
from megatron_ext.data.format import DRAWN, IMAGE, TEXT, Dataset
from megatron_ext.errors import UserError
from megatron_ext.picture_world.attributes import PLACES
from megatron_ext.preprocess import picture_world, pipeline
from megatron_ext.preprocess.recipe import Recipe, read_recipe
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from megatron_ext.vocabulary import Vocabulary
from support.programs import ROOT, run_program

EXAMPLES = ROOT / "examples"
SMALL = {
    "world": {"kinds": 4, "objects": 2, "variation": 0},
    "size": 18,
    "scenes": {"train": 40, "validation": 4, "questions": 3, "with_choices": 0},
    "split_turns": True,
    "question_sets": [{"name": "places", "seed": 5, "count": 6, "kinds": ["place"]}],
    "tokenizer": {"grid": 3, "codebook_size": 16, "options": {"held_out": 8}},
    "vocabulary_size": 320,
    "benchmarks": {"splits": ["validation"], "names": ["gqa"], "pictures": 2},
    "workers": 1,
}
PIECES = ["scenes train", "scenes validation", "benchmarks validation", "image tokenizer", "vocabulary"]
KINDS = ("questions", "captions", "texts")
PIECES += [f"data set {kind}-{split}" for split in ("train", "validation") for kind in KINDS]
PIECES += ["scenes with places", "data set places-train"]


def recipe(folder: Path, **changed) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(SMALL | changed))
    return read_recipe(file)


def prepare(folder: Path, **changed) -> list[str]:
    """The pieces that a preparation in FOLDER/out makes."""
    pieces = picture_world.prepare(recipe(folder, **changed), folder / "out", say=lambda line: None)
    return [name for name, piece in pieces.items() if piece["made"]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.bin")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a complete preparation."""
    folder = tmp_path_factory.mktemp("whole")
    assert prepare(folder) == PIECES
    return folder


def test_each_question_is_a_document_and_each_picture_a_caption_pair(whole):
    data = whole / "out" / "data"
    assert len(Dataset(data / "captions-train")) == len(Dataset(data / "texts-train")) == 40
    questions = Dataset(data / "questions-train")
    assert len(questions) > 100 and all(len(questions.document(i)) == 3 for i in range(len(questions)))
    assert len(Dataset(data / "places-train")) > 6
    assert (whole / "out" / "benchmarks" / "validation" / "gqa").is_dir()
    assert questions.metadata["vq"]["grid"] == [3, 3]


def test_the_object_that_a_question_asks_for_is_shown_at_the_place_of_the_answer(whole):
    """Where is the red circle? top left: its token is the first of 3 x 3."""
    out = whole / "out"
    vocabulary = Vocabulary(out / "vocabulary")
    sources = [(out / "data" / "places-train", "understanding"), (out / "data" / "captions-train", "generation")]
    config = Config()
    config.data.sequence_length = 256
    config.data.train = [SourceConfig(str(path), task, 1.0) for path, task in sources]
    places, drawn = [place for row in PLACES for place in row], 0
    for batch, objects in object_batches(config, vocabulary, "train", 4, 12, out / "places-scenes" / "train"):
        for row, document in {(r, int(d)) for r in range(4) for d in batch.document[r] if d != PADDING_DOCUMENT}:
            own = batch.document[row] == document
            tokens, image = batch.tokens[row][own], batch.modality[row][own] == Modality.IMAGE
            shows, about = objects.shows[row][own], objects.about[row][own]
            if batch.task[row][own][0] == Task.GENERATION:
                assert not shows.any() and not about.any()  # of other scenes
                continue
            learnt = (batch.loss_mask[row][own] > 0).roll(1)
            answer = vocabulary.decode(tokens[learnt][:-1].tolist()).strip()
            asked = about[learnt][0]
            assert asked and (asked & shows[image]).nonzero().flatten().tolist() == [places.index(answer)]
            drawn += 1
    assert drawn > 20
    config.data.train = config.data.train[1:]
    for batch, objects in object_batches(config, vocabulary, "train", 4, 1, out / "scenes" / "train"):
        image = batch.modality == Modality.IMAGE
        assert torch.equal(objects.about[:, :-1], objects.shows[:, 1:]) and not objects.shows[~image].any()
        assert objects.shows[image].any()
    with pytest.raises(UserError, match="has not the tars that data.train was made from"):
        object_batches(config, vocabulary, "train", 4, 1, out / "scenes" / "validation")


def test_a_complete_preparation_is_recognized_without_torch(whole):
    tool = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
    tool += "print('torch' in sys.modules)"
    arguments = ["tools/prepare_picture_world.py", whole / "recipe.yaml", "--out", whole / "out"]
    output = run_program([sys.executable, "-c", tool, *arguments]).stdout
    assert f"0 of {len(PIECES)} pieces made" in output and output.splitlines()[-1] == "False"


def test_a_stopped_preparation_continues_and_ends_with_the_same_bytes(whole, tmp_path, monkeypatch):
    preprocess, calls = pipeline.preprocess, []

    def stopped(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return preprocess(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "preprocess", stopped)
        prepare(tmp_path)
    assert prepare(tmp_path) == PIECES[PIECES.index("data set texts-train") :]
    assert contents(tmp_path / "out") == contents(whole / "out")


def test_what_is_made_from_changed_settings_is_made_again(whole, tmp_path):
    prepare(tmp_path)
    again = prepare(tmp_path, vocabulary_size=330)
    assert again == ["vocabulary", *(name for name in PIECES if name.startswith("data set"))]
    assert prepare(tmp_path, vocabulary_size=330) == []
    assert contents(tmp_path / "out") != contents(whole / "out")
    assert prepare(tmp_path) == again and contents(tmp_path / "out") == contents(whole / "out")


def test_edits_are_a_data_set_of_given_and_drawn_images_and_their_texts_are_in_the_vocabulary(whole, tmp_path):
    metadata = prepare(tmp_path, edits={"train": 12, "validation": 2, "turns": 2})
    assert [name for name in metadata if name not in PIECES] == [
        "edits train",
        "edits validation",
        "data set edits-train",
        "data set edits-validation",
    ]
    edits = Dataset(tmp_path / "out" / "data" / "edits-train")
    modes = [[mode for mode, _ in edits.document(i)] for i in range(len(edits))]
    assert len(modes) == 12 and all(m == [IMAGE, *[TEXT, DRAWN] * (len(m) // 2)] for m in modes)
    assert {len(m) for m in modes} == {3, 5} and edits.metadata["format"] == 2
    assert (tmp_path / "out" / "vocabulary" / "tokenizer.model").read_bytes() != (
        whole / "out" / "vocabulary" / "tokenizer.model"
    ).read_bytes()


def test_a_lost_file_is_made_again(whole):
    (whole / "out" / "data" / "places-train.json").unlink()
    assert prepare(whole) == ["data set places-train"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"sizes": 3}, r"unknown key 'sizes' \(did you mean 'size'"),
        ({"world": {"kind": 4}}, "unknown key 'world.kind'"),
        ({"world": {"kinds": 5}}, "kinds is 5"),
        ({"scenes": {"train": 4, "question": 3}}, r"unknown key 'scenes.question' \(did you mean 'questions'"),
        ({"scenes": {"train": 4, "kinds": "place"}}, "'scenes.kinds' must be a list"),
        ({"scenes": {"validation": 4}}, "'scenes.train' is 0"),
        ({"scenes": {"train": "many"}}, "'scenes.train' must be int, got 'many'"),
        ({"question_sets": [{"count": 4}]}, r"'question_sets\[0\]' needs the key name"),
        ({"question_sets": [{"name": "a", "count": 4, "seeds": 4}]}, r"unknown key 'question_sets\[0\].seeds'"),
        ({"edits": {"train": 4, "turn": 2}}, r"unknown key 'edits.turn' \(did you mean 'turns'"),
        ({"edits": {"train": 4, "kinds": ["paint"]}}, "paint"),
        ({"tokenizer": {"kind": "network"}}, "'tokenizer.kind' is 'network', must be one of dictionary, vq"),
        ({"tokenizer": {"options": {"steps": 9}}}, "unknown key 'tokenizer.options.steps'"),
        ({"tokenizer": {"grid": 4}}, "image size 18, grid 4"),
        ({"tokenizer": {"splits": ["test"]}}, "'tokenizer.splits' has 'test', but 'scenes.test' is 0"),
        ({"benchmarks": {"splits": ["best"]}}, "'benchmarks.splits' has 'best', must be one of train"),
        ({"benchmarks": {"splits": ["test"], "picture": 3}}, "unknown key 'benchmarks.picture'"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        recipe(tmp_path, **changed)


@pytest.mark.parametrize(
    "name, out, configs",
    [
        ("quickstart", "runs/quickstart", [["quickstart"], ["tiny"]]),
        ("compositional", "runs/compositional", [["compositional"]]),
        ("editing", "runs/editing", [["quickstart", "picture_world_editing"]]),
        ("long", "runs/picture_world", [["picture_world"], ["picture_world", "picture_world_relations"]]),
    ],
)
def test_the_recipes_make_what_the_configurations_read(name, out, configs):
    recipe = read_recipe(EXAMPLES / "picture_worlds" / f"{name}.yaml")
    kinds = KINDS if "text" in recipe.split("train").forms else KINDS[:2]
    data_sets = {f"{kind}-{split}" for kind in kinds for split in ("train", "validation")}
    data_sets |= {f"{recipe.question_set(number)[0]}-train" for number in range(len(recipe.question_sets))}
    data_sets |= {f"edits-{split}" for split in ("train", "validation") if recipe.edits.get(split)}
    for files in configs:
        config = config_file.load(Config, [EXAMPLES / "configs" / f"{file}.yaml" for file in files])
        sources = [*config.data.train, *config.data.validation]
        assert {source.path for source in sources} <= {f"{out}/data/{data_set}" for data_set in data_sets}
        assert config.data.vocabulary == f"{out}/vocabulary"
        benchmarks = {f"{out}/benchmarks/{s}/{n}" for s in recipe.benchmark_splits() for n in recipe.benchmark(s).names}
        assert {benchmark.data for benchmark in config.evaluation.benchmarks} <= benchmarks

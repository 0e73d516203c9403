"""The test split as benchmarks: true and balanced answers, in files that the readers of the real ones read."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_scenes import judge, matching

from megatron_ext.errors import UserError
from megatron_ext.evaluation import mjhq
from megatron_ext.evaluation.registry import BENCHMARKS
from megatron_ext.picture_world.attributes import COLORS, SHAPES
from megatron_ext.picture_world.benchmark_files import MME, SEED_TYPES, BenchmarkConfig, write_benchmarks
from megatron_ext.picture_world.captions import caption
from megatron_ext.picture_world.conversations import conversation
from megatron_ext.picture_world.render import render
from megatron_ext.picture_world.splits import HELD_OUT
from megatron_ext.picture_world.world import Scene, World, make_scene

CONFIG = BenchmarkConfig(pictures=60, size=48, seed=5)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("benchmarks") / "world"
    write_benchmarks(output, CONFIG)
    return output


def scene_of(image: Path) -> Scene:
    return make_scene(CONFIG.seed, "test", int(image.name.removesuffix(".jpg").split("-")[-1]))


def choice_is_true(scene: Scene, question: str, choice: str) -> bool:
    """Whether one of four choices is true."""
    if question == "Which object is there?":
        return bool(matching(scene, choice.split(" ", 1)[1]))
    return choice == judge(scene, question)


@pytest.mark.parametrize("name", ["pope", "mme", "gqa"])
def test_the_readers_read_true_answers_and_their_pictures(folder, name):
    items = BENCHMARKS[name].read(folder / name)
    assert len(items) >= 4 * CONFIG.pictures
    for item in items:
        scene = scene_of(item.image)
        question = item.question.split("?")[0] + "?"
        assert item.answer == judge(scene, question), (scene, item)
    for image in {item.image for item in items}:
        with Image.open(image) as picture:
            difference = np.asarray(picture, dtype=float) - np.asarray(render(scene_of(image), CONFIG.size))
        assert np.abs(difference).mean() < 3


def test_of_four_choices_exactly_one_is_true(folder):
    entries = json.loads((folder / "seed/SEED-Bench.json").read_text())["questions"]
    for entry in entries:
        scene = scene_of(folder / "seed/SEED-Bench-image" / entry["data_id"])
        choices = [entry[f"choice_{letter}"] for letter in "abcd"]
        true = [choice_is_true(scene, entry["question"], choice) for choice in choices]
        assert true.count(True) == 1 and "ABCD"[true.index(True)] == entry["answer"], (scene, entry)
    by_type = Counter(entry["question_type_id"] for entry in entries)
    assert set(by_type) == {
        i for name, i in SEED_TYPES.items() if name not in ("Instance Interaction", "Text Understanding")
    }
    assert min(by_type.values()) > CONFIG.pictures / 4
    assert all(item.image.is_file() for item in BENCHMARKS["seed"].read(folder / "seed"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_training_has_the_instructions_of_every_benchmark(folder, name):
    asked = [question for i in range(80) for question, _ in conversation(make_scene(5, "train", i), 8)]
    for item in BENCHMARKS[name].read(folder / name, None):
        instruction = re.search(r"[\n ](Answer|Please).*$", item.question)[0]
        assert any(question.endswith(instruction) for question in asked), item.question


@pytest.mark.parametrize("name", BENCHMARKS)
def test_right_answers_get_full_marks_and_one_answer_to_everything_does_not(folder, name):
    benchmark = BENCHMARKS[name]
    items = benchmark.read(folder / name)
    full = benchmark.score(items, {item.id: item.answer for item in items})
    assert not full.missing and not full.invalid
    # Of MME's ten subtasks of perception the picture world has four.
    key, best = {"pope": ("POPE-A", 100), "mme": ("MME-P", 800), "gqa": ("GQA", 100), "seed": ("SEED", 100)}[name]
    assert full.headline[key] == best
    lazy = benchmark.score(items, {item.id: "A" if name == "seed" else "yes" for item in items})
    chance = {"pope": (50, 50), "mme": (200, 200), "gqa": (20, 40), "seed": (18, 32)}[name]
    assert chance[0] <= lazy.headline[key] <= chance[1]


def test_pope_has_as_many_yes_as_no_and_harder_negatives_where_it_says_so(folder):
    splits = {}
    for split in ("random", "popular", "adversarial"):
        lines = (folder / f"pope/coco_pope_{split}.json").read_text().splitlines()
        splits[split] = [json.loads(line) for line in lines]
        assert Counter(e["label"] for e in splits[split])["yes"] * 2 == len(lines) > 4 * CONFIG.pictures
        assert [e["question_id"] for e in splits[split]] == list(range(1, len(lines) + 1))
    positives = {split: [(e["image"], e["text"]) for e in es if e["label"] == "yes"] for split, es in splits.items()}
    assert positives["random"] == positives["popular"] == positives["adversarial"]
    named = Counter(text for _, text in positives["random"])

    def negatives(split):
        return [(scene_of(Path(e["image"])), e["text"]) for e in splits[split] if e["label"] == "no"]

    def popularity(split):
        return np.mean([named[text] for _, text in negatives(split)])

    def kinship(split):
        """How many of color and shape are in the picture."""
        phrases = [(scene, *text.removesuffix("?").split()[-2:]) for scene, text in negatives(split)]
        return np.mean([bool(matching(s, f"{c} objects")) + bool(matching(s, shape)) for s, c, shape in phrases])

    assert popularity("popular") > 1.5 * popularity("random")
    assert kinship("adversarial") > 1.3 * kinship("random")


def test_a_held_out_pair_in_a_question_does_not_mean_yes(folder):
    by_held_out = defaultdict(Counter)
    files = [folder / "pope/coco_pope_random.json"]
    asked = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    asked = [(e["text"], e["label"]) for e in asked]
    for subtask in ("existence", "color"):
        for file in (folder / "mme" / subtask).glob("*.txt"):
            asked += [tuple(line.lower().split("\t")) for line in file.read_text().splitlines()]
    for question, label in asked:
        pairs = [f"{c} {s}" for s, c in HELD_OUT] + [f"{s} {c}" for s, c in HELD_OUT]
        by_held_out[any(pair in question for pair in pairs)][label] += 1
    for counts in by_held_out.values():
        assert abs(counts["yes"] - counts["no"]) < 0.1 * counts.total(), by_held_out


def test_a_number_in_a_question_does_not_mean_yes(folder):
    answers = defaultdict(Counter)
    for file in (folder / "mme/count").glob("*.txt"):
        for line in file.read_text().splitlines():
            answers[line.split()[3]][line.split("\t")[1]] += 1
    assert set(answers) == {"one", "two", "three", "four"}
    assert all(counts["Yes"] == counts["No"] for counts in answers.values()), answers


def test_the_answers_of_each_kind_of_gqa_question_are_equally_frequent(folder):
    by_kind = defaultdict(Counter)
    for entry in json.loads((folder / "gqa/testdev_balanced_questions.json").read_text()).values():
        by_kind[entry["types"]["detailed"]][entry["answer"]] += 1
    for kind in ("existence", "comparison", "relation", "logic"):
        assert abs(by_kind[kind]["yes"] - by_kind[kind]["no"]) <= 0.1 * by_kind[kind].total(), by_kind
    for kind, kinds in (("color", len(COLORS)), ("shape", len(SHAPES)), ("place", 9)):
        assert len(by_kind[kind]) == kinds and max(by_kind[kind].values()) < 2.5 / kinds * by_kind[kind].total(), (
            by_kind
        )


def test_mme_asks_two_questions_of_each_picture_one_with_yes_and_one_with_no(folder):
    for subtask in MME:
        files = sorted((folder / "mme" / subtask).glob("*.txt"))
        assert len(files) == CONFIG.pictures and all(file.with_suffix(".jpg").is_file() for file in files)
        for file in files:
            answers = [line.split("\t")[1] for line in file.read_text().splitlines()]
            assert answers == ["Yes", "No"]


def test_mjhq_has_captions_as_prompts_and_pictures_by_number_of_objects(folder):
    prompts = mjhq.read(folder / "mjhq")
    assert list(Counter(p.category for p in prompts).values()) == [CONFIG.pictures // 6] * 6
    for prompt in prompts:
        scene = scene_of(Path(prompt.id))
        assert prompt.prompt == caption(scene)
        assert NUMBERS.index(prompt.category.split("_")[0]) == len(scene.objects)
        assert mjhq.image_file(folder / "mjhq", prompt) == folder / "mjhq" / prompt.category / f"{prompt.id}.jpg"


SMALL = BenchmarkConfig(pictures=2, size=32)


def test_a_split_without_held_out_pairs_can_be_asked_about_too(tmp_path):
    write_benchmarks(tmp_path / "world", replace(CONFIG, pictures=8, split="validation"))
    for name, benchmark in BENCHMARKS.items():
        for item in benchmark.read(tmp_path / "world" / name, None):
            assert item.image.name.startswith("validation")
            assert not [pair for pair in HELD_OUT if f"{pair[1]} {pair[0]}" in item.question]


@pytest.mark.parametrize("objects", range(2, 7))
@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_world_has_a_complete_mme(tmp_path, objects, split):
    config = BenchmarkConfig(12, 48, 5, split, World(4, objects, 0.0, 2), names=("mme",))
    assert write_benchmarks(tmp_path / "world", config)["items"] == {"mme": 2 * 4 * 12}
    assert [path.name for path in (tmp_path / "world").iterdir() if path.is_dir()] == ["mme"]


def test_gqa_can_be_of_some_kinds_only(tmp_path):
    write_benchmarks(tmp_path / "world", BenchmarkConfig(10, names=("gqa",), kinds=("place", "layout", "presence")))
    entries = json.loads((tmp_path / "world/gqa/testdev_balanced_questions.json").read_text()).values()
    assert {entry["types"]["detailed"] for entry in entries} == {"place", "presence"}


def test_a_world_that_does_not_fit_a_question_is_an_error_and_not_endless(tmp_path, monkeypatch):
    monkeypatch.setitem(MME, "count", lambda scene, rng, number: None)
    with pytest.raises(UserError, match="MME, count: only 0 of 2000 scenes"):
        write_benchmarks(tmp_path / "world", BenchmarkConfig(pictures=2, names=("mme",)))


def test_the_same_settings_give_the_same_bytes_and_leave_what_is_complete_alone(tmp_path):
    manifests = [write_benchmarks(tmp_path / name, SMALL) for name in ("a", "b", "a")]
    assert [manifest["created"] for manifest in manifests] == [True, True, False]
    assert len({manifest["fingerprint"] for manifest in manifests}) == 1
    other = write_benchmarks(tmp_path / "a", BenchmarkConfig(pictures=2, size=32, seed=6))
    assert other["created"] and other["fingerprint"] != manifests[0]["fingerprint"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_write_that_fails_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    from megatron_ext.picture_world import benchmark_files as benchmarks

    def fail(folder, config):
        raise OSError("disk full")

    monkeypatch.setitem(benchmarks.WRITERS, "mjhq", fail)
    with pytest.raises(OSError):
        write_benchmarks(tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert write_benchmarks(tmp_path / "out", SMALL)["created"]


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not made by this program"):
        write_benchmarks(tmp_path, SMALL)
    assert (tmp_path / "thesis.txt").is_file()


def test_the_tool_writes_them(tmp_path):
    tool = Path(__file__).parents[2] / "tools/make_scenes.py"
    command = [sys.executable, tool, "--benchmarks", tmp_path / "out", "--benchmark-pictures", "1", "--size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "of pope" in done.stdout, done.stderr
    assert (tmp_path / "out/benchmarks.json").is_file()

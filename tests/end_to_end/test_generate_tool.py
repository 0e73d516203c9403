"""tools/generate.py and tools/evaluate.py as programs: pictures, answers, many ranks, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from megatron_ext.evaluation import edits, mjhq
from megatron_ext.evaluation.pope import POPE
from megatron_ext.picture_world.benchmark_files import BenchmarkConfig, write_benchmarks
from support.data_sets import write_pairs
from support.forked_programs import run_forked
from support.images import encoded
from support.programs import run_program
from support.tiny_vq import CODES, GRID, make_vq
from support.vocabularies import make_vocabulary

CAPTIONS = ["a red circle", "two blue squares and a circle"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with vq/, vocabulary/, run/ (trained for some steps, pipeline parallel), picture.png."""
    folder = tmp_path_factory.mktemp("generate")
    make_vq(folder / "vq")
    vocabulary = make_vocabulary(folder / "vocabulary")
    write_pairs(folder / "pairs", vocabulary, [CAPTIONS] * 60, grid=(GRID, GRID))
    config = {
        "output": str(folder / "run"),
        "model": {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2},
        "plan": {"preset": "himix_hmgen_share_partial"},
        "parallel": {"pipeline": 2},
        "data": {
            "vocabulary": str(folder / "vocabulary"),
            "train": [{"path": str(folder / "pairs"), "task": task} for task in ("understanding", "generation")],
            "sequence_length": 256,
        },
        "training": {"iterations": 4, "micro_batch_size": 2, "global_batch_size": 4},
        "optimizer": {"lr": 1e-2, "warmup_iterations": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run_forked(["pretrain_unified.py", "--config", folder / "config.yaml"], processes=2)
    (folder / "picture.png").write_bytes(encoded(3))
    return folder


def generator(trained: Path, *options) -> list:
    return ["tools/generate.py", "--checkpoint", trained / "run", "--vq", trained / "vq", *options]


def test_pictures_are_the_same_on_one_rank_and_on_two(trained, tmp_path):
    prompts = [argument for caption in CAPTIONS for argument in ("--prompt", caption)]
    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        options = [*prompts, "--temperature", 0, "--out", out, "--json", out / "pictures.json"]
        done = run_forked(generator(trained, *options), processes)
        assert "cache of keys and values" in done.stdout
        results.append(json.loads((out / "pictures.json").read_text()))
        assert [r["caption"] for r in results[-1]] == CAPTIONS
        for record in results[-1]:
            assert len(record["codes"]) == GRID * GRID and all(0 <= code < CODES for code in record["codes"])
            assert Image.open(record["file"]).size == Image.open(results[-1][0]["file"]).size
        assert (out / "sheet.png").is_file()
    assert [r["codes"] for r in results[0]] == [r["codes"] for r in results[1]]


def test_questions_are_answered_in_text(trained, tmp_path):
    options = ["--image", trained / "picture.png", "--question", "is it red", "--question", "how many"]
    # Roles that it was not trained with, over the projections that it was trained with.
    command = generator(trained, *options, "--json", tmp_path / "answers.json", "plan.preset=dense")
    run_program([sys.executable, *command])
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert [a["question"] for a in answers] == ["is it red", "how many"]
    assert all(isinstance(a["answer"], str) for a in answers)


def test_a_picture_is_edited_turn_by_turn(trained, tmp_path):
    def edit(out: Path, *instructions: str) -> list[dict]:
        options = [argument for text in instructions for argument in ("--instruction", text)]
        options = ["--edit", trained / "picture.png", *options, "--out", out, "--json", out / "edits.json"]
        run_forked(generator(trained, *options, "--temperature", 0, "--guidance", 1.5))
        assert {path.name for path in out.glob("*.png")} >= {"given.png", "sheet.png"}
        return json.loads((out / "edits.json").read_text())

    both, first = edit(tmp_path / "both", *CAPTIONS), edit(tmp_path / "first", CAPTIONS[0])
    assert [result["instruction"] for result in both] == CAPTIONS and all(Path(r["file"]).is_file() for r in both)
    assert both[0]["codes"] == first[0]["codes"] and len(both[1]["codes"]) == GRID * GRID


def evaluate(trained: Path, data: Path, out: Path, processes: int, *options, check: bool = True) -> str:
    command = ["tools/evaluate.py", "--checkpoint", trained / "run", "--vq", trained / "vq"]
    for name in ("pope", "seed", "mjhq", "edits"):
        command += ["--benchmark", name, "--data", data / name]
    return run_forked([*command, "--out", out, "--max-new-tokens", 3, *options], processes, check).stdout


def test_benchmarks_are_answered_and_drawn_by_replicas_and_go_on_where_they_stopped(trained, tmp_path):
    data, file = tmp_path / "data", tmp_path / "answers" / "pope.jsonl"
    write_benchmarks(data, BenchmarkConfig(pictures=3, size=32))
    items, prompts = POPE.read(data / "pope"), mjhq.read(data / "mjhq")
    broken = items[0].image
    broken.write_bytes(broken.read_bytes()[:60])
    lost = {item.id for item in items if item.image == broken}
    shown = evaluate(trained, data, file.parent, processes=2)
    assert shown.count(f"{broken}: ") == len(lost) and "Traceback" not in shown
    answers = {record["id"]: record["answer"] for record in map(json.loads, file.read_text().splitlines())}
    assert answers.keys() == {item.id for item in items} - lost
    pictures = {path: path.read_bytes() for path in (file.parent / "mjhq").rglob("*.png")}
    assert {path.stem for path in pictures} == {prompt.id for prompt in prompts}
    edited = [path.relative_to(file.parent / "edits") for path in (file.parent / "edits").rglob("*.png")]
    assert {(str(path.parent), path.stem) for path in edited} == {
        (item.category, item.id) for item in edits.read(data / "edits")
    }
    names = ["edits", "mjhq", "pope.jsonl", "pope.manifest.json", "seed.jsonl", "seed.manifest.json"]
    assert sorted(path.name for path in file.parent.iterdir()) == names
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:5]) + lines[5][:9])  # a run that was killed
    for path in list(pictures)[:2]:
        path.unlink()
    shown = evaluate(trained, data, file.parent, processes=1)
    assert f"{len(lost)} questions stay unanswered" in shown and "POPE-F1" in shown and "SEED-likelihood" in shown
    assert "MJHQ-FID (built-in)" in shown
    assert {path: path.read_bytes() for path in pictures} == pictures
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert {record["id"]: record["answer"] for record in again} == answers

    # What is there was made with other roles: refused by name, or moved away.
    shown = evaluate(trained, data, file.parent, 1, "plan.preset=dense", check=False)
    assert f"{file}: its contents were made with plan " in shown.splitlines()[-1]
    evaluate(trained, data, file.parent, 1, "--set-aside", "plan.preset=dense")
    before = file.with_name("pope.before-1.jsonl")
    assert [json.loads(line) for line in before.read_text().splitlines()] == again
    assert (file.parent / "mjhq.before-1" / "settings.json").is_file()
    assert {json.loads(line)["id"] for line in file.read_text().splitlines()} == answers.keys()
    # Of the same model, answers to what was another question.
    question = data / "pope" / "coco_pope_random.json"
    question.write_text(question.read_text().replace("Is there", "Do you see"))
    shown = evaluate(trained, data, file.parent, 1, "plan.preset=dense", check=False)
    assert "has changed since it was answered" in shown.splitlines()[-1]


def test_a_mismatch_is_one_line(trained, tmp_path):
    (tmp_path / "broken.png").write_bytes(encoded(3)[:40])
    broken = run_forked(generator(trained, "--image", tmp_path / "broken.png", "--question", "?"), check=False)
    assert broken.returncode == 1 and "Traceback" not in broken.stdout
    assert f"{tmp_path / 'broken.png'}: " in broken.stdout.splitlines()[-1]
    make_vocabulary(tmp_path / "other", codes=CODES * 2)
    other = run_forked(generator(trained, "--prompt", "a", "--vocabulary", tmp_path / "other"), check=False)
    assert other.returncode == 1 and "fingerprints.vocabulary" in other.stdout.splitlines()[-1]

"""tools/evaluate.py: several answers files side by side, with all their defects."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.evaluation import score_table as table
from megatron_ext.evaluation.registry import BENCHMARKS, benchmark_named
from support.programs import ROOT


def evaluate(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/evaluate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def gqa(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    questions = {str(n): {"question": "What?", "imageId": "1", "answer": "dog"} for n in range(4)}
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    return folder


def seed(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"data_id": "1", "data_type": "image", "question": "What?", "answer": "B", "question_type_id": 1}
    questions = [{**entry, **{f"choice_{c}": f"it is {c}" for c in "abcd"}, "question_id": n} for n in range(2)]
    (folder / "SEED-Bench.json").write_text(json.dumps({"questions": questions, "question_type": {"Scene": 1}}))
    return folder


def answers(file: Path, *lines) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def dense(tmp_path) -> list:
    """What is on the command line for one model's answers to two benchmarks."""
    of_gqa = [{"id": "0", "answer": "Dog"}, {"id": "0", "answer": "cat"}, "oops\n", {"id": "1", "answer": "cat"}]
    of_gqa += [{"id": "2", "answer": "?"}, {"id": "9", "answer": "dog"}, '{"id": "3", "ans']
    of_seed = [{"id": "0", "answer": "B", "likelihoods": [-3, -2, -1, -4]}, {"id": "1", "answer": "(B)"}]
    return [
        *("--benchmark", "gqa", "--data", gqa(tmp_path / "gqa")),
        *("--score", answers(tmp_path / "dense" / "gqa.jsonl", *of_gqa)),
        *("--benchmark", "seed", "--data", seed(tmp_path / "seed")),
        *("--score", answers(tmp_path / "dense" / "seed.jsonl", *of_seed)),
    ]


def test_one_table_for_several_models_and_benchmarks(tmp_path, dense):
    other = answers(tmp_path / "himix" / "gqa.jsonl", *({"id": n, "answer": "a dog"} for n in range(4)))
    files = {"--json": tmp_path / "scores.json", "--markdown": tmp_path / "new" / "scores.md"}
    more = ["--benchmark", "gqa", "--data", tmp_path / "gqa", "--score", other]
    labels = ["--label", "dense", "--label", "dense", "--label", "himix"]
    done = evaluate(*dense, *more, *labels, *(word for pair in files.items() for word in pair))
    assert done.returncode == 0, done.stderr
    assert done.stdout == files["--markdown"].read_text()
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in done.stdout.splitlines()]
    assert lines[0] == ["answers of", "GQA", "SEED", "SEED-likelihood"]
    assert lines[2:4] == [["dense", "25.00", "100.00", "0.00"], ["himix", "100.00", "-", "-"]]
    assert lines[5] == [
        "answers of",
        "benchmark",
        *("questions", "missing", "invalid", "duplicate", "unknown"),
        "malformed lines",
    ]
    assert lines[7] == ["dense", "GQA", "4", "1", "1", "1", "1", "1"]
    assert f"- dense: {tmp_path / 'dense' / 'gqa.jsonl'}: no answer in line 3" in done.stdout
    assert f"- dense: {tmp_path / 'dense' / 'gqa.jsonl'}: the last line is cut short" in done.stdout
    assert "- dense: SEED-likelihood: 1 questions without likelihoods, 0 with unusable ones" in done.stdout
    numbers = json.loads(files["--json"].read_text())
    assert numbers["rows"]["dense"] == {"GQA": 25.0, "SEED": 100.0, "SEED-likelihood": 0.0}
    assert numbers["files"][0]["scores"]["missing"] == 1
    assert numbers["files"][1]["scores"]["details"]["Scene"] == {"accuracy": 100.0, "questions": 2}


def test_a_models_files_in_one_folder_are_one_row(tmp_path, dense):
    done = evaluate(*dense, "--json", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    assert list(json.loads((tmp_path / "scores.json").read_text())["rows"]) == [str(tmp_path / "dense")]


def test_parts_of_a_benchmark(tmp_path):
    line = {"question_id": 1, "image": "x.jpg", "text": "Is there?", "label": "yes"}
    (tmp_path / "coco_pope_popular.json").write_text(json.dumps(line))
    file = answers(tmp_path / "a.jsonl", {"id": "popular/1", "answer": "yes"})
    done = evaluate("--benchmark", "pope", "--data", tmp_path, "--score", file, "--parts", "popular")
    assert done.returncode == 0, done.stderr
    assert "POPE without the split random, adversarial" in done.stdout


def test_failures_are_one_line_and_bad_usage_is_2(tmp_path, dense):
    done = evaluate("--benchmark", "gqa", "--data", tmp_path / "gqa", "--score", tmp_path / "none.jsonl")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"evaluate.py: {tmp_path / 'none.jsonl'}: No such file or directory\n"
    assert not (tmp_path / "none.jsonl").exists()
    done = evaluate(*dense, "--label", "one for two")
    assert done.returncode == 2
    assert "--label is given 1 times for 2 times --benchmark" in done.stderr


def test_two_files_for_one_place_in_the_table_are_refused(tmp_path):
    items = BENCHMARKS["gqa"].read(gqa(tmp_path))
    tables = [
        table.score_file(BENCHMARKS["gqa"], items, answers(tmp_path / name, {"id": "0", "answer": "dog"}), "dense")
        for name in ("one.jsonl", "two.jsonl")
    ]
    with pytest.raises(UserError, match="two answers files for GQA are called 'dense'"):
        table.markdown(tables)


def test_benchmarks_are_found_by_name_and_scoring_needs_no_torch():
    assert [benchmark_named(name).name for name in ("gqa", "mme", "pope", "seed")] == list(BENCHMARKS)
    with pytest.raises(UserError, match="there is no benchmark 'vqa'; there are gqa, mme, pope, seed"):
        benchmark_named("vqa")
    modules = "megatron_ext.evaluation.score_table, megatron_ext.evaluation.registry"
    program = f"import sys, {modules}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0

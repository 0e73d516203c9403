"""Benchmarks as tasks of lmms-eval: the same questions, images and right answers, and its answers scored as ours."""

import json
import runpy
from pathlib import Path

import pytest
import yaml
from PIL import Image

from megatron_ext.errors import UserError
from megatron_ext.evaluation import lmms_eval, score_table
from megatron_ext.evaluation.pope import POPE
from megatron_ext.picture_world.benchmark_files import BenchmarkConfig, write_benchmarks


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder, BenchmarkConfig(pictures=2, size=32))
    return POPE.read(folder / "pope", None)


def read_task(folder: Path) -> tuple[list[dict], dict]:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    task = yaml.load((folder / "pope_local.yaml").read_text(), Loader)
    lines = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    return [json.loads(line) for line in lines], task


def test_a_task_asks_what_the_benchmark_asks(items, tmp_path):
    lmms_eval.write_task(tmp_path, "pope_local", items)
    documents, task = read_task(tmp_path)
    functions = runpy.run_path(str(tmp_path / "functions.py"))
    assert task["task"] == "pope_local" and len(documents) == len(items) > 0
    for document, item in zip(documents, items):
        (image,) = functions[task["doc_to_visual"].split(".")[1]](document)
        assert image.tobytes() == Image.open(item.image).convert("RGB").tobytes()
        assert functions[task["doc_to_text"].split(".")[1]](document) == item.question
        score = functions[task["process_results"].split(".")[1]]
        assert score(document, [f" {item.answer.title()}."]) == {"accuracy": 1.0}
        assert score(document, ["perhaps"]) == {"accuracy": 0.0}


def test_logged_answers_are_scored_like_ours(items, tmp_path):
    lmms_eval.write_task(tmp_path, "pope_local", items)
    documents, _ = read_task(tmp_path)
    samples = tmp_path / "samples.jsonl"
    # As lmms-eval 0.7.3 logs them; the order may be another.
    logged = [
        {"doc_id": i, "filtered_resps": "Yes." if i % 3 else "no", "input": document["question"]}
        for i, document in enumerate(documents)
    ]
    samples.write_text("".join(json.dumps(sample) + "\n" for sample in reversed(logged)))
    questions, answers = tmp_path / "pope_local.jsonl", tmp_path / "answers.jsonl"
    answers.write_text('{"id": "random/1", "answer": "of another model"}\n')
    assert lmms_eval.read_samples(samples, questions, answers) == len(items)
    scored = score_table.score_file(POPE, items, tmp_path / "answers.jsonl", "lmms-eval")
    expected = POPE.score(items, {item.id: "yes" if i % 3 else "no" for i, item in enumerate(items)})
    assert scored.scores.headline == expected.headline and expected.missing == 0


def test_a_missing_image_and_foreign_samples_are_named(items, tmp_path):
    absent = [items[0].__class__("1", tmp_path / "absent.png", "is it?", "yes")]
    with pytest.raises(UserError, match="absent.png: not found; it is the image of question 1"):
        lmms_eval.write_task(tmp_path, "pope_local", absent)
    lmms_eval.write_task(tmp_path, "pope_local", items)
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"doc_id": 0, "filtered_resps": "yes", "input": "is it?"}\n')
    with pytest.raises(UserError, match="samples.jsonl:1: not a sample of the task in .*pope_local.jsonl"):
        lmms_eval.read_samples(samples, tmp_path / "pope_local.jsonl", tmp_path / "answers.jsonl")

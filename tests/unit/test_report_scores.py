"""The page's part about what a model can do and what it costs: from answers, pictures and data on disk."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.evaluation import mjhq
from megatron_ext.evaluation.answers import question_fingerprint
from megatron_ext.evaluation.gqa import GQA
from megatron_ext.picture_world.attributes import SHAPES
from megatron_ext.picture_world.benchmark_files import BenchmarkConfig, write_benchmarks
from megatron_ext.report.costs import plan_costs
from megatron_ext.report.scores import read_scores
from megatron_ext.report.write import write_report
from megatron_ext.routing.plan import Plan
from megatron_ext.training.metrics import read_metrics
from support.data_sets import write_pairs, write_texts
from support.run_folder import write_run
from support.vocabularies import make_vocabulary

CONFIG = BenchmarkConfig(pictures=8, size=54, split="validation")


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "validation"
    write_benchmarks(folder, CONFIG)
    return folder


@pytest.fixture
def run(tmp_path, benchmarks) -> Path:
    """A run that answers every question about places wrong and the others right, and draws the second caption's picture
    for the first caption, and the right pictures for the others."""
    folder = write_run(tmp_path / "run", "data.train=[{path: gone, task: generation}]", "data.vocabulary=gone")
    answers = [
        {"id": i.id, "answer": "nowhere" if i.kind == "place" else i.answer} for i in GQA.read(benchmarks / "gqa")
    ]
    (folder / "scores").mkdir()
    (folder / "scores" / "gqa.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    prompts = mjhq.read(benchmarks / "mjhq")
    for prompt, shown in zip(prompts, [prompts[1], *prompts[1:]]):
        target = folder / "scores" / "mjhq" / prompt.category / f"{prompt.id}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(mjhq.image_file(benchmarks / "mjhq", shown), target)
    return folder


def test_questions_are_shown_by_kind_and_in_the_order_of_the_file(run, benchmarks):
    items = GQA.read(benchmarks / "gqa")
    questions = read_scores(run, benchmarks, 3).questions
    assert {kind: a.right for kind, a in questions.accuracies.items()} == {
        kind: float(kind != "place") for kind in dict.fromkeys(item.kind for item in items)
    }
    shown = mjhq.read(benchmarks / "mjhq")[0].id
    first = next(i for i in items if i.answer not in ("yes", "no") and i.image.stem != shown)
    assert questions.first.text == first.question.partition("\n")[0]
    assert len(questions.cards) == 3
    place = next(item for item in items if item.kind == "place")
    assert questions.examples["place"] == place.question.partition("\n")[0]


def test_held_out_combinations_have_a_column_of_their_own(run, benchmarks, tmp_path):
    everything = tmp_path / "benchmarks"
    shutil.copytree(benchmarks, everything / "validation")
    write_benchmarks(everything / "test", replace(CONFIG, split="test"))
    (run / "scores-test").mkdir()
    lines = [json.dumps({"id": i.id, "answer": i.answer}) + "\n" for i in GQA.read(everything / "test" / "gqa")]
    (run / "scores-test" / "gqa.jsonl").write_text("".join(lines))
    questions = read_scores(run, everything / "validation", 3).questions
    assert questions.accuracies["place"].right == 0 and questions.held_out["place"].right == 1
    write_report(run, tmp_path / "page.html", benchmarks=everything / "validation")
    (line,) = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| place | Where")]
    assert re.search(r"\| 0 \| \d+ \| -.* \| 100 \[\d+,\N{NO-BREAK SPACE}100\] \|$", line)


def test_every_fact_of_a_caption_is_marked(run, benchmarks):
    pictures = read_scores(run, benchmarks, 3).pictures
    first, second, *_ = mjhq.read(benchmarks / "mjhq")
    wrong, right = pictures.cards[:2]
    assert (wrong.text, right.text) == (first.prompt, second.prompt) and len(pictures.cards) == 4
    assert all(mark for mark, _ in right.marks) and not all(mark for mark, _ in wrong.marks)
    # Where all colors are right, a shape alone says nothing more.
    shapes = {f"{a} {shape}" for a in ("a", "another") for shape in SHAPES}
    assert not shapes & {words for _, words in right.marks} and shapes & {words for _, words in wrong.marks}
    assert wrong.png == right.png and wrong.description == right.description
    assert pictures.faithfulness.right["whole pictures"] == pytest.approx(
        100 - 100 / pictures.faithfulness.facts["whole pictures"]
    )
    assert pictures.examples.keys() >= {"object", "color", "count"}


def test_the_page_begins_with_the_first_caption_and_compares_runs(run, benchmarks, tmp_path):
    paths = write_report(run, tmp_path / "page.html", benchmarks=benchmarks, also=[run])
    page, text = Path(paths["html"]).read_text(), Path(paths["markdown"]).read_text()
    prompt = mjhq.read(benchmarks / "mjhq")[0].prompt
    assert (
        page.index(prompt)
        < page.index("What it can do")
        < page.index("What it costs")
        < page.index("How it was trained")
    )
    assert "No picture of the benchmarks is in the training data" in page
    assert "(right: " in page and "✗" in text and "✓" in text
    lines = [line for line in text.splitlines() if line.startswith(f"| {run} |")]
    assert len(lines) == 2 and "| hmgen | 0.75 | 0.367 | +" in lines[0]
    assert not [
        name for name in ("hero-picture.png", "hero-question.png") if not (tmp_path / "page_files" / name).is_file()
    ]
    unlabelled = [tag for tag in page.split("<img ")[1:] if 'alt=""' in tag or not tag.startswith("alt=")]
    assert not unlabelled and page.count('<th scope="col">') > 8


def test_answers_to_other_questions_are_refused(run, benchmarks):
    items, file = GQA.read(benchmarks / "gqa"), run / "scores" / "gqa.jsonl"
    lines = [{"id": item.id, "answer": item.answer, "asked": question_fingerprint(item)} for item in items]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_scores(run, benchmarks, 3).questions
    lines[1]["asked"] = lines[0]["asked"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=f"question {items[1].id} of .* has changed since; score it again"):
        read_scores(run, benchmarks, 3)


def test_the_page_says_when_training_has_gone_on_since_the_scores(run, benchmarks, tmp_path):
    last = read_metrics(run / "metrics.jsonl")[-1]["iteration"]
    for iteration, says_so in ((last, False), (last - 1, True)):
        manifest = {"checkpoint": f"iter_{iteration:07} (0123)"}
        (run / "scores" / "gqa.manifest.json").write_text(json.dumps(manifest))
        write_report(run, tmp_path / "page.html", benchmarks=benchmarks)
        line = f"Scored after iteration {iteration}; training has gone on to {last}"
        assert (line in (tmp_path / "page.md").read_text()) == says_so


def test_a_run_without_scores_has_no_such_part(run, benchmarks, tmp_path):
    shutil.rmtree(run / "scores")
    write_report(run, tmp_path / "page.html", benchmarks=benchmarks)
    assert "What it can do" not in (tmp_path / "page.html").read_text()
    with pytest.raises(UserError, match="nowhere: no such folder"):
        write_report(run, tmp_path / "page.html", benchmarks=tmp_path / "nowhere")


@pytest.fixture
def data(tmp_path):
    """A configuration with data of all tasks, and its vocabulary."""
    vocabulary = make_vocabulary(tmp_path / "vocabulary")
    pairs = write_pairs(tmp_path / "pairs", vocabulary, [["a red circle", "left"]] * 40)
    sources = [{"path": pairs, "task": task} for task in ("understanding", "generation")]
    sources.append({"path": write_texts(tmp_path / "texts", vocabulary, ["a blue square"] * 40), "task": "text"})
    return config_file.load(
        Config, [], ["model.num_layers=4", f"data.train={json.dumps(sources)}", "data.sequence_length=64"]
    ), vocabulary


def costs_of(data, preset: str):
    config, vocabulary = data
    config.plan.preset = preset
    return {cost.name: cost for cost in plan_costs(config, Plan.from_config(config), vocabulary)}


def test_each_method_saves_in_its_task(data):
    costs = costs_of(data, "dense")
    assert list(costs) == ["dense", "HiMix", "HMGen", "HiMix + HMGen"]
    dense = costs["dense"].flops
    saving = {name: {task for task, flops in cost.flops.items() if flops < dense[task]} for name, cost in costs.items()}
    assert saving["dense"] == set() and saving["HiMix"] == {"understanding", "this mixture"}
    assert saving["HMGen"] == {"generation", "this mixture"}
    assert saving["HiMix + HMGen"] == {"understanding", "generation", "this mixture"}
    assert costs["HiMix + HMGen"].flops["understanding"] == costs["HiMix"].flops["understanding"]
    assert min(dense.values()) <= dense["this mixture"] <= max(dense.values())


def test_the_plan_of_the_run_is_marked_and_listed_once(data):
    costs = costs_of(data, "himix_hmgen_share_partial")
    assert [name for name, cost in costs.items() if cost.current] == ["himix_hmgen_share_partial"]
    assert "HiMix + HMGen" not in costs and costs_of(data, "dense")["dense"].current


def test_data_that_is_gone_has_no_costs(data):
    Path(data[0].data.train[0].path + ".idx").unlink()
    assert costs_of(data, "dense") == {}

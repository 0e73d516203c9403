"""Evaluations during training: the files they leave, and that training does not notice them."""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ext import config_file, distributed
from megatron_ext.callbacks import build_callbacks
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.evaluation import training_folder
from megatron_ext.evaluation.answer_generation import answer
from megatron_ext.evaluation.answers import read_answers
from megatron_ext.evaluation.benchmark import Item
from megatron_ext.evaluation.mme import MME
from megatron_ext.evaluation.pope import POPE
from megatron_ext.generation.checkpoint import load
from megatron_ext.generation.session import Session
from megatron_ext.picture_world.benchmark_files import BenchmarkConfig, write_benchmarks
from megatron_ext.report.write import write_report
from megatron_ext.training.config_checks import validate
from megatron_ext.training.loop import train
from megatron_ext.training.metrics import read_metrics
from megatron_ext.training.run import build_run
from megatron_ext.vocabulary import Vocabulary
from support.data_sets import write_pairs
from support.text_models import CONTROL, byte_level
from support.tiny_vq import GRID, make_vq
from support.vocabularies import make_vocabulary

CAPTIONS = ["a red circle", "two blue squares"]
ITERATIONS = 4


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A folder with vq/, vocabulary/, pairs (a data set) and benchmarks/, in which one picture cannot be read."""
    folder = tmp_path_factory.mktemp("benchmarking")
    make_vq(folder / "vq")
    vocabulary = make_vocabulary(folder / "vocabulary")
    write_pairs(folder / "pairs", vocabulary, [CAPTIONS] * 60, grid=(GRID, GRID))
    write_benchmarks(folder / "benchmarks", BenchmarkConfig(pictures=3, size=32))
    broken = POPE.read(folder / "benchmarks" / "pope")[0].image
    broken.write_bytes(broken.read_bytes()[:60])
    return folder


def configuration(material: Path, output: Path, *more: str) -> Config:
    pairs = [{"path": str(material / "pairs"), "task": task} for task in ("understanding", "generation")]
    pope = {"name": "pope", "data": str(material / "benchmarks" / "pope"), "parts": ["random", "popular"]}
    mme = {"name": "mme", "data": str(material / "benchmarks" / "mme"), "limit": 6}
    overrides = [
        f"output={output}",
        *("model.num_layers=3", "model.hidden_size=32", "model.num_attention_heads=2"),
        *("plan.preset=himix_hmgen_share_partial", f"data.vocabulary={material / 'vocabulary'}", "data.workers=0"),
        *(f"data.train={json.dumps(pairs)}", "data.sequence_length=128"),
        *(f"training.iterations={ITERATIONS}", "training.global_batch_size=2", "optimizer.warmup_iterations=1"),
        *(f"evaluation.vq={material / 'vq'}", f"evaluation.benchmarks={json.dumps([pope, mme])}"),
        *(f"evaluation.prompts={json.dumps(CAPTIONS)}", "evaluation.max_new_tokens=4"),
    ]
    return config_file.load(Config, [], [*overrides, *more])


@dataclass
class Outcome:
    """What training left in its folder and in the process."""

    output: Path
    losses: list[tuple]
    weights: list[torch.Tensor]
    generators: list

    def records(self) -> list[dict]:
        return read_metrics(self.output / "metrics.jsonl")


def trained(config: Config) -> Outcome:
    validate(config, world_size=1)
    distributed.initialize(config)
    try:
        run = build_run(config)
        assert train(run, build_callbacks(run))
        config_file.write_yaml(Path(config.output, "config.yaml"), config)
        output = Path(config.output)
        losses = [(r["loss"], r["grad_norm"]) for r in read_metrics(output / "metrics.jsonl")]
        weights = [p.detach().clone() for p in run.chunks[0].parameters()]
        states = [random.getstate(), torch.get_rng_state().tolist(), repr(np.random.get_state())]
        return Outcome(output, losses, weights, states)
    finally:
        distributed.shut_down()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, material) -> Outcome:
    """A run with an evaluation after iterations 2 and 4."""
    output = tmp_path_factory.mktemp("evaluated")
    stale = training_folder.iteration_folder(output, 2) / "0007.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of a run that was killed")
    return trained(configuration(material, output, "evaluation.interval=2"))


def test_training_does_not_notice(evaluated, material, tmp_path):
    plain = trained(configuration(material, tmp_path))
    assert len(plain.losses) == ITERATIONS and plain.losses == evaluated.losses
    assert all(map(torch.equal, plain.weights, evaluated.weights))
    assert plain.generators == evaluated.generators


def test_an_evaluation_leaves_answers_pictures_and_scores(evaluated, material):
    with_figures = [r["iteration"] for r in evaluated.records() if "pope_accuracy" in r]
    assert with_figures == [2, 4]
    for iteration in with_figures:
        folder = training_folder.iteration_folder(evaluated.output, iteration)
        names = {"pope.jsonl", "mme.jsonl", "0000.png", "0001.png", "sheet.png", training_folder.MANIFEST}
        assert {file.name for file in folder.iterdir()} == names
        manifest = json.loads((folder / training_folder.MANIFEST).read_text())
        assert [picture["caption"] for picture in manifest["pictures"]] == CAPTIONS
        assert manifest["figures"].items() <= evaluated.records()[iteration - 1].items()
        assert {"pope_f1", "mme_perception"} <= manifest["figures"].keys()
        assert manifest["scores"]["mme"]["questions"] == 6
    items = POPE.read(material / "benchmarks" / "pope", ["random", "popular"])
    unreadable = [item for item in items if item.image == items[0].image]
    assert (
        manifest["scores"]["pope"]["missing"] == len(unreadable) < manifest["scores"]["pope"]["questions"] == len(items)
    )


def test_pictures_and_scores_are_in_tensorboard(evaluated):
    events = EventAccumulator(str(evaluated.output / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("pope/accuracy")] == [2, 4]
    assert [e.step for e in events.Images("pictures/1: two blue squares")] == [2, 4]


def test_the_model_in_training_answers_as_its_checkpoint_does(evaluated, material, tmp_path):
    try:
        session = Session(load(evaluated.output, []), material / "vq", batch_size=5)
        answer(session, POPE.read(material / "benchmarks" / "pope", ["random", "popular"]), tmp_path / "a.jsonl", 4)
    finally:
        distributed.shut_down()
    answers = (training_folder.iteration_folder(evaluated.output, ITERATIONS) / "pope.jsonl").read_text()
    assert answers == (tmp_path / "a.jsonl").read_text() and len(set(answers.splitlines())) > 10


TRIMMING = """\
{% for m in messages %}<|turn|>{{ m.role }}
{{ m.content | trim }}<|eot|>
{% endfor %}{% if add_generation_prompt %}<|turn|>assistant
{% endif %}"""


def test_questions_that_cannot_be_written_stay_unanswered(one_process, tmp_path, capsys):
    text, end, turn_end = byte_level(tmp_path / "tokenizer.json"), *CONTROL[1::2]
    vocabulary = Vocabulary.create(tmp_path / "v", text, 50, end=end, answer_end=turn_end, chat_template=TRIMMING)
    session = SimpleNamespace(
        trained=SimpleNamespace(vocabulary=vocabulary),
        batch_size=2,
        encode=lambda image: [7, 8],
        generator=lambda requests, sampling: [[*vocabulary.encode("red"), vocabulary.answer_end]] * len(requests),
    )
    image, file = Path("a.png"), tmp_path / "answers.jsonl"
    items = [
        Item("bad", image, f"is {turn_end} left", "no"),
        Item("spaced", image, " what\n", "red"),
        Item("bad choice", image, "what", "A", choices=(turn_end,), bare="what"),
    ]
    one_process()
    assert answer(session, items, file, max_new_tokens=4) == 2
    assert read_answers(file).answers == {"spaced": "red"}
    lines = [line for line in capsys.readouterr().err.splitlines() if "unanswered" in line]
    assert [line.partition("; ")[2] for line in lines] == ["bad stays unanswered", "bad choice stays unanswered"]
    (vocabulary.folder / "chat_template.jinja").write_text("{% for")
    session.trained.vocabulary = Vocabulary(vocabulary.folder)
    with pytest.raises(UserError, match="chat_template.jinja: not a Jinja template"):
        answer(session, items, file, max_new_tokens=4)


def test_the_report_shows_questions_pictures_and_scores(evaluated, material, tmp_path):
    write_report(evaluated.output, tmp_path / "report.html")
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    for expected in (*CAPTIONS, "right: yes", "POPE: ", "MME, perception", "after iteration 4"):
        assert expected in page and expected in text
    assert "figures of MME" not in page, "two evaluations are no curve"
    assert "Answer the question using" not in page
    files = {file.name for file in (tmp_path / "report_files").iterdir()}
    assert {"picture-0.png", "picture-1.png", "question-0.png"} <= files
    assert page.count("data:image/png;base64") == len([name for name in files if name.endswith(".png")])


def test_missing_files_are_named_before_training(one_process, material, tmp_path):
    absent = tmp_path / "nowhere"
    settings = configuration(material, tmp_path / "run", "evaluation.interval=2")
    settings.evaluation.benchmarks[0].data = str(absent)
    one_process()
    with pytest.raises(UserError, match=f"{absent}/coco_pope_random.json: no such file"):
        build_callbacks(build_run(settings))
    settings = configuration(material, tmp_path / "run", "evaluation.interval=2", f"evaluation.vq={absent}")
    with pytest.raises(UserError, match=str(absent)):
        build_callbacks(build_run(settings))
    assert not (tmp_path / "run").exists()


def test_a_part_of_a_benchmark_comes_from_all_over_it():
    items = [
        Item(str(n), Path(str(n // 6)), "?", ("yes", "no")[n % 2], (("a", "b", "c")[n // 300],)) for n in range(900)
    ]
    some = POPE.subset(items, 60)
    assert some == POPE.subset(items, 60) and len(some) == len(set(some)) == 60
    assert Counter(group for item in some for group in item.groups) == {"a": 20, "b": 20, "c": 20}
    assert 20 < sum(item.answer == "yes" for item in some) < 40
    assert [int(item.id) for item in some] == sorted(int(item.id) for item in some)


def test_questions_that_are_scored_together_stay_together():
    items = [Item(str(n), Path(str(n // 2)), "?", "yes", ("count",)) for n in range(100)]
    assert Counter(Counter(item.image for item in MME.subset(items, 11)).values()) == {2: 5}

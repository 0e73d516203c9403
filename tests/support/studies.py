"""A study that takes seconds."""

from pathlib import Path

import yaml

from megatron_ext.picture_world.benchmark_files import BenchmarkConfig, write_benchmarks
from support.data_sets import write_pairs
from support.tiny_vq import GRID, make_vq
from support.vocabularies import make_vocabulary


def write_study(folder: Path) -> Path:
    """The file of a study of two equal runs. Only the first has a trial of its learning rate, which is that of the
    second; and only the first, which counts as trained on both tasks, answers the benchmark, as trained and blind; no
    document is drawn."""
    make_vq(folder / "vq")
    vocabulary = make_vocabulary(folder / "vocabulary")
    write_benchmarks(folder / "benchmarks", BenchmarkConfig(pictures=2, size=32))
    write_pairs(folder / "pairs", vocabulary, [["is it red", "yes"]] * 60, grid=(GRID, GRID))
    source = {"path": str(folder / "pairs"), "task": "understanding"}
    base = {
        "plan": {"preset": "himix"},
        "data": {"vocabulary": str(folder / "vocabulary"), "train": [source], "validation": [source]},
        "training": {"iterations": 30, "micro_batch_size": 2, "global_batch_size": 4, "validation_batches": 1},
        "optimizer": {"warmup_iterations": 2},
        "checkpoint": {"interval": 5},
        "logging": {"tensorboard": False},
    }
    base["data"] |= {"sequence_length": 128, "workers": 0}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    skip = "plan.table=[{layers: all, task: %s, modality: image, role: skip}]"
    first = {"name": "first", "trained_on": "unified", "partner_group": "same"}
    first["evaluate_as"] = {"blind": [skip % "understanding"], "none_drawn": [skip % "generation"]}
    second = {"name": "second", "trained_on": "understanding", "partner_group": "same", "searches_rate": False}
    pope = {"name": "pope", "data": str(folder / "benchmarks" / "pope"), "task": "generation"}
    tree = {
        "name": "test",
        "output": str(folder / "out"),
        "base": [str(folder / "base.yaml")],
        "sizes": [{"name": "tiny", "settings": {"model": {"num_layers": 2, "hidden_size": 32}}}],
        "methods": [first, second],
        "learning_rates": {"values": [3.0e-4], "seed": 9, "iterations": 3},
        "evaluation": {"vq": str(folder / "vq"), "benchmarks": [pope | {"options": ["--max-new-tokens", "2"]}]},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    return folder / "study.yaml"

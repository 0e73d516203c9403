"""A vocabulary, small data sets, and a configuration to train with on them."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_ext.picture_world.benchmark_files import BenchmarkConfig, write_benchmarks
from support.data_sets import write_pairs, write_texts
from support.forked_programs import run_forked
from support.tiny_vq import CODES, make_vq
from support.vocabularies import make_vocabulary

SENTENCE = "is there a red green blue circle square left right of above below how many yes no one two"


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A folder with vocabulary/, pairs and texts (data sets), vq/, benchmarks/, and config.yaml, of a run that takes
    a second or two."""
    folder = tmp_path_factory.mktemp("material")
    make_vq(folder / "vq")
    write_benchmarks(folder / "benchmarks", BenchmarkConfig(pictures=2, size=32))
    random = np.random.default_rng(0)
    sentences = [" ".join(random.choice(SENTENCE.split(), random.integers(4, 12))) for _ in range(400)]
    vocabulary = make_vocabulary(folder / "vocabulary", CODES, sentences, pieces=40)
    pairs = write_pairs(folder / "pairs", vocabulary, [[sentence] for sentence in sentences])
    texts = write_texts(folder / "texts", vocabulary, sentences)
    config = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "head_size": 12,
            "qkv_bias": True,
            "qk_norm": True,
        },
        # Both reductions, and split projections with every option.
        "plan": {
            "preset": "himix_hmgen_share_partial",
            "projections": {"modules": ["qkv", "proj", "fc1", "fc2"], "rank": 4, "per_task": True},
        },
        "data": {
            "vocabulary": str(folder / "vocabulary"),
            "train": [{"path": pairs, "task": task} for task in ("understanding", "generation")]
            + [{"path": texts, "task": "text", "weight": 0.5}],
            "validation": [{"path": pairs, "task": "generation"}],
            "sequence_length": 64,
        },
        "training": {
            "iterations": 20,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "validation_interval": 10,
            "z_loss": 1e-3,
        },
        "optimizer": {"lr": 1e-2, "warmup_iterations": 2},
        "checkpoint": {"interval": 10, "keep": 0},
        "logging": {"gradient_alignment_interval": 6},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="session")
def train(material):
    """A function (output, overrides, processes) that runs pretrain_unified.py and returns the completed process."""

    def run(
        output: Path, *overrides: str, processes: int | None = None, check: bool = True
    ) -> subprocess.CompletedProcess:
        command = ["pretrain_unified.py", "--config", material / "config.yaml", f"output={output}", *overrides]
        return run_forked(command, processes, check)

    return run

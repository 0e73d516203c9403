"""A model of 4 codes an image token, trained by pretrain_unified.py: it learns, resumes, keeps its code vectors, and
draws what it was shown."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch.distributed.checkpoint
import yaml

from megatron_ext import vq
from megatron_ext.checkpoints.stored_weights import StoredWeights
from megatron_ext.data.format import ANSWER, IMAGE, Dataset
from megatron_ext.data.writer import DatasetWriter
from megatron_ext.vocabulary import Vocabulary
from support.forked_programs import run_forked
from support.images import encoded
from support.vila_u import write_vision_tower
from support.vocabularies import make_vocabulary

DEPTH, CODES, GRID = 4, 24, 4
FIRST, LAST = 40, 80
TEXTS = ["red circle", "blue square"]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A folder with tower/, vocabulary/, a data set of two images, and config.yaml."""
    folder = tmp_path_factory.mktemp("material")
    write_vision_tower(folder / "tower", depth=DEPTH, codebook_size=CODES, grid=GRID)
    vocabulary, tower = make_vocabulary(folder / "vocabulary", CODES), vq.load(folder / "tower")
    random = np.random.default_rng(0)
    with DatasetWriter(folder / "pairs", vocabulary.fingerprint, tower.metadata, {"made": "by a test"}) as writer:
        for text in TEXTS:
            codes = random.integers(CODES, size=GRID * GRID * DEPTH)
            answer = np.array(vocabulary.encode(text), np.int32)
            writer.add([(IMAGE, vocabulary.image_ids(codes).astype(np.int32)), (ANSWER, answer)])
    head = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "chunk": 24}
    config = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "image_codes": {"depth": DEPTH, "codebook": str(folder / "tower"), "head": head},
        },
        "plan": {"preset": "himix_hmgen_share_partial"},
        "data": {
            "vocabulary": str(folder / "vocabulary"),
            "train": [{"path": str(folder / "pairs"), "task": task} for task in ("understanding", "generation")],
            "validation": [{"path": str(folder / "pairs"), "task": "generation"}],
            "sequence_length": 48,
            "caption_dropout": 0.0,
            "generation_text": True,
        },
        "training": {
            "iterations": LAST,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "means": "modality",
            "validation_interval": LAST,
        },
        "optimizer": {"lr": 2e-2, "warmup_iterations": 2},
        "checkpoint": {"interval": FIRST, "keep": 0},
        "logging": {"tensorboard": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def output(material) -> Path:
    """The folder of a whole run."""
    train(material, material / "run")
    return material / "run"


def train(material: Path, output: Path) -> None:
    run_forked(["pretrain_unified.py", "--config", material / "config.yaml", f"output={output}"])


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_every_depth_is_learnt(output):
    first, last = metrics(output)[0], metrics(output)[-1]
    depths = [f"loss_depth_{number}" for number in range(1, DEPTH + 1)]
    assert all(abs(first[name] - np.log(CODES)) < 0.3 for name in depths)
    assert all(last[name] < 0.01 and last[f"validation_{name}"] < 0.01 for name in depths)
    for record in (first, last):
        assert record["loss"] == pytest.approx(record["loss_text_tokens"] + record["loss_codes"])
        assert record["loss_codes"] == pytest.approx(sum(record[name] for name in depths) / DEPTH)


def test_what_a_plan_saves_is_logged_with_the_head_and_without(output):
    for record in metrics(output):
        assert 0 < record["stack_flops_ratio"] < record["flops_ratio"] < 1


def test_a_run_resumes_bit_for_bit(material, output, tmp_path):
    name = f"iter_{FIRST:07}"
    shutil.copytree(output / "checkpoints" / name, tmp_path / "checkpoints" / name)
    train(material, tmp_path)
    resumed = {record["iteration"]: record for record in metrics(tmp_path)}
    for record in metrics(output)[FIRST:]:
        again = resumed[record["iteration"]]
        assert {k: v for k, v in again.items() if k.startswith(("loss", "grad", "validation"))} == {
            k: v for k, v in record.items() if k.startswith(("loss", "grad", "validation"))
        }


def test_the_checkpoint_has_the_towers_code_vectors_and_no_optimizer_state_of_them(material, output):
    path = output / "checkpoints" / f"iter_{LAST:07}"
    weights = StoredWeights(path)
    stored = torch.distributed.checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
    assert [key for key in stored if "code_vectors" in key] == ["code_vectors.weight"]
    assert torch.equal(weights["code_vectors.weight"], vq.load(material / "tower").vectors)
    assert weights.state["config"]["model"]["image_codes"]["fingerprint"] == vq.load(material / "tower").fingerprint


def test_it_draws_the_codes_that_it_was_shown_and_answers(material, output, tmp_path):
    (tmp_path / "picture.png").write_bytes(encoded(3))
    prompts = [argument for text in TEXTS for argument in ("--prompt", text)]
    command = ["tools/generate.py", "--checkpoint", output, "--vq", material / "tower", *prompts]
    command += ["--image", tmp_path / "picture.png", "--question", "is it red", "--json", tmp_path / "results.json"]
    command += ["--guidance", 3, "--temperature", 0.5, "--top-k", 4, "--top-p", 0.9, "--out", tmp_path / "pictures"]
    run_forked(command, processes=2)
    *pictures, answer = json.loads((tmp_path / "results.json").read_text())
    pairs, first_code = Dataset(material / "pairs"), Vocabulary(material / "vocabulary").image_offset
    for number, picture in enumerate(pictures):
        (_, ids), _ = pairs.document(number)
        assert picture["codes"] == (ids - first_code).tolist()
    assert isinstance(answer["answer"], str)

"""Training over Transformer Engine's layers, on two replicas with different rows, by a stand-in that runs on CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.programs import PYTHON_PATH, ROOT, free_port


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two ranks measured."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(ROOT / "tests" / "stand_in"), PYTHON_PATH, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("transformer_engine_ranks.py"))]
    processes = [
        subprocess.Popen([*command, str(folder / str(rank))], env=environment | {"RANK": str(rank)}, stderr=log)
        for rank, log in ((rank, (folder / f"{rank}.log").open("w")) for rank in range(2))
    ]
    try:
        for rank, process in enumerate(processes):
            assert process.wait(timeout=400) == 0, (folder / f"{rank}.log").read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


@pytest.mark.parametrize("plan", ["dense", "himix", "separate", "low rank", "bias and norms"])
def test_gradients_are_those_of_torchs_layers(ranks, plan):
    for rank in ranks:
        assert rank["plans"][plan]["float32"] < 1e-5
        assert rank["plans"][plan]["fp8"] < 0.02


def test_weight_gradients_are_fused_where_a_weight_is_used_whole(ranks):
    fused = {plan: measured["fused"] for plan, measured in ranks[0]["plans"].items()}
    assert fused == {
        "dense": ["linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"],
        "himix": ["linear_fc1", "linear_fc2", "linear_proj"],
        "separate": ["linear_fc1", "linear_fc2"],
        "low rank": ["linear_fc1", "linear_fc2"],
        "bias and norms": ["linear_fc1", "linear_fc2", "linear_proj"],
    }


def test_replicas_with_different_rows_register_the_same_histories(ranks):
    first, second = (rank["delayed"] for rank in ranks)
    assert first["registered"] == second["registered"]
    assert len(first["registered"]["fwd"]) == len(first["registered"]["bwd"]) == 8
    assert first["largest"] == second["largest"] and min(first["largest"]) > 0


def test_histories_are_saved_and_restored(ranks):
    assert ranks[0]["delayed"]["restored"]
    assert ranks[0]["delayed"]["in checkpoints"] == 8


def test_an_evaluation_uses_the_weights_of_the_last_step(ranks):
    for rank in ranks:
        assert rank["staleness"]["moved"] > 0.1
        assert rank["staleness"]["stale"] == rank["staleness"]["stale loss"] == 0

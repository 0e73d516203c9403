"""Checkpoints on the disks of the nodes. Each rank stands for a node here, with a folder of its own."""

import shutil
from pathlib import Path

import pytest

from support.gpt import Layout, TrainedGPT
from support.ranks import world

LAYOUTS = {
    "replicas share the optimizer": Layout(distributed_optimizer=True, bf16=True, dropout=0.1, layers=2),
    "float32 replicas share it": Layout(distributed_optimizer=True, dropout=0.1, layers=2),
    "replicas have the same": Layout(bf16=True, dropout=0.1, layers=2),
    "parts of a model": Layout(tensor=2, dropout=0.1, layers=2),
}
QUICK = ("replicas share the optimizer", "replicas have the same")
NODE = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(v, id=k, marks=[] if k in QUICK else pytest.mark.slow) for k, v in LAYOUTS.items()],
)
def test_a_lost_node_takes_nothing_with_it(tmp_path, layout):
    for uninterrupted, resumed, points in world(2, _lose_nodes, tmp_path, layout, folder=tmp_path):
        assert resumed == [uninterrupted] * 3
        assert points == {
            "whole": "the local checkpoint of iteration 2",
            "rank 1's file has one bit changed": "the local checkpoint of iteration 2 (1 files are copies)",
            "node 1 is new": "the local checkpoint of iteration 2 (1 files are copies)",
            "of another layout": "None",
            "the run's folder is new": "None",
            "both nodes are new": "None",
        }


def _lose_nodes(folder: Path, layout: Layout):
    import torch.distributed as dist

    from megatron_ext.checkpoints.local import LocalCheckpoints

    node = folder / f"node{dist.get_rank()}"

    def checkpoints(layout: str = "a") -> LocalCheckpoints:
        dist.barrier()
        return LocalCheckpoints(str(node), folder / "run", layout, NODE)

    local, run = checkpoints(), TrainedGPT(layout)
    for iteration in (1, 2):
        run.train(iteration, iteration)
        local.save(iteration, run.chunks, run.optimizer, {"iteration": iteration})
    uninterrupted = (run.train(3, 4), run.weights())
    local.finish()
    assert len(list(local.folder.iterdir())) == 2, "the files of the older iteration are still there"

    resumed, points = [], {}

    def resume(name: str):
        local = checkpoints()
        point = local.newest()
        points[name] = str(point)
        again = TrainedGPT(layout, seed=2)
        assert local.load(point, again.chunks, again.optimizer, {})["iteration"] == 2
        resumed.append((again.train(3, 4), again.weights()))

    resume("whole")
    if dist.get_rank() == 1:
        (own,) = local.folder.glob("*.rank_00001.*")
        content = bytearray(own.read_bytes())
        content[len(content) // 2] ^= 1
        own.write_bytes(content)
    resume("rank 1's file has one bit changed")
    if dist.get_rank() == 1:
        shutil.rmtree(node)
    resume("node 1 is new")
    points["of another layout"] = str(checkpoints("b").newest())
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "run").rename(folder / "old")
    points["the run's folder is new"] = str(checkpoints().newest())
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "run")
        (folder / "old").rename(folder / "run")
    shutil.rmtree(node)
    points["both nodes are new"] = str(checkpoints().newest())
    return uninterrupted, resumed, points

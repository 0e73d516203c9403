"""Copies of checkpoints at a second place, and what a run gets back from there."""

import shutil
from pathlib import Path

import pytest

from megatron_ext.checkpoints.checkpointer import Checkpointer
from megatron_ext.checkpoints.folder import MARKER, checkpoints
from megatron_ext.checkpoints.replica import Replica
from megatron_ext.checkpoints.storage import storage
from megatron_ext.errors import UserError
from support.gpt import Layout, TrainedGPT
from support.ranks import world

LAYOUT = Layout(tensor=2, dropout=0.1, layers=2)


@pytest.mark.parametrize(
    "scheme", [pytest.param("", id="folder"), pytest.param("file://", id="url", marks=pytest.mark.slow)]
)
def test_a_run_whose_folder_is_lost_goes_on_from_the_copy(tmp_path, scheme):
    place = f"{scheme}{tmp_path / 'second'}"
    for uninterrupted, resumed in world(2, _lose_folder, tmp_path / "run", place, folder=tmp_path):
        assert resumed == uninterrupted
    assert [p.name for p in checkpoints(tmp_path / "second" / "checkpoints")] == ["iter_0000002", "iter_0000003"]


def _lose_folder(folder: Path, place: str):
    import torch.distributed as dist

    checkpointer = Checkpointer(folder / "checkpoints", keep=2, replica=Replica(place, keep=2))
    run = TrainedGPT(LAYOUT)
    for iteration in (1, 2, 3):
        run.train(iteration, iteration)
        checkpointer.save(iteration, run.chunks, run.optimizer, {})
        checkpointer.replica.finish()
    uninterrupted = (run.train(4, 5), run.weights())
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()
    point = checkpointer.resume_point()
    assert point == folder / "checkpoints" / "iter_0000003"
    again = TrainedGPT(LAYOUT, seed=2)
    checkpointer.load(point, again.chunks, again.optimizer)
    return uninterrupted, (again.train(4, 5), again.weights())


def test_a_copy_fails_without_harm_and_is_made_up_for_and_a_damaged_checkpoint_is_never_copied(tmp_path):
    data = tmp_path / "checkpoints" / "iter_0000001" / "__1_0.distcp"
    for said, left in world(2, _fail, tmp_path, folder=tmp_path):
        assert said == [
            f"iter_0000001 is not copied: {data}: damaged, its checksum is wrong",
            f"iter_0000002 is not copied: {tmp_path}/in_the_way: Not a directory",
            f"iter_0000002 is copied to {tmp_path}/in_the_way",
        ]
        assert left == []


def _fail(folder: Path):
    import torch.distributed as dist

    from megatron_ext.checkpoints import replica as replica_module

    said: list[str] = []
    replica_module.report = said.append
    checkpointer = Checkpointer(folder / "checkpoints", keep=1)
    run = TrainedGPT(LAYOUT)
    checkpointer.save(1, run.chunks, run.optimizer, {})
    newest = checkpointer.newest()
    dist.barrier()
    if dist.get_rank() == 0:
        file = newest / "__1_0.distcp"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        (folder / "in_the_way").write_text("")
    dist.barrier()
    replica = Replica(str(folder / "second"), keep=1)
    replica.offer(newest)
    replica.finish()
    checkpointer.replica = Replica(str(folder / "in_the_way"), keep=1)
    checkpointer.save(2, run.chunks, run.optimizer, {})
    checkpointer.replica.finish()
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "in_the_way").unlink()
    dist.barrier()
    for _ in range(2):  # the second has nothing to do
        checkpointer.replica.offer_newer(checkpointer.newest())
        checkpointer.replica.finish()
    return [line for line in said if line.startswith("iter")], [
        p.name for p in (folder / "second" / "checkpoints").iterdir()
    ]


def test_a_copy_at_a_url_counts_only_with_its_marker():
    place = storage("memory://bucket/run")
    for iteration in (1, 2, 3):
        target = place.begin(iteration)
        with place.writer(target, "data") as stream:
            stream.write(b"weights")
        assert iteration not in place.iterations()
        if iteration != 2:
            place.complete(target, iteration, b"{}")
    assert place.iterations() == [1, 3]
    with place.reader(3, MARKER) as stream:
        assert stream.read() == b"{}"
    place.keep_newest(1)
    assert place.iterations() == [3]
    place.begin(4)
    assert place.iterations() == [3] and "iter_0000002" not in str(place._files.find("/bucket"))


def test_a_url_that_fsspec_does_not_know_is_refused_with_one_line():
    with pytest.raises(UserError, match="^nowhere://bucket: Protocol not known: nowhere$"):
        storage("nowhere://bucket")

"""Saves on a full disk, and checkpoints that were damaged after their completion."""

import resource
from pathlib import Path

import pytest

from support.gpt import Layout, TrainedGPT
from support.ranks import world

LAYOUT = Layout(tensor=2, layers=1)


@pytest.mark.parametrize(
    "asynchronous",
    [pytest.param(False, id="synchronous", marks=pytest.mark.slow), pytest.param(True, id="asynchronous")],
)
def test_a_full_disk_is_called_that_on_every_rank_and_leaves_no_trace_of_the_checkpoint(tmp_path, asynchronous):
    first, second = world(2, _save_with_little_room, tmp_path / "checkpoints", asynchronous, folder=tmp_path)
    assert first == second, "the ranks disagree"
    path = tmp_path / "checkpoints"
    assert (
        first
        == [
            f"{path}/iter_0000002/__1_0.distcp: File too large (rank 1)",
            f"{path}/iter_0000003: File too large",
            f"{path}/iter_0000004/common.pt: File too large (rank 0)",
        ][: len(first)]
    )
    assert len(first) >= 2
    assert sorted(p.name for p in path.iterdir()) == ["iter_0000001", "iter_0000005"]


def _save_with_little_room(folder: Path, asynchronous: bool) -> list[str]:
    """Saves five times: whole, and with a limit on the size of files in which one rank's tensors, what describes the
    checkpoint, or the state that ranks share has no room; then whole again."""
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.strategies import common

    from megatron_ext.checkpoints import writer as checkpoint_writer
    from megatron_ext.checkpoints.checkpointer import Checkpointer
    from megatron_ext.checkpoints.errors import WriteError

    checkpointer = Checkpointer(folder, keep=2, asynchronous=asynchronous)
    run = TrainedGPT(LAYOUT)
    failures = []

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def save(iteration: int):
        try:
            checkpointer.save(iteration, run.chunks, run.optimizer, {})
            checkpointer.finish()
        except WriteError as error:
            failures.append(str(error))
        finally:
            limit(resource.RLIM_INFINITY)

    save(1)
    limit(1000 if dist.get_rank() else resource.RLIM_INFINITY)
    save(2)
    take = checkpoint_writer.Report.take
    checkpoint_writer.Report.take = lambda report: (take(report), limit(100))[0]
    save(3)
    checkpoint_writer.Report.take = take
    if hasattr(common, "TorchCommonSaveStrategy"):  # before 0.19
        whole = torch.save
        torch.save = lambda value, stream: (limit(100) if isinstance(value, dict) else None, whole(value, stream))
        save(4)
        torch.save = whole
    save(5)
    return failures


def test_a_run_goes_back_to_the_newest_checkpoint_or_copy_that_is_intact_if_it_may(tmp_path):
    (found,) = world(1, _damage, tmp_path, folder=tmp_path)
    path = tmp_path / "checkpoints"
    assert found == {
        "refuse": f"{path}/iter_0000003/__0_0.distcp: damaged, its checksum is wrong; to resume from the older "
        "iter_0000002, move iter_0000003 away",
        "older": ("iter_0000002", 2),
        "both": ("iter_0000001", 1),
        "all": f"{path}/iter_0000001/__0_0.distcp: damaged, its checksum is wrong; there is no older complete "
        "checkpoint beside it",
        "copied": ("iter_0000003", 3),
    }
    assert sorted(p.name for p in path.glob("*.damaged")) == [f"iter_000000{n}.damaged" for n in (1, 2, 3)]


def _damage(folder: Path) -> dict:
    """What is loaded, or the error, after more and more checkpoints are damaged."""
    from megatron_ext.checkpoints.checkpointer import Checkpointer
    from megatron_ext.checkpoints.errors import DamageError
    from megatron_ext.checkpoints.replica import Replica
    from megatron_ext.training.resuming import load_intact

    layout = Layout(layers=1)
    checkpointer = Checkpointer(folder / "checkpoints", keep=0)
    run = TrainedGPT(layout)
    for iteration in (1, 2, 3):
        checkpointer.save(iteration, run.chunks, run.optimizer, {"iteration": iteration})
    replica = Replica(str(folder / "second"), keep=1)
    replica.offer(checkpointer.newest())
    replica.finish()
    found = {}

    def damage(number: int) -> None:
        file = folder / f"checkpoints/iter_000000{number}/__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-1] + b"?")

    def attempt(name: str, on_damage: str) -> None:
        again = TrainedGPT(layout)
        try:
            point, state = load_intact(
                checkpointer,
                checkpointer.newest(),
                on_damage,
                lambda p: checkpointer.load(p, again.chunks, again.optimizer),
            )
            found[name] = point.name, state["iteration"]
        except DamageError as error:
            found[name] = str(error)

    damage(3)
    attempt("refuse", "refuse")
    attempt("older", "older")
    damage(2)
    attempt("both", "older")
    damage(1)
    attempt("all", "older")
    checkpointer.replica = replica
    attempt("copied", "older")
    return found

"""Ranks killed with SIGKILL at every step of a save and at random: a complete checkpoint is left to resume from."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from megatron_ext.checkpoints.folder import MARKER, checkpoints, damage, iteration_of, read_marker
from support.gpt import Layout, TrainedGPT
from support.ranks import start_world, world

LAYOUT = Layout(tensor=2, dropout=0.1, layers=1)
LAST = 40


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Losses by iteration of a run that nobody kills."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return dict(enumerate(world(2, _train, LAST + 3, folder=folder)[0], start=1))


def test_killed_at_any_change_to_the_file_system_in_a_save(tmp_path, uninterrupted):
    """Iteration 1 is saved; rank 0 is killed just before its n-th change while it saves iteration 2, for every n."""
    left = []
    for count in range(1, 100):
        folder = tmp_path / str(count)
        processes, pipes = start_world(2, _save_and_die_at_change, folder, count, folder=tmp_path)
        died = _wait_for(processes)[0] == -signal.SIGKILL
        left.append([iteration_of(path) for path in _intact(folder)])
        if not died:
            break
    # Before the rename, after it, after the old one is deleted (keep=1), and the save that was not killed.
    assert [left[0], left[-1]] == [[1], [2]]
    assert [1, 2] in left
    assert left == sorted(left, key=[[1], [1, 2], [2]].index)
    assert count > 12
    _assert_resumable([tmp_path / str(n + 1) for n in range(len(left))], tmp_path, uninterrupted)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_killed_at_random_moments(tmp_path, uninterrupted, asynchronous):
    generator = random.Random(asynchronous)
    folders = []
    for trial in range(4):
        folder = tmp_path / str(trial)
        processes, pipes = start_world(2, _train_and_save_always, folder, asynchronous, folder=tmp_path)
        while not checkpoints(folder) and all(p.is_alive() for p in processes):
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.7))
        os.kill(processes[generator.randrange(2)].pid, signal.SIGKILL)
        _wait_for(processes)
        assert _intact(folder)
        folders.append(folder)
    _assert_resumable(folders, tmp_path, uninterrupted)


def test_a_killed_writer_fails_the_save_on_every_rank_and_leaves_nothing(tmp_path):
    for failure, newest in world(2, _kill_writer_of_rank_one, tmp_path, folder=tmp_path):
        assert failure == "the writing process was killed (rank 1)"
        assert newest is None


def _wait_for(processes) -> list[int]:
    """Exit codes, once all have ended; a rank that lost another one ends by itself."""
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "a rank outlived the one that was killed"
    return [process.exitcode for process in processes]


def _intact(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, after a look that each of them really is complete."""
    complete = checkpoints(folder)
    for path in complete:
        files = read_marker(path)["files"]
        assert damage(path, files, files) == []
        assert {p.name for p in path.iterdir()} == {*files, MARKER}
    return complete


def _assert_resumable(folders: list[Path], tmp_path: Path, uninterrupted: dict[int, float]) -> None:
    for (iteration, losses), folder in zip(world(2, _resume_each, folders, folder=tmp_path)[0], folders, strict=True):
        assert iteration == iteration_of(_intact(folder)[-1])
        assert losses == [uninterrupted[iteration + n] for n in (1, 2)]


def _train(iterations: int) -> list[float]:
    return TrainedGPT(LAYOUT).train(1, iterations)


def _resume_each(folders: list[Path]) -> list[tuple[int, list[float]]]:
    """From the newest checkpoint of each folder: its iteration, and the losses of two more; then saves."""
    from megatron_ext.checkpoints.checkpointer import Checkpointer

    results = []
    for folder in folders:
        checkpointer = Checkpointer(folder, keep=1)
        run = TrainedGPT(LAYOUT, seed=9)
        done = checkpointer.load(checkpointer.newest(), run.chunks, run.optimizer)["iteration"]
        results.append((done, run.train(done + 1, done + 2)))
    return results


def _save_and_die_at_change(folder: Path, count: int) -> None:
    import torch.distributed as dist

    from megatron_ext.checkpoints.checkpointer import Checkpointer

    checkpointer = Checkpointer(folder, keep=1)
    run = TrainedGPT(LAYOUT)
    for iteration in (1, 2):
        run.train(iteration, iteration)
        if iteration == 2 and dist.get_rank() == 0:
            _die_before_change(count)
        checkpointer.save(iteration, run.chunks, run.optimizer, {"iteration": iteration})


def _die_before_change(count: int) -> None:
    """Kill this process when it is about to change the file system for the ``count``-th time from now."""
    import shutil

    changes = iter(range(1, count))

    def watched(change):
        def dying(*args, **kwargs):
            if next(changes, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)

        return dying

    for name in ("mkdir", "rename", "replace", "fsync", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))
    shutil.rmtree = watched(shutil.rmtree)


def _train_and_save_always(folder: Path, asynchronous: bool) -> None:
    from megatron_ext.checkpoints.checkpointer import Checkpointer

    checkpointer = Checkpointer(folder, asynchronous=asynchronous)
    run = TrainedGPT(LAYOUT)
    for iteration in range(1, LAST + 1):
        run.train(iteration, iteration)
        checkpointer.poll()
        checkpointer.save(iteration, run.chunks, run.optimizer, {"iteration": iteration})
    checkpointer.finish()


def _kill_writer_of_rank_one(folder: Path):
    import torch.distributed as dist

    from megatron_ext.checkpoints import writer as checkpoint_writer
    from megatron_ext.checkpoints.checkpointer import Checkpointer
    from megatron_ext.errors import UserError

    if dist.get_rank() == 1:
        checkpoint_writer.Report.put = lambda report, results: os.kill(os.getpid(), signal.SIGKILL)
    checkpointer = Checkpointer(folder / "checkpoints", asynchronous=True)
    run = TrainedGPT(LAYOUT)
    run.train(1, 1)
    checkpointer.save(1, run.chunks, run.optimizer, {})
    try:
        checkpointer.finish()
    except UserError as error:
        return str(error), checkpointer.newest()

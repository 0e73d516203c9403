"""Checkpoints of several ranks, beyond resuming: asynchronous saves, which are kept, which are refused."""

import time
from pathlib import Path

import pytest

from megatron_ext.checkpoints.folder import MARKER, checkpoints
from support.gpt import Layout, TrainedGPT
from support.ranks import world

LAYOUT = Layout(tensor=2, dropout=0.1, layers=2)
STATE = {"model": {"hidden_size": 16, "layers": 2}, "fingerprints": {"vocabulary": "5f0c"}}


def test_an_asynchronous_save_holds_the_moment_it_was_asked_for(tmp_path):
    for uninterrupted, resumed in world(2, _train_while_saving, tmp_path, folder=tmp_path):
        assert resumed == uninterrupted


def _train_while_saving(folder: Path):
    from megatron_ext.checkpoints.checkpointer import Checkpointer

    checkpointer = Checkpointer(folder / "checkpoints", asynchronous=True)
    run = TrainedGPT(LAYOUT)
    run.train(1, 2)
    checkpointer.save(2, run.chunks, run.optimizer, {})
    uninterrupted = (run.train(3, 5), run.weights())
    checkpointer.finish()
    again = TrainedGPT(LAYOUT, seed=2)
    checkpointer.load(checkpointer.newest(), again.chunks, again.optimizer)
    return uninterrupted, (again.train(3, 5), again.weights())


def test_an_asynchronous_save_is_complete_only_after_the_last_rank_has_written(tmp_path):
    seen = world(2, _hold_up_rank_one, tmp_path, folder=tmp_path)[0]
    assert seen == {"rank 0 has written": None, "both have written": "iter_0000001"}


def _hold_up_rank_one(folder: Path):
    import torch.distributed as dist

    from megatron_ext.checkpoints import writer as checkpoint_writer
    from megatron_ext.checkpoints.checkpointer import Checkpointer

    go_on, put = folder / "go_on", checkpoint_writer.Report.put

    def held_up(report, results):
        give_up = time.monotonic() + 60
        while dist.get_rank() == 1 and not go_on.exists() and time.monotonic() < give_up:
            time.sleep(0.01)
        put(report, results)
        (folder / f"written_{dist.get_rank()}").touch()

    def newest():
        path = checkpointer.newest()
        return path and path.name

    checkpoint_writer.Report.put = held_up
    checkpointer = Checkpointer(folder / "checkpoints", asynchronous=True)
    run = TrainedGPT(LAYOUT)
    run.train(1, 1)
    checkpointer.save(1, run.chunks, run.optimizer, {})
    while dist.get_rank() == 0 and not (folder / "written_0").exists():
        time.sleep(0.01)
    for _ in range(3):
        checkpointer.poll()
    seen = {"rank 0 has written": newest()}
    go_on.touch()
    while newest() is None:
        checkpointer.poll()
    return seen | {"both have written": newest()}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_the_newest_checkpoints_are_kept_and_nothing_else_is_left(tmp_path, asynchronous):
    world(2, _save_five, tmp_path / "checkpoints", asynchronous, folder=tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["iter_0000004", "iter_0000005"]


def _save_five(folder: Path, asynchronous: bool) -> None:
    from megatron_ext.checkpoints.checkpointer import Checkpointer

    checkpointer = Checkpointer(folder, keep=2, asynchronous=asynchronous)
    run = TrainedGPT(LAYOUT)
    for iteration in range(1, 6):
        checkpointer.save(iteration, run.chunks, run.optimizer, {})
    checkpointer.finish()


def test_a_checkpoint_before_the_first_step_is_one_too(tmp_path):
    for layout in (Layout(tensor=2), Layout(distributed_optimizer=True)):
        for uninterrupted, resumed in world(2, _save_before_training, tmp_path / str(layout), layout, folder=tmp_path):
            assert resumed == uninterrupted


def _save_before_training(folder: Path, layout: Layout):
    from megatron_ext.checkpoints.checkpointer import Checkpointer

    checkpointer = Checkpointer(folder)
    run = TrainedGPT(layout)
    checkpointer.save(0, run.chunks, run.optimizer, {})
    again = TrainedGPT(layout, seed=2)
    checkpointer.load(checkpointer.newest(), again.chunks, again.optimizer)
    return run.train(1, 2), again.train(1, 2)


def test_what_is_damaged_or_does_not_fit_is_refused_on_every_rank_with_one_line(tmp_path):
    first, second = world(2, _try_all, tmp_path, folder=tmp_path)
    assert first == second, "the ranks disagree"
    newest, older = (
        tmp_path / "checkpoints" / "iter_0000002",
        "; to resume from the older iter_0000001, move iter_0000002 away",
    )
    data = newest / "__1_0.distcp"
    expected = {
        "truncated": f"{data}: damaged, has 100 bytes instead of ",
        "altered": f"{data}: damaged, its checksum is wrong{older}",
        "missing": f"{data}: missing{older}",
        "two at once": f"{data}: missing (and 1 more){older}",
        "marker altered": f"{newest / MARKER}: damaged, its checksum is wrong{older}",
        "marker truncated": f"{newest / MARKER}: damaged, cannot be read{older}",
        "marker missing": f"{newest / MARKER}: missing, so this is not a complete checkpoint{older}",
        "no older one": f"{newest / 'metadata.json'}: missing; there is no older complete checkpoint beside it",
        "absent": f"{tmp_path / 'nowhere'}: no such checkpoint folder",
        "other vocabulary": f"{newest}: its fingerprints.vocabulary is 5f0c, this run's is abcd",
        "fewer layers": f"{newest}: has the parameter decoder.layers.1.",
        "more layers": f"{newest}: lacks the parameter decoder.layers.2.",
        "wider": f"{newest}: its parameter decoder.",
        "untied": f"{newest}: lacks the parameter output_layer.weight, which the model has",
    }
    assert first.keys() == expected.keys()
    for trial, message in first.items():
        assert message.startswith(expected[trial]), trial
        assert "\n" not in message


def _try_all(folder: Path) -> dict[str, str]:
    """The refusals by name of the trial; each trial starts from two whole checkpoints."""
    import shutil
    from dataclasses import replace

    import torch.distributed as dist

    from megatron_ext.checkpoints.checkpointer import Checkpointer
    from megatron_ext.errors import UserError

    checkpointer = Checkpointer(folder / "checkpoints")
    run = TrainedGPT(LAYOUT)
    for iteration in (1, 2):
        run.train(iteration, iteration)
        checkpointer.save(iteration, run.chunks, run.optimizer, STATE)
    shutil.copytree(folder / "checkpoints", folder / f"whole_{dist.get_rank()}")
    newest = checkpointer.newest()
    data, marker, metadata = newest / "__1_0.distcp", newest / MARKER, newest / "metadata.json"
    refusals = {}

    def attempt(name: str, change=lambda: None, path: Path = newest, expected: dict = STATE, layout: Layout = LAYOUT):
        if dist.get_rank() == 0:
            shutil.rmtree(checkpointer.folder)
            shutil.copytree(folder / "whole_0", checkpointer.folder)
            change()
        dist.barrier()
        model = TrainedGPT(layout)
        try:
            checkpointer.load(path, model.chunks, model.optimizer, expected)
        except UserError as error:
            refusals[name] = str(error)
        dist.barrier()

    def overwrite(file: Path, old: bytes, new: bytes):
        content = file.read_bytes()
        assert old in content
        file.write_bytes(content.replace(old, new, 1))

    attempt("whole")
    attempt("truncated", lambda: data.write_bytes(data.read_bytes()[:100]))
    attempt("altered", lambda: data.write_bytes(data.read_bytes()[:-1] + b"?"))
    attempt("missing", data.unlink)
    attempt("two at once", lambda: (data.unlink(), metadata.unlink()))
    attempt("marker altered", lambda: overwrite(marker, b'"hidden_size": 16', b'"hidden_size": 17'))
    attempt("marker truncated", lambda: marker.write_bytes(marker.read_bytes()[:-9]))
    attempt("marker missing", marker.unlink)
    attempt("no older one", lambda: (metadata.unlink(), shutil.rmtree(checkpoints(newest.parent)[0])))
    attempt("absent", path=folder / "nowhere")
    attempt("other vocabulary", expected={"fingerprints": {"vocabulary": "abcd"}})
    attempt("fewer layers", layout=replace(LAYOUT, layers=1))
    attempt("more layers", layout=replace(LAYOUT, layers=3))
    attempt("wider", layout=replace(LAYOUT, hidden_size=32))
    attempt("untied", layout=replace(LAYOUT, tied=False))
    return refusals


def test_a_checkpoint_that_cannot_be_written_is_refused_on_every_rank(tmp_path):
    (tmp_path / "in_the_way").write_text("")
    for message in world(2, _save_into_a_file, tmp_path / "in_the_way", folder=tmp_path):
        assert message == f"{tmp_path / 'in_the_way'}: File exists"


def _save_into_a_file(folder: Path) -> str:
    from megatron_ext.checkpoints.checkpointer import Checkpointer
    from megatron_ext.errors import UserError

    run = TrainedGPT(LAYOUT)
    try:
        Checkpointer(folder).save(1, run.chunks, run.optimizer, {})
    except UserError as error:
        return str(error)

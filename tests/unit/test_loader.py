"""Loaders: the same rows bit for bit through DALI and through torch, and workers that live as long as the trainer."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_ext.config import DataConfig, SourceConfig
from megatron_ext.data import build_mixture, step_batches
from megatron_ext.data.packed_rows import PackedRows
from megatron_ext.data.packed_tokens import unpack
from megatron_ext.errors import UserError
from support.data_sets import captions, mixture, write_pairs
from support.programs import PYTHON_PATH

SENTENCES = [["a red square"]] * 40
LOADERS = [("plain", 0), ("plain", 2), ("dali", 0), ("dali", 1), ("dali", 2)]


def settings(loader, workers=0) -> DataConfig:
    return DataConfig(sequence_length=64, loader=loader, workers=workers, prefetch=3)


def assert_equal(a, b):
    for name in (*a.names(), "codes"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)


@pytest.mark.parametrize("loader, workers", LOADERS)
def test_every_loader_gives_the_rows_of_the_step_it_is_at(blend, loader, workers):
    batches = step_batches(blend, settings(loader, workers), 5, start_step=7, num_steps=11)
    rows = PackedRows(blend, 64)
    for step in range(7, 11):
        batch = next(batches)
        assert batches.wait_seconds > 0
        assert_equal(batch, unpack(rows.packed_tokens(step * 5, step * 5 + 5), blend.special.pad).tensors())
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("loader", ["plain", "dali"])
def test_every_loader_gives_the_codes_of_image_tokens(tmp_path, loader):
    several = mixture((captions(tmp_path / "pairs", 80, depth=4), "generation", 1.0))
    batch = next(step_batches(several, settings(loader), 5, start_step=2))
    assert batch.codes.shape == (5, 64, 4)
    assert_equal(batch, PackedRows(several, 64).batch(10, 15).tensors())


def test_one_row_is_the_same_row_inside_a_batch(blend):
    rows = PackedRows(blend, 64)
    batch = next(step_batches(blend, settings("plain"), 5, start_step=2))
    for i in range(5):
        assert_equal(rows[10 + i], batch.rows(i, i + 1))


@pytest.mark.parametrize("loader", ["plain", "dali"])
def test_workers_survive_the_signals_that_stop_a_trainer(blend, loader):
    batches = step_batches(blend, settings(loader, workers=1), 5, start_step=0)
    next(batches)
    for worker in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, number)
    for _ in range(20):
        next(batches)
    batches.close()
    assert not multiprocessing.active_children()


def test_a_lost_worker_ends_the_run_instead_of_hanging_it(blend):
    batches = step_batches(blend, settings("dali", workers=2), 5, start_step=0)
    next(batches)
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with pytest.raises(UserError, match="a process that packs data ended with exit code -9"):
        next(batches)
    batches.close()
    assert not multiprocessing.active_children()


TRAINER = """
import multiprocessing, time
from support.data_sets import mixture
from megatron_ext.config import DataConfig
from megatron_ext.data import step_batches
batches = step_batches(mixture(({path!r}, "generation", 1.0)), DataConfig(sequence_length=64, loader={loader!r}), 5, 0)
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
{then}
"""


def start_trainer(tmp_path, loader, then) -> tuple[subprocess.Popen, list[str]]:
    """A program that trains with one worker and then does something; with the worker's process id."""
    path = captions(tmp_path / "pairs", 80)
    program = TRAINER.format(path=path, loader=loader, then=then)
    environment = os.environ | {"PYTHONPATH": PYTHON_PATH}
    command = [sys.executable, "-c", program]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    workers = trainer.stdout.readline().split()
    assert len(workers) == 1 and alive(workers[0])
    return trainer, workers


def alive(pid) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.parametrize("loader", ["plain", "dali"])
def test_workers_die_with_a_trainer_that_is_killed(tmp_path, loader):
    trainer, workers = start_trainer(tmp_path, loader, "time.sleep(600)")
    trainer.kill()
    trainer.communicate()
    give_up = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def test_a_trainer_that_waits_for_a_lost_worker_ends(tmp_path):
    then = """
import os, signal
from megatron_ext.data import workers
workers.SECONDS_TO_NOTICE = 0.1
time.sleep(2)
os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
time.sleep(60)"""
    trainer, _ = start_trainer(tmp_path, "dali", then)
    _, errors = trainer.communicate(timeout=50)
    assert trainer.returncode == 1 and "a process that packs data ended with exit code -9" in errors


@pytest.mark.parametrize("loader", ["plain", "dali"])
def test_a_trainer_that_fails_ends_with_its_workers(tmp_path, loader):
    trainer, workers = start_trainer(tmp_path, loader, "raise ValueError('a bug')")
    _, errors = trainer.communicate(timeout=120)
    assert trainer.returncode == 1 and errors.endswith("ValueError: a bug\n")
    assert not alive(workers[0])


def test_workers_do_not_import_torch():
    program = "import sys, megatron_ext.data.workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_mixture_from_the_configuration(tmp_path, vocabulary):
    path = write_pairs(tmp_path / "pairs", vocabulary, SENTENCES)
    sources = [SourceConfig(path, "generation"), SourceConfig(path, "understanding")]
    config = DataConfig(sequence_length=128, caption_dropout=0.5, loader="plain", workers=0)
    train = build_mixture(sources, config, vocabulary, train=True)
    batch = next(step_batches(train, config, 4, 0))
    assert batch.shape == (4, 128)
    torch.testing.assert_close(batch.modality == 1, vocabulary.is_image(batch.tokens))
    assert train.samples(0, 1000).dropped.any()


def test_validation_rows_do_not_depend_on_the_run(tmp_path, vocabulary):
    sources = [SourceConfig(write_pairs(tmp_path / "pairs", vocabulary, SENTENCES), "generation")]
    mixtures = [
        build_mixture(sources, DataConfig(sequence_length=128, seed=seed, caption_dropout=0.5), vocabulary, train=False)
        for seed in (1, 2)
    ]
    assert mixtures[0].fingerprint == mixtures[1].fingerprint
    assert not mixtures[0].samples(0, 1000).dropped.any()


def test_another_vocabulary_is_refused(tmp_path, vocabulary):
    path = captions(tmp_path / "pairs", 3)
    with pytest.raises(UserError, match=rf"was prepared with vocabulary tiny, this run has {vocabulary.fingerprint}"):
        build_mixture([SourceConfig(path, "generation")], DataConfig(), vocabulary, train=True)


def test_images_of_two_vq_models_are_refused(tmp_path, vocabulary):
    paths = [write_pairs(tmp_path / name, vocabulary, SENTENCES, vq=name) for name in ("one", "two")]
    with pytest.raises(UserError, match=r"two: images were encoded with VQ model two, those of .*one with one"):
        build_mixture([SourceConfig(path, "generation") for path in paths], DataConfig(), vocabulary, train=True)


def test_no_source_at_all_is_refused(vocabulary):
    with pytest.raises(UserError, match="'data.train' is empty"):
        build_mixture([], DataConfig(), vocabulary, train=True)


def test_a_missing_data_set_is_named(tmp_path, vocabulary):
    with pytest.raises(UserError, match=r"nowhere\.json: not found"):
        build_mixture([SourceConfig(str(tmp_path / "nowhere"), "text")], DataConfig(), vocabulary, train=True)

"""What a run does about checkpoints and records that cannot be written."""

import errno
import os
from types import SimpleNamespace

import pytest

from megatron_ext.callbacks.checkpointing import MAX_FAILURES, Checkpointing, CheckpointSeconds
from megatron_ext.callbacks.logging import Logger
from megatron_ext.checkpoints.errors import WriteError, cause
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.training.callback import StepRecord
from megatron_ext.training.metrics import MetricsFile, read_metrics


class Saves:
    """In place of a checkpointer: the saves of these iterations fail; in the background at the next call."""

    replica = local = None

    def __init__(self, failing, asynchronous=False):
        self.failing, self.asynchronous, self.pending, self.complete = failing, asynchronous, None, []

    def save(self, iteration, *_):
        self.pending = iteration
        return not self.asynchronous and self.finish()

    def finish(self):
        iteration, self.pending = self.pending, None
        if iteration is None:
            return False
        if iteration in self.failing:
            raise WriteError(f"runs/a/iter_{iteration:07d}/data: No space left on device")
        self.complete.append(iteration)
        return True

    poll = finish

    def newest(self):
        return self.complete[-1] if self.complete else None


def train(saves, iterations=8, interval=1) -> Checkpointing:
    """Runs the callback as training does."""
    config = Config()
    config.checkpoint.interval, config.training.iterations = interval, iterations
    run = SimpleNamespace(checkpoints=saves, config=config, chunks=[], optimizer=None, identity={})
    run.progress, run.train_data = config.bad_steps, SimpleNamespace(fingerprint="")  # any dataclass
    run.progress.iteration = 0
    callback = Checkpointing()
    callback.on_train_begin(run)
    for iteration in range(1, iterations + 1):
        run.progress.iteration = iteration
        callback.after_step(run, StepRecord({"iteration": iteration}))
    callback.on_train_end(run)
    return callback


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_after_saves_that_failed_but_not_after_three_in_a_row(asynchronous, capsys):
    saves = Saves({2, 3, 5, 6}, asynchronous)
    train(saves)
    assert saves.complete == [1, 4, 7, 8]
    assert capsys.readouterr().out.count("No space left on device; training goes on") == 4
    with pytest.raises(
        UserError, match="^runs/a/iter_0000004/data: No space left on device; this was the last attempt"
    ):
        train(Saves({2, 3, 4}, asynchronous))
    assert MAX_FAILURES == 3


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("interval", [0, 4])
def test_a_run_whose_last_checkpoint_cannot_be_written_fails(asynchronous, interval):
    with pytest.raises(UserError, match="iter_0000008/data: No space left on device; this was the last attempt"):
        train(Saves({8}, asynchronous), interval=interval)


def test_the_time_that_saves_take_is_logged_with_the_next_record_that_is_due():
    checkpointing = Checkpointing()
    logged = CheckpointSeconds(checkpointing)
    config = Config()
    config.logging.interval = 2
    checkpointing.seconds = 1.5
    for iteration, expected in ((1, None), (2, 1.5), (3, None), (4, 0.0)):
        record = StepRecord({"iteration": iteration})
        logged.after_step(SimpleNamespace(config=config), record)
        assert record.metrics.get("checkpoint_seconds") == expected


def test_records_wait_for_room_on_the_disk(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.write({"iteration": 1}) is None
    whole = metrics._stream
    with open("/dev/full", "ab", buffering=0) as metrics._stream:
        for iteration in (2, 3):
            fault = metrics.write({"iteration": iteration})
    assert fault == f"{tmp_path}/metrics.jsonl: No space left on device, 2 records are not written"
    metrics._stream = whole
    assert metrics.write({"iteration": 4}) is None
    assert metrics.close() is None
    assert [r["iteration"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_cause_is_the_failed_write_not_what_torch_makes_of_it():
    with pytest.raises(RuntimeError) as error:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert cause(error.value) == "No space left on device"
    assert cause(ValueError("first line\nsecond")) == "first line"


def test_training_goes_on_without_tensorboard_once_it_could_not_write(tmp_path):
    class Full:
        def add_scalar(self, *_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config, said = Config(), []
    config.output, config.logging.tensorboard = str(tmp_path), False
    logger = Logger(config, say=said.append)
    logger._tensorboard = Full()
    times = dict.fromkeys(("data_wait_seconds", "step_seconds", "learning_rate", "grad_norm", "tokens_per_second"), 1.0)
    for iteration in (1, 2):
        logger.log({"iteration": iteration, "loss": 1.0, **times})
    logger.close()
    full = f"{tmp_path}/tensorboard: No space left on device; nothing more is written there, metrics.jsonl has it all"
    assert said.count(full) == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2

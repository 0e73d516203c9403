"""Callbacks that do harm: on one rank, before one step, once per run.

``FAULT_RANK`` (0) and ``FAULT_ITERATION`` (1, the iteration that is about to be trained) say where; ``FAULT_TIMES`` (1)
says how often in all, over restarts. Each time leaves a file ``OUTPUT/.fault-N``.
"""

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.data.packed_tokens import PADDING, TASK
from megatron_ext.data.step_rows import StepRows
from megatron_ext.errors import UserError
from megatron_ext.training.callback import Callback


class Fault(Callback):
    """Calls :meth:`strike` where and as often as the environment says."""

    def strike(self, run, step) -> None:
        raise NotImplementedError

    def before_step(self, run, step) -> None:
        rank, iteration = int(os.environ.get("FAULT_RANK", 0)), int(os.environ.get("FAULT_ITERATION", 1))
        if dist.get_rank() != rank or run.progress.iteration + 1 != iteration:
            return
        for number in range(int(os.environ.get("FAULT_TIMES", 1))):
            mark = Path(run.config.output) / f".fault-{number}"
            if not mark.exists():
                mark.touch()
                self.strike(run, step)
                return


class Kill(Fault):
    """SIGKILL to the rank."""

    def strike(self, run, step) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Crash(Fault):
    """An error that nobody expects."""

    def strike(self, run, step) -> None:
        raise RuntimeError(f"injected in iteration {run.progress.iteration + 1}")


class Refuse(Fault):
    """A :class:`UserError` on one rank only."""

    def strike(self, run, step) -> None:
        raise UserError("injected: something only this rank can see is wrong")


class Slow(Callback):
    """No harm: every step takes ``FAULT_SLEEP`` (0.5) seconds longer, so that there is time for harm from outside."""

    def before_step(self, run, step) -> None:
        time.sleep(float(os.environ.get("FAULT_SLEEP", 0.5)))


class RowHashes(Callback):
    """Harmless: records in OUTPUT/rows.jsonl a hash of every row that this rank reads, by step, with the number of
    replicas and ``FAULT_LAUNCH``. Needs ``data.workers=0``."""

    def on_train_begin(self, run) -> None:
        file, read = Path(run.config.output) / "rows.jsonl", StepRows.__getitem__
        replicas = parallel_state.get_data_parallel_world_size()

        def recorded(rows: StepRows, step: int):
            packed = read(rows, step)
            hashes = [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in packed if (row & TASK != PADDING).any()]
            line = {"launch": os.environ["FAULT_LAUNCH"], "step": step, "replicas": replicas, "rows": hashes}
            with file.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            return packed

        StepRows.__getitem__ = recorded

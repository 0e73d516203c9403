"""Callbacks that do harm: on one rank, before one step, once per run.

``FAULT_RANK`` (0) and ``FAULT_ITERATION`` (1, the iteration that is about to be trained) say where; ``FAULT_TIMES`` (1)
says how often in all, over restarts. Each time leaves a file ``OUTPUT/.fault-N``.
"""

import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import unwrap_model

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


class Wait(Fault):
    """The rank does nothing for a while, so that it can be stopped."""

    def strike(self, run, step) -> None:
        time.sleep(5)


class HoldInterpreter(Fault):
    """A search that goes on for ever and never gives the interpreter lock away."""

    def strike(self, run, step) -> None:
        re.match(r"(a+)+$", "a" * 60 + "b")


class LeaveOutReduction(Fault):
    """The rank does not take part in the reduction of gradients."""

    def strike(self, run, step) -> None:
        all_reduce = dist.all_reduce

        def all_but_large(tensor, *arguments, **options):
            if tensor.numel() < 1000:
                return all_reduce(tensor, *arguments, **options)
            dist.all_reduce = torch.distributed.all_reduce = all_reduce
            return None

        dist.all_reduce = torch.distributed.all_reduce = all_but_large


class LoseMessage(Fault):
    """The stage does not send what its first forward pass gives."""

    def strike(self, run, step) -> None:
        send = P2PCommunicator.send_forward

        def lose(*arguments) -> None:
            P2PCommunicator.send_forward = send

        P2PCommunicator.send_forward = lose


class BlockedFile(Callback):
    """The workers that pack data find a file that gives nothing, a FIFO, when they open it."""

    def on_train_begin(self, run) -> None:
        if run.train_data.sources[0].dataset is not None:
            file = Path(f"{run.train_data.sources[0].path}.bin")
            file.unlink(missing_ok=True)
            os.mkfifo(file)


class NotANumber(Fault):
    """The gradient of a parameter is not a number: on this step, and every time that it is computed again if
    ``FAULT_AGAIN`` says so."""

    def strike(self, run, step) -> None:
        weight = unwrap_model(run.chunks[0]).decoder.layers[1].mlp.linear_fc2.weight
        hook = None

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            if "FAULT_AGAIN" not in os.environ:
                hook.remove()
            return gradient * float("nan")

        hook = weight.register_hook(spoil)
        self._hook = hook

    def after_step(self, run, record) -> None:
        if hasattr(self, "_hook"):
            self._hook.remove()


class FlipBit(Fault):
    """One bit of one weight is changed."""

    def strike(self, run, step) -> None:
        weight = unwrap_model(run.chunks[0]).decoder.layers[1].mlp.linear_fc1.weight
        weight.data.view(torch.int32).view(-1)[7] ^= 1 << 12


class Slow(Callback):
    """The rank takes 45 % more CPU time for each layer, which comes to some 30 % of a step."""

    def on_train_begin(self, run) -> None:
        if dist.get_rank() != int(os.environ.get("FAULT_RANK", 0)):
            return
        for chunk in run.chunks:
            for layer in unwrap_model(chunk).decoder.layers:
                layer.register_forward_pre_hook(self._start)
                layer.register_forward_hook(self._linger)
                layer.register_full_backward_pre_hook(self._start)
                layer.register_full_backward_hook(self._linger)

    def _start(self, *unused) -> None:
        self._started = time.thread_time()

    def _linger(self, *unused) -> None:
        until = time.thread_time() + 0.45 * (time.thread_time() - self._started)
        while time.thread_time() < until:
            pass


class LongSteps(Callback):
    """No harm: every step takes ``FAULT_SLEEP`` (0.5) seconds longer, so that there is time for harm from outside."""

    def before_step(self, run, step) -> None:
        time.sleep(float(os.environ.get("FAULT_SLEEP", 0.5)))

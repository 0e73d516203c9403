"""Small worlds of gloo ranks, forked from this process."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def world(size: int, function: Callable, *arguments, minutes: float = 30) -> list:
    """Call ``function(*arguments)`` on ``size`` ranks, each with one thread, and return the results by rank.

    This process must not have started threads of torch.

    Raises:
        RuntimeError: a rank failed.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(sender, Path(folder, "store"), rank, size, function, arguments)
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return [_result(pipe, minutes) for pipe in pipes]
        finally:
            for process in processes:
                process.join(5)
                process.kill()


def _result(pipe, minutes: float):
    if not pipe.poll(60 * minutes):
        raise RuntimeError("a rank did not answer")
    result, failure = pipe.recv()
    if failure:
        raise RuntimeError(failure)
    return result


def _rank(pipe, store: Path, rank: int, size: int, function: Callable, arguments: tuple) -> None:
    from megatron_ext import cpu

    torch.set_num_threads(1)
    cpu.enter()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        pipe.send((function(*arguments), None))
    except Exception:
        pipe.send((None, traceback.format_exc()))
        os._exit(1)
    dist.destroy_process_group()

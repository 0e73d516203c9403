"""Small worlds of gloo ranks.

They are forked from a server, so a world starts in about a second and a test can afford to kill many.
"""

import gc
import os
import random
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_ext.study import forked
from support import fork_server


def world(size: int, function: Callable, *args, folder: Path) -> list:
    """Call ``function(*args)`` on ``size`` ranks of a new world and return the results by rank.

    Args:
        folder: where the ranks meet.
    """
    processes, pipes = start_world(size, function, *args, folder=folder)
    try:
        return [_result(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.join(20)
            process.kill()


def start_world(size: int, function: Callable, *args, folder: Path) -> tuple[list[BaseProcess], list[Connection]]:
    """Start the ranks of :func:`world` and return their processes, with the pipes that they send their results into."""
    context = fork_server.context()
    store = folder / f"store_{random.randrange(1 << 60):x}"
    processes, pipes = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=_rank, args=(sender, store, rank, size, function, args)))
        processes[-1].start()
        sender.close()
        pipes.append(receiver)
    return processes, pipes


def _result(pipe: Connection):
    if not pipe.poll(400):
        raise TimeoutError("a rank did not answer")
    result, failure = pipe.recv()
    if failure:
        raise AssertionError(failure)
    return result


def _rank(pipe: Connection, store: Path, rank: int, size: int, function: Callable, args: tuple) -> None:
    warnings.simplefilter("ignore")
    forked.accept_signals()
    gc.freeze()  # the distributed optimizer collects garbage at every save
    import torch
    import torch.distributed as dist

    from megatron_ext import cpu

    torch.set_num_threads(1)
    cpu.enter()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        pipe.send((function(*args), None))
    except Exception:
        pipe.send((None, traceback.format_exc()))
        os._exit(1)
    dist.destroy_process_group()

"""Processes, groups and seeds, and what ranks do together outside of a step."""

import datetime
import os
import random
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_ext import cpu
from megatron_ext.config import Config
from megatron_ext.errors import UserError


def world_size() -> int:
    """Processes in this run, from torchrun's (or the launch script's) environment; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def initialize(config: Config, store: dist.Store | None = None) -> None:
    """Join the process group (nccl with a GPU, gloo without), cut it as ``config.parallel`` says, seed the generators.

    Alone, without torchrun, a process is a world of one.

    Args:
        store: where the ranks meet; None: torchrun's.
    """
    _set_arithmetic(config.training.deterministic)
    on_cpu = cpu.available()
    if on_cpu:
        cpu.enter()
    else:
        torch.cuda.set_device(_local_device(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if store is None and "MASTER_PORT" not in os.environ:
        store = dist.HashStore()
    dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        timeout=datetime.timedelta(minutes=config.lifecycle.distributed_timeout_minutes),
        store=store,
        rank=int(os.environ["RANK"]) if store else -1,
        world_size=world_size() if store else -1,
    )
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
    )
    seed = config.training.seed
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if on_cpu:
        report(f"no GPU: {dist.get_world_size()} CPU process{'es' * (dist.get_world_size() > 1)} over gloo")


def _set_arithmetic(deterministic: bool) -> None:
    """What torch and the libraries below it are told of exactness, before CUDA is initialised."""
    torch.set_float32_matmul_precision("highest")  # no TF32, even where the environment's default allows it
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over memory that is written next
        os.environ.update(CUBLAS_WORKSPACE_CONFIG=":4096:8", NVTE_ALLOW_NONDETERMINISTIC_ALGO="0")
        os.environ.setdefault("NCCL_ALGO", "^NVLS")  # switches add in the order of arrival


def _local_device(local_rank: int, visible: int) -> int:
    """The GPU of the process ``local_rank`` on this machine, among the ``visible`` ones.

    A process that sees one GPU has it to itself (Slurm's --gpus-per-task): nccl refuses two ranks on one.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(
            f"LOCAL_RANK is {local_rank}, but {visible} GPUs are visible; start one process for each of them, or let "
            "every process see its own alone"
        )
    return local_rank


def shut_down() -> None:
    """Leave the groups; safe to call when there are none."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def device() -> torch.device:
    """The device that this process trains on."""
    return torch.device(torch.cuda.current_device())


def is_logging_rank() -> bool:
    """The one rank that writes metrics: the last of the world, which holds the last pipeline stage's losses."""
    return dist.get_rank() == dist.get_world_size() - 1


def from_rank_zero(make: Callable):
    """The result of ``make()`` on rank 0, or its error, on every rank. Alone where there is no process group."""
    if not dist.is_initialized():
        return make()
    answer: list = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = make()
        except UserError as error:
            answer[1] = error
        except OSError as error:
            answer[1] = UserError(f"{error.filename}: {error.strerror}")
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def report(line: str) -> None:
    """Print ``line`` once per run."""
    if not dist.is_initialized() or is_logging_rank():
        print(line, flush=True)


def gather_weights(chunks: list[torch.nn.Module]) -> None:
    """Make the weights of ``chunks`` whole on every replica. Collective; nothing to do unless gathering overlaps."""
    for chunk in chunks:
        if getattr(chunk, "use_forward_hook", False):
            chunk.start_param_sync(force_sync=True)

"""Processes, groups and seeds, and collective operations outside of a step."""

import datetime
import json
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
    """Number of processes in this run, from the environment of torchrun or the launch script; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def initialize(config: Config, store: dist.Store | None = None) -> None:
    """Join the process group (nccl with a GPU, gloo without), split it by ``config.parallel``, seed the generators.

    Without torchrun, the process forms a world of size 1.

    Args:
        store: the rendezvous of the ranks; None: torchrun's.
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
    if config.lifecycle.hang_minutes:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "512")  # collectives that recorded_collectives() can see
        os.environ.setdefault("TORCH_INCLUDE_STACK_TRACE", "0")  # taking one may wait for the interpreter lock
    minutes = config.lifecycle.distributed_timeout_minutes
    timeout = datetime.timedelta(minutes=minutes)
    store = store or _store_of_restart(timeout)
    dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        timeout=timeout,
        store=store,
        rank=int(os.environ["RANK"]) if store else -1,
        world_size=world_size() if store else -1,
    )
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=minutes,
    )
    _timeouts[dist.group.WORLD] = timeout
    seed = config.training.seed
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if on_cpu:
        report(f"no GPU: {dist.get_world_size()} CPU process{'es' * (dist.get_world_size() > 1)} over gloo")


def _store_of_restart(timeout: datetime.timedelta) -> dist.Store | None:
    """The store of ranks that plain torchrun has started again on one machine; None: there is no need for one.

    torchrun of torch 2.13 keeps its store over restarts, with the addresses of ranks that are gone. Several machines
    need ``training/launcher.py``: their counts of restarts differ.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not attempt or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ["GROUP_WORLD_SIZE"] != "1":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore(f"attempt_{attempt}", dist.TCPStore(address, port, is_master=False, timeout=timeout))


def _set_arithmetic(deterministic: bool) -> None:
    """Configure precision and determinism of torch and its libraries, before CUDA is initialised."""
    torch.set_float32_matmul_precision("highest")  # no TF32, even where the environment's default allows it
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        torch.utils.deterministic.fill_uninitialized_memory = False  # it would fill memory that is overwritten next
        os.environ.update(CUBLAS_WORKSPACE_CONFIG=":4096:8", NVTE_ALLOW_NONDETERMINISTIC_ALGO="0")
        os.environ.setdefault("NCCL_ALGO", "^NVLS")  # switches add in order of arrival


def _local_device(local_rank: int, visible: int) -> int:
    """The GPU of the process ``local_rank`` on this machine, among the ``visible`` ones.

    A process that sees a single GPU owns it (Slurm's --gpus-per-task): nccl refuses two ranks on one GPU.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(
            f"LOCAL_RANK is {local_rank}, but {visible} GPUs are visible; start one process for each GPU, or make "
            "only its own GPU visible to each process"
        )
    return local_rank


def shut_down() -> None:
    """Leave the process groups; safe to call without any."""
    _replica_groups.clear()
    _timeouts.clear()
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def device() -> torch.device:
    """The device that this process trains on."""
    return torch.device(torch.cuda.current_device())


_timeouts: dict[dist.ProcessGroup, datetime.timedelta] = {}
_replica_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def new_group(ranks: list[int] | None = None, backend: str | None = None) -> dist.ProcessGroup:
    """A group of ``ranks``, or of all, in which messages may take as long as in the run's other groups; torch's default
    differs by backend. Collective over the world."""
    return dist.new_group(ranks, timeout=_timeouts.get(dist.group.WORLD), backend=backend)


def replica_group() -> dist.ProcessGroup:
    """The ranks that train one replica of the model together, over tensor, context and pipeline parallelism. Collective
    over the world on the first call."""
    model_parallel, size = parallel_state.get_model_parallel_group(), parallel_state.get_context_parallel_world_size()
    if size == 1:
        return model_parallel
    if model_parallel not in _replica_groups:
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        pipeline = parallel_state.get_pipeline_model_parallel_world_size()
        replicas = parallel_state.get_data_parallel_world_size()
        # Megatron-Core has no such group; its order of ranks is that of its groups.
        ranks = parallel_state.RankGenerator(tensor, 1, replicas, pipeline, size, order="tp-cp-ep-dp-pp")
        for members in ranks.get_ranks("tp-cp-pp"):
            group = new_group(members)
            if dist.get_rank() in members:
                _replica_groups[model_parallel] = group
    return _replica_groups[model_parallel]


def decoding_replica() -> tuple[int, int]:
    """This rank's replica and the number of replicas where whole documents are decoded: context ranks are replicas
    there."""
    whole = {"with_context_parallel": True}
    return parallel_state.get_data_parallel_rank(**whole), parallel_state.get_data_parallel_world_size(**whole)


def is_logging_rank() -> bool:
    """Whether this is the rank that writes metrics: the last one, which has the losses of the last pipeline stage."""
    return dist.get_rank() == dist.get_world_size() - 1


def writes_for_replica() -> bool:
    """Whether this rank writes the results of :func:`decoding_replica`, which all its ranks have."""
    return dist.get_rank() == parallel_state.get_model_parallel_src_rank()


def from_replica_source(make: Callable):
    """The result (or error) of ``make()`` on the rank that :func:`writes_for_replica`, on every rank of the replica."""
    group = parallel_state.get_model_parallel_group()
    return make() if group.size() == 1 else _from_source(make, parallel_state.get_model_parallel_src_rank(), group)


def from_rank_zero(make: Callable):
    """The result (or error) of ``make()`` on rank 0, on every rank. Without a process group, simply ``make()``."""
    return _from_source(make, 0) if dist.is_initialized() else make()


def _from_source(make: Callable, source: int, group: dist.ProcessGroup | None = None):
    result_and_error: list = [None, None]
    if dist.get_rank() == source:
        try:
            result_and_error[0] = make()
        except UserError as error:
            result_and_error[1] = error
        except OSError as error:
            result_and_error[1] = UserError(f"{error.filename}: {error.strerror}")
    dist.broadcast_object_list(result_and_error, src=source, group=group)
    if result_and_error[1] is not None:
        raise result_and_error[1]
    return result_and_error[0]


def report(line: str) -> None:
    """Print ``line`` once per run."""
    if not dist.is_initialized() or is_logging_rank():
        print(line, flush=True)


def gather_weights(chunks: list[torch.nn.Module]) -> None:
    """Complete the weights of ``chunks`` on every replica. Collective; a no-op unless gathering overlaps."""
    for chunk in chunks:
        if getattr(chunk, "use_forward_hook", False):
            chunk.start_param_sync(force_sync=True)


def recorded_collectives() -> dict[str, dict]:
    """The last collective that this process entered, by process group, from torch's flight recorder: its number
    ("entered"), the last one that it completed ("completed", at least 0), and its "operation". Empty where this torch
    has no recorder. Does not communicate."""
    library = torch._C._distributed_c10d
    dump = getattr(library, "_dump_nccl_trace_json", None) or getattr(library, "_dump_fr_trace_json", None)
    if dump is None or not dist.is_initialized():
        return {}
    trace = json.loads(dump())
    completed = {group: int(state["last_completed_collective"]) for group, state in trace.get("pg_status", {}).items()}
    return {
        " ".join(entry["process_group"]): {
            "entered": entry["collective_seq_id"],
            "completed": max(0, completed.get(str(entry["pg_id"]), 0)),
            "operation": entry["profiling_name"],
        }
        for entry in trace.get("entries", ())  # oldest first
        if not entry["is_p2p"]
    }

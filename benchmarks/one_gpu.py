"""Several ranks of nccl on one GPU."""

import os

import torch

from megatron_ext import cpu


def share_one_gpu() -> None:
    """Put this rank on the first GPU if there are fewer GPUs than ranks. Call it before joining the process group.

    nccl refuses two ranks on one GPU of one host ("Duplicate GPU detected"). It knows a host by NCCL_HOSTID, so each
    rank gets an id of its own, and ranks of different hosts talk over sockets, here of the loopback interface. Messages
    are slow that way; kernels, messages and schedules are the same.
    """
    if cpu.available() or torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        return
    os.environ.update(
        LOCAL_RANK="0",
        NCCL_HOSTID=f"rank-{os.environ['RANK']}",
        NCCL_NET="Socket",
        NCCL_SOCKET_IFNAME="lo",
        NCCL_IB_DISABLE="1",
        NCCL_P2P_DISABLE="1",
        NCCL_SHM_DISABLE="1",
        GLOO_SOCKET_IFNAME="lo",
    )

"""The place of this process among the replicas of the model."""

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class RankInfo:
    """The place of this process among the replicas of the model.

    Attributes:
        replica, replicas: index of its replica, and number of replicas.
        group: the ranks that train one replica together; None for a single process.
        reader: global rank that reads data for the group.
    """

    replica: int
    replicas: int
    group: dist.ProcessGroup | None
    reader: int

    @classmethod
    def here(cls) -> "RankInfo":
        """Of this process, from Megatron-Core's parallel state; a single replica without a process group."""
        if not dist.is_initialized():
            return cls(0, 1, None, 0)
        from megatron.core import parallel_state

        from megatron_ext.distributed import replica_group

        group = replica_group()
        return cls(
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            group,
            dist.get_process_group_ranks(group)[0],
        )

    @property
    def reads(self) -> bool:
        """Whether this process opens files."""
        return self.group is None or dist.get_rank() == self.reader

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

        return cls(
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_model_parallel_group(),
            parallel_state.get_model_parallel_src_rank(),
        )

    @property
    def reads(self) -> bool:
        """Whether this process opens files."""
        return self.group is None or dist.get_rank() == self.reader

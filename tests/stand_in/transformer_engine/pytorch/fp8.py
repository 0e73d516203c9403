"""The global state of FP8: whether it is enabled, and the histories of delayed scaling."""

from contextlib import contextmanager

import torch
import torch.distributed as dist


class FP8GlobalStateManager:
    enabled, recipe, group, depth = False, None, None, 0
    global_amax_history_buffer: dict[str, list[torch.Tensor]] = {}

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled

    @classmethod
    def add_fp8_tensors_to_global_buffer(cls, meta: dict) -> None:
        if "registered" in meta:
            return
        meta["registered"] = True
        for direction in ("fwd", "bwd"):
            cls.global_amax_history_buffer.setdefault(direction, []).append(meta[f"amax_history_{direction}"])

    @classmethod
    def reduce_and_update_fp8_tensors(cls) -> None:
        histories = cls.global_amax_history_buffer.get("fwd", [])
        if not histories:
            return
        reduced = torch.cat([history[0] for history in histories])
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=cls.group)
        for history, amax in zip(histories, reduced.split([history.shape[1] for history in histories])):
            history[0] = amax
            history.copy_(history.roll(-1, 0))
            history[0] = 0


def fp8_model_init(**unused):
    """Imported by Megatron-Core 0.19, which calls it for parameters in FP8 alone."""
    raise NotImplementedError


@contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe=None, fp8_group=None):
    state = FP8GlobalStateManager
    before = state.enabled, state.recipe, state.group
    state.enabled, state.recipe, state.group = enabled, fp8_recipe, fp8_group
    state.depth += 1
    try:
        yield
    finally:
        state.depth -= 1
        if enabled and state.depth == 0 and torch.is_grad_enabled() and fp8_recipe.delayed():
            state.reduce_and_update_fp8_tensors()
        state.enabled, state.recipe, state.group = before

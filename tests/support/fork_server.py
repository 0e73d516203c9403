"""Processes that start with torch, Megatron-Core and this package already imported: in a moment instead of seven
seconds of a core."""

import multiprocessing

from megatron_ext.study import forked

PRELOADED = (
    *forked.PRELOADED,
    "pytest",  # the main module of the process that starts them
    "transformers.models.janus.modeling_janus",
)


def context() -> multiprocessing.context.BaseContext:
    """The context that starts such processes; all tests share its server."""
    return forked.multiprocessing_context(PRELOADED, {"OMP_NUM_THREADS": "1"})

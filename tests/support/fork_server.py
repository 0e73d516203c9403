"""Processes that start with torch, Megatron-Core and this package already imported: in a moment instead of seven
seconds of a core."""

import multiprocessing
import os

PRELOADED = [
    "pytest",  # the main module of the process that starts them
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron_ext.callbacks",
    "megatron_ext.generation.session",
    "megatron_ext.training.loop",
    "megatron_ext.training.run",
    "transformers.models.janus.modeling_janus",
]
"""Modules that are only imported: nothing in them may start a thread or a device."""


def context() -> multiprocessing.context.BaseContext:
    """The context that starts such processes; all tests share its server."""
    os.environ["OMP_NUM_THREADS"] = "1"
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(PRELOADED)
    return forking

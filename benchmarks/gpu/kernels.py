"""The kernels of a step: where to look when a table misses its aim."""

import gc

from gpu.one_billion import size_of
from gpu.records import Context, Record
from gpu.steps import Figure
from training_step.cases import CASES

PROFILED = ("dense", "himix", "hmgen")
FIGURES = {"kernels": {f"{name} kernels": Figure(f"{name}: kernels in a step") for name in PROFILED}}


def measure(context: Context, record: Record) -> None:
    """Profile a step of each case."""
    import torch

    from megatron_ext import distributed
    from training_step.kernels import kernel_table, profile
    from training_step.random_rows import random_rows

    size = size_of(context, "table_bf16")
    distributed.initialize(size.configuration())
    for name in PROFILED:
        case = CASES[name]
        batch = random_rows(case.rows, size.rows * size.micro_batches, size.sequence, size.vocab_size)
        kernels = profile(case.build(size.configuration(case.plan), size.vocab_size, batch))
        record.figures[f"{name} kernels"] = sum(kernel["calls"] for kernel in kernels)
        record.tables[f"A step of {name}"] = kernel_table(kernels)
        record.write()
        gc.collect()
        torch.cuda.empty_cache()
    distributed.shut_down()

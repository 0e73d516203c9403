"""DALI brings the plain loader's rows to the GPU, bit for bit, and how fast."""

from types import SimpleNamespace

import data
import torch

from gpu.records import Context, NotRun, Record
from gpu.steps import Figure
from megatron_ext import cpu
from megatron_ext.data import dali
from megatron_ext.data.loader import PlainLoader
from megatron_ext.data.rows import PackedRows, StepRows
from megatron_ext.data.workers import WorkerRows

FIGURES = {
    "dali": {
        "differing": Figure("tokens that differ from the plain loader's", at_most=0, everywhere=True),
        "ratio": Figure("tokens per second / those of torch's DataLoader", at_least=1.0),
        "dali_tokens_per_second": Figure("tokens per second"),
    }
}
STEPS = 8


def measure(context: Context, record: Record) -> None:
    """Compare some steps of rows, then time both loaders."""
    if not dali.available():
        raise NotRun("DALI is not installed")
    sizes = {"length": 4096, "rows": 64, "steps": 40, "rounds": 2, "workers": 2, "documents": 5000}
    if context.rehearsal:
        sizes |= {"length": 512, "rows": 4, "steps": 4, "rounds": 1, "workers": 1, "documents": 500}
    options = SimpleNamespace(**sizes, image_tokens=256, text_tokens=24)
    mixture = data.mixture(context.scratch / "captions", options)
    record.figures["differing"] = differing(mixture, options)
    record.write()
    numbers = data.measure(mixture, options)
    record.figures |= {name: numbers[name] for name in ("ratio", "dali_tokens_per_second")}


def differing(mixture, options) -> int:
    """Tokens of the first steps that are not alike, or not where they should be."""
    device = torch.device("cpu") if cpu.available() else torch.device("cuda", torch.cuda.current_device())
    rows = StepRows(PackedRows(mixture, options.length), options.rows)
    ours, plain = (loader(WorkerRows(rows, 0, STEPS), 0, 2, device) for loader in (dali.DaliLoader, PlainLoader))
    count = 0
    for _ in range(STEPS):
        step, expected = next(ours), next(plain)
        assert step.device == device
        count += int((step != expected).sum())
    ours.close()
    plain.close()
    return count

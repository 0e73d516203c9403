"""Steps through DALI are the plain loader's, bit for bit, on the GPU too, and how fast they come."""

from types import SimpleNamespace

import data
import torch

from gpu.records import Context, NotRun, Record
from gpu.steps import Figure
from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.data import dali
from megatron_ext.data.loader import PlainLoader
from megatron_ext.data.rows import PackedRows, StepRows
from megatron_ext.data.serialization import from_bytes
from megatron_ext.data.transfer import to_device
from megatron_ext.data.workers import WorkerSteps
from megatron_ext.training import distributed

FIGURES = {
    "dali": {
        "differing": Figure("bytes that differ from the plain loader's", at_most=0, everywhere=True),
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
    options = SimpleNamespace(**sizes, image_tokens=256, text_tokens=24, plan="himix_hmgen_share_partial")
    distributed.initialize(config_file.load(Config, [], []))
    mixture = data.mixture(context.scratch / "captions", options)
    record.figures["differing"] = differing(mixture, options)
    record.write()
    numbers = data.measure(mixture, options)
    record.figures |= {name: numbers[name] for name in ("ratio", "dali_tokens_per_second")}
    distributed.shut_down()


def differing(mixture, options) -> int:
    """Bytes of the first steps, and labels of them on the device, that are not the plain loader's."""
    rows, prepare = StepRows(PackedRows(mixture, options.length), options.rows), data.preparation(options)
    ours, plain = (loader(WorkerSteps(rows, 0, STEPS, prepare), 0, 2) for loader in (dali.DaliLoader, PlainLoader))
    count = 0
    for _ in range(STEPS):
        step, expected = next(ours), next(plain)
        count += int((step != expected).sum())
        there, here = to_device(from_bytes(step.numpy()), distributed.device()), from_bytes(expected.numpy())
        for moved, kept in zip(there.micro_batches, here.micro_batches, strict=True):
            count += int((moved.labels.cpu() != torch.as_tensor(kept.labels)).sum())
    ours.close()
    plain.close()
    return count

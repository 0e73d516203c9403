"""Steps through DALI equal those of the plain loader bit for bit, on the GPU too; and their speed."""

import pickle
from types import SimpleNamespace

import torch

import data
from gpu.records import Context, NotRun, Record
from gpu.steps import Figure
from megatron_ext import config_file, distributed
from megatron_ext.config import Config
from megatron_ext.data import dali_loader
from megatron_ext.data.packed_rows import PackedRows
from megatron_ext.data.plain_loader import PlainLoader
from megatron_ext.data.serialization import from_bytes
from megatron_ext.data.step_rows import StepRows
from megatron_ext.data.transfer import to_device
from megatron_ext.data.workers import WorkerSteps

STEPS = 8
FIGURES = {
    "dali": {
        "differing": Figure(f"steps that differ from the plain loader's, of {STEPS}", at_most=0, everywhere=True),
        "ratio": Figure("tokens per second / those of torch's DataLoader", at_least=1.0),
        "dali_tokens_per_second": Figure("tokens per second"),
    }
}


def measure(context: Context, record: Record) -> None:
    """Compare some steps of rows, then time both loaders."""
    if not dali_loader.available():
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
    """How many of the first steps differ from those of the plain loader, as bytes or in their labels on the device."""
    rows, prepare = StepRows(PackedRows(mixture, options.length), options.rows), data.preparation(options)
    ours, plain = (
        loader(WorkerSteps(rows, 0, STEPS, prepare), 0, 2) for loader in (dali_loader.DaliLoader, PlainLoader)
    )
    count = 0
    for _ in range(STEPS):
        step, expected = (from_bytes(next(steps).numpy()) for steps in (ours, plain))
        on_device = [micro_batch.labels.cpu() for micro_batch in to_device(step, distributed.device()).micro_batches]
        on_host = [torch.as_tensor(micro_batch.labels) for micro_batch in expected.micro_batches]
        same = all(map(torch.equal, on_device, on_host)) and pickle.dumps(step) == pickle.dumps(expected)
        count += not same
    ours.close()
    plain.close()
    return count

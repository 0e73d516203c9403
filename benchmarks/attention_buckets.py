"""CPU time of a training step with documents in buckets of similar length, against a kernel call per document.

    python benchmarks/attention_buckets.py --json attention_buckets.json

Torch's kernels compute attention without Transformer Engine and on CPUs; see megatron_ext/routing/segment_buckets.py. A
document has an image and a text of random length; four in ten are generation. Both kinds of step take turns on the same
weights, and the ratio of their median CPU times is the figure.
"""

import dataclasses
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from megatron_ext import command_line, config_file, distributed, files
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from megatron_ext.training.prepare import Preparation, StepInput
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.training.step import train_step
from megatron_ext.transformer.resolved import ResolvedConfig, resolve
from training_step.weights import initialized_on_device

VOCABULARY = 1536
LONGEST_TEXT = 40
PLANS = ("dense", "himix_hmgen_share_partial")


@dataclass(frozen=True)
class Size:
    """A model and its rows; ``image``: tokens of an image, ``shortest_text``: least tokens of a text."""

    layers: int
    hidden: int
    heads: int
    rows: int
    length: int
    image: int
    shortest_text: int

    def config(self, plan: str) -> Config:
        settings = {
            "model.num_layers": self.layers,
            "model.hidden_size": self.hidden,
            "model.num_attention_heads": self.heads,
            "model.ffn_hidden_size": 8 * self.hidden // 3 // 32 * 32,
            "data.sequence_length": self.length,
            "training.micro_batch_size": self.rows,
            "training.global_batch_size": self.rows,
            "plan.preset": plan,
        }
        return config_file.load(Config, [], [f"{key}={value}" for key, value in settings.items()])


SIZES = {
    "h 96, 9 image tokens": Size(4, 96, 4, 2, 1024, 9, 8),
    "h 96, 36 image tokens": Size(4, 96, 4, 2, 1024, 36, 8),
    "h 192, 81 image tokens": Size(6, 192, 6, 4, 512, 81, 8),
}


def packed(size: Size) -> Batch:
    """Rows of whole documents and padding, [rows, length]."""
    random = np.random.default_rng(0)
    batch = Batch.zeros(size.rows, size.length)
    batch.tokens[:] = torch.from_numpy(random.integers(0, VOCABULARY, (size.rows, size.length)))
    batch.labels, batch.document[:] = batch.tokens.roll(-1, 1), PADDING_DOCUMENT
    for row in range(size.rows):
        start = 0
        for document in range(size.length):
            text, generation = int(random.integers(size.shortest_text, LONGEST_TEXT)), random.random() < 0.4
            stop = start + size.image + text
            if stop > size.length:
                break
            image = slice(start + text, stop) if generation else slice(start, start + size.image)
            batch.positions[row, start:stop] = torch.arange(stop - start)
            batch.document[row, start:stop] = document
            batch.task[row, start:stop] = Task.GENERATION if generation else Task.UNDERSTANDING
            batch.modality[row, image] = Modality.IMAGE
            batch.loss_mask[row, image if generation else slice(start + size.image, stop)] = 1
            start = stop
    return batch


def step_input(resolved: ResolvedConfig, batch: Batch, bucketed: bool) -> StepInput:
    rows = dataclasses.replace(resolved.rows, bucketed=bucketed)
    return Preparation.of(dataclasses.replace(resolved, rows=rows), training=False).step_input(batch).to("cpu")


def measure(config: Config, batch: Batch, repeats: int) -> dict:
    """``seconds`` of CPU time and kernel ``calls`` of a layer, without and with buckets."""
    resolved = resolve(config, VOCABULARY)
    with initialized_on_device():
        chunks = build_model(resolved)
    optimizer = build_optimizer(config, chunks)
    inputs = [step_input(resolved, batch, bucketed) for bucketed in (False, True)]
    seconds: list[list[float]] = [[], []]
    for repeat in range(repeats + 1):
        for side in (0, 1) if repeat % 2 else (1, 0):
            started = time.process_time()
            train_step(chunks, optimizer, inputs[side], config)
            seconds[side].append(time.process_time() - started)
    return {
        "seconds": [statistics.median(side[1:]) for side in seconds],
        "calls": [len(step.micro_batches[0].route.layers[0].buckets) for step in inputs],
    }


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "python benchmarks/attention_buckets.py --repeats 11")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    distributed.initialize(next(iter(SIZES.values())).config("dense"))
    results = {}
    print("| model and documents | plan | calls a layer | ms a step | ratio |\n| --- | --- | --- | --- | --- |")
    for name, size in SIZES.items():
        for plan in PLANS:
            results[f"{name}, {plan}"] = result = measure(size.config(plan), packed(size), arguments.repeats)
            (before, after), calls = result["seconds"], result["calls"]
            milliseconds = f"{1e3 * before:.0f} -> {1e3 * after:.0f}"
            print(f"| {name} | {plan} | {calls[0]} -> {calls[1]} | {milliseconds} | {after / before:.2f} |", flush=True)
    if arguments.json:
        files.write_json(arguments.json, results)


if __name__ == "__main__":
    command_line.run(main)

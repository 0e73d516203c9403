"""A row of 32k tokens on 1, 2 and 4 context ranks: memory of activations, work and keys of each rank.

    python benchmarks/context_rows.py                       # on CPU processes (some minutes)
    python benchmarks/context_rows.py --length 8192 --json context.json

A training step of a small model in float32 over gloo. Activations are the most bytes alive at once beyond weights,
gradients and optimizer states. Work is the FLOPs of all products and attention calls that a rank makes.
"""

import argparse
import os
from pathlib import Path

import numpy as np

from megatron_ext import command_line, config_file, files
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from parity import launch

VOCABULARY = 256
BASE = [
    "model={num_layers: 2, hidden_size: 64, num_attention_heads: 4, num_query_groups: 4, ffn_hidden_size: 256}",
    "model.implementation=local",
    "training={micro_batch_size: 1, global_batch_size: 1, iterations: 100}",
]
CASES = {
    "text documents, dense": ["plan.preset=dense"],
    "questions, captions, texts, HiMix": ["plan.preset=himix"],
}
SIZES = (1, 2, 4)


def row(case: str, length: int) -> Batch:
    """One row [1, length] of documents."""
    random, fields = np.random.default_rng(0), {}
    fields = {name: np.zeros((1, length), kind) for name, kind in Batch.DTYPES.items()}
    fields["document"][:] = PADDING_DOCUMENT
    start = number = 0
    while True:
        task, words = Task.TEXT, int(random.integers(length // 64, length // 16))
        if "captions" in case:
            task, words = Task(int(random.choice(list(Task)))), int(random.integers(20, 200))
        images = 0 if task == Task.TEXT else 256
        modality = np.repeat([Modality.TEXT, Modality.IMAGE, Modality.TEXT], [words // 2, images, words - words // 2])
        place = slice(start, start + modality.size)
        if place.stop > length:
            break
        learnt = Modality.IMAGE if task == Task.GENERATION else Modality.TEXT
        values = {"document": number, "task": task, "modality": modality, "loss_mask": modality == learnt}
        for name, value in (values | {"positions": np.arange(modality.size)}).items():
            fields[name][0, place] = value
        start, number = place.stop, number + 1
    fields["tokens"][:] = random.integers(0, VOCABULARY, (1, length))
    fields["labels"][:] = random.integers(0, VOCABULARY, (1, length))
    return Batch(**fields)


def measure(config: Config, batch: Batch) -> dict:
    """What this rank measures in a step."""
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_ext.training.setup import build_model, build_optimizer
    from megatron_ext.training.step import train_step
    from megatron_ext.transformer.resolved import resolve
    from training_step.memory import PeakStorage
    from training_step.random_rows import step_input

    step = step_input(batch, config)
    layers = [m.route.layers for m in step.micro_batches]
    keys = max(sum(x.exchange.received) if x.exchange else 0 for of_route in layers for x in of_route)
    with FlopCounterMode(display=False) as flops, PeakStorage() as memory:
        chunks = build_model(resolve(config, VOCABULARY))
        optimizer = build_optimizer(config, chunks)
        loss = train_step(chunks, optimizer, step, config).loss
        activations = memory.peak - memory.live
    return {"loss": loss, "bytes": activations, "flops": flops.get_total_flops(), "keys": keys}


def worker(length: int, file: Path) -> None:
    """One rank; rank 0 writes what all measured."""
    import torch.distributed as dist

    from megatron_ext import distributed

    size = int(os.environ["WORLD_SIZE"])
    meeting_point = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for case, settings in CASES.items():
        more = [f"parallel.context={size}", f"data.sequence_length={length}"]
        config = config_file.load(Config, [], [*BASE, *settings, *more])
        distributed.initialize(config, dist.PrefixStore(case, meeting_point))
        ranks = [None] * size
        dist.all_gather_object(ranks, measure(config, row(case, length)))
        distributed.shut_down()
        if int(os.environ["RANK"]) == 0:
            known = files.read_json(file) if file.exists() else []
            files.write_json(file, [*known, {"case": case, "length": length, "size": size, "ranks": ranks}])


def table(results: list[dict]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| row | C | activations, MB | of C = 1 | FLOPs: max / mean | keys received | loss |",
        f"|{' --- |' * 7}",
    ]
    alone = {result["case"]: result["ranks"][0] for result in results if result["size"] == 1}
    for result in results:
        ranks = {name: [rank[name] for rank in result["ranks"]] for name in result["ranks"][0]}
        spread = max(ranks["flops"]) / (sum(ranks["flops"]) / len(ranks["flops"]))
        cells = [
            result["case"],
            str(result["size"]),
            f"{max(ranks['bytes']) / 1e6:.0f}",
            f"{max(ranks['bytes']) / alone[result['case']]['bytes']:.2f}",
            f"{spread:.3f}",
            f"{max(ranks['keys'])}",
            f"{ranks['loss'][0]:.6f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "python benchmarks/context_rows.py --length 8192")
    parser.add_argument("--length", type=int, default=32768, help="tokens of the row (default: %(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    file = arguments.json or Path("context_rows.json")
    if arguments.worker:
        return worker(arguments.length, file)
    file.unlink(missing_ok=True)
    for size in SIZES:
        options = ["--worker", "--length", str(arguments.length), "--json", str(file)]
        launch(size, options, minutes=30, program=__file__)
    print(table(files.read_json(file)))


if __name__ == "__main__":
    command_line.run(main)

"""Speed of the data path: tokens per second through DALI and through torch's DataLoader, in one run.

Both prepare the same steps from a synthetic data set in a temporary folder (rows, routes and labels in one buffer) and
copy them to the device. Rows of several codes an image token are packed and unpacked against rows of one. The rounds
alternate, so that a busy machine slows both sides alike; a ratio is the median of the rounds' ratios.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_ext import config_file
from megatron_ext.command_line import parser, progress, run
from megatron_ext.config import Config, SourceConfig
from megatron_ext.data import dali_loader
from megatron_ext.data.format import ANSWER, IMAGE
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.packed_rows import PackedRows
from megatron_ext.data.packed_tokens import PADDING, TASK
from megatron_ext.data.plain_loader import PlainLoader
from megatron_ext.data.rendering import SpecialTokens
from megatron_ext.data.serialization import from_bytes, to_bytes
from megatron_ext.data.source import Source
from megatron_ext.data.step_rows import StepRows
from megatron_ext.data.transfer import to_device
from megatron_ext.data.workers import WorkerSteps
from megatron_ext.data.writer import DatasetWriter
from megatron_ext.errors import UserError
from megatron_ext.files import write_json
from megatron_ext.routing.plan import PRESETS
from megatron_ext.training.prepare import Preparation
from megatron_ext.transformer.resolved import resolve

SPECIAL = SpecialTokens(bos=1, pad=32000, eod=32001, boi=32002, eoi=32003, answer_end=32001)
CODES = 8192


def main() -> None:
    arguments = parser(__doc__, "python benchmarks/data.py --length 4096 --json data.json")
    arguments.add_argument("--length", type=int, default=4096, help="tokens in a row (default 4096)")
    arguments.add_argument("--rows", type=int, default=64, help="rows in a step (default 64)")
    arguments.add_argument("--steps", type=int, default=200, help="steps timed in a round (default 200)")
    arguments.add_argument("--rounds", type=int, default=5, help="rounds per loader (default 5)")
    arguments.add_argument("--workers", type=int, default=2, help="worker processes of each loader (default 2)")
    arguments.add_argument("--plan", default="himix_hmgen_share_partial", choices=PRESETS, help="preset of the routes")
    arguments.add_argument("--documents", type=int, default=20_000, help="documents in the data set (default 20000)")
    arguments.add_argument("--image-tokens", type=int, default=256, help="VQ codes in an image (default 256)")
    arguments.add_argument("--text-tokens", type=int, default=24, help="mean tokens of a caption (default 24)")
    arguments.add_argument(
        "--depth", type=int, default=4, help="codes an image token of the second data set (default 4)"
    )
    options = arguments.parse_args()
    if not dali_loader.available():
        raise UserError("DALI is not installed; pip install nvidia-dali-cuda130")
    with tempfile.TemporaryDirectory() as folder:
        one = mixture(Path(folder) / "pairs", options)
        numbers = measure(one, options)
        numbers["depth_ratio"] = depth_ratio(one, mixture(Path(folder) / "several", options, options.depth), options)
    print(_summary(numbers, options))
    if options.json:
        write_json(options.json, numbers)


def measure(mixture: Mixture, options) -> dict:
    """Tokens per second of every part of the data path, and the ratio of the loaders."""
    rows = StepRows(PackedRows(mixture, options.length), options.rows)
    step, packing = _timed(lambda: [rows[i] for i in range(options.steps)][-1])
    prepare = preparation(options)
    prepared = max(1, options.steps // 20)
    _, preparing = _timed(lambda: [to_bytes(prepare(step, i)) for i in range(prepared)])
    tokens = options.steps * options.rows * options.length
    speeds = {"dali": [], "torch": []}
    for _ in progress(range(options.rounds), desc="rounds"):
        for name, loader in (("dali", dali_loader.DaliLoader), ("torch", PlainLoader)):
            speeds[name].append(tokens / _one_round(loader, rows, prepare, options))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "packing_tokens_per_second": tokens / packing,
        "preparing_tokens_per_second": tokens * prepared / options.steps / preparing,
        "dali_tokens_per_second": medians["dali"],
        "torch_tokens_per_second": medians["torch"],
        "ratio": statistics.median(a / b for a, b in zip(speeds["dali"], speeds["torch"])),
        "padding": float(((step & TASK) == PADDING).mean()),
    }


def depth_ratio(one: Mixture, several: Mixture, options) -> float:
    """Rows per second, packed and unpacked in one process, with several codes an image token, relative to one code."""
    sides = [PackedRows(mixture, options.length) for mixture in (one, several)]
    for rows in sides:
        rows.batch(0, options.rows)  # plans the rows ahead
    ratios = []
    for i in progress(range(options.rounds), desc="rounds of codes"):
        first = (i + 1) * options.rows
        of_one, of_several = (_timed(partial(rows.batch, first, first + options.rows))[1] for rows in sides)
        ratios.append(of_one / of_several)
    return statistics.median(ratios)


def preparation(options) -> Preparation:
    """The preparation of the steps, for a model of 32 layers."""
    settings = [f"plan.preset={options.plan}", f"data.sequence_length={options.length}", "model.num_layers=32"]
    return Preparation.of(resolve(config_file.load(Config, [], settings)), pad=SPECIAL.pad)


def _one_round(loader, rows: StepRows, prepare: Preparation, options) -> float:
    """Seconds for all steps but the first few, which are prepared while the processes start."""
    prefetch = 4
    warm = 2 * prefetch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = loader(WorkerSteps(rows, 0, warm + options.steps, prepare), options.workers, prefetch)

    def fetch() -> float:
        return float(to_device(from_bytes(next(steps).numpy()), device).loss_tokens[0])  # waits for the copy

    for _ in range(warm):
        fetch()
    _, seconds = _timed(lambda: [fetch() for _ in range(options.steps)])
    steps.close()
    return seconds


def _timed(function):
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def mixture(prefix: Path, options, depth: int = 1) -> Mixture:
    """Captioned random images with ``depth`` codes a token, for generation and for understanding."""
    random = np.random.default_rng(0)
    vq = {"fingerprint": "random", "grid": [1, options.image_tokens], "codebook_size": CODES} | (
        {"depth": depth} if depth > 1 else {}
    )
    with DatasetWriter(prefix, "random", vq, {"made_by": "benchmarks/data.py"}) as writer:
        for length in random.integers(1, 2 * options.text_tokens, options.documents):
            codes = random.integers(0, CODES, options.image_tokens * depth) + SPECIAL.image_offset
            writer.add([(IMAGE, codes), (ANSWER, random.integers(2, SPECIAL.pad, length))])
    sources = [
        Source.open("benchmark", SourceConfig(str(prefix), task), "random", options.length)
        for task in ("generation", "understanding")
    ]
    return Mixture(sources, SPECIAL, seed=0, caption_dropout=0.1)


def _summary(numbers: dict, options) -> str:
    millions = {name: f"{value / 1e6:7.1f} M tokens/s" for name, value in numbers.items() if "tokens" in name}
    return "\n".join(
        [
            f"rows of {options.length} tokens, {options.rows} a step, {numbers['padding']:.1%} padding",
            f"packing, one process     {millions['packing_tokens_per_second']}",
            f"routes and labels        {millions['preparing_tokens_per_second']}",
            f"DALI, {options.workers} worker(s)        {millions['dali_tokens_per_second']}",
            f"DataLoader, {options.workers} worker(s)  {millions['torch_tokens_per_second']}",
            f"DALI / DataLoader        {numbers['ratio']:7.2f}",
            f"{options.depth} codes / one            {numbers['depth_ratio']:7.2f} rows/s, packed and unpacked",
        ]
    )


if __name__ == "__main__":
    run(main)

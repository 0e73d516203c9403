"""Runs example configurations and writes a card for each: command, versions, losses, figures, date.

    python benchmarks/verified.py --markdown docs/verified.md --json benchmarks/results/verified.json
    python benchmarks/verified.py --only "two context ranks"

Needs what examples/quickstart.sh prepares. Every run trains, is told to stop half way, and is started again to its
last iteration, so a card also says that the configuration resumes. Cards of earlier runs stay in the file of --json,
with their dates.
"""

import datetime
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.errors import UserError
from megatron_ext.training import starts
from megatron_ext.training.callback import Callback
from megatron_ext.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS = 40
CONFIG = "examples/configs/tiny.yaml"
METHOD = "examples/configs/methods/{}.yaml"
RUNS = {
    "one process": (1, [], []),
    "HiMix, tensor 2 with sequence parallelism": (2, ["himix"], ["parallel.tensor=2", "parallel.sequence=true"]),
    "two context ranks": (2, ["himix_hmgen_share_partial"], ["parallel.context=2"]),
    "uneven interleaved stages": (
        2,
        ["himix_hmgen_share_partial"],
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.layout=Et|t|t|tL"],
    ),
    "three replicas of eight rows": (
        3,
        ["hmgen"],
        ["parallel.distributed_optimizer=true", "parallel.overlap=true", "data.composition=balanced"],
    ),
    "tensor 2, pipeline 2, bf16": (
        4,
        ["himix_hmgen_share_all_separate"],
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "training.precision=bf16"],
    ),
}
"""By name: processes, methods, overrides of the tiny configuration."""

HEAD = """# Verified configurations

A card for every configuration that was run as it stands, made by `python benchmarks/verified.py`. Each trains from the
quickstart's data, is told to stop after half of its iterations, is started again and goes on to the end. Runs on CPUs
show that a configuration trains and resumes; their speed says nothing about GPUs.
"""
CARD = """
## {name}

```bash
{command}
```

| | |
| --- | --- |
| date | {date} |
| processes, device | {processes} x {device} |
| versions | {versions} |
| loss, iteration 1 to {iterations} | {first:.4f} to {last:.4f} |
| validation loss | {validation:.4f} |
| FLOPs of dense | {flops_ratio:.2f} |
| tokens a second | {speed:,.0f} |
| resumed | at iteration {resumed} |
"""


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], 'python benchmarks/verified.py --only "two context ranks"')
    parser.add_argument("--only", choices=RUNS, help="run this configuration alone")
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart"), help="folder of examples/quickstart.sh")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the cards of all recorded runs")
    arguments = parser.parse_args()
    if not (arguments.data / "vocabulary").is_dir():
        raise UserError(f"{arguments.data}: no vocabulary there; run bash examples/quickstart.sh first")
    cards = files.read_json(arguments.json) if arguments.json and arguments.json.exists() else {}
    for name in command_line.progress([arguments.only] if arguments.only else list(RUNS), desc="runs"):
        cards[name] = card = _card(name, arguments.data.resolve())
        print(f"{name}: loss {card['first']:.4f} to {card['last']:.4f}")
        if arguments.json:
            files.write_json(arguments.json, cards)
    if arguments.markdown:
        files.write_text(arguments.markdown, HEAD + "".join(CARD.format(name=n, **card) for n, card in cards.items()))


def _card(name: str, data: Path) -> dict:
    """Run a configuration, and what its card says."""
    processes, methods, overrides = RUNS[name]
    configs = [CONFIG, *map(METHOD.format, methods)]
    overrides = [*overrides, f"training.iterations={ITERATIONS}", "training.validation_interval=20"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        own = [f"output={output}", *_paths(data)]
        for more in (["callbacks=[verified:StopHalfWay]"], []):
            _train(processes, configs, [*overrides, *own, *more])
        records = read_metrics(output / "metrics.jsonl")
        environment = files.read_json(output / "environment.json")
        resumed = [record["iteration"] for record in starts.read(output) if "world" in record][-1]
    program = "python" if processes == 1 else f"torchrun --nproc_per_node {processes}"
    versions = {"python": environment["python"], **environment["packages"]}
    return {
        "command": f"{program} pretrain_unified.py --config {' '.join(configs)} \\\n    {shlex.join(overrides)}",
        "date": datetime.date.today().isoformat(),
        "processes": processes,
        "device": environment["device"],
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
        "iterations": records[-1]["iteration"],
        "first": records[0]["loss"],
        "last": records[-1]["loss"],
        "validation": records[-1]["validation_loss"],
        "flops_ratio": sum(r["flops_ratio"] for r in records) / len(records),
        "speed": sorted(r["tokens_per_second"] for r in records)[len(records) // 2],
        "resumed": resumed,
    }


def _paths(data: Path) -> list[str]:
    """Overrides that name the quickstart's files where they are."""

    def sources(split: str) -> str:
        tasks = {"questions": "understanding", "captions": "generation"}
        names = [f"{{path: {data}/data/{kind}-{split}, task: {task}}}" for kind, task in tasks.items()]
        return f"[{', '.join(names)}]"

    return [
        f"data.vocabulary={data}/vocabulary",
        f"data.train={sources('train')}",
        f"data.validation={sources('validation')}",
    ]


def _train(processes: int, configs: list[str], overrides: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["pretrain_unified.py", "--config", *configs, *overrides]
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise UserError(f"{shlex.join(overrides)}: {done.stderr.strip().splitlines()[-1]}")


class StopHalfWay(Callback):
    """Tells the run to stop after half of its iterations, as a launcher would."""

    def after_step(self, run, record) -> None:
        if record.iteration == ITERATIONS // 2 and int(os.environ.get("RANK", 0)) == 0:
            signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    command_line.run(main)

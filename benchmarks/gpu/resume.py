"""A run resumes from a checkpoint that was written in the background during training."""

import shutil
import subprocess
import sys
from pathlib import Path

from gpu.records import Context, Record
from gpu.steps import Figure
from gpu.tiny_run import write_config
from megatron_ext.training.metrics import read_metrics

ITERATIONS, SAVED = 20, 10
FIGURES = {
    "resume": {
        "difference": Figure(
            f"loss and gradient norm of steps {SAVED + 1} to {ITERATIONS}, resumed: largest relative difference",
            at_most=0.0,
            everywhere=True,
        )
    }
}


def measure(context: Context, record: Record) -> None:
    """Train 20 steps; resume from the checkpoint of step 10 in another folder."""
    config = write_config(context.scratch, context.rehearsal)
    whole, resumed = context.scratch / "whole", context.scratch / "resumed"
    train(config, whole)
    name = f"iter_{SAVED:07d}"
    shutil.copytree(whole / "checkpoints" / name, resumed / "checkpoints" / name)
    train(config, resumed)
    expected, measured = second_half(whole), second_half(resumed)
    record.figures["difference"] = max(abs(a - b) / abs(b) for a, b in zip(measured, expected, strict=True))


def train(config: Path, output: Path) -> None:
    """Train in a process, as a user would."""
    settings = [f"output={output}", f"training.iterations={ITERATIONS}", "logging.tensorboard=false"]
    settings += [f"checkpoint.interval={SAVED}", "checkpoint.asynchronous=true", "checkpoint.keep=0"]
    settings.append("training.deterministic=true")
    command = [sys.executable, "pretrain_unified.py", "--config", str(config), *settings]
    subprocess.run(command, check=True)


def second_half(output: Path) -> list[float]:
    """Loss and gradient norm of the steps after the checkpoint."""
    records = [line for line in read_metrics(output / "metrics.jsonl") if line["iteration"] > SAVED]
    assert [line["iteration"] for line in records] == list(range(SAVED + 1, ITERATIONS + 1))
    return [line[key] for line in records for key in ("loss", "grad_norm")]

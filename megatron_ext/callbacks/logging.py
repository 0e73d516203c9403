"""Logging to the console, ``metrics.jsonl``, TensorBoard and Weights & Biases."""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_ext.analysis import gradients_report
from megatron_ext.command_line import duration, whole
from megatron_ext.config import Config
from megatron_ext.config_file import to_tree
from megatron_ext.distributed import is_logging_rank
from megatron_ext.evaluation.registry import BENCHMARKS
from megatron_ext.files import write_json
from megatron_ext.training.callback import Callback, StepRecord, is_due
from megatron_ext.training.environment import environment
from megatron_ext.training.metrics import MetricsFile
from megatron_ext.training.run import Run


class Logging(Callback):
    """Logs from one rank, every ``logging.interval`` iterations and those of which a callback says so (``log_now``)."""

    def __init__(self, config: Config):
        self._config = config
        self._logger: Logger | None = None

    def on_train_begin(self, run: Run) -> None:
        if is_logging_rank():
            self._logger = Logger(self._config, run.progress.iteration)

    def after_step(self, run: Run, record: StepRecord) -> None:
        if self._logger and (record.log_now or is_due(record.iteration, self._config.logging.interval, self._config)):
            self._logger.log(record.metrics, record.pictures)

    def close(self) -> None:
        if self._logger:
            self._logger.close()


class Logger:
    """Writes the records of a run, and its ``environment.json``; only one rank makes a logger.

    A record is a dictionary of plain numbers, flat but for gradient_alignment:

    ====================================  ============================================================================
    iteration                             1, 2, ...
    loss, loss_understanding, ...         the objective; the mean cross-entropy of each task that had loss tokens
    z_loss                                what the z-loss adds to the objective; with training.z_loss only
    grad_norm, learning_rate              before clipping; of this iteration
    consumed_samples, consumed_tokens     packed rows, and tokens in them, since the start of the run
    consumed_flops, consumed_dense_flops  training FLOPs of the model over all ranks since the start of the run; the
                                          same under the dense plan
    tokens_per_second                     over all ranks
    step_seconds, data_wait_seconds       wall-clock time of the iteration, without callbacks; the part of it spent
                                          waiting for the batch
    flops, flops_ratio                    FLOPs of the iteration; relative to the dense plan
    stack_flops_ratio                     that of the layers alone; with several codes an image token only
    mfu                                   model FLOPs utilisation, 0 .. 1; None where the device's peak is not known
    checkpoint_seconds                    time that checkpoints have held up training since the record before; no part
                                          of step_seconds
    skipped_steps, skip_reason            bad steps so far; why this one was skipped, on skipped ones only
    non_finite                            ranks and parameters with numbers that are not finite, on the first of the
                                          skipped steps in a row, if it had such numbers
    slowest_rank, slowest_rank_speed      which rank computed most slowly, and how fast relative to its peers, every
                                          logging.straggler_interval iterations; with several ranks only
    stragglers                            lines about ranks that were slow three times in a row
    validation_loss, validation_loss_...  and validation_z_loss; on iterations with a validation only
    pope_accuracy, gqa_accuracy, ...      headline figures of the benchmarks, on iterations with an evaluation only
    evaluation_seconds                    time of the evaluation, no part of step_seconds
    gradient_alignment                    the result of ``analysis/gradients.py``, on iterations with a measurement only
    ====================================  ============================================================================

    Args:
        resumed_iteration: the last iteration that is done; records of later ones, by an earlier process, are removed.
        say: prints a line.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: Config,
        resumed_iteration: int = 0,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        clock: Callable[[], float] = time.monotonic,
    ):
        output = Path(config.output)
        self._config, self._say, self._clock = config, say, clock
        self._start = (resumed_iteration, clock())
        write_json(output / "environment.json", environment())
        self._fault: str | None = None
        self._metrics = MetricsFile(output / "metrics.jsonl", resumed_iteration)
        self._tensorboard = _tensorboard(output, resumed_iteration) if config.logging.tensorboard else None
        self._wandb = _wandb(config, resumed_iteration, say) if config.logging.wandb != "off" else None

    def log(self, record: dict, pictures: Sequence[tuple[str, Path]] = ()) -> None:
        """Log one iteration everywhere.

        Args:
            pictures: (caption, file) of each picture that the model generated after this iteration.
        """
        fault = self._metrics.write(record)
        if fault and not self._fault:
            self._say(f"{fault}; training goes on, and they will be once there is room")
        self._fault = fault
        iteration = record["iteration"]
        numbers = {k: v for k, v in record.items() if k != "iteration" and isinstance(v, int | float)}
        alignment = record.get("gradient_alignment")
        if alignment:
            cosines = gradients_report.scalars(alignment)
            numbers |= {f"gradient_alignment_{name}": value for name, value in cosines.items()}
        if self._tensorboard:
            self._log_to_tensorboard(numbers, pictures, iteration)
        if self._wandb:
            values = {_grouped(name): value for name, value in numbers.items()} | {"iteration": iteration}
            if pictures:
                import wandb

                values["pictures"] = [wandb.Image(str(file), caption=caption) for caption, file in pictures]
            self._wandb.log(values)
        if reason := record.get("skip_reason"):
            self._say(f"iteration {iteration}: step skipped, {reason} ({record['skipped_steps']} skipped so far)")
        if origin := record.get("non_finite"):
            self._say(f"iteration {iteration}: {origin}")
        self._say(console_line(record, self._config.training.iterations, self._seconds_left(iteration)))
        if "validation_loss" in record:
            self._say(f"iteration {iteration}: validation {_losses(record, 'validation_')}")
        if "evaluation_seconds" in record:
            self._say(f"iteration {iteration}: evaluation {_evaluated(record, pictures)}")
        if alignment:
            interval = self._config.logging.gradient_alignment_interval
            line = gradients_report.line(alignment, interval, record["step_seconds"])
            self._say(f"iteration {iteration}: {line}")

    def close(self) -> None:
        """Flush and close all files."""
        if fault := self._metrics.close():
            self._say(fault)
        if self._tensorboard:
            with self._without_tensorboard_if_full():
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _log_to_tensorboard(self, numbers: dict, pictures: Sequence[tuple[str, Path]], iteration: int) -> None:
        with self._without_tensorboard_if_full():
            for name, value in numbers.items():
                self._tensorboard.add_scalar(_grouped(name), value, iteration)
            for number, (caption, file) in enumerate(pictures):
                self._tensorboard.add_image(
                    f"pictures/{number}: {caption}", _pixels(file), iteration, dataformats="HWC"
                )

    @contextmanager
    def _without_tensorboard_if_full(self) -> Iterator[None]:
        """TensorBoard's writer does not recover from a failed write: what runs inside goes on without it."""
        try:
            yield
        except OSError as error:
            folder = Path(self._config.output) / "tensorboard"
            self._say(f"{folder}: {error.strerror}; nothing more is written there, metrics.jsonl has it all")
            self._tensorboard = None

    def _seconds_left(self, iteration: int) -> float:
        start_iteration, start_time = self._start
        done = max(iteration - start_iteration, 1)
        return (self._clock() - start_time) / done * (self._config.training.iterations - iteration)


def console_line(record: dict, iterations: int, seconds_left: float) -> str:
    """One iteration as a line for the console."""
    width = len(str(iterations))
    wait = record["data_wait_seconds"]
    parts = [
        f"{record['iteration']:>{width}}/{iterations}",
        _losses(record, ""),
        f"lr {record['learning_rate']:.2e}",
        f"grad norm {record['grad_norm']:.2f}",
        f"{_short(record['tokens_per_second'])} tokens/s",
        f"step {record['step_seconds']:.2f} s (data {1000 * wait:.0f} ms)",
    ]
    if record.get("mfu") is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f} %")
    if record.get("flops_ratio", 1.0) != 1.0:
        parts.append(f"FLOPs {record['flops_ratio']:.2f} of dense")
    parts.append(f"left {duration(seconds_left)}")
    if state := whole().state(record["iteration"] / iterations):
        parts.append(state)
    return " | ".join(parts)


def _losses(record: dict, prefix: str) -> str:
    name = f"{prefix}loss"
    per_task = {k[len(name) + 1 :]: v for k, v in record.items() if k.startswith(name + "_")}
    details = ", ".join(f"{task} {value:.4f}" for task, value in per_task.items())
    z_loss = record.get(f"{prefix}z_loss")
    return (
        f"loss {record[name]:.4f}"
        + (f" ({details})" if details else "")
        + ("" if z_loss is None else f", z-loss {z_loss:.2e}")
    )


def _evaluated(record: dict, pictures: Sequence[tuple[str, Path]]) -> str:
    parts = [f"{name.replace('_', ' ')} {value:.1f}" for name, value in record.items() if _benchmark(name)]
    if pictures:
        parts.append(f"{len(pictures)} picture{'s' * (len(pictures) > 1)} in {pictures[0][1].parent}")
    return f"{', '.join(parts)} ({record['evaluation_seconds']:.1f} s)"


def _benchmark(name: str) -> str | None:
    """The benchmark that the figure ``name`` belongs to; None: it is no benchmark's."""
    benchmark = name.partition("_")[0]
    return benchmark if benchmark in BENCHMARKS else None


def _pixels(file: Path) -> np.ndarray:
    """uint8 [H, W, 3]"""
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def _short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _grouped(name: str) -> str:
    """The name under which TensorBoard and wandb group charts: ``loss/understanding``."""
    if name.endswith("z_loss"):
        return f"{name.removesuffix('z_loss')}loss/z_loss"
    for group in ("validation_loss", "loss", "gradient_alignment"):
        if name == group:
            return f"{group}/all"
        if name.startswith(group + "_"):
            return f"{group}/{name[len(group) + 1 :]}"
    if benchmark := _benchmark(name):
        return f"{benchmark}/{name[len(benchmark) + 1 :]}"
    return f"run/{name}"


def _tensorboard(output: Path, resumed_iteration: int):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(output / "tensorboard"), purge_step=resumed_iteration + 1)


def _wandb(config: Config, resumed_iteration: int, say: Callable[[str], None]):
    """The wandb run, the same one after a resumption; None, and a line that says so, where wandb is not installed."""
    try:
        import wandb
    except ImportError:
        say("wandb is not installed: logging.wandb is ignored (pip install wandb)")
        return None
    output = Path(config.output)
    id_file = output / "wandb_id"
    if not resumed_iteration or not id_file.is_file():
        id_file.write_text(uuid.uuid4().hex[:8])
    run = wandb.init(
        project=config.logging.wandb_project,
        name=output.name,
        id=id_file.read_text(),
        resume="allow",
        mode=config.logging.wandb,
        dir=str(output),
        config=to_tree(config),
        settings=wandb.Settings(silent=True),
    )
    run.define_metric("*", step_metric="iteration")
    return run

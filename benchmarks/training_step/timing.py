"""Seconds and memory of the cases, each beside its base."""

import gc
import statistics
import time
from collections.abc import Callable

import torch

from megatron_ext import command_line, cpu
from megatron_ext.data.batch import Batch
from megatron_ext.training.devices import model_flops_utilisation
from training_step.cases import CASES, Case, Size
from training_step.memory import peak_bytes
from training_step.random_rows import random_rows

WARM_UP = 2


def time_cases(names: list[str], size: Size, repeats: int, record: Callable[[str, dict], None]) -> None:
    """Time the cases ``names``, in the order of :func:`training_step.cases.with_bases`.

    A base is built once and stays. Each case against it is built, takes turns with it and is freed before the next one:
    two models are in memory at a time, and both sides of a ratio are measured in the same minutes.

    Args:
        record: called with each case's name and figures as soon as they are known; a failed case has ``error``.
    """
    for base in [name for name in names if CASES[name].base == name]:
        batch = random_rows(CASES[base].rows, size.rows * size.micro_batches, size.sequence, size.vocab_size)
        against = [name for name in names if name != base and CASES[name].base == base]
        try:
            _with_base(base, against, size.of_rows(CASES[base].rows), batch, repeats, record)
        except Exception as error:
            record(base, _failed(error))
        _free()


def _with_base(base: str, against: list[str], size: Size, batch: Batch, repeats: int, record) -> None:
    case = CASES[base]
    step = case.build(size.configuration(case.plan), size.vocab_size, batch)
    (seconds,) = take_turns([step], repeats)
    base_figures = _figures(case, step, seconds, seconds, size, batch)
    record(base, base_figures)
    for name in against:
        try:
            figures = _beside(name, step, size, batch, repeats)
            figures["memory_ratio"] = figures["memory_bytes"] / base_figures["memory_bytes"]
            record(name, figures)
        except Exception as error:  # a case that does not fit, or is not installed, stops no other
            record(name, _failed(error))
        _free()


def _beside(name: str, base: Callable, size: Size, batch: Batch, repeats: int) -> dict:
    case = CASES[name]
    step = case.build(size.configuration(case.plan), size.vocab_size, case.batch(batch))
    seconds, base_seconds = take_turns([step, base], repeats)
    return _figures(case, step, seconds, base_seconds, size, batch)


def _failed(error: Exception) -> dict:
    return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def _figures(case: Case, step: Callable, seconds: list, base_seconds: list, size: Size, batch: Batch) -> dict:
    other = case.is_other_library
    median = statistics.median(seconds)
    flops, base_flops = size.flops(case, case.batch(batch)), size.flops(CASES[case.base], batch)
    device = "cpu" if cpu.available() else torch.cuda.get_device_name()
    figures = {
        "seconds": median,
        "ratio": statistics.median(b / a if other else a / b for a, b in zip(seconds, base_seconds)),
        "limit": case.limit,
        "memory_bytes": peak_bytes(step),
        "memory_ratio": 1.0,
        "mfu": model_flops_utilisation(flops, median, 1, device),
    }
    if not other:
        figures["flop_ratio"] = flops / base_flops
        figures["time_per_flop"] = figures["ratio"] / figures["flop_ratio"]
        for part in ("optimizer_step", "output_head"):
            (part_seconds,) = take_turns([getattr(step, part)], 2)
            figures[f"{part}_share"] = statistics.median(part_seconds) / median
    return figures


def take_turns(steps: list[Callable], repeats: int) -> list[list[float]]:
    """Seconds of each step in each of ``repeats`` rounds, after rounds of warming up."""
    seconds = [[] for _ in steps]
    for repeat in command_line.progress(range(WARM_UP + repeats), desc="rounds"):
        for step, step_seconds in zip(steps, seconds):
            torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            torch.cuda.synchronize()
            if repeat >= WARM_UP:
                step_seconds.append(time.perf_counter() - started)
    return seconds


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def table(results: dict[str, dict]) -> str:
    """The results as a Markdown table."""
    heads = ["step", "against", "seconds", "ratio", "FLOP ratio", "time / FLOPs", "limit", "peak memory ratio"]
    heads += ["peak GB", "MFU", "optimizer", "output head"]
    keys = ["seconds", "ratio", "flop_ratio", "time_per_flop", "limit", "memory_ratio", "gigabytes", "mfu"]
    keys += ["optimizer_step_share", "output_head_share"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, figures in results.items():
        if "error" in figures:
            lines.append(f"| {name} | {CASES[name].base} | failed: {figures['error']} |{' |' * (len(heads) - 3)}")
            continue
        figures = figures | {"gigabytes": figures["memory_bytes"] / 1e9}
        cells = ["" if figures.get(key) is None else f"{figures[key]:.3f}" for key in keys]
        lines.append(f"| {name} | {CASES[name].base} | {' | '.join(cells)} |")
    return "\n".join(lines)

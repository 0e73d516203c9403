"""A plan as numbers and as text: the layouts that fit, what the best one costs, and why its neighbours are worse."""

import dataclasses
import math
import textwrap
from dataclasses import dataclass

import yaml

from megatron_ext.config import Config
from megatron_ext.planning.devices import GB, Device
from megatron_ext.planning.search import RESERVE, Candidate
from megatron_ext.planning.workload import Workload

FAULT_FREE_DEVICE_HOURS = 50_000
"""Device hours between two faults: Llama 3 had 419 in 54 days of 16 384 GPUs (arXiv 2407.21783, 3.3.4)."""

LISTED = 12
"""Layouts in the table."""


@dataclass(frozen=True)
class Reliability:
    """What faults and saves cost.

    Attributes:
        save_seconds: seconds that a save holds training up.
        restart_seconds: from a fault until training goes on.
    """

    save_seconds: float = 5.0
    restart_seconds: float = 600.0

    def interval(self, devices: int) -> float:
        """Seconds between saves that lose least."""
        return math.sqrt(2 * self.save_seconds * self.between_faults(devices))

    def between_faults(self, devices: int) -> float:
        """Mean seconds between faults."""
        return 3600 * FAULT_FREE_DEVICE_HOURS / devices

    def goodput(self, devices: int) -> float:
        """Share of the time that makes progress, with the best interval."""
        interval, faults = self.interval(devices), self.between_faults(devices)
        lost = self.save_seconds / interval + (interval / 2 + self.restart_seconds) / faults
        return max(0.0, 1 - lost)


def layout_numbers(candidate: Candidate) -> dict:
    """A layout, its memory and its time."""
    parallel, training = candidate.config.parallel, candidate.config.training
    numbers = {
        "tensor": parallel.tensor,
        "context": parallel.context,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "layout": parallel.layout,
        "micro_batch_size": training.micro_batch_size,
        "recompute": training.recompute,
        "memory_bytes": [rank.total for rank in candidate.memory],
        "memory": [dataclasses.asdict(rank) for rank in candidate.memory],
    }
    if candidate.time:
        numbers["time"] = dataclasses.asdict(candidate.time) | {"bound": candidate.time.bound}
    return numbers


def run_numbers(
    best: Candidate, workload: Workload, devices: int, tokens: float, price: float | None, reliability: Reliability
) -> dict:
    """What a run of so many tokens takes under a layout."""
    config = best.config
    per_step = config.training.global_batch_size * config.data.sequence_length * workload.fill
    steps = math.ceil(tokens / per_step)
    goodput = reliability.goodput(devices)
    seconds = steps * best.time.seconds / goodput
    hours = seconds / 3600 * devices
    return {
        "tokens": tokens,
        "steps": steps,
        "tokens_per_second": per_step / best.time.seconds,
        "goodput": goodput,
        "checkpoint_interval": max(1, round(reliability.interval(devices) / best.time.seconds)),
        "days": seconds / 86400,
        "gpu_hours": hours,
        "cost": None if price is None else hours * price,
    }


def overrides(config: Config, checkpoint_interval: int) -> dict:
    """The keys that a layout sets, as a configuration file has them."""
    parallel, training = config.parallel, config.training
    keys = (
        "tensor",
        "context",
        "pipeline",
        "virtual_pipeline",
        "layout",
        "sequence",
        "distributed_optimizer",
        "overlap",
    )
    return {
        "parallel": {key: getattr(parallel, key) for key in keys},
        "training": {"micro_batch_size": training.micro_batch_size, "recompute": training.recompute},
        "checkpoint": {"interval": checkpoint_interval},
    }


def table(candidates: list[Candidate], devices: int, given: Candidate | None = None) -> str:
    """The first layouts as aligned text.

    Args:
        given: the configuration's own, as a first line.
    """
    rows = [
        ["TP", "CP", "PP", "VPP", "DP", "rows", "micro-batches", "recompute", "GB (stages)", "step, s", "MFU"]
        + ["idle", "messages", "most lost by"]
    ]
    listed = candidates[:LISTED]
    rows += [_line(candidate, devices) for candidate in ([given] if given else []) + listed]
    if given:
        rows[1][-1] += "; as configured"
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def _line(candidate: Candidate, devices: int) -> list[str]:
    config, time = candidate.config, candidate.time
    parallel, training = config.parallel, config.training
    return [
        *map(str, (parallel.tensor, parallel.context, parallel.pipeline, parallel.virtual_pipeline)),
        str(config.data_parallel(devices)),
        str(training.micro_batch_size),
        str(config.micro_batches(devices)),
        training.recompute,
        _stages([rank.total for rank in candidate.memory]),
        f"{time.seconds:.2f}",
        f"{time.mfu:.1%}",
        f"{time.idle / time.seconds:.0%}",
        f"{time.messages / time.seconds:.0%}",
        time.bound,
    ]


def _stages(sizes: list[int]) -> str:
    """The largest, and all where they are few."""
    if len(sizes) == 1:
        return f"{sizes[0] / GB:.1f}"
    listed = (
        " ".join(f"{size / GB:.0f}" for size in sizes)
        if len(sizes) <= 4
        else f"{sizes[0] / GB:.0f}..{sizes[-1] / GB:.0f}"
    )
    return f"{max(sizes) / GB:.1f} ({listed})"


def neighbours(best: Candidate, feasible: list[Candidate], misses: list[Candidate], device: Device) -> list[str]:
    """Why layouts that differ from the best in one size are worse."""
    names = ("tensor", "context", "pipeline", "virtual_pipeline", "micro_batch_size", "recompute")
    lines = []
    for position, name in enumerate(names):
        own = best.key[position]
        options = ("none", "selective", "full") if name == "recompute" else (own // 2, 2 * own)
        if name == "virtual_pipeline":
            options = (own - 1, own + 1)
        for option in options:
            key = (*best.key[:position], option, *best.key[position + 1 :])
            if option == own or (other := next((c for c in (*feasible, *misses) if c.key == key), None)) is None:
                continue
            lines.append(f"{name} {option} instead of {own}: {_difference(best, other, device)}")
    return lines


def _difference(best: Candidate, other: Candidate, device: Device) -> str:
    if other.time is None:
        return f"does not fit, {other.worst / GB:.1f} GB of {device.limit / GB:.1f}"
    parts = {
        "waiting in the pipeline": other.time.idle - best.time.idle,
        "messages": other.time.messages - best.time.messages,
        "thin products": other.time.thin - best.time.thin,
        "messages between replicas": other.time.replicas - best.time.replicas,
        "the optimizer": other.time.optimizer - best.time.optimizer,
    }
    more = other.time.seconds - best.time.seconds
    rest = other.time.busy - best.time.busy - parts["messages"] - parts["thin products"]
    parts["arithmetic" + " (recomputation)" * (other.config.training.recompute != "none")] = rest
    name = max(parts, key=parts.get)
    return f"{more / best.time.seconds:+.1%} a step, most by {name} ({parts[name]:+.2f} s)"


def assumptions(
    config: Config,
    device: Device,
    source: str,
    vocabulary: str,
    calibrated: bool,
    devices: int,
    reliability: Reliability,
) -> list[str]:
    """What the figures rest on."""
    hours = reliability.between_faults(devices) / 3600
    lines = [] if config.training.fp8 == "none" else [f"FP8 ({config.training.fp8}): planned as bf16"]
    return lines + [
        f"data: {source}",
        f"vocabulary: {vocabulary}",
        f"{device.name}: {device.peak / 1e12:.4g} TFLOP/s, of which large products reach {device.efficiency:.0%} and "
        f"products of {device.half_rows:.0f} rows half of that"
        + (" (measured)" if calibrated else " (not measured: --calibrate)"),
        f"links: {device.link / GB:.0f} GB/s inside nodes of {device.node}, {device.network / GB:.0f} GB/s a device "
        f"between them, of which {device.link_share:.0%} and {device.network_share:.0%} are reached",
        f"memory: at most {device.usable:.0%} of {device.memory / GB:.0f} GB, with {device.overhead_bytes / GB:.1f} GB "
        f"for context and communication, {device.fragmentation:.0%} for fragmentation"
        + f"; the recommended layout leaves {RESERVE:.0%} of that where one does"
        if device.memory
        else "memory: as much as wanted",
        "micro-batches hold the heaviest sampled rows together, the heaviest first; time is of average ones",
        f"faults: one in {hours:.0f} hours; a save holds training up for {reliability.save_seconds:.0f} s, a restart "
        f"takes {reliability.restart_seconds / 60:.0f} minutes",
        "messages of tensor parallelism are exposed in the forward pass and half hidden in the backward pass; "
        "those of context parallelism are exposed; gradients are reduced during the last micro-batch's backward pass",
        "frozen parameters count as trained ones; the dense share is that of evaluation",
    ]


def describe_run(best: Candidate, cost: dict, devices: int) -> str:
    """The recommended layout and what a run costs, in lines."""
    time, parallel, training = best.time, best.config.parallel, best.config.training
    money = "" if cost["cost"] is None else f", costs {cost['cost']:,.0f}"
    keys = [f"parallel.{key}={getattr(parallel, key)}" for key in ("tensor", "context", "pipeline", "virtual_pipeline")]
    if parallel.layout:
        keys.append(f"parallel.layout='{parallel.layout}'")
    keys += [f"training.micro_batch_size={training.micro_batch_size}", f"training.recompute={training.recompute}"]
    lines = [
        "recommended: " + " ".join(keys),
        f"step {time.seconds:.2f} s: a rank computes {time.busy - time.messages:.2f} s, waits for messages "
        f"{time.messages:.2f} s and in the pipeline {time.idle:.2f} s; messages between replicas "
        f"{time.replicas:.2f} s, optimizer {time.optimizer:.2f} s; MFU {time.mfu:.1%}",
        f"{cost['tokens']:.3g} tokens: {cost['steps']:,} steps, {cost['tokens_per_second']:,.0f} tokens/s, goodput "
        f"{cost['goodput']:.1%} with checkpoint.interval={cost['checkpoint_interval']}",
        f"{cost['days']:.1f} days, {cost['gpu_hours']:,.0f} GPU hours{money}",
    ]
    return "\n".join(lines)


def launch_variables(config: Config) -> str:
    """What examples/run_unified_tp4_pp2.sh must be told of a layout, since it sets these sizes itself."""
    return f"TP={config.parallel.tensor} PP={config.parallel.pipeline}"


def yaml_of(best: Candidate, cost: dict, devices: int, device: Device, source: str, command: str) -> str:
    """The layout as a configuration file.

    Args:
        command: that it is made with.
    """
    config = best.config
    model, data = config.model, config.data
    layers = f"{model.num_layers} layers of {model.hidden_size}"
    lines = [
        f"The layout that tools/plan_run.py recommends for {devices} x {device.name}: predicted "
        f"{best.time.seconds:.2f} s a step, MFU {best.time.mfu:.1%}, {best.worst / GB:.1f} GB on the rank that needs "
        "most.",
        f"For {layers}, plan {config.plan.preset}, {config.training.global_batch_size} rows a step of "
        f"{data.sequence_length} tokens; {source}.",
        command,
        f"With examples/run_unified_tp4_pp2.sh: {launch_variables(config)}",
    ]
    wrapped = [part for line in lines for part in textwrap.wrap(line, 116, break_on_hyphens=False)]
    head = "".join(f"# {line}\n" for line in wrapped)
    return head + yaml.safe_dump(overrides(config, cost["checkpoint_interval"]), sort_keys=False)

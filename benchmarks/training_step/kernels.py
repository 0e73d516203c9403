"""Where the time of a step goes, by kernel."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType

from megatron_ext import cpu


def profile(step: Callable[[], object]) -> list[dict]:
    """The kernels of one step by their time on the GPU, the longest first; without a GPU the operators by their own
    time. Each has a name, calls, milliseconds and its share of the total."""
    on_cpu = cpu.available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not on_cpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as trace:
        step()
        torch.cuda.synchronize()
    # On a GPU a row of an operator would count its kernels once more.
    device_type = DeviceType.CPU if on_cpu else DeviceType.CUDA
    rows = [row for row in trace.key_averages() if row.device_type == device_type]
    rows = [row for row in rows if not getattr(row, "is_user_annotation", False)]
    times = [(row.self_cpu_time_total if on_cpu else row.self_device_time_total) / 1e3 for row in rows]
    total = sum(times)
    kernels = [
        {"kernel": row.key, "calls": row.count, "milliseconds": time, "share": time / total}
        for row, time in zip(rows, times)
    ]
    return sorted(kernels, key=lambda kernel: -kernel["milliseconds"])


def kernel_table(kernels: list[dict], rows: int = 25, width: int = 90) -> str:
    """The longest kernels as a Markdown table."""
    lines = ["| kernel | calls | ms | share |", "| --- | --- | --- | --- |"]
    for kernel in kernels[:rows]:
        name = kernel["kernel"].replace("|", "/")
        name = name if len(name) <= width else name[: width - 3] + "..."
        lines.append(f"| `{name}` | {kernel['calls']} | {kernel['milliseconds']:.2f} | {kernel['share']:.1%} |")
    return "\n".join(lines)

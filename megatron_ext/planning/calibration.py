"""Measures the present device, so that a plan rests on its figures: products over their rows, attention, memory.

Products of n rows with a matrix of a model's size give the rate of large ones and the rows at which half of it is
reached; attention of one long causal document gives its share of the peak; a large addition gives the bandwidth of
memory. On a CPU in float32 with the threads that torch uses, on a GPU in bf16.
"""

import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from megatron_ext.planning.devices import DEVICES
from megatron_ext.training.devices import peak_flops

ROWS = (16, 64, 256, 1024, 4096)
REPEATS = 5


def calibrate(progress: Callable[[Iterable], Iterable] = iter) -> dict:
    """The figures of this device, as :func:`~megatron_ext.planning.devices.device_of` reads them, and what was
    measured."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    width = 4096 if on_gpu else 512
    rows = ROWS if on_gpu else ROWS[:4]
    matrix = torch.randn(4 * width, width, device=device, dtype=dtype)
    seconds = {}
    for n in progress(rows):
        x = torch.randn(n, width, device=device, dtype=dtype)
        seconds[n] = _seconds(lambda x=x: F.linear(x, matrix))
    launch = _seconds(lambda: torch.add(matrix[:1, :1], 1))
    bandwidth = _bandwidth(device, 1 << (28 if on_gpu else 24))
    rate, half_rows = fit_products(seconds, 2 * width * 4 * width)
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    # Without a known peak, a share of 1 is the rate of large products.
    peak = (peak_flops(name) if on_gpu else None) or rate
    attention = _attention_rate(device, dtype, 4096 if on_gpu else 512)
    measured = {
        "peak": peak,
        "efficiency": rate / peak,
        "half_rows": half_rows,
        "attention": attention / peak,
        "bandwidth": bandwidth,
        "launch": launch,
    }
    return {
        "name": name,
        "threads": None if on_gpu else torch.get_num_threads(),
        "device": measured,
        "seconds_of_products": {str(n): value for n, value in seconds.items()},
    }


def fit_products(seconds: dict[int, float], flops_per_row: float) -> tuple[float, float]:
    """The rate of large products, FLOP/s, and the rows at which half of it is reached, from seconds by rows.

    Seconds are flops_per_row (n + half_rows) / rate: a line over n, fitted by least squares of relative errors, so that
    short products count as much as long ones.
    """
    # Minimise the sum of ((a n + b) / s - 1)^2.
    rows = [(n / s, 1 / s) for n, s in seconds.items()]
    nn, no, oo = (sum(x[i] * x[j] for x in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    n1, o1 = sum(x[0] for x in rows), sum(x[1] for x in rows)
    determinant = nn * oo - no * no
    slope, offset = (n1 * oo - o1 * no) / determinant, (o1 * nn - n1 * no) / determinant
    offset = max(0.0, offset)
    return flops_per_row / slope, offset / slope


def describe(numbers: dict) -> str:
    """What was measured, in lines."""
    device = numbers["device"]
    rate = device["peak"] * device["efficiency"]
    lines = [
        f"{numbers['name']}: products {rate / 1e12:.3g} TFLOP/s, half of it at {device['half_rows']:.0f} rows; "
        f"attention {device['peak'] * device['attention'] / 1e12:.3g} TFLOP/s; memory {device['bandwidth'] / 1e9:.0f} "
        f"GB/s; {device['launch'] * 1e6:.1f} us a kernel"
    ]
    known = next((d for d in DEVICES.values() if peak_flops(numbers["name"]) == d.peak), None)
    if known:
        lines.append(
            f"assumed without calibration: {known.peak * known.efficiency / 1e12:.3g} TFLOP/s, half of it at "
            f"{known.half_rows:.0f} rows"
        )
    return "\n".join(lines)


def _attention_rate(device: str, dtype: torch.dtype, length: int) -> float:
    """FLOP/s of causal attention over one document."""
    heads, size = 8, 64 if device == "cpu" else 128
    query, key, value = (torch.randn(1, heads, length, size, device=device, dtype=dtype) for _ in range(3))
    seconds = _seconds(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True))
    return 4 * heads * size * length * (length + 1) / 2 / seconds


def _bandwidth(device: str, elements: int) -> float:
    """Bytes/s of reading and writing memory."""
    x = torch.zeros(elements, device=device)
    return 2 * 4 * elements / _seconds(lambda: x.add_(1))


def _seconds(call: Callable[[], object]) -> float:
    """Least seconds of a call, of several repeats."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    clock = time.perf_counter if torch.cuda.is_available() else cpu_clock

    def timed(calls: int) -> float:
        start = clock()
        for _ in range(calls):
            call()
        synchronize()
        return (clock() - start) / calls

    timed(1)
    calls = max(1, min(1000, int(0.02 / max(1e-7, timed(1)))))
    return min(timed(calls) for _ in range(REPEATS))


def cpu_clock() -> float:
    """Seconds of this process on its threads, which other processes of the machine do not lengthen."""
    return time.process_time() / torch.get_num_threads()

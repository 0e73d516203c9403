"""Steps of a stand-in model, to find out how many programs should share the GPU: ``load.py BEGIN SECONDS COUNT``.

Counts steps from the file BEGIN's appearance for SECONDS, and writes their number to the file COUNT; ``COUNT.ready``
says that it waits. A step starts as many small kernels as one of a dense model of twelve layers, at 128 wide and
16 thousand tokens.
"""

import sys
import time
from pathlib import Path

import torch

TOKENS, WIDTH, KERNELS = 16384, 128, 640
UNUSED_SECONDS = 60


def main(begin: Path, seconds: float, count: Path) -> None:
    on_gpu = torch.cuda.is_available()
    device, tokens = ("cuda", TOKENS) if on_gpu else ("cpu", TOKENS // 256)
    values = torch.randn(tokens, WIDTH, device=device)
    weight = torch.randn(WIDTH, WIDTH, device=device) / WIDTH**0.5

    def step() -> None:
        x = values
        for _ in range(KERNELS // 4):  # as in a layer: a product among operators on single elements
            x = torch.tanh(x @ weight + values) * 2.0
        x.sum().item()

    step()
    count.with_suffix(".ready").touch()
    latest = time.monotonic() + UNUSED_SECONDS
    while not begin.exists():
        if time.monotonic() > latest:
            sys.exit("nobody began")
        time.sleep(0.005)
    steps, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        step()
        steps += 1
    count.write_text(str(steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))

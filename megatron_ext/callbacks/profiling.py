"""A window of iterations under the torch profiler, as a Chrome trace (chrome://tracing, https://ui.perfetto.dev)."""

from pathlib import Path

import torch

from megatron_ext.config import LoggingConfig


class ProfileWindow:
    """Profiles iterations ``profile_start`` .. ``profile_start + profile_iterations - 1`` of one rank.

    The trace goes to ``OUTPUT/profile/rank<r>_iterations<a>-<b>.json.gz``. A window that a run starts inside of, or
    after, is not recorded.
    """

    def __init__(self, config: LoggingConfig, output: str | Path, rank: int):
        self.first = config.profile_start
        self.last = config.profile_start + config.profile_iterations - 1
        self.file = Path(output) / "profile" / f"rank{rank}_iterations{self.first}-{self.last}.json.gz"
        self._profiler: torch.profiler.profile | None = None

    def begin(self, iteration: int) -> None:
        """Call at the start of every iteration (the first is 1)."""
        if self.first and iteration == self.first <= self.last:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()

    def end(self, iteration: int) -> Path | None:
        """Call at the end of every iteration; the trace's file once it is written."""
        if self._profiler is None or iteration < self.last:
            return None
        self._profiler.stop()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.file))
        self._profiler = None
        return self.file

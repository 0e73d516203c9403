"""A window of iterations under the torch profiler, as a Chrome trace (chrome://tracing, https://ui.perfetto.dev)."""

from pathlib import Path

import torch

from megatron_ext.distributed import report
from megatron_ext.run_config import LoggingConfig
from megatron_ext.training.callback import Callback, StepRecord
from megatron_ext.training.run import Run


class Profiling(Callback):
    """Profiles iterations ``profile_start`` .. ``profile_start + profile_iterations - 1`` of one rank.

    The trace goes to ``OUTPUT/profile/rank<r>_iterations<a>-<b>.json.gz``. A window that began before this process
    started is not recorded.
    """

    def __init__(self, config: LoggingConfig, output: str | Path, rank: int):
        self._first = config.profile_start
        self._last = config.profile_start + config.profile_iterations - 1
        self.file = Path(output) / "profile" / f"rank{rank}_iterations{self._first}-{self._last}.json.gz"
        self._profiler: torch.profiler.profile | None = None

    def before_batch(self, run: Run) -> None:
        if self._first and run.progress.iteration + 1 == self._first <= self._last:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()

    def after_step(self, run: Run, record: StepRecord) -> None:
        if self._profiler is None or record.iteration < self._last:
            return
        self._profiler.stop()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.file))
        self._profiler = None
        report(f"profile written to {self.file}")

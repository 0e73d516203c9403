"""Tensor, pipeline, sequence and data parallelism, two ranks each, against the CPU's references.

Both ranks share one GPU (see one_gpu.py).
"""

import subprocess

from gpu.float32 import SETTINGS
from gpu.logs import last_error
from gpu.records import Context, Record
from gpu.steps import Figure
from megatron_ext import files
from parity import LIMIT, compare

LAYOUTS = ["tp2", "tp1-pp2", "tp2-sp", "tp1-dp2"]
PLANS = ["himix_hmgen_share_partial", "rank 4 per task", "dense"]
FIGURES = {
    "layouts": {layout: Figure(f"{layout}: largest relative error", LIMIT, everywhere=True) for layout in LAYOUTS}
}


def measure(context: Context, record: Record) -> None:
    """Measure the errors; results from before nccl fails or hangs count."""
    file = context.scratch / "layouts.json"
    file.unlink(missing_ok=True)
    plans = PLANS[1:2] if context.rehearsal else PLANS
    try:
        compare(LAYOUTS, plans, SETTINGS, 3 if context.rehearsal else 1.1, file=file, references=context.references)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(last_error(record.file.with_suffix(".log")) or str(error)) from None
    finally:
        for layout, plan_errors in (files.read_json(file) if file.exists() else {}).items():
            if layout in LAYOUTS:
                record.figures[layout] = max(value for errors in plan_errors.values() for value in errors.values())

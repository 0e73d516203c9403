"""Outputs and gradients in bf16 and in FP8, against float32 on the same machine.

The errors are those of rounding, and the limits follow from it. bf16 keeps 8 bits: an operand is off by 0.2 %, the
result of some forty roundings in a row by about 1 %. FP8 keeps 4 bits of weights and activations (E4M3, off by 2.6 % on
average) and 3 bits of gradients (E5M2, 5 %), so a product is off by 4 to 6 % and, after four layers, logits by some
10 % and gradients by some 15 %. With a wrong scale, mask or order of rows the error is 100 %.
"""

import torch

from gpu.records import Context, Record
from gpu.steps import Figure
from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.routing.plan import PRESETS

# Rows and widths that FP8 kernels accept, a head size that attention kernels support.
BASE = [
    *("model.num_layers=4", "model.hidden_size=256", "model.num_attention_heads=4", "model.num_query_groups=2"),
    *("data.sequence_length=512", "training.micro_batch_size=2", "training.global_batch_size=4"),
]
TINY = [
    *("model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2"),
    *("data.sequence_length=64", "training.micro_batch_size=1", "training.global_batch_size=2"),
]
LOCAL, TRANSFORMER_ENGINE = "model.implementation=local", "model.implementation=transformer_engine"
KINDS = {
    "bf16": {"bf16": [LOCAL, "training.precision=bf16"]},
    "fp8": {
        "bf16": [TRANSFORMER_ENGINE, "training.precision=bf16"],
        "FP8": [TRANSFORMER_ENGINE, "training.precision=bf16", "training.fp8=current"],
    },
}
LIMITS = {"bf16": {"logits": 0.03, "gradient": 0.05}, "FP8": {"logits": 0.15, "gradient": 0.25}}

FIGURES = {
    step: {
        f"{kind} {name}": Figure(f"{kind}: {name}, largest relative error of all presets", limit, everywhere=True)
        for kind in kinds
        for name, limit in LIMITS[kind].items()
    }
    for step, kinds in KINDS.items()
}


def measure(context: Context, record: Record) -> None:
    """Measure the errors of this step's kinds of precision."""
    import parity
    from megatron_ext import distributed

    base = TINY if context.rehearsal else BASE
    kinds = KINDS[record.step]
    lines = [f"| preset | {' | '.join(FIGURES[record.step])} |", f"|{' --- |' * (1 + len(FIGURES[record.step]))}"]
    distributed.initialize(config_file.load(Config, [], base))
    for preset in PRESETS:
        plan = [*base, f"plan.preset={preset}"]
        expected = parity.measure(config_file.load(Config, [], [*plan, LOCAL]))
        cells = []
        for kind, settings in kinds.items():
            measured = parity.measure(config_file.load(Config, [], [*plan, *settings]))
            errors = {
                "logits": relative_error(measured.logits, expected.logits),
                "gradient": relative_error(measured.gradients.values(), expected.gradients.values()),
            }
            for name, error in errors.items():
                worst = record.figures.get(f"{kind} {name}", 0.0)
                record.figures[f"{kind} {name}"] = error if error != error else max(worst, error)
                cells.append(f"{error:.1%}")
        lines.append(f"| {preset} | {' | '.join(cells)} |")
        record.tables["Relative errors"] = "\n".join(lines)
        record.write()
    distributed.shut_down()


def relative_error(tensors, expected) -> float:
    """|x - x'| / |x'| with all tensors as one vector."""
    x, reference = (torch.cat([tensor.float().flatten() for tensor in each]) for each in (tensors, expected))
    return float((x - reference).norm() / reference.norm())

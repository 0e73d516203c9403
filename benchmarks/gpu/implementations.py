"""Torch's layers and Transformer Engine's: the same hidden states after every layer, and the same training.

Both start from the same weights and rows. The limits are those of ``precision.py``, because hidden states are rounded
the same way; losses of 40 steps may drift apart by 3 %.
"""

from pathlib import Path

import torch

from gpu.precision import BASE, LIMITS, LOCAL, TRANSFORMER_ENGINE, relative_error
from gpu.records import Context, Record
from gpu.steps import Figure
from gpu.tiny_run import write_config
from megatron_ext import config_file, distributed
from megatron_ext.config import Config
from megatron_ext.transformer.resolved import resolve

ITERATIONS = 40
PLAN = "plan.preset=himix_hmgen_share_partial"
KINDS = {
    "Transformer Engine": ([TRANSFORMER_ENGINE], LIMITS["bf16"]["logits"]),
    "FP8": ([TRANSFORMER_ENGINE, "training.fp8=current"], LIMITS["FP8"]["logits"]),
}
FIGURES = {
    "implementations": {
        figure: aim
        for kind, (_, limit) in KINDS.items()
        for figure, aim in {
            f"{kind} layer": Figure(f"{kind}: hidden states of a layer at step 1, largest relative error", limit),
            f"{kind} loss": Figure(f"{kind}: losses of {ITERATIONS} steps, largest relative difference", 0.03),
            f"{kind} fall": Figure(f"{kind}: last loss / first loss", 0.9),
        }.items()
    }
}


def measure(context: Context, record: Record) -> None:
    """Compare layers, then train; torch's layers are the reference."""
    bf16 = [*BASE, PLAN, "training.precision=bf16"]
    expected = hidden_states([*bf16, LOCAL])
    lines = [f"| layer | {' | '.join(KINDS)} |", f"|{' --- |' * (1 + len(KINDS))}"]
    errors = {
        kind: [relative_error([x], [e]) for x, e in zip(hidden_states([*bf16, *settings]), expected, strict=True)]
        for kind, (settings, _) in KINDS.items()
    }
    for layer, layer_errors in enumerate(zip(*errors.values())):
        lines.append(f"| {layer} | {' | '.join(f'{error:.1%}' for error in layer_errors)} |")
    record.tables["Hidden states at step 1, relative error"] = "\n".join(lines)
    record.figures |= {f"{kind} layer": max(kind_errors) for kind, kind_errors in errors.items()}
    record.write()
    config = write_config(context.scratch, context.rehearsal)
    local = losses(config, context.scratch / "local", [LOCAL])
    for kind, (settings, _) in KINDS.items():
        ours = losses(config, context.scratch / kind.replace(" ", "_"), settings)
        record.figures[f"{kind} loss"] = max(abs(a - b) / b for a, b in zip(ours, local, strict=True))
        record.figures[f"{kind} fall"] = ours[-1] / ours[0]
        record.write()


def hidden_states(settings: list[str]) -> list[torch.Tensor]:
    """Hidden states [tokens, h] after each layer in the first micro-batch of a step, in the order of the batch."""
    from megatron.core.utils import unwrap_model

    from megatron_ext.training.setup import build_model, build_optimizer
    from megatron_ext.training.step import train_step
    from megatron_ext.transformer.hidden_states import joined
    from parity import VOCABULARY, packed_batch
    from training_step.random_rows import step_input, stored_order

    config = config_file.load(Config, [], settings)
    distributed.initialize(config)
    chunks = build_model(resolve(config, VOCABULARY))
    states = {}

    batch = packed_batch(config.training.global_batch_size, config.data.sequence_length, seed=0)
    order = stored_order(batch.rows(0, config.training.micro_batch_size), config)

    def keep(layer, arguments, output) -> None:
        if layer.layer_number not in states:
            stored = joined(output[0]).detach().squeeze(1).float().cpu()[order >= 0]  # without the dummies of FP8
            states[layer.layer_number] = stored[order[order >= 0].argsort()]

    for layer in unwrap_model(chunks[0]).decoder.layers:
        layer.register_forward_hook(keep)
    train_step(chunks, build_optimizer(config, chunks), step_input(batch, config), config)
    distributed.shut_down()
    return [states[number] for number in sorted(states)]


def losses(config_yaml: Path, output: Path, settings: list[str]) -> list[float]:
    """The losses of a run."""
    from megatron_ext.callbacks import build_callbacks
    from megatron_ext.training.config_checks import validate
    from megatron_ext.training.loop import train
    from megatron_ext.training.metrics import read_metrics
    from megatron_ext.training.run import build_run

    overrides = [f"output={output}", f"training.iterations={ITERATIONS}", "logging.tensorboard=false"]
    config = config_file.load(Config, [str(config_yaml)], [*overrides, "checkpoint.resume=false", *settings])
    validate(config, world_size=1)
    distributed.initialize(config)
    run = build_run(config)
    train(run, build_callbacks(run))
    distributed.shut_down()
    return [line["loss"] for line in read_metrics(output / "metrics.jsonl")]

"""The cost of a plan on given documents, as numbers and as text."""

from collections.abc import Sequence
from itertools import groupby

from megatron_ext.config import Config, ModelConfig
from megatron_ext.data.batch import Batch
from megatron_ext.routing.flops import (
    NUM_CLASSES,
    TRAINING_PER_FORWARD,
    Counts,
    class_flops,
    count,
    dense,
    forward_flops,
    head_flops,
    image_parameter_count,
    layer_flops,
    parameter_count,
    projector_flops,
    stage_flops,
    with_all_logits,
)
from megatron_ext.routing.image_code_costs import depth_head_multiply_adds
from megatron_ext.routing.memory import activation_bytes, depth_head_bytes, projector_bytes
from megatron_ext.routing.pipeline_layout import stage_layers
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import CLASSES, class_index, task_and_modality


def summarize(config: Config, vocab_size: int, batch: Batch, all_logits: bool = False) -> dict:
    """The cost of training on ``batch`` under ``config.plan``: FLOPs of forward and backward pass together, parameters
    of the whole model, and the bytes that its layers, projector and depth head keep on a rank between the two passes of
    a micro-batch full of such data.

    Args:
        all_logits: compute the output head for all tokens that are FULL in the last layer instead of those with loss.
    """
    model, parallel = config.model, config.parallel
    plan = Plan.from_config(config)
    reference = dense(plan)
    counts, dense_counts = count(batch, plan), count(batch, reference)
    if all_logits:
        counts, dense_counts = with_all_logits(counts, plan), with_all_logits(dense_counts, reference)
    names = {i: _name(i) for i in _order(plan) if counts.tokens[i]}
    dense_layers = layer_flops(model, reference, dense_counts)
    micro_batch = config.training.micro_batch_size * config.data.sequence_length
    kept, ends = _kept(config, plan, counts, micro_batch)
    dense_kept, dense_ends = _kept(config, reference, dense_counts, micro_batch)
    layers = [
        {
            "layer": number,
            "roles": {name: plan.roles[number][i].name.lower() for i, name in names.items()},
            "flops": {name: TRAINING_PER_FORWARD * classes[i] for i, name in names.items()},
            "ratio": sum(classes) / dense_layers[number],
            "activation_bytes": kept[number],
        }
        for number, classes in enumerate(class_flops(model, plan, counts))
    ]
    flops = forward_flops(model, vocab_size, plan, counts)
    dense_flops = forward_flops(model, vocab_size, reference, dense_counts)
    stack, dense_stack = sum(layer_flops(model, plan, counts)), sum(dense_layers)
    head, dense_head = head_flops(model, vocab_size, counts), head_flops(model, vocab_size, dense_counts)
    split = (parallel.pipeline, parallel.virtual_pipeline, parallel.layout)
    stages = stage_flops(model, vocab_size, plan, counts, *split)
    image_parameters = image_parameter_count(model, plan.projections)
    return {
        "plan": plan.name,
        "vocabulary": vocab_size,
        "tokens": {name: counts.tokens[i] for i, name in names.items()},
        "logits": counts.logits,
        "flops": TRAINING_PER_FORWARD * flops,
        "dense_flops": TRAINING_PER_FORWARD * dense_flops,
        "flops_ratio": flops / dense_flops,
        "stack_flops_ratio": stack / dense_stack,
        "layers": layers,
        "head": {"flops": TRAINING_PER_FORWARD * head, "ratio": head / dense_head if dense_head else 1.0},
        "stages": _stages(stage_layers(model.num_layers, *split), stages, kept, ends),
        "parameters": {
            "text": parameter_count(model, vocab_size, plan.projections) - image_parameters,
            "image": image_parameters,
        },
        "micro_batch_tokens": micro_batch,
        "activation_bytes": sum(kept) + sum(ends),
        "dense_activation_bytes": sum(dense_kept) + sum(dense_ends),
        "image_codes": _image_codes(model, counts, stack, ends),
    }


def _kept(config: Config, plan: Plan, counts: Counts, micro_batch: int) -> tuple[list[int], list[int]]:
    """Bytes that each layer, and that projector and depth head, keep of a micro-batch of so many tokens on a rank."""
    parallel, element_size = config.parallel, 2 if config.training.precision == "bf16" else 4
    times = micro_batch / sum(counts.tokens) / parallel.context
    split = parallel.tensor, parallel.sequence
    layers = activation_bytes(config.model, plan, counts, element_size, times, config.training.recompute, *split)
    ends = (projector_bytes, parallel.tensor if parallel.sequence else 1), (depth_head_bytes, parallel.tensor)
    return layers, [f(config.model, counts, element_size, times, ranks) for f, ranks in ends]


def _image_codes(model: ModelConfig, counts: Counts, stack: int, kept: list[int]) -> dict | None:
    """What image tokens of several codes cost besides the layers; None where they have one.

    Args:
        stack: FLOPs of one forward pass through the layers.
        kept: bytes that the projector and the depth head keep.
    """
    if model.image_codes.depth == 1:
        return None
    depth_head = 2 * depth_head_multiply_adds(model) * counts.codes
    return {
        "depth": model.image_codes.depth,
        "images": counts.images,
        "targets": counts.codes,
        "projector_flops": TRAINING_PER_FORWARD * projector_flops(model, counts),
        "depth_head_flops": TRAINING_PER_FORWARD * depth_head,
        "depth_head_of_layers": depth_head / stack,
        "projector_bytes": kept[0],
        "depth_head_bytes": kept[1],
    }


def _stages(layers: list[list[int]], flops: list[int], kept: list[int], ends: list[int]) -> list[dict]:
    """The figures of each pipeline stage, from its layers, its forward FLOPs, and the bytes that each layer and, before
    and after them, the projector and the depth head keep."""
    total = sum(flops)
    activations = [sum(kept[layer] for layer in numbers) for numbers in layers]
    activations[0] += ends[0]
    activations[-1] += ends[1]
    return [
        {
            "layers": numbers,
            "flops": TRAINING_PER_FORWARD * stage,
            "of_mean": stage * len(flops) / total,
            "activation_bytes": kept_of_stage,
        }
        for numbers, stage, kept_of_stage in zip(layers, flops, activations)
    ]


def describe(summary: dict) -> str:
    """The numbers of :func:`summarize` as text."""
    tokens = ", ".join(f"{n} {name}" for name, n in summary["tokens"].items())
    parameters, kept, dense_kept = (summary[k] for k in ("parameters", "activation_bytes", "dense_activation_bytes"))
    lines = [
        f"plan {summary['plan']}, vocabulary {summary['vocabulary']}",
        f"tokens: {tokens}; {summary['logits']} logits",
        f"training FLOPs {_si(summary['flops'])}, dense {_si(summary['dense_flops'])}: "
        f"{summary['flops_ratio']:.3f} of dense (flops_ratio), {summary['stack_flops_ratio']:.3f} in the layers "
        "(stack_flops_ratio)",
        f"activations {_si(kept)}B, dense {_si(dense_kept)}B: {kept / dense_kept:.3f} of dense, "
        f"for a micro-batch of {summary['micro_batch_tokens']} tokens",
        f"parameters {_si(parameters['text'])}, and {_si(parameters['image'])} for image tokens only",
        *_image_code_lines(summary["image_codes"]),
        "",
        *_layer_table(summary),
    ]
    if len(summary["stages"]) > 1:
        lines += ["", *_stage_table(summary["stages"])]
    return "\n".join(lines)


def _image_code_lines(codes: dict | None) -> list[str]:
    if codes is None:
        return []
    return [
        f"{codes['depth']} codes an image token: projector {_si(codes['projector_flops'])} for {codes['images']}, "
        f"depth head {_si(codes['depth_head_flops'])} for {codes['targets']} predicted ones, "
        f"{codes['depth_head_of_layers']:.2f} of the layers, activations {_si(codes['depth_head_bytes'])}B"
    ]


def _layer_table(summary: dict) -> list[str]:
    """One line for each run of layers of the same cost."""
    names = list(summary["tokens"])
    rows = [["each of layers", *names, "all", "of dense", "activations"]]
    for _, same in groupby(summary["layers"], key=lambda layer: {**layer, "layer": None}):
        layer, *others = same
        last = others[-1]["layer"] if others else layer["layer"]
        total = sum(layer["flops"].values())
        cells = [f"{_si(n)} {f'{n / total:.0%}' if total else '-':>4}" for n in layer["flops"].values()]
        numbers = _ranges(range(layer["layer"], last + 1))
        rows.append([numbers, *cells, _si(total), f"{layer['ratio']:.3f}", f"{_si(layer['activation_bytes'])}B"])
    head = summary["head"]
    rows.append(["head", *[""] * len(names), _si(head["flops"]), f"{head['ratio']:.3f}", ""])
    return _aligned(rows)


def _stage_table(stages: list[dict]) -> list[str]:
    rows = [["stage", "layers", "FLOPs", "of the mean", "activations"]]
    for number, stage in enumerate(stages):
        cells = [_ranges(stage["layers"]), _si(stage["flops"]), f"{stage['of_mean']:.3f}"]
        rows.append([str(number), *cells, f"{_si(stage['activation_bytes'])}B"])
    idle = 1 - 1 / max(stage["of_mean"] for stage in stages)
    return [*_aligned(rows), f"the slowest stage sets the pace: on average a stage is idle {idle:.0%} of the time"]


def _order(plan: Plan) -> list[int]:
    """Class indices in document order, then those absent from training data, then those of further tables."""
    first = [class_index(*c) for c in CLASSES]
    return first + [i for i in range(len(plan.roles[0])) if i not in first]


def _name(index: int) -> str:
    task, modality = task_and_modality(index)
    return f"{task.name.lower()} {modality.name.lower()}{' (dense)' * (index >= NUM_CLASSES)}"


def _ranges(numbers: Sequence[int]) -> str:
    """``0-2,6-7`` for 0, 1, 2, 6, 7."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in zip(starts, ends))


def _si(number: float) -> str:
    """``1.23 M`` for 1234567."""
    for factor, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]

"""Gradient alignment: how far understanding and generation pull the same weights in the same direction.

Let u and g be the gradients of the two tasks' mean cross-entropies over one global batch (each with weight 1; with
``training.means: modality``, of the sums of cross-entropies by which the tasks enter its two means), restricted to a
part of the parameters (arXiv 2606.01503 traces the loss of synergy to which parameters each task trains)::

    cosine              = <u, g> / (|u| |g|)
    norm_understanding  = |u|
    norm_generation     = |g|
    only_understanding  = share of the parameters with u != 0 and g = 0 exactly
    only_generation     = share with u = 0 and g != 0
    untrained           = share with u = 0 and g = 0

The parts of a layer are its norms, also those of queries and keys, and each projection, the shared weights (with their
bias) and every component of image tokens counted separately. Figures are also given for each layer as a whole, and
outside the layers for the embedding, the final norm and the output head (which is the embedding if tied). Where image
tokens have several codes, so are they for the projector, through which both tasks' image tokens enter (or their learned
code embedding), and for the depth head, which generation alone trains.
"""

import dataclasses
import math
import re
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_ext import config_file, distributed
from megatron_ext.analysis.batches import run_batches
from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints.checkpointer import load_weights, read_state
from megatron_ext.config import Config, ParallelConfig
from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError
from megatron_ext.routing.plan import Plan, with_roles
from megatron_ext.token_classes import Task
from megatron_ext.training.config_checks import validate
from megatron_ext.training.prepare import StepInput, prepare
from megatron_ext.training.setup import build_model
from megatron_ext.training.step import task_gradients
from megatron_ext.transformer.initialization import cut, global_parameters
from megatron_ext.transformer.resolved import ResolvedConfig, padded_vocab_size, resolve
from megatron_ext.vocabulary import Vocabulary

MODULES = ("qkv", "proj", "fc1", "fc2")
OUTSIDE = {
    "embedding": "embedding",
    "image_positions": "image positions",
    "projector": "projector",
    "code_embedding": "code embedding",
    "decoder.final_layernorm": "final norm",
    "output_layer": "head",
    "depth_head": "depth head",
}
"""Parts outside the layers, by the first words of their parameters' names."""
SUMS = ("<u, g>", "<u, u>", "<g, g>", "only u", "only g", "neither", "parameters")
CHUNK = 2**22
"""Elements converted to float64 at a time."""


def alignment(chunks: list, step: StepInput, resolved: ResolvedConfig) -> dict:
    """Gradient alignment on one global batch; collective, the same on every rank.

    Costs a forward and a backward pass per task, and memory for one copy of this rank's gradients. Overwrites the
    gradient buffers and nothing else.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism.
        step: this replica's rows of the global batch, on the device.

    Returns:
        The figures above, for "layers" (by part, lists over layers), "layer" (each layer as a whole), "outside" (parts
        outside the layers) and "all" (the whole model); and the "seconds" that the measurement took. An undefined
        figure, such as the cosine with a zero gradient, is None.
    """
    started = time.perf_counter()
    (result,) = _compare(chunks, resolved, [(step, Task.UNDERSTANDING), (step, Task.GENERATION)])
    return result | {"seconds": time.perf_counter() - started}


def corrected(chunks: list, batch: Batch, resolved: ResolvedConfig) -> dict:
    """The two tasks' cosines corrected for the sampling noise of the batch; collective, the same on every rank.

    A batch's gradient is the expected gradient plus noise, and noise makes every cosine smaller. With a and b the
    halves of the batch (Spearman's correction for attenuation, American Journal of Psychology 15, 1904)::

        corrected = (cos(u_a, g_b) + cos(u_b, g_a)) / 2 / sqrt(cos(u_a, u_b) cos(g_a, g_b))

    Costs five forward and backward passes over half of the batch, and the memory of :func:`alignment`.

    Args:
        batch: this replica's rows on the host, an even number of micro-batches.

    Returns:
        "layers", "layer", "outside" and "all" as in :func:`alignment`, with the figures ``corrected_cosine``,
        ``repeat_understanding`` = cos(u_a, u_b) and ``repeat_generation`` = cos(g_a, g_b). The corrected cosine is
        None where a task's halves do not agree at all; it may exceed 1 where they agree little.

    Raises:
        UserError: the rows do not split into halves of whole micro-batches.
    """
    middle, micro_batch_size = batch.shape[0] // 2, resolved.config.training.micro_batch_size
    if middle % micro_batch_size or not middle:
        raise UserError(
            f"a replica has {batch.shape[0]} rows, which is not an even number of micro-batches of "
            f"{micro_batch_size}; use more --batches or fewer processes"
        )
    halves = batch.rows(0, middle), batch.rows(middle, 2 * middle)
    a, b = (prepare(half, resolved).to(distributed.device()) for half in halves)
    u, g = Task.UNDERSTANDING, Task.GENERATION
    agree_u, cross, agree_g, cross_back = _compare(chunks, resolved, [(a, u), (b, u), (a, g), (b, g), (a, u)])
    measured = [agree_u, agree_g, cross, cross_back]

    def correct(cosines: list) -> dict:
        repeat_u, repeat_g, *crossed = cosines
        defined = None not in cosines and min(repeat_u, repeat_g) > 0
        cosine = sum(crossed) / 2 / math.sqrt(repeat_u * repeat_g) if defined else None
        return {"corrected_cosine": cosine, "repeat_understanding": repeat_u, "repeat_generation": repeat_g}

    def over_layers(figures: list[dict]) -> dict[str, list]:
        layers = [correct(list(cosines)) for cosines in zip(*(f["cosine"] for f in figures))]
        return {name: [layer[name] for layer in layers] for name in layers[0]}

    return {
        "layers": {part: over_layers([m["layers"][part] for m in measured]) for part in measured[0]["layers"]},
        "layer": over_layers([m["layer"] for m in measured]),
        "outside": {part: correct([m["outside"][part]["cosine"] for m in measured]) for part in measured[0]["outside"]},
        "all": correct([m["all"]["cosine"] for m in measured]),
    }


def _compare(chunks: list, resolved: ResolvedConfig, passes: list[tuple[StepInput, Task]]) -> list[dict]:
    """The figures of every two consecutive gradients, each of a task over some rows; u is the earlier of the two."""
    config, columns = resolved.config, part_names(resolved.plan)
    places = {(layer, name): i for i, (layer, name) in enumerate(_parts(config, columns))}
    counted = [(places[part_of(name)], p) for chunk in chunks for name, p in _counted_parameters(chunk)]
    figures, before = [], []
    for number, (step, task) in enumerate(passes, 1):
        task_gradients(chunks, step, config, task)
        if number > 1:
            sums = torch.zeros(len(places), len(SUMS), dtype=torch.float64, device=distributed.device())
            for (place, p), u in zip(counted, before):
                sums[place] += _sums(u, p.main_grad)
            dist.all_reduce(sums, group=parallel_state.get_model_parallel_group())
            figures.append(_by_part(sums.cpu(), places, columns, config.model.num_layers))
        if number < len(passes):
            before = [p.main_grad.clone() for _, p in counted]
    return figures


def part_names(plan: Plan) -> list[str]:
    """The names of a layer's parts: ``norms``, ``qkv``, ``qkv image``, ..."""
    projections = plan.projections
    names = ["norms"]
    for module in MODULES:
        names.append(module)
        names += [f"{module} {component}" for component in projections.components if module in projections.modules]
    return names


def part_of(name: str) -> tuple[int | None, str]:
    """The layer (from 0; None outside the layers) and the part of a parameter, from its global name."""
    for module, part in OUTSIDE.items():
        if name.startswith(f"{module}."):
            return None, part
    layer, rest = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name).groups()
    if projection := re.search(r"linear_(\w+)\.(\w+)$", rest):
        component = projection[2].rpartition("_")[0]  # weight, bias, image_weight, image_delta, image_down, image_up
        return int(layer), f"{projection[1]} {component}".rstrip()
    return int(layer), "norms"


def _parts(config: Config, columns: list[str]) -> list[tuple[int | None, str]]:
    absent = {"head"} if config.model.tie_embeddings else set()
    absent |= set() if config.model.max_image_tokens else {"image positions"}
    image_codes = config.model.image_codes
    absent |= set() if image_codes.depth > 1 else {"projector", "code embedding", "depth head"}
    absent.add("projector" if image_codes.width is None else "code embedding")
    outside = [name for name in OUTSIDE.values() if name not in absent]
    return [(n, name) for n in range(config.model.num_layers) for name in columns] + [(None, name) for name in outside]


def _counted_parameters(chunk):
    """Names and parameters of a chunk, without frozen ones and those that another rank counts: copies over the
    tensor-parallel group of what is not split, and the last stage's copy of a tied embedding."""
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    for name, parameter in global_parameters(chunk.module):
        if parameter.requires_grad and param_is_not_shared(parameter) and (first or cut(name)[0] is not None):
            yield name, parameter


def _sums(u_gradient: Tensor, g_gradient: Tensor) -> Tensor:
    """The ``SUMS`` of two gradients of one shape, float64."""
    total = torch.zeros(len(SUMS), dtype=torch.float64, device=u_gradient.device)
    for u, g in zip(u_gradient.flatten().split(CHUNK), g_gradient.flatten().split(CHUNK)):
        by_u, by_g = u != 0, g != 0
        counts = [(by_u & ~by_g).sum(), (by_g & ~by_u).sum(), (~by_u & ~by_g).sum()]
        u, g = u.double(), g.double()
        total += torch.stack([u @ g, u @ u, g @ g, *(n.double() for n in counts), total.new_tensor(u.numel())])
    return total


def _by_part(sums: Tensor, places: dict, columns: list[str], num_layers: int) -> dict:
    def over_layers(rows: list[Tensor]) -> dict[str, list]:
        figures = [_figures(row) for row in rows]
        return {name: [f[name] for f in figures] for name in figures[0]}

    layers = sums[: num_layers * len(columns)].view(num_layers, len(columns), -1)
    return {
        "layers": {name: over_layers(list(layers[:, i])) for i, name in enumerate(columns)},
        "layer": over_layers(list(layers.sum(1))),
        "outside": {name: _figures(sums[i]) for (layer, name), i in places.items() if layer is None},
        "all": _figures(sums.sum(0)),
    }


def _figures(sums: Tensor) -> dict[str, float | None]:
    dot, uu, gg, only_u, only_g, neither, count = sums.tolist()
    figures = {
        "cosine": dot / math.sqrt(uu * gg) if uu * gg > 0 else None,
        "norm_understanding": math.sqrt(uu),
        "norm_generation": math.sqrt(gg),
        "only_understanding": only_u / max(count, 1),
        "only_generation": only_g / max(count, 1),
        "untrained": neither / max(count, 1),
    }
    return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}


def of_checkpoint(checkpoint: Path, overrides: list[str], data: str = "validation", count: int = 1) -> dict:
    """The "alignment" of a checkpoint over rows of its run's data, with the names of the data; for an even ``count``
    also the "corrected" cosines.

    Args:
        checkpoint: ``.../checkpoints/iter_NNNNNNN``, or a run's folder for its newest checkpoint.
        overrides: ``section.key=value`` over the run's configuration, with ``parallel`` reset to one process.
        data: ``validation`` or ``train``.
        count: the number of the run's global batches, merged into one.

    Raises:
        UserError: the checkpoint, an override or the data is refused, by name.
    """
    path = checkpoint_folder.of_run(checkpoint)
    config = config_file.from_tree(Config, read_state(path)["config"])
    config.parallel = ParallelConfig()
    config = with_roles(config, overrides)
    config.training.global_batch_size *= count
    validate(config, distributed.world_size())
    vocabulary = Vocabulary(config.data.vocabulary)
    distributed.initialize(config)
    resolved = resolve(config, padded_vocab_size(config, vocabulary))
    chunks = build_model(resolved)
    load_weights(path, chunks, {"fingerprints": {"vocabulary": vocabulary.fingerprint}})
    batch = next(run_batches(config, vocabulary, data, config.training.global_batch_size, 1)).to("cpu")
    step = prepare(batch, resolved).to(distributed.device())
    return {
        "checkpoint": str(checkpoint),
        "plan": resolved.plan.name,
        "data": [f"{source.task}: {source.path}" for source in getattr(config.data, data)],
        "rows": config.training.global_batch_size,
        "parallel": dataclasses.asdict(config.parallel),
        "alignment": alignment(chunks, step, resolved),
        "corrected": corrected(chunks, batch, resolved) if count % 2 == 0 else None,
    }

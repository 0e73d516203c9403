"""Memory of each rank: parameters with their gradients and optimizer states, activations, and what a step needs
besides.

Bytes of a parameter: in bf16 2, its gradient 4 (float32), master weight and moments 12; in float32 4, 4 and 8. The
distributed optimizer shards the last over the replicas (and context ranks); in bf16 the master weights too.

Activations are those of :mod:`~megatron_ext.routing.memory`, of as many micro-batches as the schedule keeps alive on a
rank, with the hidden states that stages exchange. The peak of a rank is the largest, over its tasks in order, of what
is alive and what the task needs for itself: the output head; the gradients of a layer while its activations are still
there, and on GPUs the keys that its segments of attention share, repeated for each of them, and their gradients; with
full recomputation, the activations of one layer. Micro-batches hold the heaviest of the sampled rows together, and the
heaviest come first; logits are as many as in the rows that have most of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from megatron_ext.config import Config, ModelConfig
from megatron_ext.planning.devices import Device
from megatron_ext.planning.workload import Workload, of_role
from megatron_ext.routing import memory
from megatron_ext.routing.flops import Counts, key_width, projection_shapes
from megatron_ext.routing.groups import stored_length
from megatron_ext.routing.image_code_costs import depth_head_parameters, projector_parameters
from megatron_ext.routing.pipeline import Task, order
from megatron_ext.routing.pipeline_layout import stage_layers
from megatron_ext.routing.plan import Projections
from megatron_ext.routing.roles import Role


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank.

    Attributes:
        parameters: number of parameters that it holds.
        static: weights, gradients and optimizer states.
        activations: most that forward passes keep for backward passes.
        transient: what a task needs besides, at the peak.
        overhead: of the device: its context, communication buffers, fragmentation.
    """

    parameters: int
    static: int
    activations: int
    transient: int
    overhead: int = 0

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.static + self.activations + self.transient + self.overhead


def rank_memory(
    config: Config, sizes: "MicroBatchMemory", vocab_size: int, world_size: int, device: Device
) -> list[RankMemory]:
    """The memory of a rank of each pipeline stage.

    Args:
        sizes: of micro-batches under ``config``, or one that differs in pipeline stages alone.
        vocab_size: rows of the embedding, padded.
    """
    parallel = config.parallel
    chunks = chunk_layers(config)
    own = [chunks[rank :: parallel.pipeline] for rank in range(parallel.pipeline)]
    return [stage_memory(config, sizes, vocab_size, world_size, device, *stage) for stage in enumerate(own)]


def stage_memory(
    config: Config,
    sizes: "MicroBatchMemory",
    vocab_size: int,
    world_size: int,
    device: Device,
    rank: int,
    chunks: list[list[int]],
) -> RankMemory:
    """The memory of a rank of one pipeline stage that holds chunks of these layers; arguments as for
    :func:`rank_memory`."""
    parallel = config.parallel
    count = parallel.pipeline * parallel.virtual_pipeline
    own = [sizes.chunk(layers, rank + i * parallel.pipeline, count) for i, layers in enumerate(chunks)]
    # The peak is there once the pipeline has filled.
    micro_batches = simulated_micro_batches(config, world_size)
    tasks = order(rank, parallel.pipeline, parallel.virtual_pipeline, micro_batches)
    alive, transient = _peak(tasks, own, sizes.heaviest)
    ahead = 2 * sizes.hidden.max() if parallel.virtual_pipeline > 1 else 0  # received before they are needed
    parameters = stage_parameters(config, sizes.projections, vocab_size, chunks, rank)
    shards = config.data_parallel(world_size) * parallel.context
    static = round(parameters * bytes_per_parameter(config, shards))
    needed = static + alive + transient + ahead
    overhead = round(device.overhead_bytes + device.fragmentation * needed)
    return RankMemory(parameters, static, round(alive + ahead), round(transient), overhead)


def simulated_micro_batches(config: Config, world_size: int) -> int:
    """A number of micro-batches, at most those of a step, that shows what a schedule does: the pipeline fills, goes on,
    and drains."""
    pipeline, number = config.parallel.pipeline, config.micro_batches(world_size)
    return number if number <= 6 * pipeline else 4 * pipeline + number % pipeline


def chunk_layers(config: Config) -> list[list[int]]:
    """Layers of each of the P * V chunks of the model, in order."""
    parallel = config.parallel
    chunks = parallel.pipeline * parallel.virtual_pipeline
    return stage_layers(config.model.num_layers, chunks, layout=parallel.layout)


def bytes_per_parameter(config: Config, shards: int) -> float:
    """Static bytes of a parameter whose optimizer states ``shards`` ranks may share."""
    shards = shards if config.parallel.distributed_optimizer else 1
    return 6 + 12 / shards if config.training.precision == "bf16" else 8 + 8 / shards


def stage_parameters(
    config: Config, projections: Projections, vocab_size: int, chunks: list[list[int]], rank: int
) -> int:
    """Parameters on a tensor-parallel rank of a pipeline stage with these layers."""
    model, tensor, last = config.model, config.parallel.tensor, config.parallel.pipeline - 1
    total = sum(map(len, chunks)) * layer_parameters(model, projections, tensor)
    embedding = vocab_size * model.hidden_size // tensor
    if rank == 0:
        total += embedding + model.max_image_tokens * model.hidden_size + projector_parameters(model)
    if rank == last:
        total += model.hidden_size + depth_head_parameters(model) // tensor
        total += 0 if model.tie_embeddings and last == 0 else embedding
    return total


def layer_parameters(model: ModelConfig, projections: Projections, tensor: int = 1) -> int:
    """Parameters of a layer on a tensor-parallel rank."""
    shapes = projection_shapes(model)
    component = sum(
        i * o if projections.rank is None else projections.rank * (i + o)
        for i, o in (shapes[module] for module in projections.modules)
    )
    matrices = sum(i * o for i, o in shapes.values()) + len(projections.components) * component
    matrices += model.qkv_bias * shapes["qkv"][1]
    return matrices // tensor + 2 * model.hidden_size + model.qk_norm * 2 * model.head_size


@dataclass(frozen=True)
class ChunkMemory:
    """Bytes of each micro-batch in one chunk of the model, [micro-batches].

    Attributes:
        kept: from the forward to the backward pass.
        forward, backward: beside that, while the forward pass ends and while the backward pass begins.
        end: beside the other micro-batches, while the backward pass ends.
    """

    kept: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    end: np.ndarray


class MicroBatchMemory:
    """Bytes of sampled micro-batches on a rank, whatever its pipeline stage."""

    def __init__(self, config: Config, workload: Workload, vocab_size: int, device: Device, in_order: bool = False):
        """
        Args:
            in_order: the workload's rows are those of a replica's step, and micro-batches hold neighbours; else any of
                them may meet.
        """
        model, parallel, training = config.model, config.parallel, config.training
        self._config, self._plan, self.projections = config, workload.plan, workload.plan.projections
        self._size = 2 if training.precision == "bf16" else 4
        rows = training.micro_batch_size
        parts = workload.neighbours(rows, len(workload.rows)) if in_order else workload.heaviest(rows, model)
        self._counts = workload.micro_batches(parts)
        self._all = None if in_order else workload.counts
        if not in_order:
            self._counts = _with_most_targets(self._counts, workload, rows)
        self._share = 1 / parallel.context
        self._vocabulary_bytes = self._size * vocab_size * model.hidden_size / parallel.tensor
        self._ranks = ranks = parallel.tensor if parallel.sequence else 1
        real = np.array([sum(counts.tokens) for counts in self._counts]) * self._share
        stored = real
        if parallel.pipeline > 1:
            tokens = training.micro_batch_size * config.data.sequence_length
            length = stored_length(tokens, self._plan, ranks * parallel.context, training.row_multiple)
            stored = real * 0 + length * self._share
        row = self._size * model.hidden_size / ranks
        self.hidden: np.ndarray = row * stored
        """Bytes of a rank's hidden states."""
        self._padding = row * (stored - real)  # where T is fixed, a part of layers' whole inputs
        self._layers, self._first_layers = self._kept(training.recompute)
        self.heaviest: list[int] = np.argsort(-self._layers.sum(1), kind="stable").tolist()
        """Micro-batches, those that keep most first."""
        self._device_layers = workload.device_bytes(device, config, parts)
        pair = 2 * key_width(model) / parallel.tensor * self._size  # a key and a value
        self._received = pair * workload.received_share(config) * self._keys()
        if training.recompute != "full":
            self._layers, self._first_layers = (x + self._received for x in (self._layers, self._first_layers))
        # Repeated keys and values, and their gradients, which the backward pass of attention needs together.
        repeated = np.array([workload.segment_keys[part].sum(0) for part in parts]) * self._share
        self._segment_keys = 2 * pair * repeated * (device.memory > 0)
        self._logits = np.array([counts.logits for counts in self._counts]) * self._share
        self._logit_bytes = self._logits * vocab_size / parallel.tensor * (4 if self._size == 4 else 6)

    def _kept(self, recompute: str) -> tuple[np.ndarray, np.ndarray]:
        """:func:`~megatron_ext.routing.memory.activation_bytes`, [micro-batches, layers], of layers inside a chunk and
        where they begin one."""
        model, parallel, roles = self._config.model, self._config.parallel, self._plan.roles
        # Few layers differ: each kind once after another one, and once after its own.
        kinds = list(dict.fromkeys(roles))
        plan = replace(self._plan, roles=tuple(kind for kind in kinds for _ in range(2)))
        options = self._size, self._share, recompute, parallel.tensor, parallel.sequence
        bytes_ = np.array([memory.activation_bytes(model, plan, c, *options) for c in self._counts], float)
        if self._all:
            # Another row may bring the matrices that a layer computes for its KV_ONLY rows.
            options = self._size, 0, *options[2:]
            own = np.array([memory.activation_bytes(model, plan, c, *options) for c in self._counts], float)
            bytes_ += memory.activation_bytes(model, plan, self._all, *options) - own
        changed = [2 * kinds.index(kind) for kind in roles]
        inside = [n + (own == before) for n, own, before in zip(changed, roles, (None, *roles))]
        return bytes_[:, inside], bytes_[:, changed]

    def _keys(self) -> np.ndarray:
        """Keys of each micro-batch in each layer, on all context ranks."""
        takes_part = np.array([[role != Role.SKIP for role in roles] for roles in self._plan.roles])
        return np.array([counts.tokens for counts in self._counts]) @ takes_part.T

    def chunk(self, layers: list[int], number: int, count: int) -> ChunkMemory:
        """The memory of the chunk ``number`` of ``count``."""
        first, *others = layers
        full_recompute = self._config.training.recompute == "full"
        whole = 1 + sum(full_recompute or self._plan.roles[n] != self._plan.roles[n - 1] for n in others)
        kept = self._first_layers[:, first] + self._layers[:, others].sum(1) + whole * self._padding
        if self._config.training.recompute == "none":
            kept = kept + self._device_layers[:, layers].sum(1)
        end = np.zeros_like(kept)
        if number == 0:
            kept = kept + self._of_counts(memory.projector_bytes, self._ranks)
            end = self._vocabulary_bytes + self.hidden
        backward = 2 * self.hidden + self._layer_backward(layers[-1])
        if self._segment_keys.any():
            # A layer below needs more than the last one where its keys are repeated and more than what layers above
            # have freed by then.
            freed = self._layers[:, layers[::-1]].cumsum(1)[:, ::-1] - self._layers[:, layers]
            backward = np.maximum(backward, (2 * self.hidden[:, None] + self._segment_keys[:, layers] - freed).max(1))
        if number < count - 1:
            # The schedule keeps the output.
            return ChunkMemory(kept + self.hidden, self.hidden, backward, end)
        rows = self._size * self._config.model.hidden_size * self._logits
        # A backward pass of the last chunk follows its forward pass at once, and frees first what the head keeps.
        head = self.hidden + rows + self._logit_bytes
        head = head + self._of_counts(memory.depth_head_bytes, self._config.parallel.tensor)
        return ChunkMemory(
            kept, head + self.hidden + rows, np.maximum(backward, head + rows + self._vocabulary_bytes), end
        )

    def _of_counts(self, function: Callable, ranks: int) -> np.ndarray:
        return np.array([function(self._config.model, c, self._size, self._share, ranks) for c in self._counts], float)

    def _layer_backward(self, layer: int) -> np.ndarray:
        """What the backward pass of a layer needs while its activations are still there: of the FFN's rows and matrix,
        or of the keys that attention repeats; with recomputation, what is computed again."""
        model, tensor = self._config.model, self._config.parallel.tensor
        full = np.array([of_role(c, self._plan.roles[layer], Role.FULL) for c in self._counts]) * self._share
        width = model.ffn_hidden_size / tensor
        needed = self._size * np.maximum(3 * full * width, full * width + model.hidden_size * width)
        needed = np.maximum(needed, self._segment_keys[:, layer])
        if self._config.training.recompute == "full":
            again = self._kept("none")[1][:, layer] - self._layers[:, layer]
            needed = needed + again + self._received[:, layer] + self._device_layers[:, layer]
        return needed


def _with_most_targets(counts: list[Counts], workload: Workload, rows: int) -> list[Counts]:
    """Micro-batches that have, beside what they have, the targets and image tokens of those rows that have most: the
    first those with most, and so on."""
    fields = {}
    for name in ("logits", "images", "codes"):
        most = sorted((getattr(row, name) for row in workload.rows), reverse=True)
        fields[name] = [sum(most[(rows * m + i) % len(most)] for i in range(rows)) for m in range(len(counts))]
    return [replace(c, **{name: values[m] for name, values in fields.items()}) for m, c in enumerate(counts)]


def _peak(tasks: list[Task], chunks: list[ChunkMemory], sampled: list[int]) -> tuple[float, float]:
    """What is alive, and what the task needs besides, at the moment when both are most over a rank's tasks. The
    ``sampled`` micro-batches come in this order, and again once all have been there."""
    alive, most, highest = 0.0, (0.0, 0.0), 0.0
    parts = [np.stack([c.kept, c.forward, c.backward, c.end], 1).tolist() for c in chunks]
    for is_forward, chunk, micro_batch in tasks:
        kept, forward, backward, end = parts[chunk][sampled[micro_batch % len(sampled)]]
        if is_forward:
            alive += kept
            needed = forward
        else:
            alive -= kept
            needed = max(kept + backward, end)
        if alive + needed > highest:
            highest = alive + needed
            most = (alive, forward) if is_forward else (alive + kept, needed - kept)
    return most

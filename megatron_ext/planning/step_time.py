"""Seconds of a training step under a layout: the simulated pipeline, messages that nothing hides, and the optimizer.

Assumptions: messages of tensor parallelism are exposed in the forward pass and half hidden in the backward pass under
sequence parallelism; keys that context ranks exchange are exposed; the reduction of gradients hides behind the last
micro-batch's backward pass, and the gathering of weights behind the next step's first forward pass (``overlap``).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_ext.config import Config
from megatron_ext.planning import traffic
from megatron_ext.planning.devices import Device
from megatron_ext.planning.kernels import Kernels, Seconds
from megatron_ext.planning.memory import chunk_layers, simulated_micro_batches, stage_parameters
from megatron_ext.planning.traffic import Messages
from megatron_ext.planning.workload import Workload, of_role
from megatron_ext.routing.flops import TRAINING_PER_FORWARD, Counts, forward_flops, key_width
from megatron_ext.routing.groups import stored_length
from megatron_ext.routing.pipeline import simulate
from megatron_ext.routing.pipeline_balance import ModelCosts
from megatron_ext.routing.roles import Role


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        seconds: of the whole step.
        mfu: FLOPs of the model over what the devices could do in that time.
        busy: mean seconds of forward and backward passes of a rank, messages included.
        messages: of these, seconds of exposed messages, of embedding and output head too.
        idle: mean seconds that a rank waits in the pipeline.
        replicas: exposed seconds of the messages between replicas.
        optimizer: seconds of the optimizer.
        thin: of ``busy``, seconds by which products are slower than with unlimited rows.
    """

    seconds: float
    mfu: float
    busy: float
    messages: float
    idle: float
    replicas: float
    optimizer: float
    thin: float

    @property
    def bound(self) -> str:
        """What takes most of the time beside the arithmetic."""
        losses = {
            "pipeline bubble": self.idle,
            "messages": self.messages,
            "thin products": self.thin,
            "replicas": self.replicas,
            "optimizer": self.optimizer,
        }
        name = max(losses, key=losses.get)
        return name if losses[name] > 0.1 * self.seconds else "arithmetic"


@dataclass(frozen=True)
class LayerCosts:
    """Seconds of the parts of a model for some micro-batches; every list is [micro-batches].

    Attributes:
        layers: [layer][micro-batches].
        first, last: before and after the layers.
        messages: seconds of exposed messages, of all layers together.
        thin: seconds that all layers would save if rows were unlimited.
    """

    layers: list[list[Seconds]]
    first: list[Seconds]
    last: list[Seconds]
    messages: list[float]
    thin: list[float]

    @property
    def backward(self) -> float:
        """Seconds of backward passes over those of forward passes."""
        everything = [s for part in (*self.layers, self.first, self.last) for s in part]
        return sum(s.backward for s in everything) / sum(s.forward for s in everything)

    def model_costs(self, number: int) -> ModelCosts:
        """Forward seconds of so many micro-batches, to balance pipeline stages."""

        def forward(part: list[Seconds]) -> list[float]:
            return [part[m % len(part)].forward for m in range(number)]

        return ModelCosts(list(map(forward, self.layers)), forward(self.first), forward(self.last))


def link_seconds(device: Device, messages: Messages, reach: int, ranks: int) -> float:
    """Seconds of messages in a group of ``ranks`` whose ranks lie within ``reach`` consecutive devices."""
    inside = reach <= device.node
    rate = device.link * device.link_share if inside else device.network * device.network_share
    latency = device.link_latency if inside else device.network_latency
    return messages.bytes / rate + messages.number * latency * max(1, ranks - 1).bit_length()


def layer_costs(
    config: Config, workload: Workload, vocab_size: int, device: Device, micro_batches: list[Counts]
) -> LayerCosts:
    """The costs of micro-batches, of all context ranks together, on a rank, whatever its stage."""
    model, parallel, plan = config.model, config.parallel, workload.plan
    size, tensor = 2 if config.training.precision == "bf16" else 4, parallel.tensor
    kernels = Kernels(device, model, tensor, tensor if parallel.sequence else 1, size)
    unlimited = Kernels(_unlimited(device), model, tensor, kernels.ranks, size)
    received = workload.received_share(config)
    layers = [[] for _ in plan.roles]
    first, last, messages, thin = [], [], [], []
    for whole in micro_batches:
        counts = whole.scaled(1 / parallel.context)
        exposed = saved = 0.0
        known = {}
        for number, roles in enumerate(plan.roles):
            same = number > 0 and roles == plan.roles[number - 1] and config.training.recompute != "full"
            if (roles, same) not in known:
                compute, attention = kernels.layer(plan, counts, number)
                sent = _layer_messages(config, workload, counts, number, size, device, received, same)
                forward, backward = compute.forward + sent.forward, compute.backward + sent.backward
                again = {"none": 0.0, "selective": attention.forward, "full": forward}[config.training.recompute]
                best = unlimited.layer(plan, counts, number)[0]
                known[roles, same] = (
                    Seconds(forward, backward + again),
                    sent.forward + sent.backward,
                    compute.forward + compute.backward - best.forward - best.backward,
                )
            seconds, sent_seconds, lost = known[roles, same]
            layers[number].append(seconds)
            exposed += sent_seconds
            saved += lost
        ends = (kernels.first(counts), kernels.last(counts, vocab_size))
        sent = _end_messages(config, counts, size, device)
        first.append(ends[0] + sent[0])
        last.append(ends[1] + sent[1])
        messages.append(exposed + sum(s.forward + s.backward for s in sent))
        thin.append(saved)
    return LayerCosts(layers, first, last, messages, thin)


def _layer_messages(
    config: Config,
    workload: Workload,
    counts: Counts,
    layer: int,
    size: int,
    device: Device,
    received: float,
    gathered: bool,
) -> Seconds:
    """Exposed seconds of a layer's messages; ``gathered``: the layer before gathered its KV_ONLY rows."""
    model, parallel, roles, plan = config.model, config.parallel, workload.plan.roles[layer], workload.plan
    tensor = parallel.tensor
    full, kv_only = (of_role(counts, roles, role) for role in (Role.FULL, Role.KV_ONLY))
    forward, backward = traffic.layer_messages(
        model, plan.projections, full, kv_only, tensor, parallel.sequence, size, gathered
    )
    low_rank = traffic.low_rank_messages(plan.projections, counts.tokens, roles, tensor, size)
    hidden = 0.5 if parallel.sequence else 1.0
    reach = tensor
    seconds = Seconds(
        link_seconds(device, forward + low_rank, reach, tensor),
        hidden * link_seconds(device, backward + low_rank, reach, tensor),
    )
    if parallel.context > 1 and full:
        need = received * (full + kv_only) * parallel.context
        keys = Messages(2 * size * key_width(model) / tensor * need, 1)
        exchange = link_seconds(device, keys, tensor * parallel.context, parallel.context)
        seconds += Seconds(exchange, exchange)
    return seconds


def _end_messages(config: Config, counts: Counts, size: int, device: Device) -> list[Seconds]:
    """Seconds of the messages of the embedding, and of the output head and the loss, which nothing hides."""
    parallel, model = config.parallel, config.model
    split = parallel.tensor, parallel.sequence, size
    # Groups with targets have other rows too: at most all.
    tokens = sum(counts.tokens)
    embedding = traffic.embedding_messages(model, tokens, *split)
    head = traffic.head_messages(model, tokens, counts.logits, *split)
    return [
        Seconds(*(link_seconds(device, messages, parallel.tensor, parallel.tensor) for messages in both))
        for both in (embedding, head)
    ]


def step_time(
    config: Config,
    workload: Workload,
    vocab_size: int,
    world_size: int,
    device: Device,
    costs: LayerCosts,
) -> StepTime:
    """The time of a step in which the micro-batches of ``costs`` come one after the other, again and again."""
    parallel = config.parallel
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    replicas, micro_batches = config.data_parallel(world_size), config.micro_batches(world_size)
    chunks = chunk_layers(config)
    sampled = len(costs.first)
    forward, backward = _chunk_seconds(chunks, costs)
    shown = simulated_micro_batches(config, world_size)
    # The last micro-batch holds the rows that are left.
    rows = -(-config.training.global_batch_size // replicas) / config.training.micro_batch_size
    last = rows - (micro_batches - 1)
    turn = [(m % sampled, 1.0 if m < shown - 1 else last) for m in range(shown)]
    spread = [[[chunk[m] * share for m, share in turn] for chunk in both] for both in (forward, backward)]
    simulated = simulate(spread[0], pipeline, virtual, spread[1], _border_seconds(config, workload, device, replicas))
    # The pipeline goes on at the pace of its busiest rank.
    of_rank = [
        sum(sum(forward[c]) + sum(backward[c]) for c in range(r, len(chunks), pipeline)) for r in range(pipeline)
    ]
    more = (micro_batches - shown) / sampled
    makespan = simulated.makespan + more * max(of_rank)
    busy = sum(simulated.busy) / pipeline + more * sum(of_rank) / pipeline
    per_rank = [
        stage_parameters(config, workload.plan.projections, vocab_size, chunks[rank::pipeline], rank)
        for rank in range(pipeline)
    ]
    exposed = max(
        _replica_seconds(
            config, device, per_rank[rank], replicas, sum(backward[c][0] for c in range(rank, len(chunks), pipeline))
        )
        for rank in range(pipeline)
    )
    shards = replicas * parallel.context if parallel.distributed_optimizer else 1
    optimizer = max(per_rank) * (30 / shards + 8) / device.bandwidth
    seconds = makespan + exposed + optimizer
    flops = TRAINING_PER_FORWARD * forward_flops(config.model, vocab_size, workload.plan, workload.counts)
    mfu = flops / len(workload.rows) * config.training.global_batch_size / (seconds * world_size * device.peak)
    messages, thin = (rows * sum(part) / sampled / pipeline for part in (costs.messages, costs.thin))
    return StepTime(seconds, mfu, busy, messages, makespan - busy, exposed, optimizer, thin)


def _chunk_seconds(chunks: list[list[int]], costs: LayerCosts) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of forward and of backward passes, [chunk][micro-batch]."""
    forward, backward = [], []
    for number, layers in enumerate(chunks):
        parts = [costs.layers[n] for n in layers]
        parts += [costs.first] * (number == 0) + [costs.last] * (number == len(chunks) - 1)
        forward.append([sum(s.forward for s in micro_batch) for micro_batch in zip(*parts)])
        backward.append([sum(s.backward for s in micro_batch) for micro_batch in zip(*parts)])
    return forward, backward


def _border_seconds(config: Config, workload: Workload, device: Device, replicas: int) -> float:
    """Seconds of the hidden states of a micro-batch from one stage to the next."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return 0.0
    ranks = (parallel.tensor if parallel.sequence else 1) * parallel.context
    tokens = config.training.micro_batch_size * config.data.sequence_length
    size = 2 if config.training.precision == "bf16" else 4
    stored = stored_length(tokens, workload.plan, ranks, config.training.row_multiple)
    sent = traffic.border_message(config.model, stored, ranks, size)
    reach = 2 * parallel.tensor * parallel.context * replicas
    return link_seconds(device, sent, reach, 2)


def _replica_seconds(config: Config, device: Device, parameters: int, replicas: int, backward: float) -> float:
    """Exposed seconds of a rank's messages to other replicas, given those of a micro-batch's backward pass."""
    parallel = config.parallel
    ranks = replicas * parallel.context
    size = 2 if config.training.precision == "bf16" else 4
    gradients, weights = traffic.replica_messages(parameters, ranks, parallel.distributed_optimizer, size)
    reach = parallel.tensor * ranks
    seconds = [link_seconds(device, messages, reach, ranks) for messages in (gradients, weights)]
    if not parallel.overlap:
        return sum(seconds)
    return max(0.0, seconds[0] - backward) + max(0.0, seconds[1] - backward / 2)


@lru_cache
def _unlimited(device: Device) -> Device:
    """The device on which products of any size reach the efficiency of large ones."""
    return replace(device, half_rows=0.0, bandwidth=1e30, launch=0.0)

"""The layouts of a run on a number of devices: which fit, how long they take, and why the others are worse.

Searched are the sizes of tensor, context and pipeline parallelism, chunks per stage, rows of a micro-batch and
recomputation; sequence parallelism, the sharded optimizer and overlap are always on where they apply, since they cost
nothing that they do not save. Layouts that training refuses are left out, and those that do not fit, unless the layers
of their stages can be chosen such that they do. The others are ranked by the simulated step over average micro-batches,
and the best again over sampled ones with the layers of each stage chosen by
:func:`~megatron_ext.routing.pipeline_balance.balance`, until the best have all been.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.planning.devices import Device
from megatron_ext.planning.memory import MicroBatchMemory, RankMemory, rank_memory, stage_memory
from megatron_ext.planning.step_time import LayerCosts, StepTime, layer_costs, step_time
from megatron_ext.planning.workload import Workload
from megatron_ext.routing.pipeline_balance import balance
from megatron_ext.routing.pipeline_layout import even_counts, layout_string
from megatron_ext.training.config_checks import validate

LONG_ROWS = 16384
"""Tokens of a row from which on context parallelism is tried although a row would fit without."""

MOST_STAGES = 32
"""Pipeline stages: more have never been of use."""

MOST_MOVED = 16
"""Chunks of a model whose layers are balanced by simulation; with more of them it would take long."""

REFINED = 12
"""Layouts, the best, whose stages are balanced and which are simulated over sampled micro-batches."""

RESERVE = 0.05
"""Share of the limit of memory that the recommended layout leaves, if one does."""

NEAR = 1.15
"""Layouts that need up to this much of the limit may fit with other layers in their stages."""

TRIED = 8
"""Of these, how many are tried, those that need least first."""

_RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """A layout.

    Attributes:
        config: the run's configuration under it.
        memory: of a rank of each pipeline stage.
        time: of a step; None where it does not fit.
    """

    config: Config
    memory: list[RankMemory]
    time: StepTime | None = None

    @property
    def worst(self) -> int:
        """Bytes of the rank that needs most."""
        return max(rank.total for rank in self.memory)

    @property
    def key(self) -> tuple:
        """What tells layouts apart, but for the layers of their stages."""
        parallel, training = self.config.parallel, self.config.training
        sizes = parallel.tensor, parallel.context, parallel.pipeline, parallel.virtual_pipeline
        return *sizes, training.micro_batch_size, training.recompute


class Search:
    """The search for one model, data set and device."""

    def __init__(self, config: Config, workload: Workload, vocab_size: Callable[[Config], int], device: Device):
        """
        Args:
            vocab_size: rows of the embedding under a configuration.
        """
        self._config, self._workload, self._vocab_size, self._device = config, workload, vocab_size, device
        self._sizes: dict[tuple, MicroBatchMemory] = {}
        self._average: dict[tuple, LayerCosts] = {}

    def run(
        self, devices: int, progress: Callable[[Iterable], Iterable] = iter
    ) -> tuple[list[Candidate], list[Candidate]]:
        """The layouts that fit, the fastest first (refined ones, then the others), and those that do not fit, which
        come nearest first.

        Args:
            progress: shows how far the search is.

        Raises:
            UserError: no layout divides the devices, or training refuses them all.
        """
        configs, refusal = [], f"no layout of {self._config.training.global_batch_size} rows a step"
        for config in self._configs(devices):
            try:
                validate(config, devices)
            except UserError as error:
                refusal = str(error)
            else:
                configs.append(config)
        if not configs:
            raise UserError(f"--gpus {devices}: {refusal}")
        feasible, misses, without = [], [], set()
        for config in progress(configs):
            candidate = Candidate(config, [])
            if candidate.key[:-1] in without:
                continue  # recomputation only takes time where it is not needed
            candidate = self._candidate(config, devices)
            if candidate.time is None:
                misses.append(candidate)
            else:
                feasible.append(candidate)
                without.add(candidate.key[:-1])
        near = [c for c in misses if c.worst <= NEAR * self._device.limit and c.config.parallel.pipeline > 1]
        for candidate in progress(sorted(near, key=lambda c: c.worst)[:TRIED]):
            if candidate.key[:-1] not in without and (fitting := self._fitting(candidate, devices)):
                feasible.append(fitting)
                misses.remove(candidate)
        refined: list[Candidate] = []
        waiting = sorted(feasible, key=_seconds, reverse=True)
        while waiting and len(refined) < 3 * REFINED:
            if sum(_seconds(c) <= _seconds(waiting[-1]) for c in refined) >= REFINED:
                break
            refined.append(self._refined(waiting.pop(), devices))
        # What waits was computed otherwise: it comes behind.
        return sorted(refined, key=_seconds) + waiting[::-1], sorted(misses, key=lambda c: c.worst)

    def recommended(self, feasible: list[Candidate]) -> Candidate:
        """The fastest that leaves a share of :data:`RESERVE` of the limit of memory; the fastest, where none does."""
        roomy = (c for c in feasible if c.worst <= (1 - RESERVE) * self._device.limit)
        return next(roomy, feasible[0])

    def candidate(self, config: Config, devices: int) -> Candidate:
        """The layout that ``config`` has, as it is, over sampled micro-batches."""
        return self._timed(config, devices, self._memory(config, devices), sampled=True)

    def _configs(self, devices: int) -> Iterator[Config]:
        model, training = self._config.model, self._config.training
        cuttable = (model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size)
        tensors = [t for t in (1, 2, 4, 8) if t <= self._device.node and not any(n % t for n in cuttable)]
        contexts = (1, 2, 4, 8) if self._config.data.sequence_length >= LONG_ROWS else (1,)
        contexts = sorted({*contexts, self._config.parallel.context})
        for tensor in tensors:
            for context in contexts:
                if tensor * context > self._device.node or devices % (tensor * context):
                    continue
                for pipeline in _powers(min(model.num_layers, MOST_STAGES, devices // (tensor * context))):
                    if devices % (tensor * context * pipeline):
                        continue
                    replicas = devices // (tensor * context * pipeline)
                    if replicas > training.global_batch_size:
                        continue
                    yield from self._with_batches(tensor, context, pipeline, replicas)

    def _with_batches(self, tensor: int, context: int, pipeline: int, replicas: int) -> Iterator[Config]:
        layers, rows = self._config.model.num_layers, -(-self._config.training.global_batch_size // replicas)
        for size in _powers(min(rows, 16)):
            for virtual in (1, 2, 3, 4, 5) if pipeline > 1 else (1,):
                if pipeline * virtual > layers or (virtual > 1 and -(-rows // size) < pipeline):
                    continue
                even = layers % (pipeline * virtual) == 0
                if virtual > 1 and not even and virtual not in (2, 4):
                    continue
                layout = "" if even else layout_string(even_counts(layers, pipeline * virtual))
                for recompute in _RECOMPUTE:
                    yield _laid_out(
                        self._config,
                        tensor=tensor,
                        context=context,
                        pipeline=pipeline,
                        virtual_pipeline=virtual,
                        layout=layout,
                        replicas=replicas,
                        micro_batch_size=size,
                        recompute=recompute,
                    )

    def _memory(self, config: Config, devices: int) -> list[RankMemory]:
        key, vocab_size = self._sizes_key(config), self._vocab_size(config)
        if key not in self._sizes:
            self._sizes[key] = MicroBatchMemory(config, self._workload, vocab_size, self._device)
        return rank_memory(config, self._sizes[key], vocab_size, devices, self._device)

    @staticmethod
    def _sizes_key(config: Config) -> tuple:
        parallel, training = config.parallel, config.training
        split = parallel.tensor, parallel.sequence, parallel.context, parallel.pipeline > 1
        return *split, training.micro_batch_size, training.recompute

    def _candidate(self, config: Config, devices: int) -> Candidate:
        memory = self._memory(config, devices)
        if max(rank.total for rank in memory) > self._device.limit:
            return Candidate(config, memory)
        return self._timed(config, devices, memory, sampled=False)

    def _costs(self, config: Config, sampled: bool) -> LayerCosts:
        parallel, training = config.parallel, config.training
        split = parallel.tensor, parallel.sequence, parallel.context
        key = *split, training.micro_batch_size, training.recompute, sampled
        if key not in self._average:
            rows = self._workload.micro_batches(self._workload.neighbours(training.micro_batch_size))
            if not sampled:
                rows = [self._workload.counts.scaled(training.micro_batch_size / len(self._workload.rows))]
            self._average[key] = layer_costs(config, self._workload, self._vocab_size(config), self._device, rows)
        return self._average[key]

    def _timed(self, config: Config, devices: int, memory: list[RankMemory], sampled: bool) -> Candidate:
        costs = self._costs(config, sampled and config.data.composition == "in_order")
        time = step_time(config, self._workload, self._vocab_size(config), devices, self._device, costs)
        return Candidate(config, memory, time)

    def _refined(self, candidate: Candidate, devices: int) -> Candidate:
        """The candidate over sampled micro-batches, with the layers of its stages balanced where that helps."""
        config, parallel = candidate.config, candidate.config.parallel
        even = self._timed(config, devices, candidate.memory, sampled=True)
        if parallel.pipeline == 1:
            return even
        balanced = self._balanced(config, devices)
        if balanced is None:
            return even
        return min(even, self._timed(balanced.config, devices, balanced.memory, sampled=True), key=_seconds)

    def _fitting(self, candidate: Candidate, devices: int) -> Candidate | None:
        """The candidate with layers of its stages such that it fits; None if there are none."""
        balanced = self._balanced(candidate.config, devices)
        return balanced and self._timed(balanced.config, devices, balanced.memory, sampled=False)

    def _balanced(self, config: Config, devices: int) -> Candidate | None:
        """The configuration with balanced stages that fit, not timed; None where nothing fits, or there are too many
        chunks to move layers between."""
        parallel = config.parallel
        pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
        if virtual > 1 and pipeline * virtual > MOST_MOVED:
            return None
        costs = self._costs(config, sampled=False)
        once = costs.model_costs(2 * pipeline)
        self._memory(config, devices)
        sizes, vocab_size = self._sizes[self._sizes_key(config)], self._vocab_size(config)

        @cache
        def stage_fits(rank: int, chunks: tuple[range, ...]) -> bool:
            if not all(chunks):
                return False
            arguments = config, sizes, vocab_size, devices, self._device, rank, [list(chunk) for chunk in chunks]
            return stage_memory(*arguments).total <= self._device.limit

        # The limit of memory takes time to keep; often nothing comes near it.
        for fits in (None, lambda rank, chunks: stage_fits(rank, tuple(chunks))):
            counts = balance(once, pipeline, virtual, fits, costs.backward)
            if counts is None:
                return None
            other = dataclasses.replace(config, parallel=dataclasses.replace(parallel, layout=layout_string(counts)))
            memory = self._memory(other, devices)
            if max(rank.total for rank in memory) <= self._device.limit:
                return Candidate(other, memory)
        return None


def _seconds(candidate: Candidate) -> float:
    return candidate.time.seconds


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(most.bit_length()) if 1 << n <= most]


def _laid_out(config: Config, replicas: int, micro_batch_size: int, recompute: str, **sizes) -> Config:
    parallel = dataclasses.replace(
        config.parallel,
        **sizes,
        sequence=sizes["tensor"] > 1,
        distributed_optimizer=replicas * sizes["context"] > 1,
        overlap=replicas * sizes["context"] > 1,
    )
    training = dataclasses.replace(config.training, micro_batch_size=micro_batch_size, recompute=recompute)
    return dataclasses.replace(config, parallel=parallel, training=training)

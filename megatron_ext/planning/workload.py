"""What the rows of a run hold, as far as their cost depends on it: counts of tokens, from a mix or from prepared data."""

from dataclasses import dataclass, field
from functools import cached_property, reduce

import numpy as np

from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.planning.devices import Device
from megatron_ext.routing.document_mix import mix_batch
from megatron_ext.routing.flops import Counts, count
from megatron_ext.routing.plan import Plan, Role
from megatron_ext.routing.route import Route

SAMPLED_ROWS = 256


@dataclass(frozen=True)
class Workload:
    """Sampled rows under a plan.

    Attributes:
        rows: counts of each sampled row.
        fill: share of a row that is not padding.
        longest: tokens of the longest document.
        batch: the rows themselves, where they are known.
    """

    plan: Plan
    rows: tuple[Counts, ...]
    fill: float
    longest: int
    batch: Batch | None = None
    _micro_batches: dict[int, list[Counts]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def counts(self) -> Counts:
        """Counts of all sampled rows."""
        return reduce(Counts.__add__, self.rows)

    def micro_batches(self, size: int, most: int = 32) -> list[Counts]:
        """Counts of micro-batches of ``size`` neighbours, at least one and of about ``most`` rows in all."""
        if size not in self._micro_batches:
            count = max(1, min(len(self.rows), most) // size)
            chosen = [self.rows[i % len(self.rows)] for i in range(size * count)]
            parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
            self._micro_batches[size] = [reduce(Counts.__add__, part) for part in parts]
        return self._micro_batches[size]

    def device_bytes(self, device: Device, config: Config) -> np.ndarray:
        """Bytes that attention's masks take on CPUs, [micro-batches, layers]; zeros on GPUs and where the documents are
        not known."""
        micro_batches = self.micro_batches(config.training.micro_batch_size)
        none = np.zeros((len(micro_batches), config.model.num_layers))
        if device.memory or self.batch is None:
            return none
        size = config.training.micro_batch_size
        parts = [self.batch.rows(i * size, (i + 1) * size) for i in range(len(micro_batches))]
        return np.array([_mask_bytes(part, self.plan) for part in parts])

    @classmethod
    def of_batch(cls, batch: Batch, plan: Plan) -> "Workload":
        """The workload of given rows [b, s]."""
        batch = batch.arrays()
        rows = tuple(count(batch.rows(i, i + 1), plan) for i in range(batch.shape[0]))
        tokens = sum(sum(row.tokens) for row in rows)
        return cls(
            plan, rows, tokens / (batch.shape[0] * batch.shape[1]), int(batch.positions.max(initial=0)) + 1, batch
        )

    @classmethod
    def of_mix(cls, config: Config, plan: Plan, mix: str) -> "Workload":
        """Rows of documents that are drawn at random from a mix (:func:`~megatron_ext.routing.document_mix.mix_batch`).

        Rows are full. A document that is longer than a row counts as the pieces that rows hold of it do on average.

        Raises:
            UserError: quotes the part of the mix that cannot be read.
        """
        batch = mix_batch(mix, config.model.image_codes.depth, config.data.generation_text)
        edges = [*np.flatnonzero(batch.document_starts()[0]).tolist(), batch.shape[1]]
        lengths = np.diff(edges)
        documents = [count(_cut(batch, a, b), plan) for a, b in zip(edges, edges[1:])]
        random = np.random.default_rng(0)
        length, left = config.data.sequence_length, 0.0
        rows = []
        for _ in range(SAMPLED_ROWS):
            row, used = [], left
            while used < length:
                chosen = int(random.integers(len(documents)))
                row.append((chosen, min(1.0, (length - used) / lengths[chosen])))
                used += lengths[chosen]
            left = 0.0
            rows.append(reduce(Counts.__add__, (documents[i].scaled(share) for i, share in row)))
        return cls(plan, tuple(rows), 1.0, int(lengths.max()))


def of_role(counts: Counts, roles: tuple[Role, ...], role: Role) -> int:
    """Tokens that have ``role`` in a layer."""
    return sum(n for n, r in zip(counts.tokens, roles) if r == role)


def _mask_bytes(batch: Batch, plan: Plan) -> list[int]:
    """Bytes of the masks that torch's attention keeps on CPUs in each layer: a float32 for each query and key of the
    segments whose keys are more than their queries."""
    route = Route.arrays(batch, plan, bucketed=True)
    masks = {
        id(layer): sum(len(b.offsets) * b.queries * b.keys for b in layer.buckets if b.offsets is not None)
        for layer in route.layers
    }
    return [4 * masks[id(layer)] for layer in route.layers]


def _cut(batch: Batch, start: int, stop: int) -> Batch:
    return batch.map(lambda field: field[:, start:stop])

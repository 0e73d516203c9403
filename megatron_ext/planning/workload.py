"""What the rows of a run hold, as far as their cost depends on it: counts of tokens, from a mix or from rows."""

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
from megatron_ext.token_classes import PADDING_DOCUMENT

SAMPLED_ROWS = 256


@dataclass(frozen=True)
class Workload:
    """Sampled rows under a plan.

    Attributes:
        rows: counts of each sampled row.
        fill: share of a row that is not padding.
        documents: tokens of each document.
        batch: the rows themselves, where they are known.
    """

    plan: Plan
    rows: tuple[Counts, ...]
    fill: float
    documents: tuple[int, ...]
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
        size, context = config.training.micro_batch_size, config.parallel.context
        parts = [self.batch.rows(i * size, (i + 1) * size) for i in range(len(micro_batches))]
        ranks = [[_mask_bytes(part, self.plan, (rank, context)) for part in parts] for rank in range(context)]
        return np.array(ranks).max(0)

    def received_share(self, config: Config) -> float:
        """Keys that a context rank receives, as a share of a micro-batch's: of the documents that are cut, because they
        fill more than 1 / (2 C) of it, all others'; between the short ones, ranks cut about one document."""
        context = config.parallel.context
        tokens = config.training.micro_batch_size * config.data.sequence_length
        if context == 1:
            return 0.0
        long = [n for n in self.documents if n > tokens / (2 * context)]
        share = sum(long) / sum(self.documents)
        return min(1.0, share + (1 - share) * np.mean(self.documents) / tokens) * (context - 1) / context

    @classmethod
    def of_batch(cls, batch: Batch, plan: Plan) -> "Workload":
        """The workload of given rows [b, s]."""
        batch = batch.arrays()
        rows = tuple(count(batch.rows(i, i + 1), plan) for i in range(batch.shape[0]))
        tokens = sum(sum(row.tokens) for row in rows)
        real = (batch.document != PADDING_DOCUMENT).ravel()
        documents = np.bincount(batch.document_starts().ravel().cumsum()[real])
        return cls(plan, rows, tokens / real.size, tuple(documents[documents > 0].tolist()), batch)

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
        return cls(plan, tuple(rows), 1.0, tuple(lengths.tolist()))


def of_role(counts: Counts, roles: tuple[Role, ...], role: Role) -> int:
    """Tokens that have ``role`` in a layer."""
    return sum(n for n, r in zip(counts.tokens, roles) if r == role)


def _mask_bytes(batch: Batch, plan: Plan, context: tuple[int, int]) -> list[int]:
    """Bytes of the masks that torch's attention keeps on CPUs in each layer: a float32 for each query and key of the
    segments whose keys are more than their queries."""
    route = Route.arrays(batch, plan, bucketed=True, context=context)
    masks = {
        id(layer): sum(len(b.offsets) * b.queries * b.keys for b in layer.buckets if b.offsets is not None)
        for layer in route.layers
    }
    return [4 * masks[id(layer)] for layer in route.layers]


def _cut(batch: Batch, start: int, stop: int) -> Batch:
    return batch.map(lambda field: field[:, start:stop])

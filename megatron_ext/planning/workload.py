"""What the rows of a run hold, as far as their cost depends on it: counts of tokens, from a mix or from rows."""

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from itertools import islice

import numpy as np

from megatron_ext.config import Config, ModelConfig
from megatron_ext.data.batch import Batch
from megatron_ext.planning.devices import Device
from megatron_ext.routing.document_mix import cut, drawn_rows, mix_documents
from megatron_ext.routing.flops import Counts, count
from megatron_ext.routing.groups import token_classes
from megatron_ext.routing.layer_route import segment_key_rows
from megatron_ext.routing.memory import activation_bytes
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import Role
from megatron_ext.routing.route import Route
from megatron_ext.token_classes import PADDING_DOCUMENT

SAMPLED_ROWS = 256

SAMPLED_TOKENS = 1 << 22
"""Of a mix: of longer rows there are fewer."""


@dataclass(frozen=True)
class Workload:
    """Sampled rows under a plan.

    Attributes:
        rows: counts of each sampled row.
        fill: share of a row that is not padding.
        documents: tokens of each document.
        batch: the rows themselves.
    """

    plan: Plan
    rows: tuple[Counts, ...]
    fill: float
    documents: tuple[int, ...]
    batch: Batch
    _heaviest: list[int] = field(default_factory=list, repr=False, compare=False)

    @cached_property
    def counts(self) -> Counts:
        """Counts of all sampled rows."""
        return reduce(Counts.__add__, self.rows)

    def neighbours(self, size: int, most: int = 32) -> list[list[int]]:
        """Micro-batches of ``size`` rows, as the numbers of rows: neighbours, of about ``most`` rows in all."""
        return _grouped([*range(len(self.rows))], size, most)

    def heaviest(self, size: int, model: ModelConfig, most: int = 64) -> list[list[int]]:
        """Micro-batches of ``size`` rows, as their numbers: those of all rows that keep most activations together, of
        about ``most`` rows in all."""
        if not self._heaviest:
            # A layer of each kind, after one of its own, tells rows apart; 1000 times, so that matrices do not.
            kinds = Counter(self.plan.roles)
            plan = replace(self.plan, roles=tuple(kind for kind in kinds for _ in range(2)))
            kept = [np.dot([*kinds.values()], activation_bytes(model, plan, row, 2, 1000)[1::2]) for row in self.rows]
            self._heaviest.extend(np.argsort(np.negative(kept), kind="stable").tolist())
        return _grouped(self._heaviest, size, most)

    def micro_batches(self, parts: list[list[int]]) -> list[Counts]:
        """Counts of micro-batches of these rows."""
        return [reduce(Counts.__add__, (self.rows[i] for i in part)) for part in parts]

    def device_bytes(self, device: Device, config: Config, parts: list[list[int]]) -> np.ndarray:
        """Bytes that attention's masks take on CPUs, [micro-batches, layers]; zeros on GPUs."""
        if device.memory:
            return np.zeros((len(parts), config.model.num_layers))
        context = config.parallel.context
        batches = [self.batch.map(lambda field, part=part: field[part]) for part in parts]
        ranks = [[_mask_bytes(batch, self.plan, (rank, context)) for batch in batches] for rank in range(context)]
        return np.array(ranks).max(0)

    @cached_property
    def segment_keys(self) -> np.ndarray:
        """Keys of all segments of attention where segments share keys, [rows, layers]: they are repeated for a call."""
        tokens = self.batch.document.size
        document, row_length = self.batch.document_starts().ravel().cumsum(), self.batch.shape[1]
        padding = (self.batch.document == PADDING_DOCUMENT).ravel()
        kind = np.where(padding, len(self.plan.roles[0]), token_classes(self.batch, self.plan, None).ravel())
        by_roles = {}
        for roles in set(self.plan.roles):
            keys, starts = segment_key_rows(document, np.array([*roles, Role.SKIP])[kind])
            by_roles[roles] = np.bincount(starts // row_length, keys, tokens // row_length)
        return np.stack([by_roles[roles] for roles in self.plan.roles], 1)

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

        Raises:
            UserError: quotes the part of the mix that cannot be read.
        """
        depth, length = config.model.image_codes.depth, config.data.sequence_length
        weights, documents = zip(*mix_documents(mix, depth, config.data.generation_text))
        pieces = [cut(document, length) for document in documents]
        lengths = [[piece.shape[1] for piece in parts] for parts in pieces]
        by = [int(document.task[0, 0]) for document in documents] if config.data.rows == "by_task" else None
        number = max(1, min(SAMPLED_ROWS, SAMPLED_TOKENS // length))
        drawn = drawn_rows(random.Random(0), list(weights), lengths, length, by)
        rows = [[pieces[n][piece] for n, piece in row] for row in islice(drawn, number)]
        return cls.of_batch(_packed(rows, length, depth), plan)


def of_role(counts: Counts, roles: tuple[Role, ...], role: Role) -> int:
    """Tokens that have ``role`` in a layer."""
    return sum(n for n, r in zip(counts.tokens, roles) if r == role)


def _grouped(rows: list[int], size: int, most: int) -> list[list[int]]:
    """At least one group of ``size`` rows, of about ``most`` rows in all; rows come again where there are too few."""
    count = max(1, min(len(rows), most) // size)
    return [[rows[(start + i) % len(rows)] for i in range(size)] for start in range(0, size * count, size)]


def _mask_bytes(batch: Batch, plan: Plan, context: tuple[int, int]) -> list[int]:
    """Bytes of the masks that torch's attention keeps on CPUs in each layer: a float32 for each query and key of the
    segments whose keys are more than their queries."""
    route = Route.arrays(batch, plan, bucketed=True, context=context)
    masks = {
        id(layer): sum(len(b.offsets) * b.queries * b.keys for b in layer.buckets if b.offsets is not None)
        for layer in route.layers
    }
    return [4 * masks[id(layer)] for layer in route.layers]


def _packed(rows: list[list[Batch]], length: int, depth: int) -> Batch:
    """Rows [rows, length] of these documents, then padding."""
    batch = Batch(**{name: np.zeros((len(rows), length), dtype) for name, dtype in Batch.DTYPES.items()})
    if depth > 1:
        batch.codes = np.zeros((*batch.shape, depth), np.int32)
    batch.document[:] = PADDING_DOCUMENT
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents):
            stop = start + document.shape[1]
            for name in ("loss_mask", "positions", "modality", "task"):
                getattr(batch, name)[row, start:stop] = getattr(document, name)[0]
            batch.document[row, start:stop] = number
            start = stop
    return batch

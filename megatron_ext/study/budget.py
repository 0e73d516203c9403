"""The length of each run of a study, so that the runs compared are equal in tokens or in FLOPs.

``training.iterations`` of the base configuration are the iterations of dense, trained on both tasks. The other runs'
follow from them and from rows of their own data::

    tokens    iterations x share of the tokens of the tasks trained on
    steps     iterations, of batches x share
    total     iterations
    flops     tokens' / (FLOPs of the method / FLOPs of lossless dense on the same rows)

Lossless dense (preset ``dense_lossless``) is dense without the work that no loss depends on. An equal-FLOPs run thus
costs what lossless dense costs on the run's data. Its number of iterations is planned, rather than
stopping at a total of FLOPs, so that its learning rate decays like every other run's.
"""

import json
from dataclasses import dataclass

from megatron_ext.config import Config
from megatron_ext.data.mixture import Mixture

SHARE_SAMPLES = 1 << 14
"""Samples on which a task's share of the tokens is measured."""
FLOPS_ROWS = 256
"""Rows on which the FLOPs of a method are counted."""
PARTS = 16
"""Parts of those rows; each is counted at another moment of training."""


@dataclass(frozen=True)
class Length:
    """The measurements that the length of a run of some size and method follows from.

    Attributes:
        share: the fraction of the tokens of the base configuration's sources that is in the sources kept, 0 .. 1.
        flops_ratio: training FLOPs relative to lossless dense, on the same rows.
        lossless_ratio: training FLOPs of lossless dense relative to dense, on the same rows.
        parameters: parameters of the dense model of this size.
    """

    share: float
    flops_ratio: float
    lossless_ratio: float
    parameters: int

    def iterations(self, base: int, budget: str) -> int:
        """The iterations of a run, at least 1.

        Args:
            base: the iterations of dense on all sources.
        """
        factor = {"tokens": self.share, "flops": self.share / self.flops_ratio}.get(budget, 1.0)
        return max(1, round(base * factor))

    def batch(self, base: int, budget: str, replicas: int) -> int:
        """The rows of a global batch, a multiple of ``replicas``.

        Args:
            base: the rows of dense on all sources.
        """
        return max(1, round(base * self.share / replicas)) * replicas if budget == "steps" else base


class Lengths:
    """Measures lengths; opens each data set once."""

    def __init__(self):
        self._mixtures: dict[str, Mixture] = {}
        self._batches: dict[str, list] = {}

    def measure(self, config: Config, whole: Config) -> Length:
        """The length of a run.

        Args:
            config: the run's configuration, with the sources that it keeps.
            whole: the same with all sources.
        """
        # Imported late: a study whose lengths are in plan.json should not wait for torch.
        from megatron_ext.routing.flops import count, dense, forward_flops, lossless_dense, parameter_count
        from megatron_ext.routing.plan import Plan, Projections
        from megatron_ext.training.image_codes import with_code_shape
        from megatron_ext.transformer.resolved import vocab_size
        from megatron_ext.vocabulary import Vocabulary

        vocabulary = Vocabulary(config.data.vocabulary)
        config = with_code_shape(config, vocabulary)
        model, rows_of_head = config.model, vocab_size(config, vocabulary)
        plan = Plan.from_config(config)
        batches = self._batches_of(config, vocabulary)
        plans = (plan, lossless_dense(plan), dense(plan))
        totals = [0, 0, 0]
        for number, batch in enumerate(batches):
            # The middle of each part of training: a dense share may change in the course of it.
            selection = plan.selection(2 * number + 1, 2 * len(batches))
            for i, of_plan in enumerate(plans):
                totals[i] += forward_flops(model, rows_of_head, of_plan, count(batch, of_plan, selection))
        flops, lossless_flops, dense_flops = totals
        return Length(
            self._share(config, whole, vocabulary),
            flops / lossless_flops,
            lossless_flops / dense_flops,
            parameter_count(model, rows_of_head, Projections()),
        )

    def _share(self, config: Config, whole: Config, vocabulary) -> float:
        """The fraction of the tokens of ``whole``, after caption dropout, that the tasks of ``config`` have."""
        import numpy as np

        from megatron_ext.token_classes import Layout

        mixture = self._mixture(whole, vocabulary)
        samples = mixture.samples(0, SHARE_SAMPLES)
        layouts = {Layout[source.task.upper()] for source in config.data.train}
        kept = np.array([source.layout in layouts for source in mixture.sources])[samples.source]
        return float(samples.length[kept].sum() / samples.length.sum())

    def _batches_of(self, config: Config, vocabulary) -> list:
        from megatron_ext.data.packed_rows import PackedRows

        key = _key(config)
        if key not in self._batches:
            batch = PackedRows.of(self._mixture(config, vocabulary), config.data).batch(0, FLOPS_ROWS)
            size = FLOPS_ROWS // PARTS
            self._batches[key] = [batch.rows(start, start + size) for start in range(0, FLOPS_ROWS, size)]
        return self._batches[key]

    def _mixture(self, config: Config, vocabulary) -> Mixture:
        from megatron_ext.data import build_mixture

        key = _key(config)
        if key not in self._mixtures:
            self._mixtures[key] = build_mixture(config.data.train, config.data, vocabulary, train=True)
        return self._mixtures[key]


def _key(config: Config) -> str:
    from megatron_ext.config_file import to_tree

    return json.dumps(to_tree(config.data), sort_keys=True)

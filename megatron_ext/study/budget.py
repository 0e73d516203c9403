"""How long each run of a study trains, so that what is compared is equal in tokens or in FLOPs.

The base configuration's ``training.iterations`` are those of dense, trained on both tasks. From them, with rows of the
run's own data::

    tokens    iterations x share of the tokens of the tasks trained on
    steps     iterations, of batches x share
    total     iterations
    flops     tokens' / (FLOPs of the method / FLOPs of dense on the same rows)

So an equal-FLOPs run costs what dense costs on its data. It is planned by its number of iterations, not stopped at a
total of FLOPs, so that its learning rate comes down as every other run's does.
"""

import json
from dataclasses import dataclass

from megatron_ext.config import Config
from megatron_ext.data.mixture import Mixture

DRAWS = 1 << 14
"""Documents that the share of a task's tokens is counted on."""
ROWS = 256
"""Rows that the FLOPs of a method are counted on."""
PARTS = 16
"""As many times in the course of training they are looked at, a part of the rows each time."""


@dataclass(frozen=True)
class Length:
    """What planning needs to know of a size and method.

    Attributes:
        share: of the tokens of all the base configuration's sources, those in the sources kept, 0 .. 1.
        flops_ratio: training FLOPs relative to dense, on the same rows.
        parameters: of the dense model of this size.
    """

    share: float
    flops_ratio: float
    parameters: int

    def iterations(self, base: int, budget: str) -> int:
        """At least 1.

        Args:
            base: iterations of dense on all sources.
        """
        factor = {"tokens": self.share, "flops": self.share / self.flops_ratio}.get(budget, 1.0)
        return max(1, round(base * factor))

    def batch(self, base: int, budget: str, replicas: int) -> int:
        """Rows of a global batch, a multiple of ``replicas``.

        Args:
            base: those of dense on all sources.
        """
        return max(1, round(base * self.share / replicas)) * replicas if budget == "steps" else base


class Lengths:
    """Measures lengths; opens every data set once."""

    def __init__(self):
        self._mixtures: dict[str, Mixture] = {}
        self._batches: dict[str, list] = {}

    def measure(self, config: Config, whole: Config) -> Length:
        """The length of a run.

        Args:
            config: the run's, with the sources it keeps; ``whole``: the same with all sources.
        """
        # Imported late: a plan that is known already should not wait for torch.
        from megatron_ext.routing.cost import count, dense, forward_flops, parameter_count
        from megatron_ext.routing.plan import Plan, Projections
        from megatron_ext.vocabulary import Vocabulary

        words = Vocabulary(config.data.vocabulary)
        plan = Plan.of(config.plan, config.model.num_layers)
        batches = self._batches_of(config, words)
        flops = dense_flops = 0
        for number, batch in enumerate(batches):
            selection = plan.selection(
                2 * number + 1, 2 * len(batches)
            )  # a dense share may change in the course of training
            flops += forward_flops(config.model, words.size, plan, count(batch, plan, selection))
            dense_flops += forward_flops(config.model, words.size, dense(plan), count(batch, dense(plan), selection))
        return Length(
            self._share(config, whole, words),
            flops / dense_flops,
            parameter_count(config.model, words.size, Projections()),
        )

    def _share(self, config: Config, whole: Config, words) -> float:
        """Of the tokens that the sources of ``whole`` give, those of the tasks of ``config``; with caption dropout."""
        import numpy as np

        from megatron_ext.token_classes import Task

        mixture = self._mixture(whole, words)
        samples = mixture.samples(0, DRAWS)
        kept = {Task[source.task.upper()] for source in config.data.train}
        mine = np.array([source.task in kept for source in mixture.sources])[samples.source]
        return float(samples.length[mine].sum() / samples.length.sum())

    def _batches_of(self, config: Config, words) -> list:
        from megatron_ext.data.packed_rows import PackedRows
        from megatron_ext.data.packed_tokens import unpack

        key = _key(config)
        if key not in self._batches:
            import numpy as np

            rows = PackedRows.of(self._mixture(config, words), config.data).packed_tokens(0, ROWS)
            self._batches[key] = [unpack(part, words.pad) for part in np.split(rows, PARTS)]
        return self._batches[key]

    def _mixture(self, config: Config, words) -> Mixture:
        from megatron_ext.data import build_mixture

        key = _key(config)
        if key not in self._mixtures:
            self._mixtures[key] = build_mixture(config.data.train, config.data, words, train=True)
        return self._mixtures[key]


def _key(config: Config) -> str:
    from megatron_ext.config_file import to_tree

    return json.dumps(to_tree(config.data), sort_keys=True)

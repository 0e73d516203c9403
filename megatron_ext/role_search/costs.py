"""The exact cost of role tables on fixed rows of the training data.

The FLOPs of a layer depend on the roles in that layer alone, so those of a table are a sum over its layers: counted
once for every combination of roles that a layer may have.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from megatron_ext import config_file
from megatron_ext.config import Config, ModelConfig
from megatron_ext.data.batch import Batch
from megatron_ext.files import read_json, write_json
from megatron_ext.routing.drawn_tables import Choices, Table
from megatron_ext.routing.flops import class_flops, count, head_flops, lossless_dense, projector_flops
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import Role
from megatron_ext.study.grid import metadata_checksum

ROWS = 256
"""Rows of the training data on which FLOPs are counted."""

Roles = tuple[Role, ...]
"""The role of each class of token in a layer."""


@dataclass(frozen=True)
class Costs:
    """FLOPs of a forward pass over some rows.

    Attributes:
        layer: of a layer with these roles.
        ends: outside of the layers.
        base: of lossless dense.
    """

    layer: dict[Roles, int]
    ends: int
    base: int

    @classmethod
    def of(cls, batch: Batch, model: ModelConfig, vocab_size: int, plan: Plan, choices: Choices) -> "Costs":
        """The costs of all tables that change ``plan`` by ``choices``, on rows [b, s] on the host.

        Args:
            vocab_size: rows of the output head.
        """
        dense = lossless_dense(plan)
        seen = {roles for layer in range(plan.num_layers) for roles in layer_options(plan.roles, choices, layer)}
        combinations = sorted(seen | set(dense.roles))
        # A plan with a layer for each combination has all their costs.
        stack = replace(plan, roles=tuple(combinations))
        counts = count(batch, stack)
        layer = {roles: sum(classes) for roles, classes in zip(combinations, class_flops(model, stack, counts))}
        ends = projector_flops(model, counts) + head_flops(model, vocab_size, counts)
        dense_stack = sum(sum(classes) for classes in class_flops(model, dense, count(batch, dense)))
        return cls(layer, ends, dense_stack + ends)

    @classmethod
    def of_training_data(cls, config: Config, plan: Plan, choices: Choices) -> "Costs":
        """The costs on rows of a configuration's training data, with its caption dropout.

        Raises:
            UserError: the data cannot be read.
        """
        from megatron_ext.data import build_mixture
        from megatron_ext.data.packed_rows import PackedRows
        from megatron_ext.training.image_codes import with_code_shape
        from megatron_ext.transformer.resolved import vocab_size
        from megatron_ext.vocabulary import Vocabulary

        vocabulary = Vocabulary(config.data.vocabulary)
        config = with_code_shape(config, vocabulary)
        depth = config.model.image_codes.depth
        mixture = build_mixture(config.data.train, config.data, vocabulary, train=True, depth=depth)
        batch = PackedRows.of(mixture, config.data).batch(0, ROWS)
        return cls.of(batch, config.model, vocab_size(config, vocabulary), plan, choices)

    @classmethod
    def kept(cls, file: Path, config: Config, plan: Plan, choices: Choices) -> "Costs":
        """As :meth:`of_training_data`, kept in ``file`` until the configuration or the data change: the count is quick,
        but loads Megatron-Core."""
        identity = _identity(config, choices)
        known = read_json(file) if file.is_file() else {}
        if known.get("identity") == identity:
            layer = {tuple(Role(int(digit)) for digit in roles): count for roles, count in known["layer"].items()}
            return cls(layer, known["ends"], known["base"])
        costs = cls.of_training_data(config, plan, choices)
        layer = {"".join(str(int(role)) for role in roles): count for roles, count in costs.layer.items()}
        write_json(file, {"identity": identity, "layer": layer, "ends": costs.ends, "base": costs.base})
        return costs

    def flops(self, table: Table) -> int:
        """FLOPs of a table."""
        return self.ends + sum(self.layer[roles] for roles in table)

    def ratio(self, table: Table) -> float:
        """FLOPs of a table relative to lossless dense; also in training, where both are three times as many."""
        return self.flops(table) / self.base


def _identity(config: Config, choices: Choices) -> dict:
    """What costs depend on, as it is read from JSON."""
    tree = config_file.to_tree(config)
    return {
        **{section: tree[section] for section in ("model", "data", "plan")},
        "choices": [[*place, *map(int, roles)] for place, roles in choices.items()],
        "checksums": [metadata_checksum(source.path) for source in config.data.train],
    }


def layer_options(own: Table, choices: Choices, layer: int) -> Iterator[Roles]:
    """The roles that a table may have in a layer, those of ``own`` first."""
    return product(*((role, *choices.get((layer, index), ())) for index, role in enumerate(own[layer])))

"""The plan: the role of every class of token in every layer, and the weights that it uses.

This is the only module that knows methods by name; layers ask for roles and components. A new method is a table in YAML
over a preset::

    plan:
      preset: dense
      table:
        - {layers: 4-, task: understanding, modality: image, role: kv_only}
        - {layers: "3,5-6", task: generation, modality: image, role: skip}
      projections: {kind: delta, rank: 16}

A preset that combines existing elements (HiMix, HMGen, a kind of weights) is a row of ``PRESETS``. Another rule for
roles needs a field of :class:`Preset` and the lines of :meth:`Plan.of` that read it.

Roles depend on the layer and on a token's task and modality. ``dense_share`` and ``drawn_tables`` show how to add a
further criterion; they, too, use only integers that are known before the forward pass. Criteria based on hidden states,
such as pruning by attention or merging, are not supported: every stage computes the route of a micro-batch once, before
the first layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_ext import config_file
from megatron_ext.config import Config, DenseShareConfig, PlanConfig
from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError, check_divisible
from megatron_ext.routing.dense_share import DenseShare, Selection
from megatron_ext.routing.drawn_tables import DrawnTables, drawn_tables
from megatron_ext.routing.roles import (
    CLASSES,
    Role,
    checked_layer,
    class_index,
    class_indices,
    layer_numbers,
)
from megatron_ext.token_classes import Modality, Task


@dataclass(frozen=True)
class Preset:
    """A named method.

    Attributes:
        himix: image tokens of understanding documents are KV_ONLY from ``plan.himix_start`` on (arXiv 2606.01503).
        hmgen: image tokens of generation documents are SKIP in the shallow layers.
        lossless: image tokens of understanding documents are KV_ONLY in the last layer, where no loss reads their
            hidden states: loss and gradients are those without it.
        kind: the weights that image tokens use, unless ``plan.projections.kind`` overrides it.
    """

    himix: bool = False
    hmgen: bool = False
    lossless: bool = False
    kind: str = "shared"


PRESETS = {
    "dense": Preset(),
    "dense_lossless": Preset(lossless=True),
    "himix": Preset(himix=True),
    "hmgen": Preset(hmgen=True, kind="separate"),
    # Both readings of the paper's Share All: one projection for all tokens, or one for text and one for the image
    # tokens of both tasks.
    "himix_hmgen_share_all": Preset(himix=True, hmgen=True),
    "himix_hmgen_share_all_separate": Preset(himix=True, hmgen=True, kind="separate"),
    "himix_hmgen_share_partial": Preset(himix=True, hmgen=True, kind="delta"),
}


@dataclass(frozen=True)
class Projections:
    """The weights that tokens use in the projections named in ``modules`` (qkv, proj, fc1, fc2).

    Text tokens use W. Image tokens use, by ``kind``: W (shared); a separate matrix (separate); W + D, where D has full
    rank or rank ``rank`` (delta). With ``per_task`` each of the two tasks has its own matrix or D.
    """

    kind: str = "shared"
    modules: tuple[str, ...] = ("qkv", "proj")
    rank: int | None = None
    per_task: bool = False

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the weights beside W."""
        if self.kind == "shared":
            return ()
        return ("understanding", "generation") if self.per_task else ("image",)

    @property
    def identity(self) -> dict:
        """The settings that determine a model's parameters, as plain data."""
        if not self.components:
            return {"kind": "shared"}
        return {"kind": self.kind, "modules": sorted(self.modules), "rank": self.rank, "per_task": self.per_task}

    def component(self, task: Task, modality: Modality) -> int:
        """The weights that a class of token uses: 0 for W, n for ``components[n - 1]``.

        Images in documents of the text task, where every token has a loss, count as generated.
        """
        if modality == Modality.TEXT or not self.components:
            return 0
        return 1 if not self.per_task or task == Task.UNDERSTANDING else 2


@dataclass(frozen=True)
class Plan:
    """The role of each (layer, task, modality) in a model, and the weights that image tokens use.

    Attributes:
        name: the preset's name, followed by ``+table`` where a table changes it.
        roles: for each layer, the role of each class of token at :func:`class_index`; with a ``dense_share`` or
            ``drawn_tables``, followed by further tables in the same order: that of selected tokens, or those drawn.
        dense_share: the share of the data that takes the dense roles, if any.
        drawn_tables: the random tables of which documents draw one, if any.
    """

    name: str
    roles: tuple[tuple[Role, ...], ...]
    projections: Projections
    dense_share: DenseShare | None = None
    drawn_tables: DrawnTables | None = None

    @classmethod
    def of(cls, config: PlanConfig, num_layers: int) -> "Plan":
        """The plan that ``config`` describes, for a model of ``num_layers`` layers.

        Raises:
            UserError: names a preset, layer or entry that is not valid.
        """
        if config.preset not in PRESETS:
            raise UserError(f"config: 'plan.preset' is {config.preset!r}, must be one of {', '.join(PRESETS)}")
        preset = PRESETS[config.preset]
        roles = [[Role.FULL] * (len(Task) * len(Modality)) for _ in range(num_layers)]
        if preset.himix:
            for layer in range(checked_layer(config.himix_start, "plan.himix_start", num_layers), num_layers):
                roles[layer][class_index(Task.UNDERSTANDING, Modality.IMAGE)] = Role.KV_ONLY
        if preset.hmgen:
            for layer in shallow_layers(config, num_layers):
                roles[layer][class_index(Task.GENERATION, Modality.IMAGE)] = Role.SKIP
        if preset.lossless:
            roles[-1][class_index(Task.UNDERSTANDING, Modality.IMAGE)] = Role.KV_ONLY
        for i, entry in enumerate(config.table):
            where = f"plan.table[{i}]"
            for layer in layer_numbers(str(entry.layers), f"{where}.layers", num_layers):
                for index in class_indices(entry.task, entry.modality):
                    roles[layer][index] = Role[entry.role.upper()]
        settings = config.projections
        kind = preset.kind if settings.kind == "preset" else settings.kind
        if settings.rank is not None and kind != "delta":
            raise UserError(
                f"config: 'plan.projections.rank' is {settings.rank}, but plan.projections.kind is {kind}; "
                "only delta projections have a rank"
            )
        if settings.rank is not None and settings.rank < 1:
            raise UserError(f"config: 'plan.projections.rank' is {settings.rank}, must be at least 1")
        projections = Projections(kind, tuple(settings.modules), settings.rank, settings.per_task)
        name = config.preset + ("+table" if config.table else "")
        share, own = _dense_share(config.dense_share), tuple(map(tuple, roles))
        drawn, tables = drawn_tables(config.drawn_tables, own)
        if share and drawn:
            raise UserError(
                "config: 'plan.dense_share' and 'plan.drawn_tables' both give documents other roles; drop one"
            )
        if share:
            name, tables = f"{name}+dense_share", [((Role.FULL,) * len(own[0]),) * num_layers]
        if drawn:
            name += "+drawn_tables"
        roles = tuple(sum(layers, ()) for layers in zip(own, *tables))
        return cls(name, roles, projections, share, drawn)

    @classmethod
    def from_config(cls, config: Config) -> "Plan":
        """The plan of a whole configuration; raises as :meth:`of`."""
        return cls.of(config.plan, config.model.num_layers)

    @property
    def num_layers(self) -> int:
        """Number of layers in the model."""
        return len(self.roles)

    @property
    def is_dense(self) -> bool:
        """Whether every token is FULL in every layer and uses the same weights."""
        return not self.projections.components and all(role == Role.FULL for roles in self.roles for role in roles)

    def role(self, layer: int, task: Task, modality: Modality) -> Role:
        """Role of tokens of this task and modality in ``layer`` (from 0) by the plan's own table."""
        return self.roles[layer][class_index(task, modality)]

    def selection(self, iteration: int, iterations: int) -> Selection | None:
        """The selection of the dense share or the drawn tables in a training iteration, counted from 0; None without
        either."""
        if self.drawn_tables:
            return self.drawn_tables.selection(iteration)
        return self.dense_share and self.dense_share.selection(iteration, iterations)

    def table_numbers(self, batch: Batch, selection: Selection | None) -> np.ndarray | int:
        """The number of the table in ``roles`` of each token of rows on the host, int64 [b, s]; 0 if there is one.

        Args:
            selection: that of a training iteration; None: that of evaluation.
        """
        if self.drawn_tables:
            return self.drawn_tables.numbers(batch, selection)
        return self.dense_share.selected(batch, selection).astype(np.int64) if self.dense_share else 0

    def with_table(self, number: int) -> "Plan":
        """The plan in which every token takes one of the tables."""
        size = len(Task) * len(Modality)
        roles = tuple(layer[number * size : (number + 1) * size] for layer in self.roles)
        return replace(self, roles=roles, dense_share=None, drawn_tables=None)

    def table(self) -> str:
        """The plan as text: one line per layer, one column per class of token."""
        mark = {Role.FULL: "full", Role.KV_ONLY: "kv", Role.SKIP: "-"}
        names = [f"{task.name.lower()} {modality.name.lower()}" for task, modality in CLASSES]
        lines = ["layer  " + "  ".join(names)]
        for layer in range(self.num_layers):
            cells = [mark[self.role(layer, *c)].center(len(name)) for c, name in zip(CLASSES, names)]
            lines.append(f"{layer:5d}  " + "  ".join(cells))
        kind = self.projections
        if kind.components:
            rank = f" of rank {kind.rank}" if kind.rank else ""
            tasks = ", one per task" if kind.per_task else ""
            lines.append(f"image tokens: {kind.kind} projections{rank}{tasks} in {', '.join(kind.modules)}")
        if self.dense_share:
            lines.append(self.dense_share.describe())
        if self.drawn_tables:
            lines.append(self.drawn_tables.describe())
        return "\n".join(line.rstrip() for line in lines)


def shallow_layers(config: PlanConfig, num_layers: int) -> list[int]:
    """The layers that generated images skip under HMGen.

    Either the configured list, or ``shallow_count`` layers, centred and contiguous or evenly spaced. The default count
    scales the paper's 3 of 16, rounded, and is at least one.
    """
    if config.shallow_layers:
        return sorted(
            {checked_layer(n, f"plan.shallow_layers[{i}]", num_layers) for i, n in enumerate(config.shallow_layers)}
        )
    count = max(1, round(num_layers * 3 / 16)) if config.shallow_count is None else config.shallow_count
    if not 0 <= count <= num_layers:
        raise UserError(f"config: 'plan.shallow_count' is {count}, must lie in 0 .. {num_layers} (model.num_layers)")
    if config.shallow_placement == "evenly":
        return [(i + 1) * num_layers // (count + 1) for i in range(count)]
    start = (num_layers - count) // 2
    return list(range(start, start + count))


def validate_plan(config: PlanConfig, num_layers: int, tensor: int) -> Plan:
    """The plan for a model of ``num_layers`` layers, whose low-rank deltas can be cut over ``tensor`` ranks.

    Raises:
        UserError: names the key, its value and a valid choice.
    """
    plan = Plan.of(config, num_layers)
    if plan.projections.rank is not None:
        check_divisible("plan.projections.rank", plan.projections.rank, "parallel.tensor", tensor)
    return plan


def with_roles(config: Config, overrides: Sequence[str]) -> Config:
    """A trained model's configuration with overrides ``section.key=value``.

    Unless an override names them, its projections stay those that were trained: another preset then changes the roles
    but not the parameters.

    Raises:
        UserError: as for :func:`megatron_ext.config_file.override`.
    """
    changed = config_file.override(config, overrides)
    if changed.plan.projections == config.plan.projections:
        kind = Plan.from_config(config).projections.kind
        changed.plan.projections = replace(changed.plan.projections, kind=kind)
    return changed


def _dense_share(config: DenseShareConfig) -> DenseShare | None:
    if config.of == "none":
        return None
    end = config.start if config.end is None else config.end
    shares = {"start": config.start, "end": end, "begin_at": config.begin_at, "end_at": config.end_at}
    most = float(end > 0.5) if config.of == "documents" else end
    shares["evaluation"] = most if config.evaluation is None else config.evaluation
    for key, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"config: 'plan.dense_share.{key}' is {value:g}, must lie in 0 .. 1")
    if config.end_at < config.begin_at:
        raise UserError(
            f"config: 'plan.dense_share.end_at' is {config.end_at:g}, must not be before begin_at ({config.begin_at:g})"
        )
    if config.of == "documents" and shares["evaluation"] not in (0, 1):
        raise UserError(
            f"config: 'plan.dense_share.evaluation' is {shares['evaluation']:g}, must be 0 or 1 for documents"
        )
    return DenseShare(config.of, **shares)

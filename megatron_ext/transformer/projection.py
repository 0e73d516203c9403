"""The projections of a layer, with weights of their own for image tokens where the plan says so.

A projection is Megatron-Core's (or Transformer Engine's) column- or row-parallel linear layer. Beside its ``weight``
stand the components of :class:`~megatron_ext.routing.plan.Projections`, cut over the tensor-parallel group as W is:

=====================  =========================  ==========================================
kind                   parameters of component c  matrix of the tokens that use c
=====================  =========================  ==========================================
separate               ``c_weight``               ``c_weight``
delta                  ``c_delta``                W + ``c_delta``
low-rank delta (LoRA)  ``c_down``, ``c_up``       W + ``c_up`` ``c_down``, never formed
=====================  =========================  ==========================================

The rows that use one matrix stand together (see :mod:`megatron_ext.routing.route`), so each matrix is one GEMM over its
rows alone. All rows are gathered at once before, and their outputs reduced at once after, whatever matrices they use.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    reduce_scatter_last_dim_to_tensor_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_ext.routing.plan import Projections
from megatron_ext.transformer import fp8

Splits = Sequence[tuple[int, int]]
"""(component, rows) of consecutive rows on one rank; component 0 is W."""

Part = Callable[[Tensor], Tensor]
"""Some output rows of a matrix."""


class SplitProjection:
    """Mixed into a parallel linear layer: the components and the products with them.

    Attributes:
        projections: what exists beside W.
        partition_dim: dimension over which W is cut: 0 (column parallel) or 1 (row parallel).
        stride: 2 where the rows of W are two matrices one after the other (gate and up of the FFN), else 1.
    """

    partition_dim: int

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        projections: Projections,
        fuse_weight_gradient: bool = False,
        **options,
    ):
        """
        Args:
            fuse_weight_gradient: whether the GEMM of W's gradient adds to the gradient buffer itself.
        """
        if config.gradient_accumulation_fusion != fuse_weight_gradient:
            config = copy.copy(config)
            config.gradient_accumulation_fusion = fuse_weight_gradient
        super().__init__(input_size, output_size, config=config, **options)
        self.projections = projections
        self.stride = options.get("stride", 1)
        self._group = options["tp_group"]
        self._size = size = self._group.size()
        self._ranks = size if self.config.sequence_parallel else 1
        self._merged: dict[int, Tensor] = {}
        rank = projections.rank
        out_features, in_features = self.weight.shape
        for component in projections.components:
            if projections.kind == "separate":
                shapes = {"weight": (out_features, in_features)}
            elif rank is None:
                shapes = {"delta": (out_features, in_features)}
            elif self.partition_dim == 0:
                shapes = {"down": (rank // size, in_features), "up": (out_features, rank)}
            else:
                shapes = {"down": (rank, in_features), "up": (out_features, rank // size)}
            for name, shape in shapes.items():
                self.register_parameter(f"{component}_{name}", torch.nn.Parameter(self.weight.new_empty(shape)))

    @property
    def components(self) -> tuple[str, ...]:
        """What exists beside W."""
        return self.projections.components

    @property
    def plain(self) -> bool:
        """Whether Megatron-Core's (or Transformer Engine's) own product will do. It is there for gradients and their
        messages, and for FP8; when neither is at work it only takes longer."""
        return not self.components and (torch.is_grad_enabled() or bool(self.config.fp8))

    def grouped_gemm(
        self, rows: Tensor, splits: Splits, part: Part = lambda weight: weight, scale: Tensor | None = None
    ) -> Tensor:
        """``rows`` [R * n, 1, in / p] times the matrices that ``splits`` of n rows name: [R * n, 1, out / p].

        Args:
            part: which output rows of the matrices are wanted.
            scale: [in / p], factors of the matrices' columns.
        """

        def scaled(weight: Tensor) -> Tensor:
            return weight if scale is None else weight * scale

        if not self.components:
            made = fp8.grouped_linear(self, rows.squeeze(1), [rows.shape[0]], [scaled(part(self.weight))])
            return made.unsqueeze(1)
        if torch.is_grad_enabled() or not splits:
            # A component without rows is still multiplied (by none), so that its gradient is zero and not missing.
            absent = set(range(len(self.components) + 1)) - {component for component, _ in splits}
            splits = [*splits, *((component, 0) for component in sorted(absent))]
        counts = [n for _, n in splits]
        apart = self._ranks > 1 and len(splits) > 1
        ranked = (self._ranks, sum(counts), rows.shape[-1])
        flat = torch.cat([x.flatten(0, 1) for x in rows.view(ranked).split(counts, 1)]) if apart else rows.squeeze(1)
        totals = [self._ranks * n for n in counts]
        if self.projections.rank is None:
            weights = {c: scaled(self._matrix(c, part)) for c, _ in splits}
            made = fp8.grouped_linear(self, flat, totals, [weights[c] for c, _ in splits])
        else:
            made = fp8.grouped_linear(self, flat, [flat.shape[0]], [scaled(part(self.weight))])
            pieces = zip(splits, flat.split(totals), made.split(totals))
            made = torch.cat([y + self._low_rank(c, x, part, scaled) if c else y for (c, _), x, y in pieces])
        if apart:
            pieces = [y.view(self._ranks, n, y.shape[-1]) for n, y in zip(counts, made.split(totals))]
            made = torch.cat(pieces, 1).flatten(0, 1)
        return made.unsqueeze(1)

    def _matrix(self, component: int, part: Part) -> Tensor:
        if component == 0:
            return part(self.weight)
        if component in self._merged:
            return part(self._merged[component])
        name = self.components[component - 1]
        if self.projections.kind == "separate":
            return part(getattr(self, f"{name}_weight"))
        return part(self.weight) + part(getattr(self, f"{name}_delta"))

    def _low_rank(self, component: int, rows: Tensor, part: Part, scaled: Part) -> Tensor:
        """Both factors are cut over the tensor-parallel group, so no rank repeats another's work; between them only
        [rows, r] travels."""
        name = self.components[component - 1]
        inner = F.linear(rows, scaled(getattr(self, f"{name}_down")))
        if self._size > 1:
            meet = (
                all_gather_last_dim_from_tensor_parallel_region
                if self.partition_dim == 0
                else reduce_scatter_last_dim_to_tensor_parallel_region
            )
            inner = meet(inner, group=self._group)
        return F.linear(inner, part(getattr(self, f"{name}_up")))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """W and its components, cut as they are."""
        state = self.state_dict(prefix="", keep_vars=True)
        cuts = {name: self.partition_dim for name in state if not name.startswith("_")}
        made = make_sharded_tensors_for_checkpoint(
            state, prefix, cuts, sharded_offsets, tp_group=self._group, dp_cp_group=metadata["dp_cp_group"]
        )
        # Megatron-Core does the same for ``weight``, one level up.
        for name in cuts if self.stride == 2 else ():
            if name != "weight" and not name.endswith("_down"):
                made[prefix + name] = apply_swiglu_sharded_factory(
                    made[prefix + name], sharded_offsets, metadata.get("singleton_local_shards", False)
                )
        return made


@contextmanager
def merged_weights(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every W + D is merged_weights once and not with every product; the weights must not change meanwhile."""
    delta = [
        module
        for module in model.modules()
        if isinstance(module, SplitProjection)
        and module.projections.kind == "delta"
        and module.projections.rank is None
    ]
    for module in delta:
        components = range(1, len(module.components) + 1)
        module._merged = {c: module._matrix(c, lambda weight: weight) for c in components}
    try:
        yield
    finally:
        for module in delta:
            module._merged = {}


class ColumnSplitProjection(SplitProjection):
    """Mixed into a column-parallel linear layer."""

    partition_dim = 0

    def forward(self, rows: Tensor, splits: Splits) -> Tensor:
        """[n, 1, in] on each rank to [R * n, 1, out / tensor-parallel size]."""
        if self.plain:
            return super().forward(rows)[0]
        return self.grouped_gemm(self.gather_input(rows), splits)

    def gather_input(self, rows: Tensor) -> Tensor:
        """Rows of all ranks; their gradients are summed over the tensor-parallel group."""
        if self._size == 1:
            return rows
        if self._ranks > 1:
            return gather_from_sequence_parallel_region(rows, group=self._group)
        return copy_to_tensor_model_parallel_region(rows, group=self._group)


class QueryKeyValueSplitProjection(ColumnSplitProjection):
    """The query, key and value projection: W holds, key/value group after group, n query heads, a key and a value."""

    def forward(
        self, full: Tensor, splits: Splits, kv_only: Tensor | None, kv_only_splits: Splits, kv_only_scale: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Projections of FULL rows and the key and value of KV_ONLY rows; with g groups of head size d on this rank::

            full    [n, 1, in] -> [R * n, 1, g * (queries + 2) * d]
            kv_only [m, 1, in] -> [R * m, 1, g * 2 * d]

        ``kv_only_scale`` [in] is a factor of every KV_ONLY row: cheaper in the matrix than in each row.
        """
        if kv_only is None:
            return super().forward(full, splits), None
        if self._size > 1:  # one message for both
            sizes = full.shape[0], kv_only.shape[0]
            gathered = self.gather_input(torch.cat([full, kv_only])).unflatten(0, (self._ranks, -1))
            full, kv_only = (x.flatten(0, 1) for x in gathered.split(sizes, 1))
            if self._ranks == 1:  # each rank knows its outputs' share of the gradient alone
                kv_only_scale = copy_to_tensor_model_parallel_region(kv_only_scale, group=self._group)
        of_kv_only = self.grouped_gemm(kv_only, kv_only_splits, self._key_value, kv_only_scale)
        return self.grouped_gemm(full, splits), of_kv_only

    def _key_value(self, weight: Tensor) -> Tensor:
        """The rows of keys and values, [g * 2 * d, in], of a matrix over queries, keys and values."""
        groups = self.config.num_query_groups // self._size
        d = self.config.kv_channels
        return weight.view(groups, -1, d, weight.shape[-1])[:, -2:].flatten(0, 2)


class RowSplitProjection(SplitProjection):
    """Mixed into a row-parallel linear layer."""

    partition_dim = 1

    def forward(self, rows: Tensor, splits: Splits) -> Tensor:
        """[R * n, 1, in / tensor-parallel size] to [n, 1, out] on each rank, reduced once for all matrices."""
        if self.plain:
            return super().forward(rows)[0]
        partial = self.grouped_gemm(rows, splits)
        if self._size == 1:
            return partial
        if self._ranks > 1:
            return reduce_scatter_to_sequence_parallel_region(partial, group=self._group)
        return reduce_from_tensor_model_parallel_region(partial, group=self._group)

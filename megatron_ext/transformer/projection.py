"""The projections of a layer, with separate weights for image tokens where the plan has them.

A projection is Megatron-Core's (or Transformer Engine's) column- or row-parallel linear layer. Beside its ``weight``,
W, it has the components of :class:`~megatron_ext.routing.plan.Projections`, cut over the tensor-parallel group as W is:

=====================  =========================  ==========================================
kind                   parameters of component c  matrix of the tokens that use c
=====================  =========================  ==========================================
separate               ``c_weight``               ``c_weight``
delta                  ``c_delta``                W + ``c_delta``
low-rank delta (LoRA)  ``c_down``, ``c_up``       W + ``c_up`` ``c_down``, not computed
=====================  =========================  ==========================================

A ``bias`` is added whatever the matrix: one serves all tokens.

Rows that use the same matrix are contiguous (see :mod:`megatron_ext.routing.route`), so each matrix takes one GEMM over
its own rows. One message gathers the rows of all matrices before, and one reduces their outputs after.
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

SelectOutputs = Callable[[Tensor], Tensor]
"""From a matrix [out, in] or a bias [out] to some of its output rows."""


def _all_outputs(weight: Tensor) -> Tensor:
    return weight


class SplitProjection:
    """Mixed into a parallel linear layer: its components, and the products with them.

    Attributes:
        projections: the components beside W.
        partition_dim: dimension over which W is cut: 0 (column parallel) or 1 (row parallel).
        stride: 2 where W stacks two matrices (gate and up of the FFN), else 1.
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
        self._has_bias = options["bias"]
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
        """Names of the components beside W."""
        return self.projections.components

    @property
    def plain(self) -> bool:
        """Whether to use the forward pass of Megatron-Core's (or Transformer Engine's) linear layer.

        It suffices without components, and handles gradients, their messages and FP8. Without gradients and FP8 it is
        slower than :meth:`grouped_gemm`.
        """
        return not self.components and (torch.is_grad_enabled() or bool(self.config.fp8))

    def grouped_gemm(
        self,
        rows: Tensor,
        splits: Splits,
        select: SelectOutputs = _all_outputs,
        scale: Tensor | None = None,
        by_split: bool = False,
    ) -> Tensor:
        """``rows`` [R * n, 1, in / p], split as ``splits`` say, times the matrix of each split, plus the bias:
        [R * n, 1, out / p].

        Args:
            select: selects the output rows of each matrix to compute.
            scale: [in / p], factors of the matrices' columns.
            by_split: whether ``rows`` come from :meth:`by_split` with the same splits.
        """
        output = self._products(rows, splits, select, scale, by_split)
        return output.add_(select(self.bias)) if self._has_bias else output

    def by_split(self, rows: Tensor, splits: Splits) -> Tensor:
        """Gathered rows [R * n, 1, in], which are ordered by rank and then by split, with the rows of each split
        together, as products need them. Without components a product takes all rows, as they are."""
        counts = [n for _, n in splits if n]
        if self._ranks == 1 or not self.components or len(counts) < 2:
            return rows
        parts = rows.view(self._ranks, -1, *rows.shape[1:]).split(counts, 1)
        return torch.cat([part.flatten(0, 1) for part in parts])

    def _products(
        self, rows: Tensor, splits: Splits, select: SelectOutputs, scale: Tensor | None, by_split: bool
    ) -> Tensor:

        def scaled(weight: Tensor) -> Tensor:
            return weight if scale is None else weight * scale

        if not self.components:
            output = fp8.grouped_linear(self, rows.squeeze(1), [rows.shape[0]], [scaled(select(self.weight))])
            return output.unsqueeze(1)
        if torch.is_grad_enabled() or not splits:
            # Components without rows take part with 0 rows, so that their gradients are zero and not missing.
            absent = set(range(len(self.components) + 1)) - {component for component, _ in splits}
            splits = [*splits, *((component, 0) for component in sorted(absent))]
        counts = [n for _, n in splits]
        reorder = self._ranks > 1 and len(splits) > 1
        flat = (rows if by_split else self.by_split(rows, splits)).squeeze(1)
        totals = [self._ranks * n for n in counts]
        if self.projections.rank is None:
            weights = {c: scaled(self._matrix(c, select)) for c, _ in splits}
            output = fp8.grouped_linear(self, flat, totals, [weights[c] for c, _ in splits])
        else:
            output = fp8.grouped_linear(self, flat, [flat.shape[0]], [scaled(select(self.weight))])
            products = zip(splits, flat.split(totals), output.split(totals))
            output = torch.cat([y + self._low_rank(c, x, select, scaled) if c else y for (c, _), x, y in products])
        if reorder:
            by_split = [y.view(self._ranks, n, y.shape[-1]) for n, y in zip(counts, output.split(totals))]
            output = torch.cat(by_split, 1).flatten(0, 1)
        return output.unsqueeze(1)

    def _matrix(self, component: int, select: SelectOutputs) -> Tensor:
        if component == 0:
            return select(self.weight)
        if component in self._merged:
            return select(self._merged[component])
        name = self.components[component - 1]
        if self.projections.kind == "separate":
            return select(getattr(self, f"{name}_weight"))
        return select(self.weight) + select(getattr(self, f"{name}_delta"))

    def _low_rank(
        self, component: int, rows: Tensor, select: SelectOutputs, scaled: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The product with a low-rank delta. Both factors are cut over the tensor-parallel group, so that no rank
        repeats another's work; the message between the two products has [rows, r]."""
        name = self.components[component - 1]
        inner = F.linear(rows, scaled(getattr(self, f"{name}_down")))
        if self._size > 1:
            communicate = (
                all_gather_last_dim_from_tensor_parallel_region
                if self.partition_dim == 0
                else reduce_scatter_last_dim_to_tensor_parallel_region
            )
            inner = communicate(inner, group=self._group)
        return F.linear(inner, select(getattr(self, f"{name}_up")))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """W and its components, each with its tensor-parallel cut."""
        state = self.state_dict(prefix="", keep_vars=True)
        cuts = {name: self.partition_dim for name in state if not name.startswith("_")}
        sharded = make_sharded_tensors_for_checkpoint(
            state, prefix, cuts, sharded_offsets, tp_group=self._group, dp_cp_group=metadata["dp_cp_group"]
        )
        # Megatron-Core does the same for ``weight``, one level up.
        for name in cuts if self.stride == 2 else ():
            if name != "weight" and not name.endswith("_down"):
                sharded[prefix + name] = apply_swiglu_sharded_factory(
                    sharded[prefix + name], sharded_offsets, metadata.get("singleton_local_shards", False)
                )
        return sharded


@contextmanager
def merged_weights(*models: torch.nn.Module) -> Iterator[None]:
    """Compute every W + D once for all products inside the context, in which weights must not change."""
    modules = [
        module
        for model in models
        for module in model.modules()
        if isinstance(module, SplitProjection)
        and module.projections.kind == "delta"
        and module.projections.rank is None
    ]
    for module in modules:
        components = range(1, len(module.components) + 1)
        module._merged = {c: module._matrix(c, _all_outputs) for c in components}
    try:
        yield
    finally:
        for module in modules:
            module._merged = {}


class ColumnSplitProjection(SplitProjection):
    """Mixed into a column-parallel linear layer."""

    partition_dim = 0

    def forward(self, rows: Tensor, splits: Splits) -> Tensor:
        """From [n, 1, in] on each rank to [R * n, 1, out / tensor-parallel size]."""
        if self.plain:
            return super().forward(rows)[0]
        return self.grouped_gemm(self.gather_input(rows), splits)

    def gather_input(self, rows: Tensor) -> Tensor:
        """The rows of all ranks. Their gradients are summed over the tensor-parallel group."""
        if self._size == 1:
            return rows
        if self._ranks > 1:
            return gather_from_sequence_parallel_region(rows, group=self._group)
        return copy_to_tensor_model_parallel_region(rows, group=self._group)


class QueryKeyValueSplitProjection(ColumnSplitProjection):
    """The query, key and value projection. Its output rows are, for each key/value group, n query heads, a key and a
    value."""

    def forward(
        self,
        full: Tensor,
        splits: Splits,
        kv_only: Tensor | None,
        kv_only_splits: Splits,
        kv_only_scale: Tensor,
        kv_only_input: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Projections of FULL rows and the key and value of KV_ONLY rows; with g groups of head size d on this rank::

            full    [n, 1, in] -> [R * n, 1, g * (queries + 2) * d]
            kv_only [m, 1, in] -> [R * m, 1, g * 2 * d]

        ``kv_only_scale`` [in] multiplies every KV_ONLY row; it is applied to the matrix, which takes fewer operations.

        Also returned is ``kv_only_input`` [R * m, 1, in], the gathered ``kv_only``. The next layer's projection may
        take it in place of ``kv_only``: then these rows are gathered, and their gradient reduced, once for both.
        """
        if kv_only is None and kv_only_input is None:
            return super().forward(full, splits), None, None
        if kv_only_input is None:
            full, kv_only_input = self._gather_both(full, kv_only, kv_only_splits)
        else:
            full = self.gather_input(full)
        if self._size > self._ranks:  # each rank has only its own outputs' share of the gradient
            kv_only_scale = copy_to_tensor_model_parallel_region(kv_only_scale, group=self._group)
        key_value = self.grouped_gemm(kv_only_input, kv_only_splits, self._key_value_rows, kv_only_scale, by_split=True)
        return self.grouped_gemm(full, splits), key_value, kv_only_input

    def _gather_both(self, full: Tensor, kv_only: Tensor, kv_only_splits: Splits) -> tuple[Tensor, Tensor]:
        """FULL and KV_ONLY rows of all ranks by one message, the latter :meth:`by_split`."""
        if self._size == 1:
            return full, kv_only
        sizes = full.shape[0], kv_only.shape[0]
        gathered = self.gather_input(torch.cat([full, kv_only])).unflatten(0, (self._ranks, -1))
        full, kv_only = (x.flatten(0, 1) for x in gathered.split(sizes, 1))
        return full, self.by_split(kv_only, kv_only_splits)

    def _key_value_rows(self, weight: Tensor) -> Tensor:
        """The output rows of keys and values, [g * 2 * d, in] or, of a bias, [g * 2 * d]."""
        groups = self.config.num_query_groups // self._size
        d = self.config.kv_channels
        return weight.view(groups, -1, d, *weight.shape[1:])[:, -2:].flatten(0, 2)


class RowSplitProjection(SplitProjection):
    """Mixed into a row-parallel linear layer."""

    partition_dim = 1

    def forward(self, rows: Tensor, splits: Splits) -> Tensor:
        """From [R * n, 1, in / tensor-parallel size] to [n, 1, out] on each rank, reduced once for all matrices."""
        if self.plain:
            return super().forward(rows)[0]
        partial = self.grouped_gemm(rows, splits)
        if self._size == 1:
            return partial
        if self._ranks > 1:
            return reduce_scatter_to_sequence_parallel_region(partial, group=self._group)
        return reduce_from_tensor_model_parallel_region(partial, group=self._group)

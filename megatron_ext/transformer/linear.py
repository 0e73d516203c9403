"""The linear layers of the projections: split ones over torch's GEMMs, or over Transformer Engine's."""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_ext.transformer.projection import ColumnSplitProjection, QueryKeyValueSplitProjection, RowSplitProjection


class QueryKeyValueLinear(QueryKeyValueSplitProjection, ColumnParallelLinear):
    """With torch's GEMMs."""


class ColumnLinear(ColumnSplitProjection, ColumnParallelLinear):
    """With torch's GEMMs."""


class RowLinear(RowSplitProjection, RowParallelLinear):
    """With torch's GEMMs."""


def transformer_engine_linears() -> tuple[type, type, type]:
    """The same three over Transformer Engine's linear layers."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    class TransformerEngineQueryKeyValueLinear(FreshWeights, QueryKeyValueSplitProjection, TEColumnParallelLinear):
        pass

    class TransformerEngineColumnLinear(FreshWeights, ColumnSplitProjection, TEColumnParallelLinear):
        pass

    class TransformerEngineRowLinear(FreshWeights, RowSplitProjection, TERowParallelLinear):
        pass

    return TransformerEngineQueryKeyValueLinear, TransformerEngineColumnLinear, TransformerEngineRowLinear


class FreshWeights:
    """Mixed into Transformer Engine's linear layers, which keep their weights in FP8 from one micro-batch to the next.

    Megatron-Core's schedules have them made anew at the first micro-batch of every step. A model that is called without
    a schedule, as generation does, would go on with those from before the optimizer's last step: so they are made anew
    by the first call of an evaluation, too.
    """

    def train(self, mode: bool = True):
        if not mode:
            self.is_first_microbatch = True
        return super().train(mode)

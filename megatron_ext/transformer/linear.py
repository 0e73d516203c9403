"""The linear layers of the projections: split projections over torch's GEMMs or Transformer Engine's."""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_ext.transformer.projection import ColumnSplitProjection, QueryKeyValueSplitProjection, RowSplitProjection


class QueryKeyValueLinear(QueryKeyValueSplitProjection, ColumnParallelLinear):
    """With torch's GEMMs."""


class ColumnLinear(ColumnSplitProjection, ColumnParallelLinear):
    """With torch's GEMMs."""


class RowLinear(RowSplitProjection, RowParallelLinear):
    """With torch's GEMMs."""


def transformer_engine_linears() -> tuple[type, type, type]:
    """The same three linear layers over Transformer Engine's."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    class TransformerEngineQueryKeyValueLinear(FreshWeights, QueryKeyValueSplitProjection, TEColumnParallelLinear):
        pass

    class TransformerEngineColumnLinear(FreshWeights, ColumnSplitProjection, TEColumnParallelLinear):
        pass

    class TransformerEngineRowLinear(FreshWeights, RowSplitProjection, TERowParallelLinear):
        pass

    return TransformerEngineQueryKeyValueLinear, TransformerEngineColumnLinear, TransformerEngineRowLinear


class FreshWeights:
    """Mixed into Transformer Engine's linear layers, which cache their weights in FP8 across micro-batches.

    Megatron-Core's schedules refresh the cache at the first micro-batch of every step. Generation calls the model
    without a schedule and would use weights from before the optimizer's last step, so the first call in evaluation mode
    refreshes the cache too.
    """

    def train(self, mode: bool = True):
        if not mode:
            self.is_first_microbatch = True
        return super().train(mode)

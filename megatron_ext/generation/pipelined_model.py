"""The model over all pipeline stages, called outside of Megatron-Core's schedules: one pass, stage after stage."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.routing.route import Route
from megatron_ext.training import watch
from megatron_ext.transformer.forward_context import Attend
from megatron_ext.transformer.model import UnifiedModel


class PipelinedModel:
    """A model of which every pipeline stage holds a part; all ranks of a replica call it together.

    Every stage computes the same route from the same tokens, so only hidden states travel, whose shapes all know. A
    stage waits while others compute. Each call is progress to the watch.

    Attributes:
        config: Megatron-Core's, of the layers.
        depth: codes of an image token.
        dtype, device: of the parameters.
        layers: numbers, from 0, of the layers on this stage.
    """

    def __init__(self, chunks: Sequence[UnifiedModel]):
        """
        Args:
            chunks: this rank's model chunks, one after the other, in evaluation mode.
        """
        self.chunks = list(chunks)
        self.config, self.depth = self.chunks[0].config, self.chunks[0].code_depth
        parameter = next(self.chunks[0].parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        self.layers = [layer.layer_number - 1 for chunk in self.chunks for layer in chunk.decoder.layers]
        self._stages = parallel_state.get_pipeline_model_parallel_world_size()

    @property
    def last(self) -> UnifiedModel | None:
        """The chunk with the heads; None on other stages than the last."""
        return self.chunks[-1] if self.chunks[-1].post_process else None

    @torch.no_grad()
    def __call__(self, route: Route, attend: Attend | None = None, **options):
        """A forward pass of all stages; arguments and result as for
        :meth:`~megatron_ext.transformer.model.UnifiedModel.forward`. The result is None on other stages than the
        last."""
        watch.advance()
        if self._stages == 1:
            return self.chunks[0](route, attend=attend, **options)
        group = parallel_state.get_pipeline_model_parallel_group()
        before = parallel_state.get_pipeline_model_parallel_prev_rank()
        after = parallel_state.get_pipeline_model_parallel_next_rank()
        ranks = parallel_state.get_tensor_model_parallel_world_size() if self.config.sequence_parallel else 1
        shape = route.tokens.shape[1] // ranks, 1, self.config.hidden_size
        result = None
        for chunk in self.chunks:
            if not chunk.pre_process:
                hidden_states = torch.empty(shape, dtype=self.dtype, device=self.device)
                dist.recv(hidden_states, before, group=group)
                chunk.set_input_tensor(hidden_states)
            result = chunk(route, attend=attend, **options)
            if not chunk.post_process:
                dist.send(result.contiguous(), after, group=group)
                result = None
        return result

    def from_last_stage(self, compute: Callable[[], Tensor], *shape: int, dtype: torch.dtype) -> Tensor:
        """The tensor that ``compute`` returns on the last stage, where alone it is called, on every stage.

        Args:
            shape: the tensor's, and ``dtype``, which every stage knows.
        """
        if self._stages == 1:
            return compute()
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        result = torch.empty(shape, dtype=dtype, device=self.device)
        if self.last is not None:
            result.copy_(compute())
        dist.broadcast(result, source, group=parallel_state.get_pipeline_model_parallel_group())
        return result

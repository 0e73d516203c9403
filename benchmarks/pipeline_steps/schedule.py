"""Megatron-Core's schedule over chunks that call back instead of computing."""

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.routing.pipeline import Task, group_size

Work = Callable[[Task], None]


class Chunk(torch.nn.Module):
    """Multiplies the number of its micro-batch, or what it receives, by a weight of 2, and calls ``work`` with each
    forward and backward pass of it."""

    def __init__(self, config: TransformerConfig, number: int, work: Work):
        super().__init__()
        self.config, self.number, self.work = config, number, work
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.received, self.model_type = None, ModelType.encoder_or_decoder

    def set_input_tensor(self, tensor) -> None:
        self.received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, micro_batch: int):
        self.work(Task(True, self.number, micro_batch))
        given = torch.full((1, 1, 1), micro_batch + 1.0) if self.received is None else self.received
        return _Backward.apply(given * self.weight, self.work, Task(False, self.number, micro_batch))


class _Backward(torch.autograd.Function):
    """The identity, whose backward pass calls back."""

    @staticmethod
    def forward(ctx, tensor, work, task):
        ctx.work, ctx.task = work, task
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        ctx.work(ctx.task)
        return gradient, None, None


def chunks(pipeline: int, virtual: int, micro_batches: int, work: Work) -> list[Chunk]:
    """This rank's chunks, in process groups that this call makes."""
    interleaved = virtual > 1
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(1, pipeline, virtual if interleaved else None)
    config = TransformerConfig(
        num_layers=pipeline * virtual,
        hidden_size=1,
        num_attention_heads=1,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if interleaved else None,
        microbatch_group_size_per_vp_stage=group_size(micro_batches, pipeline) if interleaved else None,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        batch_p2p_sync=False,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
    )
    return [Chunk(config, number, work) for number in range(virtual)]


def step(model: list[Chunk], micro_batches: int) -> None:
    """One step of forward and backward passes."""
    numbers = [iter(range(micro_batches)) for _ in model]
    get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=numbers if len(model) > 1 else numbers[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=micro_batches,
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )


def _forward_step(numbers, chunk: Chunk):
    return chunk(next(numbers)), lambda output: (output.sum(), torch.tensor(1), {})

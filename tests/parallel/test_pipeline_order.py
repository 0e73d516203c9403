"""Megatron-Core's own schedules, recorded on gloo ranks, against those that are simulated."""

import pytest
import torch
from megatron.core.enums import ModelType

from megatron_ext.routing.pipeline import order
from support.ranks import world

SCHEDULES = {
    2: [(1, 1), (1, 5), (2, 2), (2, 4), (2, 5), (3, 3), (3, 7)],  # (virtual, micro-batches)
    4: [(1, 2), (1, 6), (2, 8), (2, 6), (2, 9)],
}


@pytest.mark.parametrize("pipeline", SCHEDULES)
def test_every_rank_works_in_the_order_that_megatron_core_gives_it(tmp_path, pipeline):
    for rank, recorded in enumerate(world(pipeline, _record, pipeline, SCHEDULES[pipeline], folder=tmp_path)):
        for (virtual, micro_batches), (tasks, gradients) in zip(SCHEDULES[pipeline], recorded):
            assert tasks == [tuple(task) for task in order(rank, pipeline, virtual, micro_batches)]
            # Each chunk multiplies by its weight 2: the gradient is that of all micro-batches, each once.
            assert gradients == [sum(range(1, micro_batches + 1)) * 2 ** (pipeline * virtual - 1)] * virtual


def _record(pipeline: int, schedules: list[tuple[int, int]]) -> list:
    """The tasks of this rank in each schedule, and the gradient of each of its chunks."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    recorded = []
    for virtual, micro_batches in schedules:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(1, pipeline, virtual if virtual > 1 else None)
        tasks = []
        config = _config(pipeline, virtual, micro_batches)
        chunks = [_Chunk(config, number, tasks) for number in range(virtual)]
        rows = [iter(range(micro_batches)) for _ in chunks]
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=rows if virtual > 1 else rows[0],
            model=chunks if virtual > 1 else chunks[0],
            num_microbatches=micro_batches,
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
        recorded.append((tasks, [chunk.weight.grad.item() for chunk in chunks]))
    return recorded


def _config(pipeline: int, virtual: int, micro_batches: int):
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ext.routing.pipeline import group_size

    interleaved = virtual > 1
    return TransformerConfig(
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


def _forward_step(rows, chunk):
    return chunk(next(rows)), lambda output: (output.sum(), torch.tensor(1), {})


class _Chunk(torch.nn.Module):
    """Multiplies the number of its row, or what it receives, by a weight, and notes when."""

    def __init__(self, config, number: int, tasks: list):
        super().__init__()
        self.config, self.number, self.tasks = config, number, tasks
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.received, self.model_type = None, ModelType.encoder_or_decoder

    def set_input_tensor(self, tensor) -> None:
        self.received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, row: int):
        self.tasks.append((True, self.number, row))
        given = torch.full((1, 1, 1), row + 1.0) if self.received is None else self.received
        return _Noted.apply(given * self.weight, self.tasks, (False, self.number, row))


class _Noted(torch.autograd.Function):
    """The identity, whose backward pass notes a task."""

    @staticmethod
    def forward(ctx, tensor, tasks, task):
        ctx.tasks, ctx.task = tasks, task
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        ctx.tasks.append(ctx.task)
        return gradient, None, None

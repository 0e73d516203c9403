"""Small worlds of gloo ranks that train Megatron-Core's own GPTModel, for the checkpoint tests.

A fork server imports Megatron-Core once, so a world starts in about a second, which is what lets the tests kill many.
"""

import gc
import multiprocessing
import os
import random
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

VOCABULARY, SEQUENCE, ROWS = 64, 16, 4


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    distributed_optimizer: bool = False
    bf16: bool = False
    tied: bool = True
    dropout: float = 0.0
    """With dropout, equal losses need equal generators."""
    layers: int = 4
    hidden_size: int = 16


def world(size: int, function, *args, folder: Path, wait: bool = True):
    """Call ``function(*args)`` on ``size`` ranks of a new world.

    Returns:
        What it returned on each rank; with ``wait=False`` the processes and the pipes that they answer into.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["megatron_ext.checkpoints.checkpointer", "megatron.core.models.gpt.gpt_layer_specs"]
    )
    store = folder / f"store_{random.randrange(1 << 60):x}"
    pipes, processes = [], []
    for rank in range(size):
        mine, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=_rank, args=(theirs, store, rank, size, function, args)))
        processes[-1].start()
        theirs.close()
        pipes.append(mine)
    if not wait:
        return processes, pipes
    try:
        return [_answer(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.join(20)
            process.kill()


def _answer(pipe):
    if not pipe.poll(120):
        raise TimeoutError("a rank did not answer")
    result, failure = pipe.recv()
    if failure:
        raise AssertionError(failure)
    return result


def _rank(pipe, store: Path, rank: int, size: int, function, args) -> None:
    warnings.simplefilter("ignore")
    gc.freeze()  # the distributed optimizer collects garbage at every save
    import torch
    import torch.distributed as dist

    from megatron_ext import cpu

    torch.set_num_threads(1)
    cpu.enter()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        pipe.send((function(*args), None))
    except Exception:
        pipe.send((None, traceback.format_exc()))
        os._exit(1)
    dist.destroy_process_group()


@dataclass
class Run:
    """A model with its optimizer under a layout, and the data: rows that depend on the iteration alone."""

    layout: Layout
    seed: int = 1
    chunks: list = field(init=False)

    def __post_init__(self):
        import numpy as np
        import torch
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        cut, dtype = self.layout, torch.bfloat16 if self.layout.bf16 else torch.float32
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            cut.tensor, cut.pipeline, cut.virtual_pipeline if cut.virtual_pipeline > 1 else None
        )
        for seed in (random.seed, np.random.seed, torch.manual_seed, tensor_parallel.model_parallel_cuda_manual_seed):
            seed(self.seed)
        sharded = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=cut.distributed_optimizer
        )
        self.config = self._config(dtype)
        stages = range(cut.virtual_pipeline) if cut.virtual_pipeline > 1 else [None]
        models = [self._model(stage) for stage in stages]
        if cut.bf16:
            models = [Float16Module(self.config, m) for m in models]
        self.chunks = [
            DistributedDataParallel(self.config, sharded, m, disable_bucketing=i > 0) for i, m in enumerate(models)
        ]
        optimizer = OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.1,
            clip_grad=1.0,
            bf16=cut.bf16,
            params_dtype=dtype,
            use_distributed_optimizer=cut.distributed_optimizer,
        )
        self.optimizer = get_megatron_optimizer(optimizer, self.chunks)

    def _config(self, dtype):
        import torch
        from megatron.core.transformer.transformer_config import TransformerConfig

        cut = self.layout
        return TransformerConfig(
            num_layers=cut.layers,
            hidden_size=cut.hidden_size,
            num_attention_heads=4,
            ffn_hidden_size=32,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            hidden_dropout=cut.dropout,
            attention_dropout=cut.dropout,
            tensor_model_parallel_size=cut.tensor,
            pipeline_model_parallel_size=cut.pipeline,
            virtual_pipeline_model_parallel_size=cut.virtual_pipeline if cut.virtual_pipeline > 1 else None,
            # Batched, the two messages between two stages that are each other's neighbours on both sides get mixed up.
            overlap_p2p_comm=cut.virtual_pipeline > 1,
            batch_p2p_comm=cut.virtual_pipeline == 1,
            pipeline_dtype=dtype,
            params_dtype=dtype,
            bf16=cut.bf16,
            use_cpu_initialization=True,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
        )

    def _model(self, stage):
        from megatron.core import parallel_state
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel

        edges = {"ignore_virtual": False, "vp_stage": stage}
        return GPTModel(
            config=self.config,
            transformer_layer_spec=get_gpt_layer_local_spec(),
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            pre_process=parallel_state.is_pipeline_first_stage(**edges),
            post_process=parallel_state.is_pipeline_last_stage(**edges),
            share_embeddings_and_output_weights=self.layout.tied,
            position_embedding_type="rope",
            vp_stage=stage,
        )

    def train(self, first: int, last: int) -> list[float]:
        """Do iterations ``first`` to ``last``; their losses over the global batch, the same on every rank."""
        return [self._step(iteration) for iteration in range(first, last + 1)]

    def _step(self, iteration: int) -> float:
        import torch
        import torch.distributed as dist
        from megatron.core import parallel_state
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func

        replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        rows = torch.randint(
            VOCABULARY, (ROWS, SEQUENCE + 1), generator=torch.Generator().manual_seed(iteration)
        ).chunk(replicas)[replica]
        micro_batches = [row[None] for row in rows]
        mask = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool), 1)
        positions = torch.arange(SEQUENCE)[None]

        def forward(batches, model):
            tokens = next(batches)
            output = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
            return output, lambda losses: (losses.float().mean(), {"loss": losses.float().mean().detach()})

        self.config.finalize_model_grads_func = finalize_model_grads
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(micro_batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=False,
        )
        self.optimizer.step()
        loss = torch.zeros(())
        if outputs and parallel_state.get_tensor_model_parallel_rank() == 0:
            loss = sum(o["loss"] for o in outputs) / ROWS
        dist.all_reduce(loss)
        return float(loss)

    def weights(self) -> dict:
        """This rank's parameters by name, as bytes that can be compared."""
        import torch

        return {
            f"{i}.{name}": p.detach().view(torch.uint8).numpy().tobytes()
            for i, chunk in enumerate(self.chunks)
            for name, p in chunk.named_parameters()
        }

"""Megatron-Core's own GPTModel with its optimizer, small enough for tests that train and save it many times."""

import random
from dataclasses import dataclass, field

VOCABULARY, SEQUENCE, ROWS = 64, 16, 4


@dataclass(frozen=True)
class Layout:
    """How the model is cut over ranks, and its shape."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    distributed_optimizer: bool = False
    bf16: bool = False
    tied: bool = True
    dropout: float = 0.0
    """With dropout, losses are equal only if random generators are."""
    layers: int = 4
    hidden_size: int = 16


@dataclass
class TrainedGPT:
    """A model with its optimizer under a layout. Its rows depend on the iteration alone."""

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

        layout, dtype = self.layout, torch.bfloat16 if self.layout.bf16 else torch.float32
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            layout.tensor, layout.pipeline, layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
        )
        for seed in (random.seed, np.random.seed, torch.manual_seed, tensor_parallel.model_parallel_cuda_manual_seed):
            seed(self.seed)
        sharded = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=layout.distributed_optimizer
        )
        self.config = self._config(dtype)
        stages = range(layout.virtual_pipeline) if layout.virtual_pipeline > 1 else [None]
        models = [self._model(stage) for stage in stages]
        if layout.bf16:
            models = [Float16Module(self.config, m) for m in models]
        self.chunks = [
            DistributedDataParallel(self.config, sharded, m, disable_bucketing=i > 0) for i, m in enumerate(models)
        ]
        optimizer = OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.1,
            clip_grad=1.0,
            bf16=layout.bf16,
            params_dtype=dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
        )
        self.optimizer = get_megatron_optimizer(optimizer, self.chunks)

    def _config(self, dtype):
        import torch
        from megatron.core.transformer.transformer_config import TransformerConfig

        layout = self.layout
        return TransformerConfig(
            num_layers=layout.layers,
            hidden_size=layout.hidden_size,
            num_attention_heads=4,
            ffn_hidden_size=32,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            hidden_dropout=layout.dropout,
            attention_dropout=layout.dropout,
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            # Two stages are neighbours on both sides; batched, the messages of the two sides would be confused.
            overlap_p2p_comm=layout.virtual_pipeline > 1,
            batch_p2p_comm=layout.virtual_pipeline == 1,
            pipeline_dtype=dtype,
            params_dtype=dtype,
            bf16=layout.bf16,
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
        """Run iterations ``first`` to ``last``. The losses, over the global batch, are the same on every rank."""
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
        """This rank's parameters by name, as bytes, which can be compared."""
        import torch

        return {
            f"{i}.{name}": p.detach().view(torch.uint8).numpy().tobytes()
            for i, chunk in enumerate(self.chunks)
            for name, p in chunk.named_parameters()
        }

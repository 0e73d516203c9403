"""Model and optimizer of a run, both of them Megatron-Core's."""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides

from megatron_ext import cpu
from megatron_ext.config import Config
from megatron_ext.training.step import configure
from megatron_ext.transformer.model import build_chunks


def build_model(config: Config, vocab_size: int) -> list[DistributedDataParallel]:
    """This rank's model chunks with initial weights, wrapped for data parallelism."""
    chunks = build_chunks(config, vocab_size)
    configure(chunks[0].config)
    for chunk in chunks[1:]:
        chunk.config = chunks[0].config
    data_parallel = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, data_parallel, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    if config.parallel.overlap:
        # Gradients are reduced as they become ready, but only those of a step's last micro-batch.
        no_sync = [chunk.no_sync for chunk in wrapped]
        chunks[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def build_optimizer(config: Config, chunks: list[DistributedDataParallel]):
    """AdamW, fused when Transformer Engine or Apex is there, with float32 master weights under bf16."""
    wanted, bf16 = config.optimizer, config.training.precision == "bf16"
    made = MegatronOptimizerConfig(
        optimizer="adam",
        lr=wanted.lr,
        min_lr=wanted.min_lr,
        weight_decay=wanted.weight_decay,
        adam_beta1=wanted.beta1,
        adam_beta2=wanted.beta2,
        adam_eps=wanted.eps,
        clip_grad=wanted.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(made, chunks, config_overrides=get_standard_config_overrides(made))
    if cpu.available():
        for group in optimizer.param_groups:
            group["fused"] = True  # torch's one-pass kernel; Megatron-Core asks for it only on GPUs
    return optimizer

"""Builds a run's model and its Megatron-Core optimizer."""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer

from megatron_ext.checkpoints.state import single_optimizer
from megatron_ext.config import Config
from megatron_ext.distributed import gather_weights
from megatron_ext.training import parameter_groups
from megatron_ext.training.step import configure
from megatron_ext.transformer.layer import UnifiedLayer
from megatron_ext.transformer.model import build_chunks
from megatron_ext.transformer.resolved import ResolvedConfig


class DataParallel(DistributedDataParallel):
    """Megatron-Core's class, with the guarantee that no weight is read before it is gathered.

    With the distributed optimizer and overlap, new weights are gathered during the next forward pass: after a step, a
    replica has only its own share of them.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for layer in self.modules() if self.use_forward_hook else ():
            if isinstance(layer, UnifiedLayer):
                layer.register_forward_pre_hook(self._wait_for_weights)

    def _wait_for_weights(self, layer: UnifiedLayer, inputs: tuple) -> None:
        """Megatron-Core waits when a module is called, but a layer also uses weights of modules it never calls."""
        for group in dict.fromkeys(self.param_to_bucket_group[p] for p in layer.parameters() if p.requires_grad):
            group.finish_param_sync()

    def train(self, mode: bool = True) -> "DataParallel":
        """Gather the weights before evaluation, where replicas may call different layers, or not equally often."""
        if not mode:
            gather_weights([self])
        return super().train(mode)


def _gathers_ahead(config: Config) -> bool:
    return config.parallel.overlap and config.parallel.distributed_optimizer


def build_model(resolved: ResolvedConfig, code_vectors: torch.Tensor | None = None) -> list[DistributedDataParallel]:
    """This rank's model chunks with initial weights, wrapped for data parallelism; ``code_vectors`` as for
    :func:`~megatron_ext.transformer.model.build_chunks`.

    Raises:
        UserError: ``optimizer.groups`` do not fit the model.
    """
    config = resolved.config
    parallel = config.parallel
    chunks = build_chunks(resolved, code_vectors)
    parameter_groups.assign(chunks, config)
    configure(chunks[0].config)
    for chunk in chunks[1:]:
        chunk.config = chunks[0].config
    data_parallel = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap,
        overlap_param_gather=_gathers_ahead(config),
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    wrapped = [
        DataParallel(chunk.config, data_parallel, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
    ]
    if parallel.overlap:
        # Gradients are reduced as they become ready, but only those of a step's last micro-batch.
        no_sync = [chunk.no_sync for chunk in wrapped]
        chunks[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def build_optimizer(config: Config, chunks: list[DistributedDataParallel]):
    """AdamW, fused where Transformer Engine or Apex is installed, with float32 master weights under bf16."""
    settings, bf16 = config.optimizer, config.training.precision == "bf16"
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=_gathers_ahead(config),
    )
    optimizer = get_megatron_optimizer(
        megatron_config, chunks, config_overrides=parameter_groups.overrides(megatron_config, settings)
    )
    if isinstance(single_optimizer(optimizer).optimizer, torch.optim.Adam | torch.optim.AdamW):
        for group in optimizer.param_groups:
            group["fused"] = True  # torch's one-pass kernel, which Megatron-Core does not enable
    return optimizer

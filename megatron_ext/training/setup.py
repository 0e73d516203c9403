"""The parts of a run: data, model, optimizer, checkpoints, and where it goes on."""

import dataclasses
import math
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides

from megatron_ext import cpu
from megatron_ext.config import Config
from megatron_ext.data import build_mixture
from megatron_ext.errors import UserError
from megatron_ext.routing.plan import Plan
from megatron_ext.training import distributed
from megatron_ext.training.checkpoint import Checkpointer, load_weights
from megatron_ext.training.loop import Progress, Run
from megatron_ext.training.step import configure
from megatron_ext.transformer.model import build_chunks
from megatron_ext.vocabulary import Vocabulary

# The embedding is padded to a multiple of this, whatever the tensor-parallel size, so that it reshards.
VOCABULARY_MULTIPLE = 128


def build_run(config: Config) -> Run:
    """Everything that a training run needs, resumed where the output folder says.

    Raises:
        UserError: a file, key or checkpoint that does not fit, named.
    """
    if not config.data.vocabulary:
        raise UserError("config: 'data.vocabulary' is empty; name a folder made by tools/train_tokenizer.py")
    if not config.data.train:
        raise UserError("config: 'data.train' is empty; name data sets made by tools/preprocess_vq.py")
    plan = Plan.preset(config.plan.preset, config.model.num_layers)
    vocabulary = Vocabulary(config.data.vocabulary)
    train_data = build_mixture(config.data.train, config.data, vocabulary, train=True)
    validation_data = None
    if config.data.validation:
        validation_data = build_mixture(config.data.validation, config.data, vocabulary, train=False)
    chunks = build_model(config, padded_vocabulary(config, vocabulary))
    run = Run(
        config=config,
        plan=plan,
        vocabulary=vocabulary,
        train_data=train_data,
        validation_data=validation_data,
        chunks=chunks,
        optimizer=build_optimizer(config, chunks),
        checkpoints=Checkpointer(
            Path(config.output) / "checkpoints", config.checkpoint.keep, config.checkpoint.asynchronous
        ),
        progress=Progress(),
        identity=_identity(config, vocabulary),
    )
    _resume(run)
    return run


def padded_vocabulary(config: Config, vocabulary: Vocabulary) -> int:
    """Rows of the embedding."""
    return vocabulary.padded_size(math.lcm(VOCABULARY_MULTIPLE, config.parallel.tensor))


def _identity(config: Config, vocabulary: Vocabulary) -> dict:
    model = dataclasses.asdict(config.model)
    for free in ("implementation", "init_std"):
        del model[free]
    return {"model": model, "fingerprints": {"vocabulary": vocabulary.fingerprint}}


def _resume(run: Run) -> None:
    """Go on from the newest checkpoint of the output folder, or start from another run's weights."""
    wanted = run.config.checkpoint
    path = run.checkpoints.newest() if wanted.resume else None
    if path:
        state = run.checkpoints.load(path, run.chunks, run.optimizer, run.identity)
        run.progress = Progress(**state["progress"])
        distributed.report(f"resumed from {path}")
    elif wanted.load:
        load_weights(Path(wanted.load), run.chunks, run.identity)
        run.optimizer.reload_model_params()
        distributed.report(f"weights from {wanted.load}")


def build_model(config: Config, vocab_size: int) -> list[DistributedDataParallel]:
    """This rank's model chunks with initial weights, wrapped for data parallelism."""
    chunks = build_chunks(config, vocab_size)
    configure(chunks[0].config)
    for chunk in chunks[1:]:
        chunk.config = chunks[0].config
    data_parallel = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap,
        overlap_param_gather=config.parallel.overlap and config.parallel.distributed_optimizer,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    return [
        DistributedDataParallel(chunk.config, data_parallel, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]


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

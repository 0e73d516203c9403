"""Training steps of other libraries, over the same rows of one document each."""

import dataclasses
from collections.abc import Callable

import torch

from megatron_ext import distributed
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.transformer.resolved import resolve
from training_step.weights import fill_on_device


def stock_megatron(config: Config, vocab_size: int, batch: Batch) -> Callable[[], float]:
    """Megatron-Core's GPTModel with its own layer spec, schedule, data-parallel wrapper and optimizer."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_ext.training.setup import build_optimizer

    chunk = _stock_chunk(config, vocab_size)
    optimizer = build_optimizer(config, [chunk])
    device, rows, length = distributed.device(), config.training.micro_batch_size, config.data.sequence_length
    causal = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None, None]
    whole = batch.to(device)
    micro_batches = [whole.rows(start, start + rows) for start in range(0, batch.shape[0], rows)]

    def forward(batches, chunk):
        batch = next(batches)
        losses = chunk(batch.tokens, batch.positions, causal, labels=batch.labels)
        return losses, lambda losses: ((loss := losses.mean()), {"loss": loss.detach()})

    def step() -> float:
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        results = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(micro_batches),
            model=[chunk],
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=False,
        )
        optimizer.step()
        return float(sum(result["loss"] for result in results) / len(results))

    return step


def _stock_chunk(config: Config, vocab_size: int):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megatron_ext.transformer.specs import transformer_config

    resolved = resolve(config)
    settings = dataclasses.replace(transformer_config(resolved), use_te_activation_func=False)
    settings.finalize_model_grads_func = finalize_model_grads
    if resolved.implementation == "transformer_engine":
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(
        settings,
        spec,
        vocab_size,
        config.data.sequence_length,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
    ).cuda()
    fill_on_device([model], config.model, config.training.seed)
    data_parallel = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap,
        overlap_param_gather=config.parallel.overlap and config.parallel.distributed_optimizer,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    chunk = DistributedDataParallel(settings, data_parallel, model)
    if config.parallel.overlap:
        settings.no_sync_func = chunk.no_sync
    return chunk


def hugging_face(config: Config, vocab_size: int, batch: Batch) -> Callable[[], float]:
    """Hugging Face's Llama with its scaled-dot-product attention and torch's fused AdamW, under bf16 without float32
    master weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.model.hidden_size,
        intermediate_size=config.model.ffn_hidden_size,
        num_hidden_layers=config.model.num_layers,
        num_attention_heads=config.model.num_attention_heads,
        num_key_value_heads=config.model.num_query_groups,
        max_position_embeddings=config.data.sequence_length,
        tie_word_embeddings=config.model.tie_embeddings,
        use_cache=False,
        attn_implementation="sdpa",
    )
    device, rows = distributed.device(), config.training.micro_batch_size
    with device:
        model = LlamaForCausalLM(shape)
    model = model.to(torch.bfloat16 if config.training.precision == "bf16" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    micro_batches = batch.tokens.to(device).split(rows)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for tokens in micro_batches:
            loss = model(input_ids=tokens, labels=tokens).loss / len(micro_batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(total)

    return step

"""Seconds per training step against stock Megatron-Core and Hugging Face Llama of the same size, in one run.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --threads 2 --repeats 15 --json benchmarks/results/step_time.json

The three take turns on the same tokens (one document of 256 image and 24 text tokens a row), each doing a whole step:
forward, backward, gradient clipping, AdamW. The ratio of a round is ours over theirs; its median is the figure.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

from megatron_ext import command_line, config_file, cpu
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch

DOCUMENT = 256 + 24
VOCABULARY = 4096


def configuration(arguments) -> Config:
    """The size under test as a run's configuration."""
    return config_file.load(
        Config,
        [],
        [
            f"model.num_layers={arguments.layers}",
            f"model.hidden_size={arguments.hidden_size}",
            f"model.num_attention_heads={arguments.hidden_size // 64}",
            f"data.sequence_length={DOCUMENT}",
            f"training.micro_batch_size={arguments.rows}",
            f"training.global_batch_size={arguments.rows}",
            f"training.precision={arguments.precision}",
        ],
    )


def random_rows(rows: int) -> Batch:
    """Rows of one document each; the same kind of row for all three."""
    batch = Batch(**{name: torch.zeros(rows, DOCUMENT, dtype=Batch.DTYPES[name]) for name in Batch.names()})
    batch.tokens[:] = torch.randint(0, VOCABULARY, (rows, DOCUMENT))
    batch.labels = batch.tokens.roll(-1, 1)
    batch.positions[:] = torch.arange(DOCUMENT)
    batch.loss_mask[:] = 1
    return batch


def ours(config: Config) -> Callable[[Batch], float]:
    """A training step of this project."""
    from megatron_ext.training.setup import build_model, build_optimizer
    from megatron_ext.training.step import train_step

    chunks = build_model(config, VOCABULARY)
    optimizer = build_optimizer(config, chunks)
    return lambda batch: train_step(chunks, optimizer, batch, config).loss


def stock_megatron(config: Config) -> Callable[[Batch], float]:
    """Megatron-Core's GPTModel with its own layer spec, schedule, data-parallel wrapper and optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_ext.training.setup import build_optimizer
    from megatron_ext.transformer.specs import implementation, transformer_config

    settings = dataclasses.replace(transformer_config(config), use_te_activation_func=False)
    settings.finalize_model_grads_func = finalize_model_grads
    if implementation(config) == "transformer_engine":
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(settings, spec, VOCABULARY, DOCUMENT, position_embedding_type="rope").cuda()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    chunks = [DistributedDataParallel(settings, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)]
    optimizer = build_optimizer(config, chunks)
    causal = torch.ones(DOCUMENT, DOCUMENT, dtype=torch.bool, device="cuda").triu(1)[None, None]

    def forward(batches, chunk):
        batch = next(batches)
        losses = chunk(batch.tokens, batch.positions, causal, labels=batch.labels)
        return losses, lambda losses: ((loss := losses.mean()), {"loss": loss.detach()})

    def step(batch: Batch) -> float:
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        (result,) = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([batch]),
            model=chunks,
            num_microbatches=1,
            seq_length=DOCUMENT,
            micro_batch_size=batch.shape[0],
            forward_only=False,
        )
        optimizer.step()
        return float(result["loss"])

    return step


def hugging_face(config: Config) -> Callable[[Batch], float]:
    """Hugging Face's Llama with its scaled-dot-product attention and torch's fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.model.hidden_size,
            intermediate_size=config.model.ffn_hidden_size,
            num_hidden_layers=config.model.num_layers,
            num_attention_heads=config.model.num_attention_heads,
            num_key_value_heads=config.model.num_query_groups,
            max_position_embeddings=DOCUMENT,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    model = model.to(torch.bfloat16 if config.training.precision == "bf16" else torch.float32).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)

    def step(batch: Batch) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=batch.tokens, labels=batch.tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def measure(steps: dict[str, Callable[[Batch], float]], batch: Batch, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; the steps take turns, after two rounds that do not count."""
    seconds = {name: [] for name in steps}
    for repeat in command_line.progress(range(repeats + 2), desc="rounds"):
        for name, step in steps.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            step(batch)
            torch.cuda.synchronize()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "python benchmarks/step_time.py --repeats 15")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4, help="documents per step")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    arguments = parser.parse_args()

    from megatron_ext.training import distributed

    torch.set_num_threads(arguments.threads)
    config = configuration(arguments)
    config.validate(world_size=1)
    distributed.initialize(config)
    batch = random_rows(arguments.rows).to("cpu" if cpu.available() else "cuda")
    steps = {"ours": ours(config), "stock Megatron-Core": stock_megatron(config), "Hugging Face": hugging_face(config)}
    seconds = measure(steps, batch, arguments.repeats)
    results = {}
    for name, values in seconds.items():
        ratio = statistics.median(mine / other for mine, other in zip(seconds["ours"], values))
        results[name] = {"median_seconds": statistics.median(values), "ours_over_this": ratio}
        print(f"{name:20} {statistics.median(values):8.4f} s a step   ours / this {ratio:.3f}")
    if arguments.json:
        command_line.write_json(
            arguments.json, {"arguments": {k: str(v) for k, v in vars(arguments).items()}} | results
        )
    distributed.shut_down()


if __name__ == "__main__":
    command_line.run(main)

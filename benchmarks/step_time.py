"""Seconds and memory of a training step: plans against their FLOPs, and ours against others, in one run.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --json benchmarks/results/step_time.json
    python benchmarks/step_time.py --only himix,hmgen --profile hmgen

A document has 256 image and 24 text tokens, a row holds one or as many as fit, and a step is a whole one: forward,
backward, gradient clipping, AdamW. The other libraries see the same rows, as one document each. The steps take turns;
the ratio of a round is a step over its base and the median ratio is the figure. A plan should take as long as its FLOPs
say: ``time / FLOPs`` is the ratio of seconds over the ratio of FLOPs. Memory is the peak of a step beyond weights,
gradients and the optimizer's state.
"""

import dataclasses
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext import command_line, config_file, cpu
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.routing.cost import TRAINING_PER_FORWARD, count, forward_flops
from megatron_ext.routing.plan import Plan
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task

IMAGE, TEXT = 256, 24
DOCUMENT = IMAGE + TEXT
VOCABULARY = 4096


@dataclass
class Case:
    """One kind of step.

    Attributes:
        rows: what the rows hold: ``understanding`` and ``generation`` documents have their task's loss,
            ``everything`` has loss on every token.
        base: the case that it is measured against.
        plan: settings of our plan; None for another library.
        limit: what the figure should not exceed.
    """

    rows: str
    base: str
    plan: list[str] | None
    limit: float | None = None


CASES = {
    "dense": Case("everything", "dense", []),
    "stock Megatron-Core": Case("everything", "dense", None, 1.05),
    "Hugging Face": Case("everything", "dense", None, 1.0),
    "dense on understanding": Case("understanding", "dense on understanding", []),
    "himix": Case("understanding", "dense on understanding", ["plan.preset=himix"], 1.15),
    "dense on generation": Case("generation", "dense on generation", []),
    "hmgen": Case("generation", "dense on generation", ["plan.preset=hmgen"], 1.10),
    "separate": Case("generation", "dense on generation", ["plan.projections.kind=separate"], 1.10),
    "decomposed": Case("generation", "dense on generation", ["plan.projections.kind=decomposed"], 1.10),
}


def configuration(arguments, plan: list[str]) -> Config:
    """The size under test as a run's configuration."""
    shape = [
        f"model.num_layers={arguments.layers}",
        f"model.hidden_size={arguments.hidden_size}",
        f"model.num_attention_heads={arguments.hidden_size // 64}",
    ]
    return config_file.load(
        Config,
        arguments.config,
        [
            *([] if arguments.config else shape),
            f"data.sequence_length={arguments.sequence}",
            f"training.fp8={arguments.fp8}",
            f"training.micro_batch_size={arguments.rows}",
            f"training.global_batch_size={arguments.rows}",
            f"training.precision={arguments.precision}",
            *plan,
        ],
    )


def random_rows(kind: str, rows: int, length: int) -> Batch:
    """Rows of ``length`` tokens, as many documents as fit and padding; ``kind`` as in :class:`Case`."""
    batch = Batch.zeros(rows, length)
    batch.tokens[:] = torch.randint(0, VOCABULARY, (rows, length))
    batch.labels = batch.tokens.roll(-1, 1)
    number, position = torch.arange(length) // DOCUMENT, torch.arange(length) % DOCUMENT
    batch.positions[:] = position
    batch.modality[:] = (position >= TEXT if kind == "generation" else position < IMAGE) * Modality.IMAGE
    batch.task[:] = Task.GENERATION if kind == "generation" else Task.UNDERSTANDING
    batch.document[:] = torch.where(number < length // DOCUMENT, number, PADDING_DOCUMENT)
    batch.loss_mask[:] = {
        "everything": 1,
        "understanding": batch.modality == Modality.TEXT,
        "generation": batch.modality == Modality.IMAGE,
    }[kind]
    batch.loss_mask[batch.document == PADDING_DOCUMENT] = 0
    return batch


def ours(config: Config) -> Callable[[Batch], float]:
    """A training step of this project."""
    from megatron_ext.training.prepare import prepare
    from megatron_ext.training.setup import build_model, build_optimizer
    from megatron_ext.training.step import train_step

    chunks = build_model(config, VOCABULARY)
    optimizer = build_optimizer(config, chunks)
    return lambda batch: train_step(chunks, optimizer, prepare(batch, config), config).loss


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
    length = config.data.sequence_length
    model = GPTModel(settings, spec, VOCABULARY, length, position_embedding_type="rope").cuda()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    chunks = [DistributedDataParallel(settings, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)]
    optimizer = build_optimizer(config, chunks)
    causal = torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)[None, None]

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
            seq_length=length,
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
            max_position_embeddings=config.data.sequence_length,
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


class PeakMemory(TorchDispatchMode):
    """Most bytes alive at once among the storages made inside, on any device."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        known = {id(x.untyped_storage()) for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self._known | known:
                self._known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._release, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return made

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def measure(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; the steps take turns, after a round that does not count."""
    seconds = {name: [] for name in steps}
    for repeat in command_line.progress(range(repeats + 1), desc="rounds"):
        for name, step in steps.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def flops(arguments, name: str, batch: Batch) -> int:
    """Forward FLOPs of a case of ours."""
    config = configuration(arguments, CASES[name].plan)
    plan = Plan.of(config.plan, config.model.num_layers)
    return forward_flops(config.model, VOCABULARY, plan, count(batch, plan))


def peak_bytes(step: Callable[[], float]) -> int:
    """Peak memory of one step beyond what is there before it."""
    with PeakMemory() as memory:
        step()
    return memory.peak


def table(results: dict[str, dict]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| step | against | seconds | ratio | FLOP ratio | time / FLOPs | limit | peak memory ratio | MFU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in results.items():
        cells = [f"{r['seconds']:.3f}", f"{r['ratio']:.3f}"]
        cells += [f"{r[key]:.3f}" if r.get(key) else "" for key in ("flop_ratio", "time_per_flop")]
        cells += [f"{r['limit']:.2f}" if r["limit"] else "", f"{r['memory_ratio']:.3f}"]
        cells.append(f"{r['mfu']:.3f}" if r.get("mfu") else "")
        lines.append(f"| {name} | {CASES[name].base} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "python benchmarks/step_time.py --repeats 7")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--config", nargs="*", default=[], help="take the model's shape from these files instead")
    parser.add_argument("--sequence", type=int, default=DOCUMENT, help="tokens in a row (default: one document)")
    parser.add_argument("--rows", type=int, default=16, help="rows per step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--fp8", choices=["none", "delayed", "current", "mxfp8"], default="none")
    parser.add_argument("--only", default=",".join(CASES), help="comma-separated cases; their bases come along")
    parser.add_argument("--profile", choices=CASES, help="print where the time of this case goes, and nothing else")
    arguments = parser.parse_args()

    from megatron_ext.training import distributed
    from megatron_ext.training.devices import model_flops_utilisation

    torch.set_num_threads(arguments.threads)
    config = configuration(arguments, [])
    config.validate(world_size=1)
    distributed.initialize(config)
    wanted = [arguments.profile] if arguments.profile else arguments.only.split(",")
    wanted = [name for name in CASES if name in wanted or any(CASES[w].base == name for w in wanted)]
    rows = {
        kind: random_rows(kind, arguments.rows, arguments.sequence)
        for kind in ("everything", "understanding", "generation")
    }
    device = "cpu" if cpu.available() else "cuda"
    others = {"stock Megatron-Core": stock_megatron, "Hugging Face": hugging_face}
    steps = {}
    for name in wanted:
        case = CASES[name]
        step = others[name](config) if case.plan is None else ours(configuration(arguments, case.plan))
        steps[name] = partial(step, rows[case.rows].to(device))
    if arguments.profile:
        steps[arguments.profile]()
        with torch.profiler.profile() as profile:
            steps[arguments.profile]()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))
        return distributed.shut_down()
    seconds = measure(steps, arguments.repeats)
    memory = {name: peak_bytes(step) for name, step in steps.items()}
    results = {}
    for name in wanted:
        case = CASES[name]
        pairs = list(zip(seconds[name], seconds[case.base]))
        theirs = case.plan is None  # then the figure is ours over theirs
        result = {
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(b / a if theirs else a / b for a, b in pairs),
            "limit": case.limit,
            "memory_bytes": memory[name],
            "memory_ratio": memory[name] / memory[case.base],
        }
        if not theirs:
            work = TRAINING_PER_FORWARD * flops(arguments, name, rows[case.rows])
            device_name = "cpu" if cpu.available() else torch.cuda.get_device_name()
            result["mfu"] = model_flops_utilisation(work, result["seconds"], 1, device_name)
            result["flop_ratio"] = flops(arguments, name, rows[case.rows]) / flops(
                arguments, case.base, rows[case.rows]
            )
            result["time_per_flop"] = result["ratio"] / result["flop_ratio"]
        results[name] = result
    print(table(results))
    print("For other libraries the ratio is ours over theirs, memory theirs over ours.")
    if arguments.json:
        command_line.write_json(
            arguments.json, {"arguments": {k: str(v) for k, v in vars(arguments).items()}} | results
        )
    distributed.shut_down()


if __name__ == "__main__":
    command_line.run(main)

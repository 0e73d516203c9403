"""Seconds and memory of a training step: plans against their FLOPs, and ours against others, in one run.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --json step_time.json
    python benchmarks/step_time.py --only himix,hmgen --profile hmgen

A document has 256 image and 24 text tokens, a row holds one or as many as fit, and a step is a whole one: forward,
backward, gradient clipping, AdamW. Against other libraries a row is one document. A step takes turns with its base; the
ratio of a round is a step over its base and the median ratio is the figure. A plan, and image tokens of 4 codes, should
take as long as their FLOPs say: ``time / FLOPs`` is the ratio of seconds over the ratio of FLOPs. Memory is the peak of
a step beyond weights, gradients and the optimizer's state. ``optimizer`` and ``output head`` are the shares of a step
of what no plan makes shorter: gradient norm, clipping and AdamW; and the last matrix (the depth head) and the loss.
"""

import argparse

import torch

from megatron_ext import command_line, cpu, files
from megatron_ext.training.config_checks import validate
from training_step.cases import CASES, Size, with_bases

LLAMA_3_VOCABULARY = 128256


def size_of(arguments: argparse.Namespace) -> Size:
    """The model and step that the command line describes."""
    on_cpu = cpu.available()
    shape = [
        f"model.num_layers={arguments.layers}",
        f"model.hidden_size={arguments.hidden_size}",
        f"model.num_attention_heads={arguments.hidden_size // 64}",
    ]
    settings = [
        *([] if arguments.config else shape),
        f"model.implementation={arguments.implementation}",
        f"training.precision={arguments.precision}",
        f"training.fp8={arguments.fp8}",
    ]
    return Size(
        settings=tuple(settings),
        files=tuple(arguments.config),
        vocab_size=arguments.vocabulary or (4096 if on_cpu else LLAMA_3_VOCABULARY),
        rows=arguments.rows,
        sequence=arguments.sequence,
        micro_batches=arguments.micro_batches or (2 if on_cpu else 4),
    )


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "python benchmarks/step_time.py --repeats 7")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--config", nargs="*", default=[], help="take the model's shape from these files instead")
    parser.add_argument("--vocabulary", type=int, help="default: 4096 on a CPU, Llama 3's 128256 on a GPU")
    parser.add_argument("--sequence", type=int, default=280, help="tokens in a row (default: one document, 280)")
    parser.add_argument("--rows", type=int, default=16, help="rows per micro-batch")
    parser.add_argument("--micro-batches", type=int, help="per step; default: 2 on a CPU, 4 on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--fp8", choices=["none", "delayed", "current", "mxfp8"], default="none")
    parser.add_argument("--implementation", choices=["auto", "local", "transformer_engine"], default="auto")
    parser.add_argument("--only", default=",".join(CASES), help="comma-separated cases; their bases come along")
    parser.add_argument("--profile", choices=CASES, help="print where the time of this case goes, and nothing else")
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    if unknown := [name for name in only if name not in CASES]:
        parser.error(f"unknown case {unknown[0]!r}; known: {', '.join(CASES)}")

    from megatron_ext import distributed
    from training_step.kernels import kernel_table, profile
    from training_step.random_rows import random_rows
    from training_step.timing import table, time_cases

    torch.set_num_threads(arguments.threads)
    size = size_of(arguments)
    config = size.configuration()
    validate(config, world_size=1)
    distributed.initialize(config)
    if arguments.profile:
        case = CASES[arguments.profile]
        batch = random_rows(case.rows, size.rows * size.micro_batches, size.sequence, size.vocab_size)
        step = case.build(size.configuration(case.plan), size.vocab_size, case.batch(batch))
        print(kernel_table(profile(step)))
        return distributed.shut_down()
    results = {}
    time_cases(with_bases(only), size, arguments.repeats, results.__setitem__)
    print(table(results))
    print("For other libraries the ratio is ours over theirs, memory theirs over ours.")
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        files.write_json(arguments.json, {"arguments": settings} | results)
    distributed.shut_down()


if __name__ == "__main__":
    command_line.run(main)

"""Compute the cost of a plan: FLOPs per layer, class of token and pipeline stage, relative to dense; parameters;
activations.

The data is a mix of documents, for example
"understanding: 256 image, 64 text, 8 answer; generation: 30 text, 256 image x 3":
each entry gives a task, its runs of tokens in order and the number of documents.
"""

import argparse
import math

from megatron_ext import config_file
from megatron_ext.analysis import published_costs
from megatron_ext.command_line import parser, run
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.evaluation.config_checks import validate_evaluation
from megatron_ext.files import write_json
from megatron_ext.planning.inputs import MIX, with_vocabulary
from megatron_ext.routing.balance_summary import describe_balance, summarize_balance
from megatron_ext.routing.document_mix import mix_batch
from megatron_ext.routing.pipeline_layout import even_counts, layout_string
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.summary import describe, summarize
from megatron_ext.training.config_checks import validate
from megatron_ext.training.devices import peak_flops

GPU, MFU = "H100", 0.35


def main() -> None:
    options = _arguments()
    settings = [*options.config, *options.overrides]  # argparse gives everything after --config to it
    config = config_file.load(Config, [s for s in settings if "=" not in s], [s for s in settings if "=" in s])
    if options.balance and not config.parallel.layout:
        # Layers need not divide by stages, since a layout is what is asked for.
        chunks = config.parallel.pipeline * config.parallel.virtual_pipeline
        if config.model.num_layers % chunks:
            config.parallel.layout = layout_string(even_counts(config.model.num_layers, chunks))
    validate(config, config.parallel.tensor * config.parallel.context * config.parallel.pipeline)
    validate_evaluation(config)
    if options.paper:
        numbers = {"paper": published_costs.compare(), "heads": published_costs.compare_heads()}
        text = published_costs.describe(numbers["paper"], numbers["heads"])
        if options.tokens:
            numbers["training"] = published_costs.compare_training(options.tokens, speed(options.gpu, options.mfu))
            text += "\n\n" + published_costs.describe_training(numbers["training"])
    elif options.plan:
        plan = Plan.from_config(config)
        numbers = {"plan": plan.name, "roles": [[role.name.lower() for role in roles] for roles in plan.roles]}
        text = plan.table()
    else:
        config, size, _ = with_vocabulary(config)
        size, all_logits = options.vocabulary or size, options.logits == "all"
        batch = mix_batch(options.mix, config.model.image_codes.depth, config.data.generation_text)
        numbers = {"mix": options.mix} | summarize(config, size, batch, all_logits)
        text = describe(numbers)
        if options.balance:
            numbers["balance"] = summarize_balance(config, size, options.mix, options.balance, all_logits)
            text += "\n\n" + describe_balance(numbers["balance"])
    print(text)
    if options.json:
        write_json(options.json, numbers)


def _arguments() -> argparse.Namespace:
    arguments = parser(__doc__, "python tools/flops.py --config examples/configs/llama-3.2-1b.yaml plan.preset=himix")
    arguments.add_argument("--config", nargs="+", default=[], metavar="FILE", help="as for pretrain_unified.py")
    arguments.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for pretrain_unified.py")
    arguments.add_argument("--mix", default=MIX, metavar="DOCUMENTS", help=f'the data (default: "{MIX}")')
    arguments.add_argument(
        "--vocabulary",
        type=int,
        metavar="SIZE",
        help=f"rows of the output head (default: that of data.vocabulary, or {published_costs.VOCABULARY})",
    )
    arguments.add_argument(
        "--logits",
        choices=("loss", "all"),
        default="loss",
        help="positions of the output head: tokens with a loss, as in training (default), or all tokens that are "
        "FULL in the last layer",
    )
    arguments.add_argument(
        "--balance",
        type=int,
        metavar="MICRO_BATCHES",
        help="also choose parallel.layout, for steps of so many micro-batches per replica, and simulate the gain",
    )
    output = arguments.add_mutually_exclusive_group()
    output.add_argument("--plan", action="store_true", help="only show the table of roles")
    output.add_argument("--paper", action="store_true", help="only compare with published FLOPs (arXiv 2606.01503)")
    arguments.add_argument(
        "--tokens",
        type=float,
        metavar="N",
        help="with --paper: what its runs cost here, with N tokens in a unified one",
    )
    arguments.add_argument("--gpu", metavar="NAME", help=f"for --tokens: GPU (default: {GPU})")
    arguments.add_argument(
        "--mfu", type=float, metavar="SHARE", help=f"for --tokens: share of its peak (default: {MFU})"
    )
    options = arguments.parse_intermixed_args()
    if options.tokens is None and (options.gpu, options.mfu) != (None, None):
        arguments.error("--gpu and --mfu need --tokens")
    if options.tokens is not None and not options.paper:
        arguments.error("--tokens needs --paper")
    if options.tokens is not None and not 0 < options.tokens < math.inf:
        arguments.error(f"--tokens {options.tokens:g}: must be above 0")
    if options.balance is not None and options.balance < 1:
        arguments.error(f"--balance {options.balance}: must be at least 1")
    options.gpu, options.mfu = options.gpu or GPU, MFU if options.mfu is None else options.mfu
    if not 0 < options.mfu <= 1:
        arguments.error(f"--mfu {options.mfu:g}: must be above 0 and at most 1")
    return options


def speed(gpu: str, mfu: float) -> float:
    """FLOP/s of a GPU at a share of its bf16 peak."""
    if (peak := peak_flops(gpu)) is None:
        raise UserError(f"--gpu {gpu}: not known; megatron_ext/training/devices.py lists the GPUs")
    return mfu * peak


if __name__ == "__main__":
    run(main)

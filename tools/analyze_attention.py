"""Attention allocation of a checkpoint, per layer, for understanding and for generation."""

import argparse
from pathlib import Path

from megatron_ext import command_line, files


def main() -> None:
    arguments = _arguments()

    # Imported late: --help and bad usage should not wait for Megatron-Core.
    import torch.distributed as dist

    from megatron_ext import distributed
    from megatron_ext.analysis import attention_report
    from megatron_ext.analysis.attention import of_checkpoint

    numbers = of_checkpoint(
        arguments.checkpoint,
        arguments.overrides,
        arguments.data,
        arguments.batches,
        arguments.batch_size,
        arguments.vocabulary,
        arguments.tensor,
        arguments.scenes,
        arguments.untrained,
    )
    if dist.get_rank() == 0:
        measured = numbers["allocation"], numbers.get("untrained_allocation")
        print(attention_report.table(*measured))
        if arguments.json:
            files.write_json(arguments.json, numbers)
        if arguments.figure:
            title = f"attention allocation: {numbers['checkpoint']}, plan {numbers['plan']}"
            attention_report.plot(measured[0], arguments.figure, title, measured[1])
            print(arguments.figure)
    distributed.shut_down()


def _arguments() -> argparse.Namespace:
    parser = command_line.parser(
        "Attention allocation of a checkpoint: for each layer, how much answers (understanding) and image\n"
        "tokens (generation) attend to images, text and special tokens, also relative to uniform attention.\n"
        "The query itself, sinks and <eod> are left out. Under torchrun the model is split over --tensor\n"
        "processes; the replicas share the rows.",
        "python tools/analyze_attention.py --checkpoint runs/quickstart/training --batches 8 --untrained \\\n"
        "      --scenes runs/quickstart/scenes/validation --figure runs/attention.svg --json runs/attention.json",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a checkpoint, or a run (its newest checkpoint)",
    )
    add("--vocabulary", type=Path, metavar="FOLDER", help="the run's vocabulary, if it has moved")
    add("--data", choices=("validation", "train"), default="validation", help="split of the run's data")
    add("--batches", type=int, default=4, help="number of batches")
    add("--batch-size", type=int, default=8, help="rows of a batch, over all processes")
    add(
        "--scenes",
        type=Path,
        metavar="FOLDER",
        help="the split of the picture world that the data were made from (.../scenes/validation): also show attention "
        "to the object that is asked about or drawn",
    )
    add("--untrained", action="store_true", help="show the same model with its initial weights beside it")
    add("--figure", type=Path, metavar="FILE", help="plot to FILE (.svg, .pdf, .png)")
    add("--tensor", type=int, default=1, help="processes that the model is split over")
    add("overrides", nargs="*", metavar="section.key=value", help="plan.* changes the roles of the measurement")
    arguments = parser.parse_args()
    if min(arguments.batches, arguments.batch_size) < 1:
        parser.error("--batches and --batch-size must be at least 1")
    return arguments


if __name__ == "__main__":
    command_line.run(main)

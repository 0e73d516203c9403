"""Where a checkpoint's attention goes: per layer, for understanding and for generation."""

from pathlib import Path

from megatron_ext import command_line, files


def main() -> None:
    parser = command_line.parser(
        "Where a checkpoint's attention goes, layer by layer: how much of it answers (understanding) and image tokens\n"
        "(generation) pay to images, text and special tokens, and how much that is against uniform attention.\n"
        "Under torchrun the model is cut over --tensor processes; the others share the rows.",
        "python tools/analyze_attention.py --checkpoint runs/quickstart/training --batches 8 \\\n"
        "      --figure runs/attention.svg --json runs/attention.json",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FOLDER", help="a checkpoint, or a run (its newest one)")
    add("--vocabulary", type=Path, metavar="FOLDER", help="where the run's vocabulary is now, if it was moved")
    add("--data", choices=("validation", "train"), default="validation", help="which of the run's data are read")
    add("--batches", type=int, default=4, help="how many batches of rows are read")
    add("--batch-size", type=int, default=8, help="rows of a batch, over all processes")
    add("--figure", type=Path, metavar="FILE", help="plot to FILE (.svg, .pdf, .png)")
    add("--tensor", type=int, default=1, help="processes over which the model is cut; the others are replicas")
    add(
        "overrides", nargs="*", metavar="section.key=value", help="plan.* changes the roles that the model is used with"
    )
    arguments = parser.parse_args()
    if min(arguments.batches, arguments.batch_size) < 1:
        parser.error("--batches and --batch-size must be at least 1")

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
    )
    if dist.get_rank() == 0:
        print(attention_report.table(numbers["allocation"]))
        if arguments.json:
            files.write_json(arguments.json, numbers)
        if arguments.figure:
            title = f"attention allocation: {numbers['checkpoint']}, plan {numbers['plan']}"
            attention_report.plot(numbers["allocation"], arguments.figure, title)
            print(arguments.figure)
    distributed.shut_down()


if __name__ == "__main__":
    command_line.run(main)

"""Gradient alignment of a checkpoint's two tasks, per layer and projection."""

from pathlib import Path

from megatron_ext import command_line, files


def main() -> None:
    parser = command_line.parser(
        "Gradient alignment of understanding and generation: for each layer and projection of a checkpoint the cosine\n"
        "of the two tasks' gradients, their norms, and the share of parameters that one task trains alone.\n"
        "Under torchrun give parallel.tensor and parallel.pipeline; the remaining processes are replicas.",
        "python tools/analyze_gradients.py --checkpoint runs/quickstart/training --batches 4 \\\n"
        "      --figure runs/gradients.svg --json runs/gradients.json",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a checkpoint, or a run (its newest checkpoint)",
    )
    add("--data", choices=("validation", "train"), default="validation", help="split of the run's data")
    add(
        "--batches",
        type=int,
        default=4,
        help="number of the run's global batches, merged into one; an even number separates noise from disagreement",
    )
    add("--figure", type=Path, metavar="FILE", help="plot to FILE (.svg, .pdf, .png)")
    add("overrides", nargs="*", metavar="section.key=value", help="changes to the run's configuration")
    arguments = parser.parse_args()
    if arguments.batches < 1:
        parser.error("--batches must be at least 1")

    # Imported late: --help and bad usage should not wait for Megatron-Core.
    import torch.distributed as dist

    from megatron_ext import distributed
    from megatron_ext.analysis import gradients_report
    from megatron_ext.analysis.gradients import of_checkpoint

    numbers = of_checkpoint(arguments.checkpoint, arguments.overrides, arguments.data, arguments.batches)
    if dist.get_rank() == 0:
        print(gradients_report.table(numbers["alignment"], numbers["corrected"]))
        if arguments.json:
            files.write_json(arguments.json, numbers)
        if arguments.figure:
            title = f"gradient alignment: {numbers['checkpoint']}, plan {numbers['plan']}"
            gradients_report.plot(numbers["alignment"], arguments.figure, title)
            print(arguments.figure)
    distributed.shut_down()


if __name__ == "__main__":
    command_line.run(main)

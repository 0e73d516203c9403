"""Convert a checkpoint to other projections of the same model (plan.projections), as the start of a new run.

The converted model computes the same function; if the new projections cannot express it, nothing is written. The
optimizer starts from scratch.
"""

from pathlib import Path

from megatron_ext import command_line, files


def main() -> None:
    parser = command_line.parser(
        __doc__,
        "python tools/convert_checkpoint.py --checkpoint runs/dense/checkpoints/iter_0000200 --out runs/split/start "
        "plan.projections.kind=separate",
    )
    parser.add_argument(
        "overrides", nargs="+", metavar="plan.projections.key=value", help="override those of the checkpoint"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER", help="saved under any layout")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="receives the checkpoint iter_0000000"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-6,
        metavar="SHARE",
        help="matrices count as equal if they differ by at most this share of the shared matrix (default: 1e-6)",
    )
    arguments = parser.parse_intermixed_args()
    # Imported late: --help should not wait for Megatron-Core.
    from megatron_ext.conversion.projections import convert

    numbers = convert(arguments.checkpoint, arguments.out, arguments.overrides, arguments.tolerance)
    if arguments.json:
        files.write_json(arguments.json, numbers)
    print(
        f"{numbers['parameters']:,} parameters, before {numbers['source']['parameters']:,}; continue training with\n"
        f"  checkpoint.load={numbers['checkpoint']} {' '.join(arguments.overrides)} output=..."
    )


if __name__ == "__main__":
    command_line.run(main)

"""A training run as one page: loss curves, speed, data, roles, VQ pictures, next commands."""

from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.report.write import write_report


def main() -> None:
    parser = command_line.parser(
        "Write one self-contained HTML page about a training run, and the same in Markdown.",
        "python tools/report.py --run runs/quickstart/training --vq runs/quickstart/vq",
    )
    parser.add_argument(
        "--run", type=Path, required=True, metavar="FOLDER", help="output folder of pretrain_unified.py"
    )
    parser.add_argument("--vq", type=Path, metavar="FOLDER", help="the VQ tokenizer, to show pictures with")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the HTML file (default: RUN/report.html)")
    arguments = parser.parse_args()
    numbers = write_report(arguments.run, arguments.vq, arguments.out or arguments.run / "report.html")
    if arguments.json:
        files.write_json(arguments.json, numbers)
    print(f"{numbers['html']}\n{numbers['markdown']}")


if __name__ == "__main__":
    command_line.run(main)

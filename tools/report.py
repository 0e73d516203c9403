"""A training run as one page: what the model can do, what that cost, how it was trained, next commands."""

from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.report.write import write_report


def main() -> None:
    parser = command_line.parser(
        "Write one self-contained HTML page about a training run, and the same in Markdown.",
        "python tools/report.py --run runs/quickstart/training --vq runs/quickstart/vq \\\n"
        "      --benchmarks runs/quickstart/benchmarks/validation",
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="FOLDER", help="output folder of pretrain_unified.py")
    add("--vq", type=Path, metavar="FOLDER", help="the VQ tokenizer, to show pictures with")
    add(
        "--benchmarks",
        type=Path,
        metavar="FOLDER",
        help="holds gqa/ and mjhq/, whose answers and pictures are in RUN/scores (tools/evaluate.py --out RUN/scores)",
    )
    add("--also", type=Path, nargs="+", default=[], metavar="RUN", help="other runs, compared in one line each")
    add("--out", type=Path, metavar="FILE", help="the HTML file (default: RUN/report.html)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.run / "report.html"
    numbers = write_report(arguments.run, out, arguments.vq, arguments.benchmarks, arguments.also)
    if arguments.json:
        files.write_json(arguments.json, numbers)
    print(f"{numbers['html']}\n{numbers['markdown']}")


if __name__ == "__main__":
    command_line.run(main)

"""Causal depth curves: what trained models lose if their image tokens take less part from a layer on."""

from dataclasses import asdict
from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.errors import UserError


def main() -> None:
    parser = command_line.parser(
        "Causal depth curves from a study's results: accuracy, facts and losses of models that were evaluated as\n"
        "himix_from_K or skip_from_K (docs/analysis.md), with intervals over seeds and a test of the trend over K.",
        "python tools/depth_curves.py runs/studies/decisive/results.json --figures runs/studies/decisive/figures",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write a figure of each model into FOLDER")
    arguments = parser.parse_args()

    # Imported late: --help should not wait for pandas.
    from megatron_ext.analysis import depth, depth_report
    from megatron_ext.analysis.results import read_all

    curves = depth.curves(read_all(arguments.results))
    if not curves:
        names = ", ".join(f"{name}_K" for name in depth.INTERVENTIONS)
        raise UserError(f"{arguments.results[0]}: no seed has rows evaluated as {names} and with the roles of training")
    for model, of_model in depth.by_model(curves).items():
        print("\n\n".join([depth_report.title(model), *depth_report.tables(of_model)]), end="\n\n")
        if arguments.figures:
            print(depth_report.plot(of_model, arguments.figures))
    if arguments.json:
        files.write_json(arguments.json, {"curves": [asdict(curve) for curve in curves]})


if __name__ == "__main__":
    command_line.run(main)

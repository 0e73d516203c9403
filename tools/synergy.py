"""Synergy of unified training: each method's gain over single-task training, and its synergy loss against dense."""

from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.analysis import beside_paper, results, synergy, tables


def main() -> None:
    parser = command_line.parser(
        "Gains of unified over single-task training and the synergy loss of every method against dense, from files of\n"
        "results (megatron_ext/analysis/results.py describes their form; tools/scaling_study.py writes them). Methods\n"
        "that have the names of the paper's are also shown beside its tables 1 to 3.",
        "python tools/synergy.py                    the paper's tables (arXiv 2606.01503)\n"
        "  python tools/synergy.py runs/studies/picture_world/results.json --latex synergy.tex --plot synergy.svg",
    )
    add = parser.add_argument
    add("results", nargs="*", type=Path, metavar="RESULTS.json", help="default: the paper's tables")
    add("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    add("--latex", type=Path, metavar="FILE", help="the same in LaTeX (needs booktabs)")
    add("--csv", type=Path, metavar="FILE", help="a line per method and metric, unrounded")
    add("--plot", type=Path, metavar="FILE", help="plot the gains as bars (.svg, .pdf, .png)")
    arguments = parser.parse_args()
    loaded = results.read_all(arguments.results or [results.PUBLISHED])
    comparisons = synergy.compare(loaded)
    titled = {tables.GAINS: tables.gains(comparisons), tables.LOSSES: tables.losses(comparisons)}
    titled = {title: table for title, table in titled.items() if not table.empty}
    if arguments.results:
        titled |= beside_paper.tables(loaded)
    notes = [f"- {note}" for c in comparisons for note in c.missing]
    parts = [loaded.source, *(f"{title}:\n\n{tables.markdown(table)}" for title, table in titled.items()), *notes]
    text = "\n\n".join(parts) + "\n"
    print(text, end="")
    if arguments.json:
        files.write_json(arguments.json, {"source": loaded.source, "methods": tables.as_json(comparisons)})
    if arguments.markdown:
        files.write_text(arguments.markdown, text)
    if arguments.latex:
        files.write_text(
            arguments.latex, "\n\n".join(tables.latex(table, title) for title, table in titled.items()) + "\n"
        )
    if arguments.csv:
        files.write_text(arguments.csv, tables.as_csv(comparisons))
    if arguments.plot:
        from megatron_ext.analysis import plots  # imported late: --help should not wait for matplotlib

        plots.bars(comparisons, arguments.plot)


if __name__ == "__main__":
    command_line.run(main)

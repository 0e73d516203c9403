"""Synergy of unified training, and each method's synergy loss against dense as unified cost + partner advantage."""

from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.analysis import beside_paper, outcomes, results, synergy, tables


def main() -> None:
    parser = command_line.parser(
        "Gains of unified over single-task training, and the synergy loss of every method against dense as the sum of\n"
        "unified cost and partner advantage, with intervals over seeds, from files of results\n"
        "(megatron_ext/analysis/results.py describes their form; tools/scaling_study.py writes them). Methods with\n"
        "the names of the paper's are also shown beside its tables 1 to 3.",
        "python tools/synergy.py                    the paper's tables (arXiv 2606.01503)\n"
        "  python tools/synergy.py runs/studies/decisive/results.json --latex synergy.tex --plot synergy.svg",
    )
    add = parser.add_argument
    add("results", nargs="*", type=Path, metavar="RESULTS.json", help="default: the paper's tables")
    add("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    add("--latex", type=Path, metavar="FILE", help="the same in LaTeX (needs booktabs)")
    add("--csv", type=Path, metavar="FILE", help="a line per method and metric, unrounded")
    add("--plot", type=Path, metavar="FILE", help="plot the parts of the synergy losses (.svg, .pdf, .png)")
    arguments = parser.parse_args()
    loaded = results.read_all(arguments.results or [results.PUBLISHED])
    comparisons = synergy.compare(loaded)
    titled = {tables.PARTS: tables.parts(comparisons), tables.TESTS: tables.tests(outcomes.outcomes(comparisons))}
    titled = {title: table for title, table in titled.items() if not table.empty}
    if arguments.results:
        titled |= beside_paper.tables(loaded)
    notes = list(dict.fromkeys(f"- {note}" for c in comparisons for note in c.missing))
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

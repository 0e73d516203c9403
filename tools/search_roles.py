"""Searches for the role table that keeps both tasks at a given cost."""

from pathlib import Path

from megatron_ext import command_line, files


def main() -> None:
    parser = command_line.parser(
        "Search for the role table with the lowest losses at a given cost, beside random tables of that cost\n"
        "(docs/role_search.md): one model whose documents draw random tables measures what every role costs in loss,\n"
        "a knapsack finds the best tables, and successive halving trains them. After any interruption the same\n"
        "command resumes.",
        "python tools/search_roles.py examples/role_search.yaml --jobs 2\n"
        "  python tools/search_roles.py examples/role_search.yaml --status",
    )
    add = parser.add_argument
    add("search", nargs="+", type=Path, metavar="SEARCH.yaml", help="a search, or several files laid over one another")
    add("--out", metavar="FOLDER", help="instead of the file's output")
    add("--jobs", type=int, default=1, metavar="N", help="runs at once (default: 1)")
    add("--gpus", default="", metavar="0,1", help="GPUs to share out among the runs, one per process")
    add("--status", action="store_true", help="only show the progress of every run")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    # Imported late: --help should not wait for numpy and the configuration.
    from megatron_ext.role_search import search, settings, status

    read = settings.read(*arguments.search)
    read.output = arguments.out or read.output
    if arguments.status:
        print(status.text(read))
        return
    numbers = search.run(read, arguments.jobs, [gpu for gpu in arguments.gpus.split(",") if gpu])
    print(f"{read.output}/report.md: written")
    if arguments.json:
        files.write_json(arguments.json, numbers)


if __name__ == "__main__":
    command_line.run(main)

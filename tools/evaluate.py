"""Benchmarks: score answers files against the official questions, several side by side."""

import argparse
import os
from pathlib import Path

from megatron_ext import command_line
from megatron_ext.evaluation import table
from megatron_ext.evaluation.registry import BENCHMARKS, benchmark_named


def main() -> None:
    parser = command_line.parser(
        "Score answers to GQA, MME, POPE and SEED-Bench (image): files with a JSON object a line, {id, answer}.\n"
        "--benchmark, --data and --score are given once for each answers file, in the same order.",
        "python tools/evaluate.py --benchmark pope --data data/pope --score runs/my/answers/pope.jsonl \\\n"
        "      --benchmark gqa --data data/gqa --score runs/my/answers/gqa.jsonl --markdown scores.md",
    )
    add = parser.add_argument
    add("--benchmark", action="append", required=True, choices=list(BENCHMARKS), help="which questions")
    add("--data", action="append", required=True, type=Path, metavar="FOLDER", help="the benchmark as released")
    add("--score", action="append", required=True, type=Path, metavar="FILE", help="the answers file to score")
    add("--parts", action="append", metavar="A,B", help="only these splits or subtasks of the benchmark, or 'all'")
    add("--label", action="append", metavar="NAME", help="whose answers they are (default: the file's folder)")
    add("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    arguments = parser.parse_args()
    scored = [
        _score(*one)
        for one in zip(
            arguments.benchmark,
            _each(parser, arguments, "data"),
            _each(parser, arguments, "score"),
            _each(parser, arguments, "parts"),
            _each(parser, arguments, "label"),
        )
    ]
    text = table.markdown(scored)
    if arguments.json:
        command_line.write_json(arguments.json, table.as_json(scored))
    if arguments.markdown:
        _write(arguments.markdown, text)
    print(text, end="")


def _each(parser: argparse.ArgumentParser, arguments: argparse.Namespace, name: str) -> list:
    """The values of an option that is given once for each benchmark, or (where it may be left out) never."""
    values = getattr(arguments, name)
    if values is None:
        return [None] * len(arguments.benchmark)
    if len(values) != len(arguments.benchmark):
        parser.error(f"--{name} is given {len(values)} times for {len(arguments.benchmark)} times --benchmark")
    return values


def _score(name: str, folder: Path, file: Path, parts: str | None, label: str | None) -> table.Scored:
    benchmark = benchmark_named(name)
    items = benchmark.read(folder, None if parts in (None, "all") else parts.split(","))
    return table.score_file(benchmark, items, file, label or str(file.parent))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    command_line.run(main)

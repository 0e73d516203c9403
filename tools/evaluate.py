"""Benchmarks: a checkpoint's answers to the official questions, saved and scored, or the score of saved answers."""

import argparse
import os
from pathlib import Path

from megatron_ext import command_line
from megatron_ext.evaluation import table
from megatron_ext.evaluation.items import Item
from megatron_ext.evaluation.registry import BENCHMARKS, benchmark_named


def main() -> None:
    parser = command_line.parser(
        "Answer GQA, MME, POPE and SEED-Bench (image) with a checkpoint, or score answers that are there already:\n"
        "files with a JSON object a line, {id, answer}. --benchmark, --data and --score are given once for each\n"
        "answers file, in the same order. Answering goes on where it was stopped, over all processes of torchrun.",
        "python tools/evaluate.py --checkpoint runs/my --vq checkpoints/janus --benchmark pope --data data/pope \\\n"
        "      --out runs/my/answers\n"
        "  "
        "python tools/evaluate.py --benchmark pope --data data/pope --score runs/my/answers/pope.jsonl \\\n"
        "      --benchmark gqa --data data/gqa --score runs/my/answers/gqa.jsonl --markdown scores.md",
    )
    add = parser.add_argument
    add("--benchmark", action="append", required=True, choices=list(BENCHMARKS), help="which questions")
    add("--data", action="append", required=True, type=Path, metavar="FOLDER", help="the benchmark as released")
    add("--score", action="append", type=Path, metavar="FILE", help="the answers file to score")
    add("--checkpoint", type=Path, metavar="FOLDER", help="answer with this checkpoint (or a run's newest) first")
    add("--vq", type=Path, metavar="FOLDER", help="the VQ tokenizer that the checkpoint was trained with")
    add("--vocabulary", type=Path, metavar="FOLDER", help="where the run's vocabulary is now, if it was moved")
    add("--out", type=Path, metavar="FOLDER", help="where the answers go, FOLDER/<benchmark>.jsonl")
    add("--tensor", type=int, default=1, help="processes over which the model is cut; the others are replicas")
    add("--batch-size", type=int, default=16, help="questions that are answered together")
    add("--longest", type=int, default=16, help="most tokens of an answer")
    add("--parts", action="append", metavar="A,B", help="only these splits or subtasks of the benchmark, or 'all'")
    add("--label", action="append", metavar="NAME", help="whose answers they are (default: the file's folder)")
    add("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    add(
        "overrides", nargs="*", metavar="section.key=value", help="plan.* changes the roles that the model is used with"
    )
    arguments = parser.parse_args()
    if arguments.checkpoint:
        if arguments.score or not (arguments.vq and arguments.out):
            parser.error("--checkpoint needs --vq and --out, and goes without --score")
        arguments.score = [arguments.out / f"{name}.jsonl" for name in arguments.benchmark]
        if not _answer(arguments, _each(parser, arguments, "data"), _each(parser, arguments, "parts")):
            return
    elif not arguments.score:
        parser.error("give --score, or --checkpoint with --vq and --out")
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


def _answer(arguments: argparse.Namespace, folders: list[Path], parts: list[str | None]) -> bool:
    """Answer every benchmark with the checkpoint. Returns whether this is the process that scores."""
    # Imported late: --help and scoring alone should not wait for Megatron-Core.
    import torch.distributed as dist

    from megatron_ext.evaluation.answering import answer
    from megatron_ext.generation.load import load
    from megatron_ext.generation.session import Session

    items = [_items(*one) for one in zip(arguments.benchmark, folders, parts)]
    trained = load(arguments.checkpoint, arguments.overrides, arguments.vocabulary, arguments.tensor)
    session = Session(trained, arguments.vq, arguments.batch_size)
    try:
        for questions, file in zip(items, arguments.score):
            if unreadable := answer(session, questions, file, arguments.longest):
                print(f"{file}: {unreadable} images could not be read", flush=True)
        return dist.get_rank() == 0
    finally:
        session.close()


def _items(name: str, folder: Path, parts: str | None) -> list[Item]:
    return benchmark_named(name).read(folder, None if parts in (None, "all") else parts.split(","))


def _score(name: str, folder: Path, file: Path, parts: str | None, label: str | None) -> table.Scored:
    return table.score_file(benchmark_named(name), _items(name, folder, parts), file, label or str(file.parent))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    command_line.run(main)

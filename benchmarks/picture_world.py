"""What a model has learnt on the picture world: accuracy on every kind of question against chance, and generated
pictures against a control.

    python benchmarks/picture_world.py --run runs/picture_world/dense --data runs/picture_world \
        --out runs/picture_world/scores --markdown docs/picture_world.md --json benchmarks/results/picture_world.json

Answers the picture world's benchmarks (by tools/evaluate.py, which resumes where it stopped) for new arrangements of
known combinations and for held-out combinations of shape and color. Chance is the accuracy of guessing among the
possible answers, which are balanced; for GQA, of the most frequent answer. Intervals are 95 % Wilson intervals.
"""

import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.errors import UserError
from megatron_ext.evaluation import scene_check
from megatron_ext.evaluation.answers import read_answers
from megatron_ext.evaluation.kinds import Accuracy, by_kind
from megatron_ext.evaluation.parsing import LETTERS
from megatron_ext.evaluation.registry import BENCHMARKS, PICTURES

ROOT = Path(__file__).parents[1]
SPLITS = {"validation": "new arrangements", "test": "held-out combinations"}


def evaluate(run: Path, data: Path, out: Path, options: list[str]) -> dict:
    """The tables of tools/evaluate.py for all benchmarks in ``data``."""
    command = [sys.executable, "tools/evaluate.py", "--checkpoint", run, "--vq", data.parents[1] / "vq", "--out", out]
    for name in (*BENCHMARKS, PICTURES):
        command += ["--benchmark", name, "--data", data / name]
    finished = subprocess.run(
        [*map(str, command), "--json", str(out / "scores.json"), *options], cwd=ROOT, timeout=7200, check=False
    )
    if finished.returncode:
        raise UserError(f"{out}: tools/evaluate.py failed; its last line says why")
    return files.read_json(out / "scores.json")


def kinds(data: Path, out: Path) -> dict[str, dict]:
    """By kind of question: the fields of :class:`Accuracy`."""
    accuracies: dict[str, Accuracy] = {}
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for name, benchmark in BENCHMARKS.items():
        read, items = read_answers(out / f"{name}.jsonl"), benchmark.read(data / name, None)
        if name == "gqa":
            accuracies |= {f"GQA, {kind}": a for kind, a in by_kind(benchmark, items, read.answers).items()}
            continue
        for item in items:
            right = item.id in read.answers and benchmark.right(item, read.answers[item.id])
            if name == "seed":
                likelihoods = read.likelihoods.get(item.id)
                likeliest = likelihoods and LETTERS[likelihoods.index(max(likelihoods))] == item.answer
                outcomes[f"SEED, {item.groups[0]}, by letter"].append(right)
                outcomes[f"SEED, {item.groups[0]}, by likelihood"].append(bool(likeliest))
            else:
                outcomes[f"{benchmark.title}, {item.groups[0]}"].append(right)
    for kind, results in outcomes.items():
        accuracies[kind] = Accuracy.of(sum(results), len(results), 1 / 4 if kind.startswith("SEED") else 1 / 2)
    return {kind: asdict(accuracy) for kind, accuracy in accuracies.items()}


def markdown(results: dict, budget: str) -> str:
    """The page."""
    lines = ["# What a model learns on the picture world", "", budget, ""]
    lines += ["Accuracy in percent with its 95 % interval in brackets; **bold**: the interval is above chance.", ""]
    lines += ["| question | chance | " + " | ".join(SPLITS.values()) + " |", "| --- | --- | --- | --- |"]
    for kind, share in results["validation"]["kinds"].items():
        cells = [_cell(results[split]["kinds"].get(kind)) for split in SPLITS]
        lines.append(f"| {kind} | {100 * share['chance']:.1f} | " + " | ".join(cells) + " |")
    lines += ["", "Facts of their captions that are right in generated pictures, in percent; the control is the same"]
    lines += ["pictures with other pictures' captions. At best: the reference pictures through the VQ tokenizer.", ""]
    lines += [
        "| pictures for | facts | right | control | difference | at best |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for split, name in SPLITS.items():
        for kind, row in results[split]["pictures"].items():
            between = f"{row['difference']:.1f} [{row['from']:.1f}, {row['to']:.1f}]" if "difference" in row else "-"
            control, best = row.get("others' prompts"), row.get("reference through VQ")
            cells = [f"{row['right']:.1f}", _number(control), between, _number(best)]
            lines.append(f"| {name} | {kind} ({row['facts']}) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def sections(page: Path) -> str:
    """The sections of an existing page, which are written by hand and kept: what begins at the first ``##``."""
    text = page.read_text() if page.is_file() else ""
    return "\n## " + text.partition("\n## ")[2] if "\n## " in text else ""


def _cell(share: dict | None) -> str:
    if share is None:
        return "-"
    text = f"{100 * share['right']:.1f}"
    bold = f"**{text}**" if share["low"] > share["chance"] else text
    return f"{bold} [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main() -> None:
    parser = command_line.parser(
        __doc__,
        "python benchmarks/picture_world.py --run runs/picture_world/dense --data runs/picture_world --out scores",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="a run, trained on --data")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with vq/ and benchmarks/")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for answers and pictures")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--budget", default="", help="a paragraph or more on what the model was trained with")
    parser.add_argument("options", nargs="*", help="more for tools/evaluate.py, such as plan.preset=dense")
    arguments = parser.parse_args()
    results = {}
    for split in SPLITS:
        data, out = arguments.data / "benchmarks" / split, arguments.out / split
        tables = evaluate(arguments.run, data, out, arguments.options)
        pictures = [file["scores"]["details"] for file in tables["files"] if file["benchmark"] == scene_check.TITLE]
        results[split] = {
            "kinds": kinds(data, out),
            "pictures": pictures[0] if pictures else {},
            "table": tables["rows"],
        }
    text = markdown(results, arguments.budget)
    print(text)
    if arguments.markdown:
        files.write_text(arguments.markdown, text + sections(arguments.markdown))
    if arguments.json:
        files.write_json(arguments.json, {"budget": arguments.budget, **results})


if __name__ == "__main__":
    command_line.run(main)

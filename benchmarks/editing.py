"""Editing on the picture world: a run with edits beside one without that saw as many tokens of understanding and
generation.

Reads answers and pictures that tools/evaluate.py made with --benchmark gqa, mjhq and edits. Intervals are 95 %, by
resampling questions, captions or edits; both runs of a difference are resampled together.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ext import command_line, files
from megatron_ext.evaluation import edits, mjhq
from megatron_ext.evaluation.answers import read_answers
from megatron_ext.evaluation.detected_files import detect_files, saved_file
from megatron_ext.evaluation.faithfulness import ALL, ROWS, WHOLE, count_facts, interval, shares
from megatron_ext.evaluation.gqa import GQA
from megatron_ext.evaluation.mjhq import Prompt
from megatron_ext.evaluation.picture_folder import picture_file
from megatron_ext.evaluation.scene_check import caption_facts
from megatron_ext.picture_world.captions import NUMBERS
from megatron_ext.picture_world.detected import DetectedScene


def questions(data: Path, scores: Path) -> np.ndarray:
    """Right answers and answers, [questions, 1, 2]."""
    items, answers = GQA.read(data / "gqa", None), read_answers(scores / "gqa.jsonl").answers
    return np.array([[[item.id in answers and GQA.right(item, answers[item.id]), 1]] for item in items], dtype=float)


def captions(data: Path, scores: Path) -> np.ndarray:
    """Right facts and all facts of generated pictures, [captions, 2, 2]: single facts, and whole pictures."""
    prompts = mjhq.read(data / "mjhq")
    seen, facts = seen_pictures(prompts, scores / "mjhq"), caption_facts(prompts)
    own, _ = count_facts([seen.get(id) for id in facts], list(facts.values()), control=False)
    return own[:, [ROWS.index(ALL), ROWS.index(WHOLE)]]


def seen_pictures(prompts: Sequence[Prompt], folder: Path) -> dict[str, DetectedScene]:
    """The contents of the prompts' pictures in a folder, by id."""
    pictures = {prompt.id: file for prompt in prompts if (file := picture_file(folder, prompt)).is_file()}
    return detect_files(pictures, saved_file(folder))


def edited(data: Path, scores: Path) -> np.ndarray:
    """Right facts and all facts of edited pictures, [edits, rows of :data:`edits.ROWS`, 2]."""
    items = edits.read(data / "edits")
    return edits.counts(items, seen_pictures(items, scores / "edits"))


def inputs(data: Path) -> np.ndarray:
    """The same of the pictures as they were given."""
    items = edits.read(data / "edits")
    return edits.counts(items, detect_files({item.id: item.image for item in items}))


def compare(names: Sequence[str], before: np.ndarray, after: np.ndarray) -> dict[str, dict]:
    """By name of the row: the two shares in percent, their difference with its interval, and the number of facts."""
    first, second, bounds = shares(before.sum(0)), shares(after.sum(0)), interval(after, before)
    return {
        name: {
            "before": float(first[i]),
            "after": float(second[i]),
            "difference": float(second[i] - first[i]),
            "from": float(bounds[i, 0]),
            "to": float(bounds[i, 1]),
            "number": int(after[:, i, 1].sum()),
        }
        for i, name in enumerate(names)
    }


def markdown(results: dict[str, dict[str, dict]], heads: dict[str, tuple[str, str]]) -> str:
    """A table for each comparison, between two sides that ``heads`` names."""
    lines = []
    for part, (before, after) in heads.items():
        lines += [f"| {part}, in percent | {before} | {after} | difference |", "| --- | --- | --- | --- |"]
        for name, row in results[part].items():
            between = f"{row['difference']:+.1f} [{row['from']:+.1f}, {row['to']:+.1f}]"
            lines.append(f"| {name} ({row['number']}) | {row['before']:.1f} | {row['after']:.1f} | {between} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = command_line.parser(
        __doc__,
        "python benchmarks/editing.py --with runs/editing/training/scores \\\n"
        "      --without runs/editing/without_edits/scores --data runs/editing/benchmarks/validation",
    )
    for name in ("with", "without"):
        help = f"scores of the run {name} edits"
        parser.add_argument(f"--{name}", dest=f"{name}_edits", type=Path, required=True, metavar="FOLDER", help=help)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with gqa/, mjhq/ and edits/")
    arguments = parser.parse_args()
    data, runs = arguments.data, (arguments.without_edits, arguments.with_edits)
    facts = ["facts of captions in pictures for them", "whole pictures for captions"]
    names = [f"{row} of edits" for row in edits.ROWS]
    own, given = edited(data, arguments.with_edits), inputs(data)
    items = edits.read(data / "edits")
    of_edits = compare(names, given, own)
    groups = [item.category for item in items], [NUMBERS[len(item.before.objects)] + " before" for item in items]
    for group in groups:
        for name in sorted(set(group)):
            chosen = [other == name for other in group]
            whole = compare(names, given[chosen], own[chosen])[f"{edits.WHOLE} of edits"]
            of_edits[f"{edits.WHOLE}, {name}"] = whole
    results = {
        "tasks": compare(["answers to questions"], *(questions(data, run) for run in runs))
        | compare(facts, *(captions(data, run) for run in runs)),
        "edits": of_edits,
    }
    print(markdown(results, {"tasks": ("without edits", "with edits"), "edits": ("as given", "edited")}))
    if arguments.json:
        files.write_json(arguments.json, results)


if __name__ == "__main__":
    command_line.run(main)

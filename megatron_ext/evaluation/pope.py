"""POPE: is this object in the image? Accuracy, and precision, recall and F1 with yes as the positive class."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.evaluation import released_files, scoring
from megatron_ext.evaluation.benchmark import Answers, Benchmark, Item, Scores
from megatron_ext.evaluation.parsing import yes_or_no
from megatron_ext.evaluation.released_files import (
    checked,
    field,
    first_file,
    first_image,
    one_of,
    selected_parts,
    with_suffix,
)

PARTS = ("random", "popular", "adversarial")
SUFFIX = "Answer the question using a single word or phrase."
_COLUMNS = {"accuracy": "POPE-A", "precision": "POPE-P", "recall": "POPE-R", "f1": "POPE-F1", "yes": "POPE-yes"}


def read(folder: Path, parts: Sequence[str] | None = None) -> list[Item]:
    """The questions of ``coco_pope_<split>.json`` (in ``folder``, ``coco/`` or ``output/coco/``), a JSON object a line
    with ``question_id``, ``image``, ``text``, ``label``; COCO's images are in ``val2014/`` (or ``images/``, or
    ``folder``). All files number their questions from 1, so an id is ``<split>/<question_id>``.
    """
    items: list[Item] = []
    for split in selected_parts(parts, PARTS, "pope"):
        name = f"coco_pope_{split}.json"
        file = first_file([folder / name, folder / "coco" / name, folder / "output" / "coco" / name])
        items += checked(_items(split, file, folder), file)
    return items


def _items(split: str, file: Path, folder: Path) -> Iterator[Item]:
    for number, line in enumerate(released_files.text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}: line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        image = field(entry, "image", where)
        yield Item(
            id=f"{split}/{field(entry, 'question_id', where)}",
            image=first_image([folder / place / image for place in ("val2014", "coco/val2014", "images", "")]),
            question=with_suffix(field(entry, "text", where), SUFFIX),
            answer=one_of(field(entry, "label", where).lower(), ("yes", "no"), "label", where),
            groups=(split,),
        )


def score(items: Sequence[Item], answers: Answers) -> Scores:
    """The figures of each split, and in the headline their means over the splits, as in published results.

    An answer that is missing or says neither yes nor no is wrong for the accuracy, and lowers the recall if yes was
    correct. Precision is over the questions answered yes, and ``yes`` is their share of all questions.
    """
    parsed = scoring.parse(items, answers, lambda item, answer: yes_or_no(answer))
    details = {split: _figures(members, parsed) for split, members in scoring.by_group(items).items()}
    headline = {
        column: sum(figures[key] for figures in details.values()) / len(details) for key, column in _COLUMNS.items()
    }
    absent = [split for split in PARTS if split not in details]
    notes = (f"POPE without the split {', '.join(absent)}",) if absent else ()
    return Scores(headline, details, len(items), parsed.missing, parsed.invalid, notes)


def _figures(items: list[Item], parsed: scoring.Parsed) -> dict[str, float]:
    precision = scoring.percent(item.answer == "yes" for item in items if parsed.answer[item.id] == "yes")
    recall = scoring.percent(parsed.answer[item.id] == "yes" for item in items if item.answer == "yes")
    return {
        "accuracy": scoring.percent(map(parsed.right, items)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes": scoring.percent(parsed.answer[item.id] == "yes" for item in items),
        "questions": len(items),
    }


def right(item: Item, answer: str) -> bool:
    """Whether the answer says the correct yes or no."""
    return yes_or_no(answer) == item.answer


POPE = Benchmark("pope", "POPE", PARTS, read, score, right, {column: name for name, column in _COLUMNS.items()})

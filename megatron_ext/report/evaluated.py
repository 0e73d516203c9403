"""What the newest evaluation during training left: pictures for captions, and answers to questions about pictures."""

import random
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from PIL import Image

from megatron_ext.config import Config, EvaluationBenchmark
from megatron_ext.errors import UserError
from megatron_ext.evaluation import training_folder
from megatron_ext.evaluation.answers import read_answers
from megatron_ext.evaluation.registry import benchmark_named
from megatron_ext.report.samples import enlarged

QUESTIONS = 8
_LARGEST = 384  # pixels; larger pictures are shown smaller


@dataclass(frozen=True)
class Question:
    """PNG of the picture, the benchmark's title, the question without the benchmark's instruction, the right answer,
    the model's, and whether that counts as right."""

    png: bytes
    benchmark: str
    question: str
    answer: str
    given: str
    right: bool


@dataclass(frozen=True)
class Evaluated:
    """An evaluation; ``pictures``: (PNG, caption)."""

    iteration: int
    pictures: list[tuple[bytes, str]]
    questions: list[Question]


def evaluated(run: Path, config: Config, iteration: int) -> Evaluated | None:
    """The newest complete evaluation up to ``iteration``; None: there is none.

    There are no questions of benchmarks that are not where the run had them any more.
    """
    found = training_folder.newest(run, iteration)
    if found is None:
        return None
    folder, manifest = found
    pictures = [(_png(folder / one["file"]), one["caption"]) for one in manifest["pictures"]]
    answered = [_answered(one, folder) for one in config.evaluation.benchmarks]
    # Benchmarks take turns, and with each of them what was right and what was wrong.
    turns = chain.from_iterable(zip_longest(*(kind for kinds in answered for kind in kinds)))
    return Evaluated(manifest["iteration"], pictures, _shown(turns))


def _answered(wanted: EvaluationBenchmark, folder: Path) -> list[list[tuple]]:
    """(benchmark, item, answer) of each item answered right, and of each answered wrong, in random order."""
    benchmark, file = benchmark_named(wanted.name), folder / f"{wanted.name}.jsonl"
    try:
        items = benchmark.read(Path(wanted.data), wanted.parts or None)
        answers = read_answers(file).answers
    except UserError:
        return []
    right, wrong = [], []
    for item in items:
        if item.id in answers:
            given = answers[item.id]
            (right if benchmark.right(item, given) else wrong).append((benchmark, item, given))
    for kind in (right, wrong):
        random.Random(0).shuffle(kind)
    return [right, wrong]


def _shown(turns) -> list[Question]:
    """The first questions whose picture can be read, each about another picture."""
    shown: list[Question] = []
    seen: set[Path] = set()
    for benchmark, item, given in filter(None, turns):
        if len(shown) == QUESTIONS:
            break
        if item.image not in seen and (png := _png(item.image)):
            seen.add(item.image)
            question = item.question.rpartition("\n")[0] or item.question
            shown.append(Question(png, benchmark.title, question, item.answer, given, benchmark.right(item, given)))
    return shown


def _png(file: Path) -> bytes | None:
    try:
        with Image.open(file) as picture:
            picture = picture.convert("RGB")
    except OSError:
        return None
    picture.thumbnail((_LARGEST, _LARGEST))
    return enlarged(picture)

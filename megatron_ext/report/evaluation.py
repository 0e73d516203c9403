"""The newest evaluation during training: pictures for captions, and answers to questions about pictures."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.evaluation import training_folder
from megatron_ext.evaluation.answers import read_answers
from megatron_ext.evaluation.registry import benchmark_named
from megatron_ext.report.cards import Card, question_card, read_png
from megatron_ext.run_config import EvaluationBenchmark

MAX_QUESTIONS = 8


@dataclass(frozen=True)
class NewestEvaluation:
    """Generated pictures with their captions, and pictures with a question, the right answer and the model's."""

    iteration: int
    pictures: list[Card]
    questions: list[Card]


def newest_evaluation(run: Path, config: Config, iteration: int) -> NewestEvaluation | None:
    """The newest complete evaluation up to ``iteration``, or None.

    Leaves out the questions of benchmarks whose data is no longer where the run read it.
    """
    evaluation = training_folder.newest(run, iteration)
    if evaluation is None:
        return None
    folder, manifest = evaluation
    pictures = [
        Card(read_png(folder / picture["file"]), "the picture drawn for this caption", picture["caption"])
        for picture in manifest["pictures"]
    ]
    answered = [_answered(benchmark, folder) for benchmark in config.evaluation.benchmarks]
    # Benchmarks take turns, and within each benchmark right and wrong answers.
    turns = chain.from_iterable(zip_longest(*(items for right_and_wrong in answered for items in right_and_wrong)))
    return NewestEvaluation(manifest["iteration"], pictures, _question_cards(filter(None, turns)))


def _answered(settings: EvaluationBenchmark, folder: Path) -> list[list[tuple]]:
    """(benchmark, item, answer) of the items answered right and of those answered wrong, each in random order."""
    benchmark = benchmark_named(settings.name)
    try:
        items = benchmark.read(Path(settings.data), settings.parts or None)
        answers = read_answers(folder / f"{settings.name}.jsonl").answers
    except UserError:
        return []
    right, wrong = [], []
    for item in items:
        if item.id in answers:
            answer = answers[item.id]
            (right if benchmark.right(item, answer) else wrong).append((benchmark, item, answer))
    for items in (right, wrong):
        random.Random(0).shuffle(items)
    return [right, wrong]


def _question_cards(turns: Iterable[tuple]) -> list[Card]:
    """Cards of the first questions whose pictures are readable, each about another picture."""
    cards: list[Card] = []
    seen: set[Path] = set()
    for benchmark, item, answer in turns:
        if len(cards) == MAX_QUESTIONS:
            break
        if item.image not in seen and (png := read_png(item.image)):
            seen.add(item.image)
            cards.append(question_card(png, item, answer, benchmark.right(item, answer), f"{benchmark.title}: "))
    return cards

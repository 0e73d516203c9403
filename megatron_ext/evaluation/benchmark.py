"""The interface of benchmarks: an item (a question about an image), the scores, and a benchmark (reader and scorer)."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Item:
    """One question about one image."""

    id: str  # unique in its benchmark; names the answer in an answers file
    image: Path  # may not exist: reading a benchmark does not open its images
    question: str  # the whole prompt, including the benchmark's suffix
    answer: str  # the correct one: a word or phrase (GQA), "yes" or "no" (MME, POPE), a letter (SEED-Bench)
    groups: tuple[str, ...] = ()  # the subtask, split or question types under which the item is reported
    choices: tuple[str, ...] = ()  # the options of a multiple-choice question, A first
    kind: str = ""  # what the question asks for, finer than groups: GQA's detailed type
    bare: str = ""  # a multiple-choice question without options and suffix, to rank the options by likelihood


@dataclass(frozen=True)
class Scores:
    """The figures of one benchmark for one set of answers; shares are in percent."""

    headline: dict[str, float]  # column of the table -> figure
    details: dict[str, dict[str, float]]  # split, subtask or question type -> its figures
    questions: int
    missing: int  # questions without an answer; they count as wrong
    invalid: int  # unreadable answers (neither yes nor no, no letter, empty); they count as wrong
    notes: tuple[str, ...] = ()  # restrictions of the headline, such as a missing part of the benchmark


Answers = Mapping[str, str]  # item id -> the model's answer, as it was generated


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with text answers.

    Attributes:
        read: ``read(folder, parts)`` reads the released files in ``folder`` into items, in their order, for the given
            parts or all. It raises :class:`~megatron_ext.errors.UserError` for a missing or malformed file and names
            the entry; it does not check that images exist.
        score: ``score(items, answers)``, a pure function.
        right: ``right(item, answer)``, whether one answer counts as correct.
        figures: headline column -> name; a training run logs the column as ``<benchmark>_<name>``.
        whole_images: the questions about an image are scored together.
        score_likelihoods: ``score_likelihoods(items, {id: log-likelihood of each choice})``; None if the benchmark does
            not rank choices.
    """

    name: str
    title: str
    parts: tuple[str, ...]
    read: Callable[[Path, Sequence[str] | None], list[Item]]
    score: Callable[[Sequence[Item], Answers], Scores]
    right: Callable[[Item, str], bool]
    figures: Mapping[str, str]
    whole_images: bool = False
    score_likelihoods: Callable[[Sequence[Item], Mapping[str, Sequence[float]]], Scores] | None = None

    def subset(self, items: Sequence[Item], limit: int) -> list[Item]:
        """About ``limit`` items from all over the benchmark, always the same, in their order.

        One random item is selected from each of ``limit`` stretches of equal length. Items at even distances would
        follow the pattern of a file whose answers alternate between yes and no.
        """
        units = list(_by_image(items).values()) if self.whole_images else [[item] for item in items]
        count = max(1, limit * len(units) // len(items))
        edges = [i * len(units) // count for i in range(count + 1)]
        rng = random.Random(0)
        return [item for low, high in zip(edges, edges[1:]) for item in units[rng.randrange(low, high)]]


def _by_image(items: Sequence[Item]) -> dict[Path, list[Item]]:
    groups: dict[Path, list[Item]] = {}
    for item in items:
        groups.setdefault(item.image, []).append(item)
    return groups

"""What all benchmarks share: a question with its image, the scores, and a benchmark as a reader and a scorer."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Item:
    """One question about one image."""

    id: str  # unique in its benchmark; names the answer in an answers file
    image: Path  # may not exist: reading a benchmark does not look into its images
    question: str  # all the text that the model is given, the benchmark's suffix included
    answer: str  # the right one: a word or phrase (GQA), "yes" or "no" (MME, POPE), a letter (SEED-Bench)
    groups: tuple[str, ...] = ()  # what the item is reported under: its subtask, split or question types
    choices: tuple[str, ...] = ()  # the options of a multiple choice question, A first
    bare: str = ""  # such a question without its options and suffix, for ranking them by their likelihood


@dataclass(frozen=True)
class Scores:
    """The figures of one benchmark for one set of answers; shares are in percent."""

    headline: dict[str, float]  # column of the table -> figure
    details: dict[str, dict[str, float]]  # split, subtask or question type -> its figures
    questions: int
    missing: int  # questions without an answer: counted wrong
    invalid: int  # answers that could not be read (neither yes nor no, no letter, nothing): counted wrong
    notes: tuple[str, ...] = ()  # what makes the headline less than the whole benchmark


Answers = Mapping[str, str]  # item id -> the model's answer, as it was generated


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with text answers.

    ``read(folder, parts)`` reads the released files in ``folder`` into items, in their order: all of ``parts``, or the
    given ones. It raises :class:`~megatron_ext.errors.UserError` for a file that is missing or malformed, with the
    entry at fault; whether the images exist is for whoever opens them. ``score(items, answers)`` is a pure function.
    ``right(item, answer)`` is whether one answer is counted as right. ``figures`` names what each headline column is:
    a training run logs it as ``<benchmark>_<name>``. With ``whole_images`` the questions about an image are scored
    together. ``score_likelihoods(items, {id: log-likelihood of each choice})`` is there where the choices can be ranked
    instead.
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

    def some(self, items: Sequence[Item], limit: int) -> list[Item]:
        """About ``limit`` items from all over a benchmark, always the same ones, in their order.

        The items are cut into runs of equal length, of which each gives one at random: taken at even distances they
        would follow the pattern of a file that asks for yes and no in turn.
        """
        units = list(_by_image(items).values()) if self.whole_images else [[item] for item in items]
        count = max(1, limit * len(units) // len(items))
        edges = [i * len(units) // count for i in range(count + 1)]
        draw = random.Random(0)
        return [item for low, high in zip(edges, edges[1:]) for item in units[draw.randrange(low, high)]]


def _by_image(items: Sequence[Item]) -> dict[Path, list[Item]]:
    of_image: dict[Path, list[Item]] = {}
    for item in items:
        of_image.setdefault(item.image, []).append(item)
    return of_image

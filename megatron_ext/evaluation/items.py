"""What all benchmarks share: a question with its image, the scores, and a benchmark as a reader and a scorer."""

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
    ``score_likelihoods(items, {id: log-likelihood of each choice})`` is there where the choices can be ranked instead.
    """

    name: str
    title: str
    parts: tuple[str, ...]
    read: Callable[[Path, Sequence[str] | None], list[Item]]
    score: Callable[[Sequence[Item], Answers], Scores]
    score_likelihoods: Callable[[Sequence[Item], Mapping[str, Sequence[float]]], Scores] | None = None

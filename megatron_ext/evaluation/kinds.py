"""Accuracy on each kind of question, beside what answering without looking at the picture would reach."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.evaluation.benchmark import Benchmark, Item

Z = 1.96  # of a 95 % interval


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on some questions; all but ``questions`` are shares of 1.

    Attributes:
        right: share of right answers.
        questions: their number.
        chance: accuracy of the best constant answer; knowing what each question asks for may do better.
        low, high: 95 % Wilson interval of ``right``.
    """

    right: float
    questions: int
    chance: float
    low: float
    high: float

    @classmethod
    def of(cls, right: int, questions: int, chance: float) -> "Accuracy":
        """The accuracy of ``right`` answers to at least one question."""
        n, share = questions, right / questions
        middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * (share * (1 - share) / n + Z**2 / (4 * n**2)) ** 0.5
        return cls(share, n, chance, max(middle - half, 0.0), min(middle + half, 1.0))


def by_kind(benchmark: Benchmark, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, Accuracy]:
    """Accuracy on each kind of question, in order of first occurrence; a missing answer is wrong.

    Chance is the accuracy of always giving the most frequent right answer: one over the number of possible answers
    where these are balanced, and more where they are not. Items without a kind are left out.
    """
    kinds: dict[str, list[Item]] = {}
    for item in items:
        if item.kind:
            kinds.setdefault(item.kind, []).append(item)
    accuracies = {}
    for kind, members in kinds.items():
        right = sum(item.id in answers and benchmark.right(item, answers[item.id]) for item in members)
        most_frequent = max(Counter(item.answer for item in members).values())
        accuracies[kind] = Accuracy.of(right, len(members), most_frequent / len(members))
    return accuracies


def chance_corrected(accuracies: Iterable[Accuracy]) -> float | None:
    """Mean over kinds of (accuracy - chance) / (1 - chance) in per cent: 100 is perfect, and constant answers give 0 at
    most. Kinds with a single right answer do not count; None if there are no others."""
    shares = [(a.right - a.chance) / (1 - a.chance) for a in accuracies if a.chance < 1]
    return 100 * sum(shares) / len(shares) if shares else None


def overall(accuracies: Iterable[Accuracy]) -> Accuracy:
    """The accuracy on the questions of all kinds together; chance is the mean over the questions."""
    rows = [(a.right * a.questions, a.chance * a.questions, a.questions) for a in accuracies]
    right, by_chance, questions = map(sum, zip(*rows))
    return Accuracy.of(round(right), questions, by_chance / questions)

"""Whether dense models learned the tasks: where they did not, differences between methods say nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.analysis.results import Results
from megatron_ext.analysis.synergy import REFERENCE


@dataclass(frozen=True)
class Gate:
    """What dense, trained on both tasks, reached at a size.

    Attributes:
        reached: metric -> the mean over seeds; None if no dense model has it.
        least: metric -> what it had to reach.
    """

    size: str | None
    reached: dict[str, float | None]
    least: dict[str, float]

    @property
    def passed(self) -> bool:
        return all((mean := self.reached[metric]) is not None and mean >= least for metric, least in self.least.items())

    def as_json(self) -> dict:
        return {
            "size": self.size,
            "verdict": "informative" if self.passed else "uninformative",
            "reached": self.reached,
            "least": self.least,
        }


def gates(results: Results, least: Mapping[str, float]) -> list[Gate]:
    """The gate of every size, in the order of the rows; none if nothing is asked for."""
    decided = []
    for size in dict.fromkeys(row.size for row in results.rows) if least else ():
        dense = {  # a run that belongs to several budgets counts once
            (row.seed, row.run): row
            for row in results.rows
            if (row.size, row.method, row.task, row.evaluated_as) == (size, REFERENCE, "unified", None)
        }
        reached = {}
        for metric in least:
            known = [x for row in dense.values() if (x := row.metrics.get(metric)) is not None]
            reached[metric] = sum(known) / len(known) if known else None
        decided.append(Gate(size, reached, dict(least)))
    return decided

"""The rows of what a model can do and of what it cost, for ``templates/content.j2``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.evaluation.faithfulness import NAMED, WHOLE
from megatron_ext.evaluation.kinds import Accuracy, overall
from megatron_ext.report import costs
from megatron_ext.report.chart import number
from megatron_ext.report.gather import RunData
from megatron_ext.report.scores import Pictures, Questions


@dataclass(frozen=True)
class Meter:
    """A share beside the share that would be reached without looking, in percent.

    Attributes:
        total: what ``right`` is a share of, such as ``40 questions``.
        low, high: 95 % interval of ``right``, or, around the baseline, of the difference.
        held_out: ``right`` and its interval for held-out combinations; empty where they were not evaluated.
    """

    name: str
    example: str
    total: str
    right: float
    baseline: float
    low: float
    high: float
    held_out: str = ""

    @property
    def above(self) -> bool:
        """Whether the whole interval is above the baseline."""
        return self.low > self.baseline

    @property
    def difference(self) -> str:
        """``+41.2 [+33, +49]``."""
        difference, low, high = (value - self.baseline for value in (self.right, self.low, self.high))
        return f"{difference:+.1f} [{low:+.0f},\N{NO-BREAK SPACE}{high:+.0f}]"


def question_meters(questions: Questions) -> list[Meter]:
    """All questions, then each kind."""
    rows = {"all": overall(questions.accuracies.values()), **questions.accuracies}
    return [
        Meter(
            kind,
            questions.examples.get(kind, ""),
            f"{a.questions} questions",
            *(100 * share for share in (a.right, a.chance, a.low, a.high)),
            _held_out(questions.held_out, kind),
        )
        for kind, a in rows.items()
    ]


def _held_out(accuracies: Mapping[str, Accuracy], kind: str) -> str:
    """``62 [51, 72]``; a dash for a kind without questions."""
    if not accuracies or kind not in accuracies:
        return "–" if accuracies else ""
    right, low, high = (100 * share for share in (accuracies[kind].right, accuracies[kind].low, accuracies[kind].high))
    return f"{right:.0f} [{low:.0f},\N{NO-BREAK SPACE}{high:.0f}]"


def fact_meters(pictures: Pictures) -> list[Meter]:
    """All facts, each kind, whole pictures, and drawn objects; empty without a control."""
    result = pictures.faithfulness
    if not result or not result.control:
        return []
    texts = {row: (row, pictures.examples.get(row, ""), f"{n} facts") for row, n in result.facts.items()}
    texts[WHOLE] = ("whole picture", "every fact right, no other object", f"{result.facts[WHOLE]} pictures")
    if NAMED in texts:
        texts[NAMED] = ("drawn object", "one that the caption names", f"{result.facts[NAMED]} drawn objects")
    meters = []
    for row in sorted(texts, key=lambda row: row in (WHOLE, NAMED)):
        control, interval = result.control[row], result.interval[row]
        meters.append(Meter(*texts[row], result.right[row], control, *(control + end for end in interval)))
    return meters


def cost_table(plans: Sequence[costs.PlanCost]) -> dict:
    """Head and rows of the table of FLOPs per token: those of the first plan, and the other plans relative to it."""
    first = plans[0].flops
    rows = []
    for plan in plans:
        name = f"{plan.name} (this run)" if plan.current else plan.name
        cells = (number(f) if plan is plans[0] else f"× {f / first[task]:.2f}" for task, f in plan.flops.items())
        rows.append((name, *cells))
    return {"head": ["plan", *first], "rows": rows}


def comparison(runs: Sequence[RunData]) -> dict:
    """Head and rows of the table of several runs."""
    tasks = [task for task in runs[0].tasks if runs[0].last(f"validation_loss_{task}") is not None]
    head = ["run", "plan", "FLOPs of dense", *(f"validation loss, {task}" for task in tasks)]
    head += ["questions above chance", "facts above others' captions"]
    return {"head": head, "rows": [_method(run, tasks) for run in runs]}


def _method(run: RunData, tasks: Sequence[str]) -> tuple[str, ...]:
    last = run.records[-1]
    flops, dense_flops = last.get("consumed_flops"), last.get("consumed_dense_flops")
    losses = [run.last(f"validation_loss_{task}") for task in tasks]
    questions = run.scores and run.scores.questions and question_meters(run.scores.questions)[0].difference
    facts = run.scores and run.scores.pictures and fact_meters(run.scores.pictures)
    start = run.config.checkpoint.load
    return (
        f"{run.folder}, from {start}" if start else str(run.folder),
        run.plan.name,
        f"{flops / dense_flops:.2f}" if dense_flops else "–",
        *("–" if loss is None else f"{loss:.3f}" for loss in losses),
        questions or "–",
        facts[0].difference if facts else "–",
    )

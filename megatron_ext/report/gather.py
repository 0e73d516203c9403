"""The contents of the page, read from the run's own files."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.files import read_json
from megatron_ext.report.cards import Card
from megatron_ext.report.costs import PlanCost, plan_costs
from megatron_ext.report.documents import documents
from megatron_ext.report.evaluation import NewestEvaluation, newest_evaluation
from megatron_ext.report.scores import Scores, read_scores
from megatron_ext.routing.flops import parameter_count
from megatron_ext.routing.plan import Plan
from megatron_ext.token_classes import Layout, Task
from megatron_ext.training.finished import finished_file
from megatron_ext.training.metrics import read_metrics
from megatron_ext.transformer.resolved import vocab_size
from megatron_ext.vocabulary import Vocabulary

MOST_CARDS = 8
"""Questions, and pictures with their captions, that the page shows below the two at the top."""
TASKS_OF = {"interleaved": ("understanding", "generation")}
"""Tasks of the tokens of a layout that is not named after its only task."""
VQ_SHEET = "reconstructions.png"
"""File in a VQ folder: pictures beside their reconstructions."""


@dataclass
class RunData:
    """What the files of a run say.

    Attributes:
        records: lines of ``metrics.jsonl``, oldest first.
        finished: the run is complete.
        environment: contents of ``environment.json``; empty without the file.
        dataset_metadata: of each data set of ``data.train``; None for a data set that is no longer there.
        vocabulary: None if its folder is no longer there.
        vq: folder of the VQ tokenizer, if given.
        vq_sheet: PNG of pictures beside their VQ reconstructions.
        documents: a few validation (else training) documents.
        evaluation: the newest evaluation during training.
        benchmarks: folder of the benchmarks, if given.
        scores: of the answers and pictures in the run's folder; None without them or without ``benchmarks``.
    """

    folder: Path
    config: Config
    plan: Plan
    records: list[dict]
    finished: bool
    environment: dict
    dataset_metadata: list[dict | None]
    vocabulary: Vocabulary | None
    vq: Path | None
    vq_sheet: bytes | None
    documents: list[Card]
    evaluation: NewestEvaluation | None
    benchmarks: Path | None
    scores: Scores | None

    def last(self, metric: str) -> float | None:
        """The newest value of a metric; None if it was never logged."""
        return next((r[metric] for r in reversed(self.records) if r.get(metric) is not None), None)

    @cached_property
    def costs(self) -> list[PlanCost]:
        """Costs of the plan and of others; empty if the data or the vocabulary is no longer there."""
        return plan_costs(self.config, self.plan, self.vocabulary) if self.vocabulary else []

    @property
    def parameters(self) -> int | None:
        """Weights of the model without the embedding rows that pad the table."""
        if not self.vocabulary:
            return None
        rows = vocab_size(self.config, self.vocabulary)
        return parameter_count(self.config.model, rows, self.plan.projections)

    @property
    def tasks(self) -> list[str]:
        """Names of the trained tasks, in the order of the token classes. Interleaved documents have two."""
        used = {name for layout in self.layouts for name in TASKS_OF.get(layout, (layout,))}
        return [task.name.lower() for task in Task if task.name.lower() in used]

    @property
    def layouts(self) -> list[str]:
        """The layouts of the training data."""
        used = {source.task for source in self.config.data.train}
        return [layout.name.lower() for layout in Layout if layout.name.lower() in used]


def gather(run: Path, vq: Path | None = None, benchmarks: Path | None = None) -> RunData:
    """Read a run's folder and, if given, the folders of the VQ tokenizer and of the benchmarks.

    Raises:
        UserError: the folder holds no run, nothing is logged yet, or the scores cannot be read.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: no config.yaml, so not the output folder of a training run")
    config = config_file.load(Config, [run / "config.yaml"])
    records = read_metrics(run / "metrics.jsonl")
    if not records:
        raise UserError(f"{run / 'metrics.jsonl'}: nothing logged yet")
    has_vocabulary = (Path(config.data.vocabulary) / "vocabulary.json").is_file()
    vocabulary = Vocabulary(config.data.vocabulary) if has_vocabulary else None
    return RunData(
        folder=run,
        config=config,
        plan=Plan.from_config(config),
        records=records,
        finished=finished_file(run).is_file(),
        environment=_read_if_there(run / "environment.json") or {},
        dataset_metadata=[_read_if_there(Path(f"{source.path}.json")) for source in config.data.train],
        vocabulary=vocabulary,
        vq=vq,
        vq_sheet=(vq / VQ_SHEET).read_bytes() if vq and (vq / VQ_SHEET).is_file() else None,
        documents=documents(config.data, vocabulary, vq) if vq and vocabulary else [],
        evaluation=newest_evaluation(run, config, records[-1]["iteration"]),
        benchmarks=benchmarks,
        scores=read_scores(run, benchmarks, MOST_CARDS) if benchmarks else None,
    )


def _read_if_there(file: Path) -> dict | None:
    return read_json(file) if file.is_file() else None

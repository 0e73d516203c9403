"""Everything the report tells, read from the run's own files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext import config_file
from megatron_ext.config import Config, SourceConfig
from megatron_ext.errors import UserError
from megatron_ext.files import read_json
from megatron_ext.report.evaluated import Evaluated, evaluated
from megatron_ext.report.samples import Sample, samples, vq_sheet
from megatron_ext.routing.cost import parameter_count
from megatron_ext.routing.plan import Plan
from megatron_ext.training.finished import finished_file
from megatron_ext.training.metrics import read_metrics
from megatron_ext.vocabulary import Vocabulary


@dataclass
class Facts:
    """A run as its files tell it.

    Attributes:
        records: lines of ``metrics.jsonl``, oldest first.
        finished: the run is complete.
        environment: contents of ``environment.json``.
        cards: of the training data sets, in the order of ``data.train``; None where there is no data set any more.
        vocabulary: None where its folder is gone.
        sheet: PNG of pictures beside their VQ reconstructions.
        samples: a few validation (else training) documents.
        evaluated: what the newest evaluation during training left.
    """

    run: Path
    config: Config
    plan: Plan
    records: list[dict]
    finished: bool
    environment: dict
    cards: list[dict | None]
    vocabulary: Vocabulary | None
    sheet: bytes | None
    samples: list[Sample]
    evaluated: Evaluated | None

    @property
    def parameters(self) -> int | None:
        """Weights of the model, embedding rows that only pad the table left out."""
        if not self.vocabulary:
            return None
        return parameter_count(self.config.model, self.vocabulary.size, self.plan.projections)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that were trained, in the order of the token classes."""
        names = ("understanding", "generation", "text")
        return [n for n in names if any(source.task == n for source in self.config.data.train)]


def gather(run: str | Path, vq: str | Path | None = None) -> Facts:
    """Read a run folder and, when given, the VQ tokenizer's.

    Raises:
        UserError: the folder holds no run, or nothing is logged yet.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: no config.yaml, so not the output folder of a training run")
    config = config_file.load(Config, [run / "config.yaml"])
    records = read_metrics(run / "metrics.jsonl")
    if not records:
        raise UserError(f"{run / 'metrics.jsonl'}: nothing logged yet")
    environment_file = run / "environment.json"
    found = (Path(config.data.vocabulary) / "vocabulary.json").is_file()
    vocabulary = Vocabulary(config.data.vocabulary) if found else None
    return Facts(
        run=run,
        config=config,
        plan=Plan.of(config.plan, config.model.num_layers),
        records=records,
        finished=finished_file(run).is_file(),
        environment=read_json(environment_file) if environment_file.is_file() else {},
        cards=_cards(config.data.train),
        vocabulary=vocabulary,
        sheet=vq_sheet(Path(vq)) if vq else None,
        samples=samples(config.data, vocabulary, Path(vq)) if vq and vocabulary else [],
        evaluated=evaluated(run, config, records[-1]["iteration"]),
    )


def _cards(sources: Sequence[SourceConfig]) -> list[dict | None]:
    files = [Path(f"{source.path}.json") for source in sources]
    return [json.loads(file.read_text()) if file.is_file() else None for file in files]

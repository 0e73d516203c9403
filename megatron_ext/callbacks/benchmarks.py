"""What the model of a running training can do by now: answers to benchmarks, and pictures for captions."""

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.utils import unwrap_model

from megatron_ext.config import Config, EvaluationBenchmark
from megatron_ext.distributed import device, from_rank_zero, report
from megatron_ext.evaluation import training_folder as evaluation_folder
from megatron_ext.evaluation.answer_generation import answer
from megatron_ext.evaluation.benchmark import Benchmark, Item
from megatron_ext.evaluation.registry import benchmark_named
from megatron_ext.evaluation.score_table import score_file
from megatron_ext.files import write_json
from megatron_ext.generation.checkpoint import Trained
from megatron_ext.generation.session import Session
from megatron_ext.routing.plan import Plan
from megatron_ext.training.step import evaluation_mode
from megatron_ext.vocabulary import Vocabulary


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, the same on every rank.

    Attributes:
        figures: headline figures of the benchmarks, by names such as ``pope_accuracy``.
        pictures: (caption, file) of each picture.
        seconds: wall-clock time that it took.
    """

    figures: dict[str, float]
    pictures: list[tuple[str, Path]]
    seconds: float


class Benchmarking:
    """Asks and draws as ``config.evaluation`` says, with the model while it is being trained.

    Training goes on as if nothing had happened: weights, gradients and random generators are left alone.
    """

    def __init__(self, config: Config, plan: Plan, vocabulary: Vocabulary, chunks: list):
        """
        Args:
            chunks: this rank's part of the model, wrapped for data parallelism; a single chunk.

        Raises:
            UserError: a benchmark's file or the VQ tokenizer is missing, malformed, or of another vocabulary.
        """
        self._wanted, self._chunks = config.evaluation, chunks
        self._output = Path(config.output)
        self._benchmarks = [_questions(one) for one in self._wanted.benchmarks]
        (model,) = unwrap_model(chunks)
        # Building the tokenizer's network draws numbers for weights that are then read from its file.
        with torch.random.fork_rng([device()]):
            self._session = Session(
                Trained(config, plan, vocabulary, model),
                Path(self._wanted.vq),
                self._wanted.batch_size,
                say=lambda line: None,
            )

    def __call__(self, iteration: int) -> Evaluation:
        """Evaluate the model as it is after ``iteration``. Collective.

        What an earlier process left of the same iteration is removed first.
        """
        started = time.perf_counter()
        folder = evaluation_folder.place(self._output, iteration)
        from_rank_zero(lambda: shutil.rmtree(folder, ignore_errors=True))
        pictures = []
        with evaluation_mode(self._chunks):
            for benchmark, items in self._benchmarks:
                file = folder / f"{benchmark.name}.jsonl"
                if unreadable := answer(self._session, items, file, self._wanted.max_new_tokens):
                    report(f"{file}: {unreadable} images could not be read")
            if self._wanted.prompts:
                drawn = {key: getattr(self._wanted, key) for key in ("guidance", "temperature", "seed")}
                made = self._session.draw(self._wanted.prompts, folder, drawn)
                pictures = [(one["caption"], Path(one["file"])) for one in made]
        figures = from_rank_zero(lambda: self._score(folder, iteration, pictures))
        return Evaluation(figures, pictures, time.perf_counter() - started)

    def _score(self, folder: Path, iteration: int, pictures: list[tuple[str, Path]]) -> dict[str, float]:
        figures, scores = {}, {}
        for benchmark, items in self._benchmarks:
            scored = score_file(benchmark, items, folder / f"{benchmark.name}.jsonl", f"iteration {iteration}").scores
            for column, figure in scored.headline.items():
                figures[f"{benchmark.name}_{benchmark.figures[column]}"] = figure
            scores[benchmark.name] = dataclasses.asdict(scored)
        manifest = {"iteration": iteration, "figures": figures, "scores": scores}
        manifest["pictures"] = [{"file": file.name, "caption": caption} for caption, file in pictures]
        write_json(folder / evaluation_folder.MANIFEST, manifest)
        return figures


def _questions(wanted: EvaluationBenchmark) -> tuple[Benchmark, list[Item]]:
    benchmark = benchmark_named(wanted.name)
    items = benchmark.read(Path(wanted.data), wanted.parts or None)
    return benchmark, benchmark.subset(items, wanted.limit) if 0 < wanted.limit < len(items) else items

"""Benchmarks answered and pictures generated during training."""

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.utils import unwrap_model

from megatron_ext.distributed import device, from_rank_zero, report
from megatron_ext.evaluation import training_folder
from megatron_ext.evaluation.answer_generation import answer
from megatron_ext.evaluation.benchmark import Benchmark, Item
from megatron_ext.evaluation.registry import benchmark_named
from megatron_ext.evaluation.score_table import score_file
from megatron_ext.files import write_json
from megatron_ext.generation.checkpoint import TrainedModel
from megatron_ext.generation.session import Session
from megatron_ext.run_config import EvaluationBenchmark
from megatron_ext.training import watch
from megatron_ext.training.callback import Callback, StepRecord, is_due
from megatron_ext.training.run import Run
from megatron_ext.training.step import evaluation_mode


@dataclass(frozen=True)
class EvaluationResult:
    """The result of one evaluation, the same on every rank.

    Attributes:
        figures: headline figures of the benchmarks, by names such as ``pope_accuracy``.
        pictures: (caption, file) of each picture.
        seconds: wall-clock time that the evaluation took.
    """

    figures: dict[str, float]
    pictures: list[tuple[str, Path]]
    seconds: float


class Benchmarking(Callback):
    """Evaluates the model every ``evaluation.interval`` iterations, as ``config.evaluation`` says.

    Training is not affected: weights, gradients and random generators stay as they are. A run that was told to stop
    skips the evaluation: its time may be short.
    """

    def __init__(self, run: Run):
        """
        Raises:
            UserError: a benchmark's file or the VQ tokenizer is missing, malformed, or has another vocabulary.
        """
        self._settings, self._chunks = run.config.evaluation, run.chunks
        self._output = Path(run.config.output)
        self._benchmarks = [_questions(benchmark) for benchmark in self._settings.benchmarks]
        # Building the tokenizer's network takes random numbers for weights that its file then replaces.
        with torch.random.fork_rng([device()]):
            self._session = Session(
                TrainedModel(run.resolved, run.vocabulary, unwrap_model(run.chunks)),
                Path(self._settings.vq),
                self._settings.batch_size,
                report=lambda line: None,
            )

    def after_step(self, run: Run, record: StepRecord) -> None:
        if record.stop_reason or not is_due(record.iteration, self._settings.interval, run.config):
            return
        watch.at(record.iteration, "evaluate")
        result = self.evaluate(record.iteration)
        watch.at(record.iteration, "callbacks")
        record.metrics |= result.figures | {"evaluation_seconds": result.seconds}
        record.pictures += result.pictures
        record.log_now = True

    def evaluate(self, iteration: int) -> EvaluationResult:
        """Evaluate the model as it is after ``iteration``. Collective.

        Files that an interrupted process left for the same iteration are removed first.
        """
        started = time.perf_counter()
        folder = training_folder.iteration_folder(self._output, iteration)
        from_rank_zero(lambda: shutil.rmtree(folder, ignore_errors=True))
        pictures = []
        with evaluation_mode(self._chunks):
            for benchmark, items in self._benchmarks:
                file = folder / f"{benchmark.name}.jsonl"
                if unanswered := answer(self._session, items, file, self._settings.max_new_tokens):
                    report(f"{file}: {unanswered} questions stay unanswered")
            if self._settings.prompts:
                sampling = ("temperature", "top_k", "top_p", "guidance", "seed")
                options = {key: getattr(self._settings, key) for key in sampling}
                generated = self._session.generate_pictures(self._settings.prompts, folder, options)
                pictures = [(picture["caption"], Path(picture["file"])) for picture in generated]
        figures = from_rank_zero(lambda: self._score(folder, iteration, pictures))
        return EvaluationResult(figures, pictures, time.perf_counter() - started)

    def _score(self, folder: Path, iteration: int, pictures: list[tuple[str, Path]]) -> dict[str, float]:
        figures, scores = {}, {}
        for benchmark, items in self._benchmarks:
            scored = score_file(benchmark, items, folder / f"{benchmark.name}.jsonl", f"iteration {iteration}").scores
            for column, figure in scored.headline.items():
                figures[f"{benchmark.name}_{benchmark.figures[column]}"] = figure
            scores[benchmark.name] = dataclasses.asdict(scored)
        manifest = {"iteration": iteration, "figures": figures, "scores": scores}
        manifest["pictures"] = [{"file": file.name, "caption": caption} for caption, file in pictures]
        write_json(folder / training_folder.MANIFEST, manifest)
        return figures


def _questions(settings: EvaluationBenchmark) -> tuple[Benchmark, list[Item]]:
    benchmark = benchmark_named(settings.name)
    items = benchmark.read(Path(settings.data), settings.parts or None)
    return benchmark, benchmark.subset(items, settings.limit) if 0 < settings.limit < len(items) else items

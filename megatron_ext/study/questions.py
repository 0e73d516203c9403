"""Scores over resampled questions and pictures, for every run whose answers were kept.

Pictures are sampled with all their questions, because answers about one picture are correlated. All runs get the same
pictures in replicate r, so the choice of questions cancels in their differences.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ext import command_line, files
from megatron_ext.analysis.bootstrap import Bootstrap
from megatron_ext.evaluation.answers import read_answers
from megatron_ext.evaluation.benchmark import Item
from megatron_ext.evaluation.registry import BENCHMARKS
from megatron_ext.study import state, steps
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import PICTURES, Study, StudyBenchmark

VERSION = 2
"""Version of the resampling; cached replicates of another version are recomputed."""
STRATIFIED = ("mme",)
"""Benchmarks whose score sums over groups of a fixed number of pictures; they are resampled within the groups."""


def bootstrap(study: Study, runs: Sequence[StudyRun]) -> Bootstrap:
    """Replicates of every score of answers or generated pictures; cached in the run's folder."""
    replicates = Bootstrap(study.replicates)
    if not study.replicates:
        return replicates
    samples = _Resamples(study.replicates)
    several = len(study.evaluation.evaluate_as) > 1
    work = [
        (run, name, benchmark)
        for run in runs
        if state.result(run, steps.fingerprint(run, study.evaluation))
        for benchmark in steps.benchmarks(run, study.evaluation)
        for name in study.evaluation.evaluate_as
    ]
    for run, name, benchmark in command_line.progress(work, desc="resampling questions", leave=False):
        folder = steps.answers(run, steps.same_roles(run, study.evaluation, name))
        for column, values in _replicates(folder, benchmark, samples).items():
            replicates.questions[run.name, name if several else None, column] = np.array(values)
    return replicates


class _Resamples:
    """The questions of each benchmark, and the pictures of each replicate."""

    def __init__(self, replicates: int):
        self.replicates = replicates
        self._items: dict[tuple[str, str, str], list[Item]] = {}
        self._copied: dict[tuple[tuple, int], list[tuple[Item, Item]]] = {}

    def items(self, benchmark: StudyBenchmark) -> list[Item]:
        key = (benchmark.name, benchmark.data, benchmark.parts)
        if key not in self._items:
            self._items[key] = benchmark.read()
        return self._items[key]

    def resampled(self, benchmark: StudyBenchmark):
        """For each replicate, as many pictures as the benchmark has: pairs of an item and its copy for the scorer.

        Copies have distinct ids and pictures, so the scorer counts a picture that was sampled twice as two.
        """
        items_of: dict[tuple, list[Item]] = {}  # by picture, within its benchmark and stratum
        strata: dict[tuple, dict[tuple, None]] = {}
        for item in self.items(benchmark):
            stratum = item.groups if benchmark.name in STRATIFIED else ()
            picture = (benchmark.name, benchmark.data, benchmark.parts, stratum, item.image)
            items_of.setdefault(picture, []).append(item)
            strata.setdefault(stratum, {})[picture] = None
        for replicate in range(self.replicates):
            random = np.random.default_rng([replicate, len(strata)])
            counts = Counter(
                picture
                for pictures in map(list, strata.values())
                for picture in (pictures[n] for n in random.integers(len(pictures), size=len(pictures)))
            )
            yield [
                pair
                for picture, times in counts.items()
                for n in range(times)
                for pair in self._copies(picture, n, items_of)
            ]

    def _copies(self, picture: tuple, n: int, items_of: dict) -> list[tuple[Item, Item]]:
        """The items of a picture, each with its copy for the picture's n-th time in a replicate."""
        if (picture, n) not in self._copied:
            self._copied[picture, n] = [
                (item, dataclasses.replace(item, id=f"{n}/{item.id}", image=Path(f"{n}/{item.image}")))
                for item in items_of[picture]
            ]
        return self._copied[picture, n]


def _replicates(folder: Path, benchmark: StudyBenchmark, samples: _Resamples) -> dict[str, list[float]]:
    """Column -> figures of the replicates, without figures that cannot be resampled (FID, CLIP)."""
    pictures = benchmark.name == PICTURES
    answers = folder / (PICTURES if pictures else f"{benchmark.name}.jsonl")
    if not answers.exists():
        return {}
    checksum = hashlib.sha256(
        json.dumps([VERSION, benchmark.name, benchmark.data, benchmark.parts, samples.replicates]).encode()
    )
    for answered in sorted(answers.rglob("*.png")) if pictures else [answers]:
        checksum.update(answered.read_bytes())
    file = folder / f"{benchmark.name}.replicates.json"
    if file.is_file() and (cached := files.read_json(file))["key"] == checksum.hexdigest():
        return cached["figures"]
    figures = (_of_pictures if pictures else _of_answers)(answers, benchmark, samples)
    files.write_json(file, {"key": checksum.hexdigest(), "figures": figures})
    return figures


def _of_answers(file: Path, benchmark: StudyBenchmark, samples: _Resamples) -> dict[str, list[float]]:
    scorer, answers = BENCHMARKS[benchmark.name], read_answers(file)
    scores = [(scorer.score, answers.answers)]
    if scorer.score_likelihoods and answers.likelihoods:
        scores.append((scorer.score_likelihoods, answers.likelihoods))
    figures: dict[str, list[float]] = {}
    for items in samples.resampled(benchmark):
        copies = [copy for _, copy in items]
        for score, answer_of in scores:
            resampled = {copy.id: answer_of[item.id] for item, copy in items if item.id in answer_of}
            for column, value in score(copies, resampled).headline.items():
                figures.setdefault(column, []).append(value)
    return figures


def _of_pictures(folder: Path, benchmark: StudyBenchmark, samples: _Resamples) -> dict[str, list[float]]:
    from megatron_ext.evaluation import mjhq, scene_check  # imported late: torch, which answers do without

    prompts = benchmark.read()
    files = {prompt.id: file for prompt in prompts if (file := mjhq.image_file(folder, prompt))}

    def counts(pictures: int) -> np.ndarray:
        indices = (
            np.random.default_rng([n, pictures]).integers(pictures, size=pictures) for n in range(samples.replicates)
        )
        return np.array([np.bincount(sample, minlength=pictures) for sample in indices])

    return scene_check.resample(prompts, files, counts)

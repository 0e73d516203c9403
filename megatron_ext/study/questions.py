"""Scores over resampled questions and pictures, of every run whose answers were kept.

Pictures are drawn, each with all its questions, because the answers about one picture go together. In replicate r all
runs get the same pictures, so that their differences are not blurred by which questions were asked.
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
from megatron_ext.study.grid import Run
from megatron_ext.study.study_file import PICTURES, Benchmark, Study

VERSION = 2
"""Of the way in which replicates are made: others that were kept are made anew."""
STRATIFIED = ("mme",)
"""Benchmarks whose score is a sum over groups of a fixed number of pictures: drawn within the groups."""


def bootstrap(study: Study, runs: Sequence[Run]) -> Bootstrap:
    """Replicates of every figure that is a score of answers or of what pictures show; kept in the run's folder, so that
    they are made once."""
    made = Bootstrap(study.replicates)
    if not study.replicates:
        return made
    drawn = _Drawings(study.replicates)
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
        for column, values in _replicates(folder, benchmark, drawn).items():
            made.questions[run.name, name if several else None, column] = np.array(values)
    return made


class _Drawings:
    """The questions of each benchmark, and the pictures of each replicate."""

    def __init__(self, replicates: int):
        self.replicates = replicates
        self._items: dict[tuple[str, str, str], list[Item]] = {}
        self._copied: dict[tuple[tuple, int], list[tuple[Item, Item]]] = {}

    def items(self, benchmark: Benchmark) -> list[Item]:
        key = (benchmark.name, benchmark.data, benchmark.parts)
        if key not in self._items:
            self._items[key] = benchmark.read()
        return self._items[key]

    def resampled(self, benchmark: Benchmark):
        """For each replicate the items of as many pictures as there are, beside copies of them for the scorer, to whom
        a picture that is drawn again is another one."""
        of: dict[tuple, list[Item]] = {}  # a picture is a benchmark's, and a stratum's where it has strata
        strata: dict[tuple, dict[tuple, None]] = {}
        for item in self.items(benchmark):
            stratum = item.groups if benchmark.name in STRATIFIED else ()
            picture = (benchmark.name, benchmark.data, benchmark.parts, stratum, item.image)
            of.setdefault(picture, []).append(item)
            strata.setdefault(stratum, {})[picture] = None
        for replicate in range(self.replicates):
            random = np.random.default_rng([replicate, len(strata)])
            drawn = Counter(
                image
                for pictures in map(list, strata.values())
                for image in (pictures[n] for n in random.integers(len(pictures), size=len(pictures)))
            )
            yield [pair for image, times in drawn.items() for n in range(times) for pair in self._copies(image, n, of)]

    def _copies(self, image: tuple, n: int, of: dict) -> list[tuple[Item, Item]]:
        """The items of a picture with copies for the n-th time that it is drawn."""
        if (image, n) not in self._copied:
            self._copied[image, n] = [
                (item, dataclasses.replace(item, id=f"{n}/{item.id}", image=Path(f"{n}/{item.image}")))
                for item in of[image]
            ]
        return self._copied[image, n]


def _replicates(folder: Path, benchmark: Benchmark, drawn: _Drawings) -> dict[str, list[float]]:
    """Column -> figures of the replicates; nothing for what cannot be resampled (FID, CLIP)."""
    pictures = benchmark.name == PICTURES
    made = folder / (PICTURES if pictures else f"{benchmark.name}.jsonl")
    if not made.exists():
        return {}
    told = hashlib.sha256(
        json.dumps([VERSION, benchmark.name, benchmark.data, benchmark.parts, drawn.replicates]).encode()
    )
    for answered in sorted(made.rglob("*.png")) if pictures else [made]:
        told.update(answered.read_bytes())
    file = folder / f"{benchmark.name}.replicates.json"
    if file.is_file() and (kept := files.read_json(file))["key"] == told.hexdigest():
        return kept["figures"]
    figures = (_of_pictures if pictures else _of_answers)(made, benchmark, drawn)
    files.write_json(file, {"key": told.hexdigest(), "figures": figures})
    return figures


def _of_answers(file: Path, benchmark: Benchmark, drawn: _Drawings) -> dict[str, list[float]]:
    scorer, given = BENCHMARKS[benchmark.name], read_answers(file)
    scores = [(scorer.score, given.answers)]
    if scorer.score_likelihoods and given.likelihoods:
        scores.append((scorer.score_likelihoods, given.likelihoods))
    figures: dict[str, list[float]] = {}
    for items in drawn.resampled(benchmark):
        copies = [copy for _, copy in items]
        for score, answers in scores:
            said = {copy.id: answers[item.id] for item, copy in items if item.id in answers}
            for column, value in score(copies, said).headline.items():
                figures.setdefault(column, []).append(value)
    return figures


def _of_pictures(folder: Path, benchmark: Benchmark, drawn: _Drawings) -> dict[str, list[float]]:
    from megatron_ext.evaluation import mjhq, scene_check  # imported late: torch, which answers do without

    prompts = benchmark.read()
    files = {prompt.id: file for prompt in prompts if (file := mjhq.image_file(folder, prompt))}

    def drawings(pictures: int) -> np.ndarray:
        chosen = (
            np.random.default_rng([n, pictures]).integers(pictures, size=pictures) for n in range(drawn.replicates)
        )
        return np.array([np.bincount(one, minlength=pictures) for one in chosen])

    return scene_check.resample(prompts, files, drawings)

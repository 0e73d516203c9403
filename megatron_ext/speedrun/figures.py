"""The figures of a model, above chance, from its answers and its pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ext.evaluation import kinds, mjhq, scene_check
from megatron_ext.evaluation.answers import read_answers
from megatron_ext.evaluation.benchmark import Item
from megatron_ext.evaluation.detected_files import detect_files, saved_file
from megatron_ext.evaluation.faithfulness import ALL, ROWS, chance_corrected, count_facts, shares
from megatron_ext.evaluation.gqa import GQA
from megatron_ext.picture_world.detected import DetectedScene
from megatron_ext.picture_world.facts import CaptionFacts
from megatron_ext.speedrun.questions import SPLITS, split_of

TASKS = ("understanding", "generation")
MEAN = "mean"
"""Of both splits: what counts. Pooled, one fixed picture for each split would be above chance."""


def figures(questions: Path, answers: Path) -> dict[str, dict[str, float]]:
    """The chance-corrected figures, in per cent, by split (and :data:`MEAN`) and task.

    Args:
        questions: folder of :mod:`.questions`.
        answers: folder of gqa.jsonl and mjhq/.

    Raises:
        UserError: a file is missing or malformed.
    """
    items, answered = GQA.read(questions / "gqa"), read_answers(answers / "gqa.jsonl").answers
    prompts = mjhq.read(questions / "mjhq")
    pictures = {p.id: file for p in prompts if (file := mjhq.image_file(answers / "mjhq", p))}
    seen = detect_files(pictures, saved_file(answers / "mjhq"))
    facts = scene_check.caption_facts(prompts)
    result = {}
    for split in SPLITS:
        chosen = [item for item in items if split_of(item.id) == split]
        ids = [id for id in facts if split_of(id) == split]
        of_split = understanding(chosen, answered), generation([seen.get(id) for id in ids], [facts[id] for id in ids])
        result[split] = dict(zip(TASKS, of_split))
    return result | {MEAN: {task: float(np.mean([result[split][task] for split in SPLITS])) for task in TASKS}}


def understanding(items: Sequence[Item], answers: dict[str, str]) -> float:
    """``GQA, chance-corrected`` of these questions."""
    return kinds.chance_corrected(kinds.by_kind(GQA, items, answers).values()) or 0.0


def generation(seen: Sequence[DetectedScene | None], facts: Sequence[CaptionFacts]) -> float:
    """``MJHQ-facts, chance-corrected`` of pictures (None: missing) of captions with these facts."""
    own, others = (shares(np.sum(counts, 0))[ROWS.index(ALL)] for counts in count_facts(seen, facts))
    return chance_corrected(float(own), float(others)) or 0.0

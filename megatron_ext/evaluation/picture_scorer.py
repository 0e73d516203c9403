"""All scores of a folder of generated pictures: Frechet distance, CLIP score, and agreement with the captions."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_ext import vq as vq_package
from megatron_ext.command_line import progress
from megatron_ext.evaluation import mjhq, scene_check
from megatron_ext.evaluation.benchmark import Scores
from megatron_ext.evaluation.clip import Clip
from megatron_ext.evaluation.detected_files import saved_file
from megatron_ext.evaluation.fid import BATCH, feature_extractor, read_picture
from megatron_ext.evaluation.mjhq import ImageSet, Prompt
from megatron_ext.evaluation.picture_folder import MANIFEST, read_manifest
from megatron_ext.evaluation.score_table import Scored

OVERALL = "all"


class PictureScorer:
    """Scores folders of pictures; networks and reference images are loaded once.

    Args:
        inception: TorchScript file for the Frechet distance; None: the built-in features.
        clip: folder of a CLIP model; None: no CLIP score.
        vq: folder of a VQ tokenizer, for the best agreement with captions that its pictures can reach; None: not
            measured.

    Raises:
        UserError: one of them is missing or of another kind.
    """

    def __init__(self, inception: Path | None, clip: Path | None, vq: Path | None):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._extract = feature_extractor(inception, device)
        # The distance of the built-in features has a column of its own: it is not comparable with Inception's.
        self._fid = "MJHQ-FID" if inception else "MJHQ-FID (built-in)"
        self._clip = Clip(clip, device) if clip else None
        self._vq = vq_package.load(vq, device) if vq else None
        self._reference = functools.cache(self._collect_reference)

    def score(self, data: Path, parts: Sequence[str] | None, folder: Path, label: str) -> list[Scored]:
        """Score the pictures in ``folder`` for the prompts in ``data``, or for some categories: first the benchmark's
        scores; then, if prompts are captions of the picture world, the agreement with the captions.

        A missing or unreadable picture has a CLIP score of 0 and no correct facts. It has no features: the distance is
        that of the other pictures, with their number.

        Raises:
            UserError: a folder is missing, or the prompts are not in MJHQ's layout.
        """
        reference = self._reference(data, None if parts is None else tuple(parts))
        generated = mjhq.collect(reference.prompts, folder, self._extract)
        unknown, duplicates = mjhq.unexpected_images(mjhq.read(data), folder)
        unusable = {
            "no picture of": generated.missing,
            "unreadable pictures of": generated.unreadable,
            "pictures without a prompt": unknown,
            "no reference picture of": reference.missing,
            "unreadable reference pictures of": reference.unreadable,
        }
        headline, details, notes = self._distances(reference, generated)
        if self._clip:
            notes.append(f"MJHQ-CLIP: {self._clip.name}")
            scores = self._clip_scores(generated)
            for name, prompts in _by_category(generated.prompts).items():
                details[name]["CLIP"] = float(np.mean([scores.get(prompt.id, 0.0) for prompt in prompts]))
            headline["MJHQ-CLIP"] = details[OVERALL]["CLIP"]
        if parts is not None:
            notes.append(f"{mjhq.TITLE}: only {', '.join(parts)}")
        notes += _manifest_note(folder)
        counts = (len(generated.prompts), len(generated.missing), len(generated.unreadable))
        scores = Scores(headline, details, *counts, tuple(notes))
        scored = [Scored(label, mjhq.TITLE, str(folder), scores, duplicates, len(unknown), [], False, unusable)]
        if agreement := scene_check.scores(reference, generated, self._vq, saved_file(folder)):
            scored.append(Scored(label, scene_check.TITLE, str(folder), agreement, 0, 0, [], False))
        return scored

    def _collect_reference(self, data: Path, parts: tuple[str, ...] | None) -> ImageSet:
        return mjhq.collect(mjhq.read(data, parts), data, self._extract)

    def _distances(self, reference: ImageSet, generated: ImageSet) -> tuple[dict, dict[str, dict], list[str]]:
        details = {}
        for category, distance in mjhq.distances(reference, generated).items():
            figures = {"FID": distance["fid"], "pictures": distance["images"]["generated"]}
            details[category or OVERALL] = {**figures, "references": distance["images"]["reference"]}
        fid, dimensions = details[OVERALL]["FID"], generated.features.rows.shape[1]
        notes = [f"{self._fid}: {self._extract.name}"]
        if fid is None:
            notes.append(f"{self._fid}: needs two pictures on both sides")
        elif min(row[side] for row in details.values() for side in ("pictures", "references")) <= dimensions:
            notes.append(f"{self._fid}: too large where there are not more pictures than the {dimensions} features")
        return {} if fid is None else {self._fid: fid}, details, notes

    def _clip_scores(self, generated: ImageSet) -> dict[str, float]:
        """CLIP score of each picture by the id of its prompt."""
        scores = {}
        prompts = [prompt for prompt in generated.prompts if prompt.id in generated.files]
        for start in progress(range(0, len(prompts), BATCH), desc="CLIP", unit="batch"):
            batch = prompts[start : start + BATCH]
            pictures = [read_picture(generated.files[prompt.id]) for prompt in batch]
            values = self._clip(pictures, [prompt.prompt for prompt in batch])
            scores |= {prompt.id: float(value) for prompt, value in zip(batch, values)}
        return scores


def _by_category(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    groups = {OVERALL: list(prompts)}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt)
    return groups


def _manifest_note(folder: Path) -> list[str]:
    """How the pictures were made, if they have a manifest."""
    manifest = read_manifest(folder)
    if not manifest:
        return []
    settings = ", ".join(f"{key} {manifest.get(key)}" for key in ("temperature", "top_k", "top_p", "guidance", "seed"))
    return [f"{folder / MANIFEST}: by {manifest.get('path')} with {settings}"]

"""All scores of a folder of generated pictures: Frechet distance, CLIP score, and what the pictures show."""

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
from megatron_ext.evaluation.fid import BATCH, network, read_picture
from megatron_ext.evaluation.mjhq import Prompt, Side
from megatron_ext.evaluation.picture_folder import MANIFEST, read_manifest
from megatron_ext.evaluation.score_table import Scored

OVERALL = "all"


class PictureScorer:
    """Scores folders of pictures; what they have in common, networks and reference images, is read once.

    Args:
        inception: TorchScript file for the Frechet distance; None: the built-in features.
        clip: folder of a CLIP model; None: no CLIP score.
        vq: folder of a VQ tokenizer; None: nothing is said of what pictures could show at best.

    Raises:
        UserError: one of them is absent or something else.
    """

    def __init__(self, inception: Path | None, clip: Path | None, vq: Path | None):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._network = network(inception, device)
        # A distance that nobody else has must not stand in the column of one that everybody has.
        self._fid = "MJHQ-FID" if inception else "MJHQ-FID (built-in)"
        self._clip = Clip(clip, device) if clip else None
        self._vq = vq_package.load(vq, device) if vq else None
        self._reference = functools.cache(self._collect_reference)

    def score(self, data: Path, parts: Sequence[str] | None, folder: Path, label: str) -> list[Scored]:
        """The scores of the pictures in ``folder`` for the prompts in ``data``, or those of some categories: first the
        benchmark's; then, where prompts are captions of the picture world, what the pictures show.

        A picture that is missing or unreadable has a CLIP score of 0 and shows nothing that was asked for. It has no
        features: the distance is that of the others, and says of how many.

        Raises:
            UserError: a folder is absent, or the prompts are not of MJHQ's layout.
        """
        reference = self._reference(data, None if parts is None else tuple(parts))
        generated = mjhq.collect(reference.prompts, folder, self._network)
        unknown, duplicates = mjhq.strays(mjhq.read(data), folder)
        wrong = {
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
        notes += _drawn(folder)
        counts = (len(generated.prompts), len(generated.missing), len(generated.unreadable))
        scores = Scores(headline, details, *counts, tuple(notes))
        made = [Scored(label, mjhq.TITLE, str(folder), scores, duplicates, len(unknown), [], False, wrong)]
        if shown := scene_check.scores(reference, generated, self._vq):
            made.append(Scored(label, scene_check.TITLE, str(folder), shown, 0, 0, [], False))
        return made

    def _collect_reference(self, data: Path, parts: tuple[str, ...] | None) -> Side:
        return mjhq.collect(mjhq.read(data, parts), data, self._network)

    def _distances(self, reference: Side, generated: Side) -> tuple[dict, dict[str, dict], list[str]]:
        details = {}
        for category, found in mjhq.distances(reference, generated).items():
            figures = {"FID": found["fid"], "pictures": found["images"]["generated"]}
            details[category or OVERALL] = {**figures, "references": found["images"]["reference"]}
        fid, dimensions = details[OVERALL]["FID"], generated.features.rows.shape[1]
        notes = [f"{self._fid}: {self._network.name}"]
        if fid is None:
            notes.append(f"{self._fid}: needs two pictures on both sides")
        elif min(of[side] for of in details.values() for side in ("pictures", "references")) <= dimensions:
            notes.append(f"{self._fid}: too large where there are no more pictures than the {dimensions} features")
        return {} if fid is None else {self._fid: fid}, details, notes

    def _clip_scores(self, generated: Side) -> dict[str, float]:
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


def _drawn(folder: Path) -> list[str]:
    """How the pictures were made, where their manifest says so."""
    manifest = read_manifest(folder)
    if not manifest:
        return []
    settings = ", ".join(f"{key} {manifest.get(key)}" for key in ("temperature", "top_k", "top_p", "guidance", "seed"))
    return [f"{folder / MANIFEST}: by {manifest.get('path')} with {settings}"]

"""The scene check: whether generated pictures show the captions of the picture world that they were made for."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_ext.errors import UserError
from megatron_ext.evaluation import mjhq
from megatron_ext.evaluation.benchmark import Scores
from megatron_ext.evaluation.detected_files import detect_all, detect_files
from megatron_ext.evaluation.faithfulness import ALL, Faithfulness, chance_corrected, measure
from megatron_ext.evaluation.fid import BATCH
from megatron_ext.evaluation.mjhq import ImageSet, Prompt
from megatron_ext.picture_world.detected import DetectedScene
from megatron_ext.picture_world.facts import CaptionFacts, read_caption
from megatron_ext.vq.image_decoder import PillowDecoder
from megatron_ext.vq.model import VQModel
from megatron_ext.vq.pixels import from_bytes, to_bytes

TITLE = f"{mjhq.TITLE}, scene check"
COLUMN = "MJHQ-facts"
OTHERS, DIFFERENCE = f"{COLUMN}, others' prompts", f"{COLUMN}, difference"
CORRECTED = f"{COLUMN}, chance-corrected"
"""The difference, relative to the largest possible one, in per cent; equal pictures for all prompts give 0."""


def scores(reference: ImageSet, generated: ImageSet, vq: VQModel | None, saved: Path | None = None) -> Scores | None:
    """The share of facts of the prompts that the pictures show; the same with other pictures' prompts; and the best
    that can be reached: the reference pictures themselves, and as the VQ tokenizer reconstructs them.

    None if no prompt is a caption of the picture world.

    Args:
        saved: keeps the contents of the generated pictures, see :func:`~.detected_files.detect_files`.
    """
    facts = caption_facts(generated.prompts)
    if not facts:
        return None
    counts = [len([id for id in ids if id in facts]) for ids in (generated.missing, generated.unreadable)]
    notes = []
    if others := len(generated.prompts) - len(facts):
        notes.append(f"{TITLE}: {others} prompts are not captions of the picture world and are left out")
    try:
        seen = detect_files(_files(generated, facts), saved)
    except UserError as error:
        return Scores({}, {}, len(facts), *counts, (*notes, f"{TITLE}: none, {error}"))
    result = measure([seen.get(id) for id in facts], list(facts.values()))
    best = {}
    files = _files(reference, facts)
    try:
        if files:
            best["reference"] = _measure_reference(detect_files(files), facts)
        if files and vq:
            best["reference through VQ"] = _measure_reference(
                detect_all(reconstructions(vq, list(files.items())), len(files)), facts
            )
    except UserError as error:
        notes.append(f"{TITLE}: the best that can be reached is incomplete, {error}")
    headline = {COLUMN: result.right[ALL]}
    if result.control:
        low, high = result.interval[ALL]
        difference = result.right[ALL] - result.control[ALL]
        headline |= {OTHERS: result.control[ALL], DIFFERENCE: difference}
        corrected = chance_corrected(result.right[ALL], result.control[ALL])
        headline |= {} if corrected is None else {CORRECTED: corrected}
        notes.append(f"{DIFFERENCE}: {difference:.2f}, 95 % interval {low:.2f} to {high:.2f}")
    else:
        notes.append(f"{COLUMN}: no control, there is only one prompt")
    return Scores(headline, _details(result, best), len(facts), *counts, tuple(notes))


def caption_facts(prompts: Sequence[Prompt]) -> dict[str, CaptionFacts]:
    """The facts of the prompts that are captions of the picture world, by id."""
    facts = {}
    for prompt in prompts:
        with contextlib.suppress(UserError):
            facts[prompt.id] = read_caption(prompt.prompt)
    return facts


def _files(images: ImageSet, facts: dict[str, CaptionFacts]) -> dict[str, Path]:
    return {id: images.files[id] for id in facts if id in images.files}


def _measure_reference(seen: dict[str, DetectedScene], facts: dict[str, CaptionFacts]) -> Faithfulness:
    return measure(list(seen.values()), [facts[id] for id in seen], control=False)


def reconstructions(vq: VQModel, files: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, np.ndarray]]:
    """Pictures as the tokenizer reconstructs them, uint8 [H, W, 3]."""
    decoder = PillowDecoder(vq.image_size, vq.preparation.generation, 1, vq.preparation)
    for start in range(0, len(files), BATCH):
        batch = files[start : start + BATCH]
        pixels = torch.stack(decoder([file.read_bytes() for _, file in batch])).permute(0, 3, 1, 2)
        decoded = vq.decode(vq.encode(from_bytes(pixels))).cpu()
        pictures = to_bytes(decoded).permute(0, 2, 3, 1).numpy()
        yield from zip((id for id, _ in batch), pictures)
    decoder.close()


def _details(result: Faithfulness, best: dict[str, Faithfulness]) -> dict[str, dict[str, float]]:
    details = {}
    for row, right in result.right.items():
        figures = {"right": right}
        if result.control:
            low, high = result.interval[row]
            figures |= {"others' prompts": result.control[row], "difference": right - result.control[row]}
            figures |= {"from": low, "to": high}
        figures |= {name: reference.right[row] for name, reference in best.items() if row in reference.right}
        details[row] = {**figures, "facts": result.facts[row]}
    return details

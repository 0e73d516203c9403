"""What pictures show of the prompts they were made for, where those are captions of the picture world."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_ext.command_line import progress
from megatron_ext.errors import UserError
from megatron_ext.evaluation import mjhq
from megatron_ext.evaluation.benchmark import Scores
from megatron_ext.evaluation.faithfulness import ALL, ROWS, Aligned, align, counted, shares
from megatron_ext.evaluation.fid import BATCH, read_picture
from megatron_ext.evaluation.mjhq import Prompt, Side
from megatron_ext.picture_world.detection import Seen, look
from megatron_ext.picture_world.facts import Facts, read_caption
from megatron_ext.vq.image_decoder import CROP, PillowDecoder
from megatron_ext.vq.model import VQModel

TITLE = f"{mjhq.TITLE}, scene check"
COLUMN = "MJHQ-facts"
OTHERS, DIFFERENCE = f"{COLUMN}, others' prompts", f"{COLUMN}, difference"


def scores(reference: Side, generated: Side, vq: VQModel | None) -> Scores | None:
    """The share of facts in the prompts that are right in the pictures; with other pictures' prompts; and what can be
    had at best: the same of the reference pictures, and of these sent through the VQ tokenizer.

    None: no prompt is a caption of the picture world.
    """
    facts = {prompt.id: said for prompt in generated.prompts if (said := _facts(prompt))}
    if not facts:
        return None
    lost = [len([id for id in ids if id in facts]) for ids in (generated.missing, generated.unreadable)]
    notes = []
    if others := len(generated.prompts) - len(facts):
        notes.append(f"{TITLE}: {others} prompts are no captions of the picture world and are left out")
    try:
        seen = _look(((id, read_picture(file)) for id, file in _of(generated, facts)), len(facts))
    except UserError as error:
        return Scores({}, {}, len(facts), *lost, (*notes, f"{TITLE}: none, {error}"))
    found = align([seen.get(id) for id in facts], list(facts.values()))
    best = {}
    files = _of(reference, facts)
    try:
        if files:
            best["reference"] = _best(((id, read_picture(file)) for id, file in files), facts)
        if files and vq:
            best["reference through VQ"] = _best(_through(vq, files), facts)
    except UserError as error:
        notes.append(f"{TITLE}: not all of what can be had at best, {error}")
    headline = {COLUMN: found.right[ALL]}
    if found.shuffled:
        low, high = found.interval[ALL]
        difference = found.right[ALL] - found.shuffled[ALL]
        headline |= {OTHERS: found.shuffled[ALL], DIFFERENCE: difference}
        notes.append(f"{DIFFERENCE}: {difference:.2f}, 95 % interval {low:.2f} to {high:.2f}")
    else:
        notes.append(f"{COLUMN}: no control, there is one prompt only")
    return Scores(headline, _details(found, best), len(facts), *lost, tuple(notes))


def resampled(
    prompts: Sequence[Prompt], files: Mapping[str, Path], drawings: Callable[[int], np.ndarray]
) -> dict[str, list[float]]:
    """Column of the headline -> its figure for each drawing of pictures, each with its own and the others' prompts.

    Args:
        files: the picture of each prompt, by its id; a prompt without one has nothing right.
        drawings: of a number of pictures, how often each is drawn, [drawings, pictures].

    Returns:
        Nothing where no prompt is a caption of the picture world, or a picture is none of it.
    """
    facts = {prompt.id: said for prompt in prompts if (said := _facts(prompt))}
    if not facts:
        return {}
    try:
        seen = _look(((id, read_picture(files[id])) for id in facts if id in files), len(facts))
    except UserError:
        return {}
    own, other = counted([seen.get(id) for id in facts], list(facts.values()))
    drawn = drawings(len(facts))
    every = ROWS.index(ALL)
    right = shares(drawn @ own[:, every])
    figures = {COLUMN: right}
    if other is not None:
        control = shares(drawn @ other[:, every])
        figures |= {OTHERS: control, DIFFERENCE: right - control}
    return {column: values.tolist() for column, values in figures.items()}


def _facts(prompt: Prompt) -> Facts | None:
    try:
        return read_caption(prompt.prompt)
    except UserError:
        return None


def _of(side: Side, facts: dict[str, Facts]) -> list[tuple[str, Path]]:
    return [(id, side.files[id]) for id in facts if id in side.files]


def _best(pictures: Iterator[tuple[str, Image.Image | np.ndarray]], facts: dict[str, Facts]) -> Aligned:
    seen = _look(pictures, len(facts))
    return align(list(seen.values()), [facts[id] for id in seen], control=False)


def _look(pictures: Iterator[tuple[str, Image.Image | np.ndarray]], count: int) -> dict[str, Seen]:
    """What is in each picture, by id.

    Raises:
        UserError: a picture has not the shape of a picture of the picture world.
    """
    seen = {}
    for id, picture in progress(pictures, desc="looking", unit="picture", total=count):
        try:
            seen[id] = look(picture)
        except ValueError as error:
            raise UserError(f"{id}: {error}") from None
    return seen


def _through(vq: VQModel, files: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, np.ndarray]]:
    """Pictures as the tokenizer gives them back, uint8 [H, W, 3]."""
    decoder = PillowDecoder(vq.image_size, CROP, 1)
    for start in range(0, len(files), BATCH):
        batch = files[start : start + BATCH]
        pixels = torch.stack(decoder([file.read_bytes() for _, file in batch])).permute(0, 3, 1, 2)
        made = vq.decode(vq.encode(pixels / 127.5 - 1)).cpu()
        pictures = ((made + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        yield from zip((id for id, _ in batch), pictures)
    decoder.close()


def _details(found: Aligned, best: dict[str, Aligned]) -> dict[str, dict[str, float]]:
    details = {}
    for row, right in found.right.items():
        figures = {"right": right}
        if found.shuffled:
            low, high = found.interval[row]
            figures |= {"others' prompts": found.shuffled[row], "difference": right - found.shuffled[row]}
            figures |= {"from": low, "to": high}
        figures |= {name: of.right[row] for name, of in best.items() if row in of.right}
        details[row] = {**figures, "facts": found.facts[row]}
    return details

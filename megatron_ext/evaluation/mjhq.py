"""MJHQ-30K: images generated from prompts, by their Frechet distance from the reference images.

Layout of the release, ``meta_data.json``: {id: {"category", "prompt"}}, and ``<category>/<id>.jpg``. Generated images
lie in a folder of the same layout, or without categories; .png, .jpg, .jpeg and .webp are all looked for.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.errors import UserError
from megatron_ext.evaluation.fid import Features, Network, features, frechet_distance
from megatron_ext.files import read_json

TITLE = "MJHQ-30K"
PROMPTS = "meta_data.json"
ENDINGS = (".jpg", ".png", ".jpeg", ".webp")


@dataclass(frozen=True)
class Prompt:
    """One image to be generated."""

    id: str
    category: str
    prompt: str
    number: int  # among all prompts of the file: it stays the same where only some categories are read


def read(folder: Path, categories: Sequence[str] | None = None) -> list[Prompt]:
    """The prompts of ``folder/meta_data.json``, in its order: all, or those of some categories.

    Raises:
        UserError: the file is absent or not of this layout, or has no such category.
    """
    file = folder / PROMPTS
    entries = read_json(file)
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{file}: must be an object {{id: {{category, prompt}}}} with at least one entry")
    prompts = []
    for name, entry in entries.items():
        values = [entry.get(key) for key in ("category", "prompt")] if isinstance(entry, dict) else [None]
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{file}: entry '{name}': 'category' and 'prompt' must be texts")
        # Both become parts of paths.
        if any(part in ("", ".", "..") or "/" in part or "\\" in part for part in (name, values[0])):
            raise UserError(f"{file}: entry '{name}', category '{values[0]}': cannot be the name of a file")
        prompts.append(Prompt(name, *values, len(prompts)))
    known = sorted({prompt.category for prompt in prompts})
    if absent := [category for category in categories or () if category not in known]:
        raise UserError(f"{file}: has no category '{absent[0]}'; it has {', '.join(known)}")
    return [prompt for prompt in prompts if categories is None or prompt.category in categories]


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits that change with the file of prompts."""
    return hashlib.sha256((folder / PROMPTS).read_bytes()).hexdigest()[:16]


def image_file(folder: Path, prompt: Prompt) -> Path | None:
    """Where the image for a prompt lies in a folder, if it does."""
    return next((place for place in _places(folder, prompt) if place.is_file()), None)


def strays(prompts: Sequence[Prompt], folder: Path) -> tuple[list[str], int]:
    """The images in a folder, and in its categories, that stand for no prompt, and the number of those that stand for
    one that has an image already."""
    folders = [folder, *(folder / category for category in sorted({prompt.category for prompt in prompts}))]
    files = {f for place in folders if place.is_dir() for f in place.iterdir() if f.suffix.lower() in ENDINGS}
    found = [[place for place in _places(folder, prompt) if place in files] for prompt in prompts]
    unknown = files.difference(*found) if found else files
    return sorted(str(file.relative_to(folder)) for file in unknown), sum(max(len(some) - 1, 0) for some in found)


def _places(folder: Path, prompt: Prompt) -> list[Path]:
    return [place / f"{prompt.id}{ending}" for place in (folder / prompt.category, folder) for ending in ENDINGS]


@dataclass(frozen=True)
class Side:
    """The images of one folder, generated or reference, as a network sees them."""

    network: str
    prompts: Sequence[Prompt]
    features: Features
    files: dict[str, Path]  # id -> image, the readable ones
    missing: list[str]  # ids
    unreadable: list[str]  # ids

    def rows(self, category: str | None = None) -> np.ndarray:
        """Features of all images, or of one category's."""
        if category is None:
            return self.features.rows
        files = {self.files[p.id] for p in self.prompts if p.category == category and p.id in self.files}
        return self.features.rows[np.array([file in files for file in self.features.files], dtype=bool)]


def collect(prompts: Sequence[Prompt], folder: Path, network: Network) -> Side:
    """The images for some prompts in a folder.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = {prompt.id: file for prompt in prompts if (file := image_file(folder, prompt))}
    made = features(list(found.values()), network)
    lost = set(made.unreadable)
    return Side(
        network.name,
        prompts,
        made,
        {id: file for id, file in found.items() if file not in lost},
        [prompt.id for prompt in prompts if prompt.id not in found],
        [id for id, file in found.items() if file in lost],
    )


def distances(reference: Side, generated: Side) -> dict[str | None, dict]:
    """Frechet distances of the generated images from the reference images.

    Returns:
        For each category, and for None, all images: ``fid``, and ``images`` (how many of ``reference`` and
        ``generated`` it is between). A distance is None where a side has fewer than two images.
    """
    categories = sorted({prompt.category for prompt in generated.prompts})
    return {c: _distance(reference.rows(c), generated.rows(c)) for c in (None, *categories)}


def _distance(reference: np.ndarray, generated: np.ndarray) -> dict:
    fid = frechet_distance(generated, reference) if min(len(reference), len(generated)) > 1 else None
    return {"fid": fid, "images": {"reference": len(reference), "generated": len(generated)}}

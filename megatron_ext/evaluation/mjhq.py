"""MJHQ-30K: Frechet distance of images generated from prompts to reference images.

The release holds ``meta_data.json``: {id: {"category", "prompt"}}, and ``<category>/<id>.jpg``. Generated images are in
a folder of the same layout, with or without category folders, as .png, .jpg, .jpeg or .webp.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_ext.errors import UserError
from megatron_ext.evaluation.fid import FeatureExtractor, Features, features, frechet_distance
from megatron_ext.files import read_json

TITLE = "MJHQ-30K"
PROMPTS = "meta_data.json"
ENDINGS = (".jpg", ".png", ".jpeg", ".webp")


@dataclass(frozen=True)
class Prompt:
    """The prompt of one image."""

    id: str
    category: str
    prompt: str
    number: int  # index among all prompts of the file, whichever categories are read


AnyPrompt = TypeVar("AnyPrompt", bound=Prompt)


def read(folder: Path, categories: Sequence[str] | None = None) -> list[Prompt]:
    """The prompts of ``folder/meta_data.json``, in its order; all, or those of some categories.

    Raises:
        UserError: the file is missing or malformed, or has no such category.
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
    return of_categories(prompts, categories, file, "category")


def of_categories(prompts: list[AnyPrompt], categories: Sequence[str] | None, file: Path, word: str) -> list[AnyPrompt]:
    """All prompts, or those of some categories, which ``word`` names in messages about ``file``.

    Raises:
        UserError: there is no such category.
    """
    known = sorted({prompt.category for prompt in prompts})
    if absent := [category for category in categories or () if category not in known]:
        raise UserError(f"{file}: has no {word} '{absent[0]}'; it has {', '.join(known)}")
    return [prompt for prompt in prompts if categories is None or prompt.category in categories]


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits that change with ``folder/meta_data.json``."""
    return hashlib.sha256((folder / PROMPTS).read_bytes()).hexdigest()[:16]


def image_file(folder: Path, prompt: Prompt) -> Path | None:
    """The image for a prompt in a folder; None if there is none."""
    return next((place for place in _places(folder, prompt) if place.is_file()), None)


def unexpected_images(prompts: Sequence[Prompt], folder: Path) -> tuple[list[str], int]:
    """The images in a folder (and its category folders) that belong to no prompt, and the number of further images for
    prompts that have one."""
    folders = [folder, *(folder / category for category in sorted({prompt.category for prompt in prompts}))]
    files = {f for place in folders if place.is_dir() for f in place.iterdir() if f.suffix.lower() in ENDINGS}
    by_prompt = [[place for place in _places(folder, prompt) if place in files] for prompt in prompts]
    unknown = files.difference(*by_prompt) if by_prompt else files
    duplicates = sum(max(len(images) - 1, 0) for images in by_prompt)
    return sorted(str(file.relative_to(folder)) for file in unknown), duplicates


def _places(folder: Path, prompt: Prompt) -> list[Path]:
    return [place / f"{prompt.id}{ending}" for place in (folder / prompt.category, folder) for ending in ENDINGS]


@dataclass(frozen=True)
class ImageSet:
    """The images of one folder, generated or reference, with their features."""

    extractor: str  # name of the feature extractor
    prompts: Sequence[Prompt]
    features: Features
    files: dict[str, Path]  # id -> readable image
    missing: list[str]  # ids
    unreadable: list[str]  # ids

    def rows(self, category: str | None = None) -> np.ndarray:
        """Features of all images, or of one category."""
        if category is None:
            return self.features.rows
        files = {self.files[p.id] for p in self.prompts if p.category == category and p.id in self.files}
        return self.features.rows[np.array([file in files for file in self.features.files], dtype=bool)]


def collect(prompts: Sequence[Prompt], folder: Path, extract: FeatureExtractor) -> ImageSet:
    """The images for some prompts in a folder, with their features.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = {prompt.id: file for prompt in prompts if (file := image_file(folder, prompt))}
    extracted = features(list(files.values()), extract)
    unreadable = set(extracted.unreadable)
    return ImageSet(
        extract.name,
        prompts,
        extracted,
        {id: file for id, file in files.items() if file not in unreadable},
        [prompt.id for prompt in prompts if prompt.id not in files],
        [id for id, file in files.items() if file in unreadable],
    )


def distances(reference: ImageSet, generated: ImageSet) -> dict[str | None, dict]:
    """Frechet distances between the generated and the reference images.

    Returns:
        ``fid`` and ``images`` (numbers of ``reference`` and ``generated`` images) for each category and, under the key
        None, for all images. ``fid`` is None where a set has fewer than two images.
    """
    categories = sorted({prompt.category for prompt in generated.prompts})
    return {c: _distance(reference.rows(c), generated.rows(c)) for c in (None, *categories)}


def _distance(reference: np.ndarray, generated: np.ndarray) -> dict:
    fid = frechet_distance(generated, reference) if min(len(reference), len(generated)) > 1 else None
    return {"fid": fid, "images": {"reference": len(reference), "generated": len(generated)}}

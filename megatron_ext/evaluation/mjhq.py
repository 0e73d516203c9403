"""MJHQ-30K: images generated from prompts, by their Frechet distance from the reference images.

Layout of the release, ``meta_data.json``: {id: {"category", "prompt"}}, and ``<category>/<id>.jpg``. Generated images
lie in a folder of the same layout, or without categories; .png, .jpg, .jpeg and .webp are all looked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.command_line import read_json
from megatron_ext.errors import UserError
from megatron_ext.evaluation.fid import Features, Network, features, frechet_distance

ENDINGS = (".jpg", ".png", ".jpeg", ".webp")


@dataclass(frozen=True)
class Prompt:
    """One image to be generated."""

    id: str
    category: str
    prompt: str


def read(folder: Path) -> list[Prompt]:
    """The prompts of ``folder/meta_data.json``, in its order.

    Raises:
        UserError: the file is absent or not of this layout.
    """
    file = folder / "meta_data.json"
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
        prompts.append(Prompt(name, *values))
    return prompts


def image_file(folder: Path, prompt: Prompt) -> Path | None:
    """Where the image for a prompt lies in a folder, if it does."""
    places = [place / f"{prompt.id}{ending}" for place in (folder / prompt.category, folder) for ending in ENDINGS]
    return next((place for place in places if place.is_file()), None)


def score(prompts: Sequence[Prompt], reference: Path, generated: Path, network: Network) -> dict:
    """Frechet distances of the generated images from the reference images.

    Returns:
        ``network``; ``fid`` and ``images`` (how many of ``reference`` and ``generated`` were used) overall and for each
        of ``categories``; and for both sides the ids that are ``missing`` or ``unreadable``. A distance is None where
        a side has fewer than two images.

    Raises:
        UserError: a folder is absent.
    """
    sides = {"reference": _collect(prompts, reference, network), "generated": _collect(prompts, generated, network)}
    categories = sorted({prompt.category for prompt in prompts})
    return {
        "network": network.name,
        **_distance([side.rows() for side in sides.values()]),
        "categories": {c: _distance([side.rows(c) for side in sides.values()]) for c in categories},
        "missing": {name: side.missing for name, side in sides.items()},
        "unreadable": {name: side.unreadable for name, side in sides.items()},
    }


@dataclass(frozen=True)
class _Side:
    """The images of one folder."""

    category_of: dict[Path, str]
    features: Features
    missing: list[str]
    unreadable: list[str]

    def rows(self, category: str | None = None) -> np.ndarray:
        """Features of all images, or of one category's."""
        if category is None:
            return self.features.rows
        wanted = [self.category_of[file] == category for file in self.features.files]
        return self.features.rows[np.array(wanted, dtype=bool)]


def _collect(prompts: Sequence[Prompt], folder: Path, network: Network) -> _Side:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = {prompt: image_file(folder, prompt) for prompt in prompts}
    found = {file: prompt for prompt, file in files.items() if file}
    made = features(list(found), network)
    return _Side(
        {file: prompt.category for file, prompt in found.items()},
        made,
        [prompt.id for prompt, file in files.items() if not file],
        [found[file].id for file in made.unreadable],
    )


def _distance(rows: list[np.ndarray]) -> dict:
    reference, generated = rows
    fid = frechet_distance(generated, reference) if min(len(reference), len(generated)) > 1 else None
    return {"fid": fid, "images": {"reference": len(reference), "generated": len(generated)}}

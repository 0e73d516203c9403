"""A folder of generated pictures: the place of each, and a manifest that records how they were made."""

import os
from pathlib import Path

from PIL import Image

from megatron_ext.evaluation import manifest
from megatron_ext.evaluation.mjhq import Prompt

MANIFEST = "settings.json"


def picture_file(folder: Path, prompt: Prompt) -> Path:
    """The file of the picture for a prompt."""
    return folder / prompt.category / f"{prompt.id}.png"


def save(picture: Image.Image, file: Path) -> None:
    """Save a picture as PNG, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # A fixed name, so that a resumed run overwrites the leftovers of a killed one.
    temporary = file.with_name(f".{file.name}.tmp")
    picture.save(temporary, format="PNG")
    os.replace(temporary, file)


def claim(folder: Path, settings: dict, set_aside: bool = False) -> None:
    """:func:`megatron_ext.evaluation.manifest.claim` for a folder of pictures."""
    manifest.claim(folder, folder / MANIFEST, settings, set_aside=set_aside)


def read_manifest(folder: Path) -> dict | None:
    """The settings of the pictures in a folder; None without a manifest."""
    return manifest.read(folder / MANIFEST)

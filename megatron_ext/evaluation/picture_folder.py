"""A folder of generated pictures: where each lies, and a manifest that says how they were made."""

import os
from pathlib import Path

from PIL import Image

from megatron_ext.evaluation import manifest
from megatron_ext.evaluation.mjhq import Prompt

MANIFEST = "settings.json"


def picture_file(folder: Path, prompt: Prompt) -> Path:
    """Where the picture for a prompt is written."""
    return folder / prompt.category / f"{prompt.id}.png"


def save(picture: Image.Image, file: Path) -> None:
    """Write a picture so that its name is never that of half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # The same name each time: what a killed run leaves is overwritten by the one that goes on.
    temporary = file.with_name(f".{file.name}.tmp")
    picture.save(temporary, format="PNG")
    os.replace(temporary, file)


def claim(folder: Path, settings: dict, set_aside: bool = False) -> None:
    """:func:`megatron_ext.evaluation.manifest.claim` for a folder of pictures."""
    manifest.claim(folder, folder / MANIFEST, settings, set_aside=set_aside)


def read_manifest(folder: Path) -> dict | None:
    """The settings of the pictures in a folder; None where there is no manifest."""
    return manifest.read(folder / MANIFEST)

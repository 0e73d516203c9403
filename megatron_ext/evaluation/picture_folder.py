"""A folder of generated pictures: where each lies, and a card that says how they were made."""

import os
from pathlib import Path

from PIL import Image

from megatron_ext import command_line
from megatron_ext.errors import UserError
from megatron_ext.evaluation.mjhq import Prompt

CARD = "settings.json"
FREE = ("path",)
"""Keys of a card that may change: a run that was moved is still the same run."""


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


def claim(folder: Path, settings: dict) -> None:
    """Make ``folder`` the place of pictures made with ``settings`` (plain data), or go on with one that is.

    Raises:
        UserError: its pictures were made with other settings, or nobody knows how.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    before = read_card(folder)
    if before is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: holds files but no {CARD} that says how they were made; name another folder")
        command_line.write_json(folder / CARD, settings)
        return
    for key in dict.fromkeys([*settings, *before]):
        if key not in FREE and before.get(key) != settings.get(key):
            raise UserError(
                f"{folder}: its pictures were made with {key} {before.get(key)}, not {settings.get(key)}; "
                "name another folder, or remove this one"
            )


def read_card(folder: Path) -> dict | None:
    """The settings of the pictures in a folder; None where there is no card.

    Raises:
        UserError: the card cannot be read.
    """
    file = folder / CARD
    if not file.exists():
        return None
    card = command_line.read_json(file)
    if not isinstance(card, dict):
        raise UserError(f"{file}: must be a JSON object")
    return card

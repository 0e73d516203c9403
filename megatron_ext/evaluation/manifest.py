"""A manifest beside answers or pictures that records how they were made, so that others are not mixed in."""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext import chat_template, config_file, files
from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.errors import UserError

if TYPE_CHECKING:  # answers and pictures are scored without Megatron-Core
    from megatron_ext.generation.session import Session

IGNORED_KEYS = ("path",)
"""Keys of a manifest that may differ: a run that was moved is still the same run."""


def model_settings(session: "Session", checkpoint: Path) -> dict:
    """The properties of a model and its use on which answers and pictures depend, as plain data.

    Args:
        checkpoint: ``.../iter_NNNNNNN`` from which the session was loaded.
    """
    marker = checkpoint_folder.read_marker(checkpoint)
    weights = hashlib.sha256(json.dumps(marker["files"], sort_keys=True).encode()).hexdigest()[:16]
    config = config_file.to_tree(session.trained.config)
    return {
        "path": str(checkpoint),
        "checkpoint": f"{checkpoint.name} ({weights})",
        "plan": json.loads(json.dumps(config["plan"])),
        "precision": config["training"]["precision"],
        "vq": session.vq.fingerprint,
        "vocabulary": session.trained.vocabulary.fingerprint,
        "chat_template": chat_template.fingerprint(session.trained.vocabulary),
    }


def claim(place: Path, manifest: Path, settings: dict, other: str | None = None, set_aside: bool = False) -> None:
    """Claim ``place`` for results made with ``settings`` (plain data), new or to be resumed.

    Args:
        place: a file or folder.
        manifest: its manifest, beside it or in it.
        other: a reason to refuse the existing results, whatever their manifest says.
        set_aside: move existing results of other settings to ``<name>.before-<n>`` instead of refusing.

    Raises:
        UserError: existing results were made with other settings, or have no manifest.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    before = read(manifest)
    if before is not None or _occupied(place):
        if not (reason := _difference(place, manifest, before, settings) or other):
            return
        if not set_aside:
            raise UserError(f"{place}: {reason}; name another folder, or remove this one")
        _set_aside(place, manifest)
    files.write_json(manifest, settings)


def read(manifest: Path) -> dict | None:
    """The contents of a manifest; None if there is none.

    Raises:
        UserError: it cannot be read.
    """
    if not manifest.exists():
        return None
    settings = files.read_json(manifest)
    if not isinstance(settings, dict):
        raise UserError(f"{manifest}: must be a JSON object")
    return settings


def _occupied(place: Path) -> bool:
    return any(place.iterdir()) if place.is_dir() else place.exists() and place.stat().st_size > 0


def _difference(place: Path, manifest: Path, before: dict | None, settings: dict) -> str | None:
    if before is None:
        contents = "files" if place.is_dir() else "answers"
        return f"holds {contents}, but no {manifest.name} says how they were made"
    for key in dict.fromkeys([*settings, *before]):
        if key not in IGNORED_KEYS and before.get(key) != settings.get(key):
            return f"its contents were made with {key} {before.get(key)}, not {settings.get(key)}"
    return None


def _set_aside(place: Path, manifest: Path) -> None:
    number = 1
    while (target := place.with_name(f"{place.stem}.before-{number}{place.suffix}")).exists():
        number += 1
    if place not in manifest.parents and manifest.exists():
        os.replace(manifest, manifest.with_name(f"{place.stem}.before-{number}.manifest.json"))
    os.replace(place, target)

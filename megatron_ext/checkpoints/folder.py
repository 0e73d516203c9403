"""Checkpoints as files: their layout on disk and when they count as complete. Independent of models and ranks.

::

    checkpoints/
      iter_0000010/                     a complete checkpoint
        __0_0.distcp, __1_0.distcp ...  tensors, written by all ranks
        metadata.json, .metadata, and common.pt where Megatron-Core is older than 0.19
        COMPLETE.json                   written last: iteration, layout, state, size and checksum of every file
      .iter_0000020.5f0c9a1e.partial/   being written, or left over from a killed save

One rename gives a checkpoint its name once every byte is on disk, and one rename takes the name away before any file is
deleted. A folder called ``iter_N`` was therefore complete once; its checksums tell whether it still is.
"""

import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

from megatron_ext.checkpoints.errors import DamageError
from megatron_ext.errors import UserError

MARKER = "COMPLETE.json"
FORMAT = 1
_COMPLETE = re.compile(r"iter_(\d{7,})")
_LEFT_OVER = re.compile(r"\.iter_\d{7,}\.[0-9a-f]+\.(partial|deleted)")
_CHUNK = 1 << 22


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder`` by rising iteration, without those being written or left by a killed save."""
    paths = [p for p in folder.iterdir() if _COMPLETE.fullmatch(p.name) and p.is_dir()] if folder.is_dir() else []
    return sorted(paths, key=iteration_of)


def of_run(folder: Path) -> Path:
    """``folder`` itself if it is a checkpoint by name or marker, else the newest complete checkpoint of its run.

    Raises:
        UserError: the run has no complete checkpoint.
    """
    if _COMPLETE.fullmatch(folder.name) or (folder / MARKER).is_file():
        return folder
    paths = checkpoints(folder / "checkpoints")
    if not paths:
        reason = f"no complete checkpoint in {folder / 'checkpoints'}" if folder.exists() else "not found"
        raise UserError(f"{folder}: {reason}")
    return paths[-1]


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint."""
    return bool(_COMPLETE.fullmatch(name))


def iteration_of(path: Path) -> int:
    """The iteration in a checkpoint's name: 20 for ``iter_0000020``."""
    return int(_COMPLETE.fullmatch(path.name)[1])


def begin(folder: Path, iteration: int) -> Path:
    """Create an empty folder to write the checkpoint of ``iteration`` into, and remove left-overs of killed saves.

    Its name is never reused, so a writer that outlives its killed run cannot write into the next run's files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    partial = folder / _hidden(f"iter_{iteration:07d}", "partial")
    partial.mkdir()
    return partial


def complete(partial: Path, description: dict, files: dict[str, dict]) -> Path:
    """Turn the folder ``partial`` into a complete checkpoint.

    Args:
        partial: the folder from :func:`begin`, with the files written.
        description: goes into the marker; plain data, with the "iteration".
        files: known :func:`fingerprint` of files by name; other files are read for their fingerprints.

    Returns:
        The checkpoint's folder.
    """
    others = [p for p in sorted(partial.iterdir()) if p.name not in files]
    files = files | {p.name: fingerprint(p) for p in others}
    marker = partial / MARKER
    body = {"format": FORMAT, **description, "files": files}
    marker.write_text(json.dumps({**body, "checksum": _checksum_of(body)}, indent=1) + "\n")
    for path in (*others, marker, partial):
        _sync(path)

    return _named(partial, description["iteration"])


def publish(partial: Path, iteration: int, marker: bytes) -> Path:
    """Turn a copy of a checkpoint's files, which are on disk, into a checkpoint with the original's marker."""
    (partial / MARKER).write_bytes(marker)
    for path in (partial / MARKER, partial):
        _sync(path)
    return _named(partial, iteration)


def _named(partial: Path, iteration: int) -> Path:
    final = partial.with_name(f"iter_{iteration:07d}")
    replaced = _rename_away(final) if final.exists() else None
    os.rename(partial, final)
    _sync(final.parent)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def delete(path: Path) -> None:
    """Remove a checkpoint; if killed halfway, the remains no longer carry a checkpoint's name."""
    hidden = _rename_away(path)
    _sync(path.parent)
    shutil.rmtree(hidden, ignore_errors=True)


def keep_newest(folder: Path, count: int, spared: Path | None = None) -> None:
    """Delete all but the newest ``count`` checkpoints and ``spared``; 0 keeps all."""
    for path in checkpoints(folder)[:-count] if count else []:
        if path != spared:
            delete(path)


def older_than(path: Path) -> Path | None:
    """The next older checkpoint beside ``path``."""
    older = [p for p in checkpoints(path.parent) if iteration_of(p) < iteration_of(path)]
    return older[-1] if older else None


def damaged_name(path: Path) -> Path:
    """What to rename the damaged checkpoint ``path`` to, so that it no longer counts as one."""
    names = (path.with_name(f"{path.name}.damaged{number}") for number in ("", *range(2, 1000)))
    return next(name for name in names if not name.exists())


def read_marker(path: Path) -> dict:
    """The marker that :func:`complete` wrote for the checkpoint ``path``: "iteration", "state", "layout", "files" ...

    Raises:
        DamageError: the marker is missing or damaged.
        UserError: there is no checkpoint, or it has another format.
    """
    marker = path / MARKER
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint folder")
    if inside := checkpoints(path):
        raise UserError(f"{path}: holds checkpoints, name one of them, such as {inside[-1]}")
    try:
        body = json.loads(marker.read_text())
        checksum = body.pop("checksum")
    except FileNotFoundError:
        raise DamageError(f"{marker}: missing, so this is not a complete checkpoint{remedy(path)}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamageError(f"{marker}: damaged, cannot be read{remedy(path)}") from None
    if body.get("format") != FORMAT:
        raise UserError(f"{marker}: checkpoint format {body.get('format')}, this version reads {FORMAT}")
    if _checksum_of(body) != checksum:
        raise DamageError(f"{marker}: damaged, its checksum is wrong{remedy(path)}")
    return body


def damage(path: Path, files: dict[str, dict], names: Iterable[str]) -> list[str]:
    """One line for each of ``names`` in the checkpoint ``path`` that does not match its fingerprint in ``files``."""
    lines = []
    for name in names:
        file, expected = path / name, files[name]
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                lines.append(f"{file}: damaged, has {size} bytes instead of {expected['bytes']}")
            elif fingerprint(file) != expected:
                lines.append(f"{file}: damaged, its checksum is wrong")
        except FileNotFoundError:
            lines.append(f"{file}: missing")
        except OSError as error:
            lines.append(f"{file}: cannot be read ({error.strerror})")
    return lines


def remedy(path: Path) -> str:
    """The end of a message that refuses the checkpoint ``path``: which older one a run can resume from, and how."""
    for older in reversed(checkpoints(path.parent)):
        if _COMPLETE.fullmatch(path.name) and iteration_of(older) < iteration_of(path) and _looks_whole(older):
            return f"; to resume from the older {older.name}, move {path.name} away"
    return "; there is no older complete checkpoint beside it"


def fingerprint(file: Path) -> dict:
    """Size and CRC-32 of a file. CRC-32 detects accidental damage, as intended, at several GB/s."""
    crc, size = 0, 0
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": f"{crc:08x}"}


def _looks_whole(path: Path) -> bool:
    try:
        files = json.loads((path / MARKER).read_text())["files"]
        return all((path / name).stat().st_size == f["bytes"] for name, f in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checksum_of(body: dict) -> str:
    return f"{zlib.crc32(json.dumps(body).encode()):08x}"


def _rename_away(path: Path) -> Path:
    hidden = path.with_name(_hidden(path.name, "deleted"))
    os.rename(path, hidden)
    return hidden


def _hidden(name: str, why: str) -> str:
    return f".{name}.{secrets.token_hex(4)}.{why}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

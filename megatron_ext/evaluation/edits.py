"""Edits of pictures of the picture world: reading the benchmark (:mod:`megatron_ext.picture_world.edit_files`), and
scoring edited pictures object by object against a control, the input pictures as they are."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.errors import UserError
from megatron_ext.evaluation.benchmark import Scores
from megatron_ext.evaluation.detected_files import detect_files, saved_file
from megatron_ext.evaluation.faithfulness import interval, shares
from megatron_ext.evaluation.mjhq import Prompt, of_categories
from megatron_ext.evaluation.picture_folder import picture_file
from megatron_ext.evaluation.score_table import Scored
from megatron_ext.files import read_json
from megatron_ext.picture_world.detected import DetectedScene
from megatron_ext.picture_world.edit_check import CHANGED, KEPT, EditVerdict, check_edit
from megatron_ext.picture_world.edit_files import RECORDS
from megatron_ext.picture_world.world import Scene

TITLE = "picture-world edits"
COLUMN, CONTROL, DIFFERENCE, WHOLE_COLUMN = "edits-facts", "edits-facts, input", "edits-difference", "edits-whole"
ALL, WHOLE = "all facts", "whole pictures"
ROWS: dict[str, Callable[[EditVerdict], tuple[int, int]]] = {
    ALL: lambda verdict: verdict.facts(),
    "changed facts": lambda verdict: verdict.facts(CHANGED),
    "kept facts": lambda verdict: verdict.facts(KEPT),
    WHOLE: lambda verdict: (int(verdict.all_right), 1),
}
"""(correct, all) of a picture by row of the details."""


@dataclass(frozen=True)
class EditItem(Prompt):
    """One edit: ``category`` is its kind, ``prompt`` the instruction; pictures and scenes before and after it."""

    image: Path
    reference: Path
    before: Scene
    after: Scene


def read(folder: Path, kinds: Sequence[str] | None = None) -> list[EditItem]:
    """The edits of ``folder/edits.json``, in its order; all, or those of some kinds.

    Raises:
        UserError: the file is missing or malformed, or has no such kind.
    """
    file, items = folder / RECORDS, []
    entries = read_json(file)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file}: must be a list with at least one edit")
    for number, entry in enumerate(entries):
        try:
            scenes = Scene.from_dict(entry["before"]), Scene.from_dict(entry["after"])
            pictures = folder / entry["image"], folder / entry["reference"]
            items.append(EditItem(entry["id"], entry["kind"], entry["instruction"], number, *pictures, *scenes))
        except (KeyError, TypeError) as error:
            raise UserError(f"{file}: entry {number} is not an edit ({error!r})") from None
    return of_categories(items, kinds, file, "kind")


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits that change with ``folder/edits.json``."""
    return hashlib.sha256((folder / RECORDS).read_bytes()).hexdigest()[:16]


def score_folder(data: Path, kinds: Sequence[str] | None, folder: Path, label: str) -> Scored:
    """Score the edited pictures in a folder; a missing picture has no correct facts.

    Raises:
        UserError: the benchmark cannot be read.
    """
    items = read(data, kinds)
    files = {item.id: file for item in items if (file := picture_file(folder, item)).is_file()}
    missing = len(items) - len(files)
    try:
        seen = detect_files(files, saved_file(folder))
        inputs, references = (
            detect_files({item.id: getattr(item, name) for item in items}) for name in ("image", "reference")
        )
    except UserError as error:
        scores = Scores({}, {}, len(items), missing, 0, (f"{TITLE}: none, {error}",))
        return Scored(label, TITLE, str(folder), scores, 0, 0, [], False)
    own, control, best = (counts(items, scenes) for scenes in (seen, inputs, references))
    details, kinds_of = {}, [item.category for item in items]
    for kind in (None, *dict.fromkeys(kinds_of)):
        of_kind = np.array([kind in (None, other) for other in kinds_of])
        details |= _details("" if kind is None else f"{kind}, ", own[of_kind], control[of_kind], best[of_kind])
    headline = {COLUMN: details[ALL]["right"], CONTROL: details[ALL]["input"], DIFFERENCE: details[ALL]["difference"]}
    headline[WHOLE_COLUMN] = details[WHOLE]["right"]
    low, high = details[ALL]["from"], details[ALL]["to"]
    note = f"{DIFFERENCE}: {headline[DIFFERENCE]:.2f}, 95 % interval {low:.2f} to {high:.2f}"
    scores = Scores(headline, details, len(items), missing, len(files) - len(seen), (note,))
    return Scored(label, TITLE, str(folder), scores, 0, 0, [], False)


def counts(items: Sequence[EditItem], seen: Mapping[str, DetectedScene]) -> np.ndarray:
    """Correct facts and all facts, [edits, rows of :data:`ROWS`, 2], of what the picture of each edit shows."""
    verdicts = [check_edit(seen.get(item.id), item.before, item.after) for item in items]
    return np.array([[of(verdict) for of in ROWS.values()] for verdict in verdicts], dtype=float)


def _details(prefix: str, own: np.ndarray, control: np.ndarray, best: np.ndarray) -> dict[str, dict[str, float]]:
    """The figures of each row, in percent: of the pictures, of the input pictures (the control), their difference with
    its 95 % interval by resampling edits, and of the reference pictures."""
    right, unchanged, reference = (shares(part.sum(0)) for part in (own, control, best))
    bounds = interval(own, control)
    return {
        f"{prefix}{row}": {
            "right": float(right[i]),
            "input": float(unchanged[i]),
            "difference": float(right[i] - unchanged[i]),
            "from": float(bounds[i, 0]),
            "to": float(bounds[i, 1]),
            "reference": float(reference[i]),
            "facts": int(own[:, i, 1].sum()),
        }
        for i, row in enumerate(ROWS)
    }

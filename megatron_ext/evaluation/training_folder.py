"""The files of the evaluations during training, and when they count as one.

::

    OUTPUT/evaluation/iter_NNNNNNN/<benchmark>.jsonl          answers, in the form that tools/evaluate.py scores
                                   0000.png ... sheet.png     a picture for each caption
                                   evaluation.json            scores and captions; what has none is not complete
"""

from pathlib import Path

from megatron_ext.files import read_json

MANIFEST = "evaluation.json"


def place(output: Path, iteration: int) -> Path:
    """The folder of the evaluation after ``iteration``."""
    return output / "evaluation" / f"iter_{iteration:07}"


def newest(output: Path, iteration: int) -> tuple[Path, dict] | None:
    """Folder and manifest of the newest complete evaluation of a run up to ``iteration``; None: there is none."""
    for manifest in sorted((output / "evaluation").glob(f"iter_*/{MANIFEST}"), reverse=True):
        found = read_json(manifest)
        if found["iteration"] <= iteration:
            return manifest.parent, found
    return None

"""The files that evaluations during training leave, and which of them are complete.

::

    OUTPUT/evaluation/iter_NNNNNNN/<benchmark>.jsonl          answers, in the form that tools/evaluate.py scores
                                   0000.png ... sheet.png     a picture for each caption
                                   evaluation.json            scores and captions; without it the folder is incomplete
"""

from pathlib import Path

from megatron_ext.files import read_json

MANIFEST = "evaluation.json"


def iteration_folder(output: Path, iteration: int) -> Path:
    """The folder of the evaluation after ``iteration``."""
    return output / "evaluation" / f"iter_{iteration:07}"


def newest(output: Path, iteration: int) -> tuple[Path, dict] | None:
    """Folder and manifest of a run's newest complete evaluation up to ``iteration``; None: there is none."""
    for file in sorted((output / "evaluation").glob(f"iter_*/{MANIFEST}"), reverse=True):
        manifest = read_json(file)
        if manifest["iteration"] <= iteration:
            return file.parent, manifest
    return None

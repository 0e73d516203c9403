"""The files of the evaluations during training, and when they count as one.

::

    OUTPUT/evaluation/iter_NNNNNNN/<benchmark>.jsonl          answers, in the form that tools/evaluate.py scores
                                   0000.png ... sheet.png     a picture for each caption
                                   evaluation.json            scores and captions; what has none is not complete
"""

from pathlib import Path

from megatron_ext.command_line import read_json

CARD = "evaluation.json"


def place(output: Path, iteration: int) -> Path:
    """The folder of the evaluation after ``iteration``."""
    return output / "evaluation" / f"iter_{iteration:07}"


def newest(output: Path, iteration: int) -> tuple[Path, dict] | None:
    """Folder and card of the newest complete evaluation of a run up to ``iteration``; None: there is none."""
    for card in sorted((output / "evaluation").glob(f"iter_*/{CARD}"), reverse=True):
        found = read_json(card)
        if found["iteration"] <= iteration:
            return card.parent, found
    return None

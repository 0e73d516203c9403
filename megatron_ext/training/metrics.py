"""``metrics.jsonl``: one JSON object per logged iteration, in order, each iteration at most once.

A line is written whole and flushed at once. Numbers that are not finite become ``null``, so every line is strict JSON.
A killed run may leave half a line at the end: readers skip it, and a resumed run removes it.
"""

import json
import math
import os
from pathlib import Path


class MetricsFile:
    """Appends to a metrics file, after removing the records of iterations after ``resumed_iteration``."""

    def __init__(self, file: str | Path, resumed_iteration: int = 0):
        self.file = Path(file)
        kept = [r for r in read_metrics(self.file) if r["iteration"] <= resumed_iteration]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f".{self.file.name}.tmp")
        temporary.write_text("".join(map(_line, kept)))
        os.replace(temporary, self.file)
        self._stream = self.file.open("a")

    def write(self, record: dict) -> None:
        """Append one record; it must have the key ``iteration``."""
        self._stream.write(_line(record))
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_metrics(file: str | Path) -> list[dict]:
    """The records of a metrics file, oldest first; none if there is no such file."""
    file = Path(file)
    records = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:  # half a line of a killed run
            continue
    return records


def _line(record: dict) -> str:
    strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(strict, allow_nan=False) + "\n"

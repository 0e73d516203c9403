"""``metrics.jsonl``: one JSON object per logged iteration, in order, each iteration at most once.

A line is written whole and flushed at once. Numbers that are not finite become ``null``, so every line is strict JSON.
A killed run may leave half a line at the end: readers skip it, and a resumed run removes it. Records that a full disk
refuses are kept in memory and written once there is room.
"""

import contextlib
import json
import math
from pathlib import Path

from megatron_ext.files import write_text


class MetricsFile:
    """Appends to a metrics file, after removing the records of iterations after ``resumed_iteration``."""

    def __init__(self, file: str | Path, resumed_iteration: int = 0):
        self.file = Path(file)
        kept = [r for r in read_metrics(self.file) if r["iteration"] <= resumed_iteration]
        write_text(self.file, "".join(map(_line, kept)))
        self._stream = self.file.open("ab", buffering=0)
        self._unwritten: list[str] = []

    def write(self, record: dict) -> str | None:
        """Append one record; it must have the key ``iteration``.

        Returns:
            Why it, and perhaps others before it, could not be written yet; None: all are.
        """
        self._unwritten.append(_line(record))
        return self._write()

    def close(self) -> str | None:
        """Write what is left and close the file; returns what :meth:`write` does."""
        fault = self._write()
        self._stream.close()
        return fault

    def _write(self) -> str | None:
        end = self._stream.tell()
        left = "".join(self._unwritten).encode()
        try:
            while left:
                left = left[self._stream.write(left) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._stream.truncate(end)  # no half line
                self._stream.seek(end)
            return f"{self.file}: {error.strerror}, {len(self._unwritten)} records are not written"
        self._unwritten.clear()
        return None


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

"""An answers file: a JSON object a line, with an item's ``id`` and the ``answer`` as the model wrote it.

More keys are welcome: ``likelihoods`` (a log-likelihood per choice) is scored where a benchmark can rank its choices,
``asked`` tells which question it was (:func:`~megatron_ext.evaluation.answer_generation.asked`), all others are left
alone. A line is written whole and flushed at once, so a run that is killed leaves at most half a last line; going on
drops that half and answers what is not answered yet. Where an id was answered twice the first counts, so that a file's
score does not change by adding to it.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.evaluation.benchmark import Item

_START = b'{"id": '  # of every line that is written


@dataclass
class AnswersFile:
    """What an answers file holds."""

    records: dict[str, dict] = field(default_factory=dict)  # id -> the first line with it
    duplicates: list[str] = field(default_factory=list)  # the id of every further line with an id already answered
    malformed: list[int] = field(default_factory=list)  # numbers of lines, from 1, without an id and an answer
    cut_short: bool = False  # the last line is half a line, which is not among the malformed

    @property
    def answers(self) -> dict[str, str]:
        return {id: record["answer"] for id, record in self.records.items()}

    @property
    def likelihoods(self) -> dict[str, list[float]]:
        return {id: record["likelihoods"] for id, record in self.records.items() if "likelihoods" in record}

    def unknown(self, items: Iterable[Item]) -> list[str]:
        """The ids that no item has."""
        known = {item.id for item in items}
        return [id for id in self.records if id not in known]


def read_answers(file: str | Path) -> AnswersFile:
    """Read an answers file; nothing in it stops the reading.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    read = AnswersFile()
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _record(line)
        if record is not None and record["id"] in read.records:
            read.duplicates.append(record["id"])
        elif record is not None:
            read.records[record["id"]] = record
        elif number == len(lines):
            read.cut_short = True
        else:
            read.malformed.append(number)
    return read


def _record(line: bytes) -> dict | None:
    """The record in a line, its id as text; None where there is none."""
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    if not isinstance(record, dict) or not isinstance(record.get("answer"), str):
        return None
    id = record.get("id")
    return {**record, "id": str(id)} if isinstance(id, (str, int)) and not isinstance(id, bool) else None


class AnswersWriter:
    """Appends to an answers file, new or begun; ``answered`` are the ids that need no answer any more.

    A context manager::

        with AnswersWriter(out / "pope.jsonl") as writer:
            for item in items:
                if item.id not in writer.answered:
                    writer.write(item.id, answer(item))

    Raises:
        UserError: the file is there and is no answers file.
    """

    def __init__(self, file: str | Path):
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        _finish_last_line(file)
        self.answered = set(read_answers(file).records)
        self._stream = file.open("a", encoding="utf-8")

    def write(self, id: str, answer: str, **more) -> None:
        """Append one answer, with further keys if any."""
        self._stream.write(json.dumps({"id": id, "answer": answer, **more}) + "\n")
        self._stream.flush()
        self.answered.add(id)

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> "AnswersWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _finish_last_line(file: Path) -> None:
    """End the last line where only its line feed is missing; remove it where it is half a line."""
    content = file.read_bytes()
    start = content.rfind(b"\n") + 1
    last = content[start:]
    if _record(last) is not None:
        with file.open("ab") as stream:
            stream.write(b"\n")
    elif last[: len(_START)] == _START[: len(last)]:
        os.truncate(file, start)
    else:  # a line that no writer began: somebody's other file
        raise UserError(f"{file}: its last line is not of an answers file; name another file")

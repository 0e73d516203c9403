"""An answers file: one JSON object per line, with an item's ``id`` and the ``answer`` as the model wrote it.

Lines may have more keys. ``likelihoods`` (a log-likelihood per choice) is scored by benchmarks that rank choices,
``asked`` identifies the question (:func:`question_fingerprint`), other keys are ignored. A line is written and flushed
at once, so a killed run leaves at most one incomplete last line; resuming drops it and answers the remaining questions.
If an id occurs twice the first line counts, so appending to a file never changes its score.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.evaluation.benchmark import Item


def question_fingerprint(item: Item) -> str:
    """8 hexadecimal digits that change with the question, its choices, and the name and size of its image."""
    size = item.image.stat().st_size if item.image.is_file() else None
    description = [item.image.name, size, item.question, item.choices, item.bare]
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()[:8]


_START = b'{"id": '  # of every line that is written


@dataclass
class AnswersFile:
    """The contents of an answers file."""

    records: dict[str, dict] = field(default_factory=dict)  # id -> its first line
    duplicates: list[str] = field(default_factory=list)  # the id of every further line for an answered id
    malformed: list[int] = field(default_factory=list)  # numbers of lines, from 1, without an id and an answer
    cut_short: bool = False  # the last line is incomplete; it is not among the malformed ones

    @property
    def answers(self) -> dict[str, str]:
        return {id: record["answer"] for id, record in self.records.items()}

    @property
    def likelihoods(self) -> dict[str, list[float]]:
        return {id: record["likelihoods"] for id, record in self.records.items() if "likelihoods" in record}

    def unknown(self, items: Iterable[Item]) -> list[str]:
        """The ids that belong to no item."""
        known = {item.id for item in items}
        return [id for id in self.records if id not in known]

    def outdated(self, items: Iterable[Item]) -> list[str]:
        """The ids of items whose questions have changed since they were answered; answers of other programs do not say
        what was asked."""
        known = {item.id: question_fingerprint(item) for item in items if item.id in self.records}
        return [id for id, asked in known.items() if self.records[id].get("asked", asked) != asked]


def read_answers(file: str | Path) -> AnswersFile:
    """Read an answers file; malformed lines are recorded, not raised.

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
    """The record in a line, with its id as text; None if the line holds none."""
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    if not isinstance(record, dict) or not isinstance(record.get("answer"), str):
        return None
    id = record.get("id")
    return {**record, "id": str(id)} if isinstance(id, (str, int)) and not isinstance(id, bool) else None


class AnswersWriter:
    """Appends to a new or existing answers file; ``answered`` holds the ids that already have an answer.

    A context manager::

        with AnswersWriter(out / "pope.jsonl") as writer:
            for item in items:
                if item.id not in writer.answered:
                    writer.write(item.id, answer(item))

    Raises:
        UserError: the file exists and is not an answers file.
    """

    def __init__(self, file: str | Path):
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        _finish_last_line(file)
        self.answered = set(read_answers(file).records)
        self._stream = file.open("a", encoding="utf-8")

    def write(self, id: str, answer: str, **more) -> None:
        """Append one answer, optionally with further keys."""
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
    """Complete the last line if only its line feed is missing; remove it if it is incomplete."""
    content = file.read_bytes()
    start = content.rfind(b"\n") + 1
    last = content[start:]
    if _record(last) is not None:
        with file.open("ab") as stream:
            stream.write(b"\n")
    elif last[: len(_START)] == _START[: len(last)]:
        os.truncate(file, start)
    else:  # no writer began this line: the file is something else
        raise UserError(f"{file}: its last line does not belong to an answers file; name another file")

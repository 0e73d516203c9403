"""Reading LLaVA JSON: one list of ``{"id", "image", "conversations": [{"from", "value"}, ...]}``.

The list is never held as a whole, since published ones have more than a million samples: planning notes where each
sample begins, reading decodes a stretch of them.
"""

import codecs
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from megatron_ext.preprocess.records import cut_records, samples_of_records
from megatron_ext.preprocess.samples import ReadOptions, Sample, Unit, naming_errors

CHUNK = 1 << 20
"""Bytes read at a time."""

_BLANKS = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def units(file: Path, size: int, part_samples: int) -> Iterator[Unit]:
    """The file in units of ``part_samples`` records.

    Raises:
        UserError: the file is not a list, or is empty.
    """
    with naming_errors(str(file)):
        offsets = [offset for offset, _ in _elements(file, _first_element(file))]
    for first, count, share in cut_records(file, size, len(offsets), part_samples):
        yield Unit(file, share, first, count, offset=offsets[first])


def read(unit: Unit, options: ReadOptions, skip: int) -> Iterator[Sample]:
    """The samples of a unit from sample ``skip`` on.

    Raises:
        UserError: a record is malformed.
    """
    return samples_of_records(unit, _records(unit), options, skip)


def _records(unit: Unit) -> Iterator[tuple[str, object, int]]:
    for index, (_, content) in enumerate(islice(_elements(unit.file, unit.offset), unit.count), unit.first):
        yield f"{unit.file}[{index}]", json.loads(content), len(content)


def _first_element(file: Path) -> int:
    """The byte after the bracket that opens the list."""
    with file.open("rb") as stream:
        start = stream.read(CHUNK)
    mark = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
    opening = _BLANKS.match(start.decode("latin-1"), mark).end()
    if start[opening : opening + 1] != b"[":
        raise ValueError("not a list of LLaVA samples")
    return opening + 1


def _elements(file: Path, offset: int) -> Iterator[tuple[int, bytes]]:
    """First byte and content of each element of the list from byte ``offset`` on.

    Raises:
        ValueError: the file is not valid JSON from there on; names the byte.
    """
    text, place, more = "", 0, False  # one character a byte: JSON's own characters are ASCII, and indices are bytes
    with file.open("rb") as stream:
        stream.seek(offset)
        while True:
            place = _BLANKS.match(text, place).end()
            try:
                if text[place : place + 1] == "]" and not more:
                    return _refuse_more(stream, text[place + 1 :], offset + place + 1)
                _, end = _DECODER.raw_decode(text, place)
                following = _BLANKS.match(text, end).end()
                if text[following : following + 1] not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, following)
            except json.JSONDecodeError as error:  # malformed, or not read to its end
                chunk = stream.read(max(CHUNK, len(text) - place))
                if not chunk:
                    raise ValueError(f"{error.msg} (byte {offset + error.pos})") from None
                text, offset, place = text[place:] + chunk.decode("latin-1"), offset + place, 0
                continue
            yield offset + place, text[place:end].encode("latin-1")
            more = text[following] == ","
            place = following + more


def _refuse_more(stream: BinaryIO, text: str, offset: int) -> None:
    """Raise ValueError if anything but blanks follows the list; ``text`` begins at byte ``offset``."""
    while (blanks := _BLANKS.match(text).end()) == len(text):
        offset += len(text)
        if not (chunk := stream.read(CHUNK)):
            return
        text = chunk.decode("latin-1")
    raise ValueError(f"Extra data (byte {offset + blanks})")

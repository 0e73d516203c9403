"""Documents described by their lengths, to compute the cost of a plan without data.

``understanding: 256 image, 64 text, 8 answer; generation: 30 text, 256 image x 3`` is one document with a question
about an image and three with a caption and its image: a layout, runs of tokens in order, and the number of documents.
Loss is on answers in understanding, on image tokens in generation, and on all tokens in text. ``interleaved: 256 image,
12 text, 256 drawn`` is an edit; its loss is on drawn image tokens and answers.

With ``data.generation_text`` the texts around drawn images are taken to hold special tokens that are learnt: a text
before an image ends in ``<boi>``, one after it begins with ``<eoi>``, and the last one ends in ``<eod>``.

The loss is at the learnt tokens themselves, one place after those that predict them, which changes no cost. Image
tokens of several codes have another head than text, so their loss is at the tokens that predict them.
"""

import random
import re
from collections.abc import Iterator
from itertools import accumulate

import numpy as np

from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError
from megatron_ext.token_classes import Layout, Modality, Task

_KINDS = {"text": Modality.TEXT, "answer": Modality.TEXT, "image": Modality.IMAGE, "drawn": Modality.IMAGE}
_LEARNT = {
    Layout.UNDERSTANDING: ("answer",),
    Layout.GENERATION: ("image",),
    Layout.TEXT: tuple(_KINDS),
    Layout.INTERLEAVED: ("answer", "drawn"),
}
_ONLY_IN = {"answer": (Layout.UNDERSTANDING, Layout.INTERLEAVED), "drawn": (Layout.INTERLEAVED,)}


def mix_batch(mix: str, depth: int = 1, generation_text: bool = False) -> Batch:
    """The documents of a mix, end to end in one row [1, t] without padding, as arrays; all ids and codes are 0.

    Args:
        depth: D, codes of an image token.
        generation_text: ``data.generation_text``.

    Raises:
        UserError: quotes the part of the mix that cannot be read.
    """
    return _batch([document for documents in _parts(mix) for document in documents], depth, generation_text)


def mix_documents(mix: str, depth: int = 1, generation_text: bool = False) -> list[tuple[int, Batch]]:
    """For each part of a mix the number of its documents, and one of them as :func:`mix_batch` makes it."""
    return [(len(documents), _batch(documents[:1], depth, generation_text)) for documents in _parts(mix)]


def cut(document: Batch, length: int) -> list[Batch]:
    """A document [1, t] in pieces of at most ``length`` tokens, each a document of its own."""
    pieces = [
        document.map(lambda field, start=start: field[:, start : start + length])
        for start in range(0, document.shape[1], length)
    ]
    for piece in pieces:
        piece.positions = np.arange(piece.shape[1], dtype=piece.positions.dtype)[None]
    return pieces


def drawn_rows(
    drawn: random.Random, weights: list[float], lengths: list[list[int]], row_length: int, by: list[int] | None = None
) -> Iterator[list[tuple[int, int]]]:
    """Rows without end, each a list of (document, piece), filled with documents that are drawn at random. A row is full
    when the next piece does not fit, which begins the next row.

    Args:
        weights: relative number of each document.
        lengths: tokens of each document's pieces.
        by: of each document; documents that differ in it do not share rows (``data.rows=by_task``).
    """
    cumulative, numbers = list(accumulate(weights)), range(len(weights))
    open_rows: dict[int, tuple[list[tuple[int, int]], int]] = {}
    while True:
        (number,) = drawn.choices(numbers, cum_weights=cumulative)
        kind = by[number] if by else 0
        for piece, length in enumerate(lengths[number]):
            row, used = open_rows.get(kind, ([], 0))
            if row and used + length > row_length:
                yield row
                row, used = [], 0
            open_rows[kind] = [*row, (number, piece)], used + length


def _batch(documents: list[tuple[Layout, list[tuple[int, str]]]], depth: int, generation_text: bool) -> Batch:
    """Documents end to end in one row."""
    fields = {name: [] for name in ("loss_mask", "positions", "modality", "task", "document")}
    for number, (layout, runs) in enumerate(documents):
        length = sum(n for n, _ in runs)
        fields["positions"].append(np.arange(length))
        fields["document"].append(np.full(length, number))
        for n, kind in runs:
            fields["modality"].append(np.full(n, _KINDS[kind]))
            fields["task"].append(np.full(n, _task(layout, kind)))
            fields["loss_mask"].append(np.full(n, kind in _LEARNT[layout]))
        if generation_text and layout == Layout.GENERATION:
            _learn_special_tokens(runs, fields["loss_mask"][-len(runs) :])
    fields["tokens"] = fields["labels"] = [np.zeros_like(p) for p in fields["positions"]]
    batch = Batch(**{name: np.concatenate(parts)[None].astype(Batch.DTYPES[name]) for name, parts in fields.items()})
    if depth > 1:
        batch.codes = np.zeros((*batch.shape, depth), np.int32)
        _predict_images(batch)
    return batch


def _learn_special_tokens(runs: list[tuple[int, str]], loss_mask: list[np.ndarray]) -> None:
    """Mark, in the loss masks of a generation document's runs, the special tokens around images. The loss of ``<boi>``
    is at the token before, which predicts it: with several codes a token, ``<boi>`` itself has the codes' loss."""
    kinds = [kind for _, kind in runs]
    for number, (kind, mask) in enumerate(zip(kinds, loss_mask)):
        if kind != "text":
            continue
        if kinds[number + 1 : number + 2] == ["image"]:
            mask[-2:-1] = True
        if number and kinds[number - 1] == "image":
            mask[0] = True
            mask[-1] |= number == len(runs) - 1


def _predict_images(batch: Batch) -> None:
    """Move the loss of image tokens to the tokens that predict them; nothing predicts the first token of a document."""
    image = batch.modality == Modality.IMAGE
    predicts = batch.predicts_image() & np.roll((batch.loss_mask > 0) & image, -1, axis=1)
    batch.loss_mask = (predicts | (batch.loss_mask > 0) & ~image).astype(np.float32)


def _parts(mix: str) -> list[list[tuple[Layout, list[tuple[int, str]]]]]:
    """The documents of each part of a mix."""
    parts = [_documents(part.strip()) for part in mix.split(";") if part.strip()]
    if not parts:
        raise UserError(f"mix {mix!r}: no document in it; write for example 'generation: 30 text, 256 image'")
    return parts


def _documents(text: str) -> list[tuple[Layout, list[tuple[int, str]]]]:
    """The documents of one part: a layout with (length, kind) runs, repeated as the part says."""
    match = re.fullmatch(r"(\w+)\s*:\s*(.*?)\s*(?:\bx\s*([1-9]\d*))?", text)
    if not match or match[1].upper() not in Layout.__members__:
        layouts = ", ".join(layout.name.lower() for layout in Layout)
        raise UserError(f"mix {text!r}: write TASK: RUNS, or TASK: RUNS x NUMBER, with a task of {layouts}")
    runs = []
    for run in match[2].split(","):
        run_match = re.fullmatch(r"\s*([1-9]\d*)\s+(\w+)\s*", run)
        if not run_match or run_match[2] not in _KINDS:
            raise UserError(f"mix {text!r}: {run.strip()!r} is not a run; write 256 image, 64 text or 8 answer")
        runs.append((int(run_match[1]), run_match[2]))
    layout = Layout[match[1].upper()]
    for _, kind in runs:
        if layout not in _ONLY_IN.get(kind, tuple(Layout)):
            names = " and ".join(only.name.lower() for only in _ONLY_IN[kind])
            other = {"answer": "text", "drawn": "image"}[kind]
            raise UserError(f"mix {text!r}: only {names} documents have runs of {kind!r}; write {other}")
    return [(layout, runs)] * int(match[3] or 1)


def _task(layout: Layout, kind: str) -> Task:
    if layout == Layout.INTERLEAVED:
        return Task.GENERATION if kind == "drawn" else Task.UNDERSTANDING
    return Task(layout)

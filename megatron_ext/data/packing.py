"""Packing documents into rows of fixed length, from their lengths alone.

Documents fill a row in their order until only the last one or two places are left. These go to the pair, among the next
``WINDOW`` documents, that fills the row best; this repeats while a document fits. The order stays well mixed: the
oldest document always opens the next row, and no document moves forward by more than the window. Rows of 512 tokens
with documents of about 100 lose 1.4 % to padding instead of 9 %.

Blocks of documents are packed independently, many at once in vectorised numpy.
"""

import numpy as np

WINDOW = 48
"""Documents from which the last pair of a row is selected. The rows depend on it, as they do on ``_STRIDE``."""

_STRIDE = 64
"""Most documents that enter a row in one step."""


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack each block of documents into rows.

    Args:
        lengths: integers [blocks, documents], each in ``1 .. capacity``; a block may end in zeros (no document).
        capacity: tokens in a row.

    Returns:
        The row of each document inside its block, int64 [blocks, documents] (-1 where there is no document), and the
        number of rows of each block, int64 [blocks].
    """
    blocks, documents = lengths.shape
    width = documents + _STRIDE + WINDOW
    small = 2 * (capacity + 1) < 1 << 15
    waiting = np.zeros((blocks, width), dtype=np.int16 if small else np.int32)  # lengths of documents not in a row yet
    waiting[:, :documents] = lengths
    row_of = np.full((blocks, width), -1, dtype=np.int64)
    row, cursor, room = (np.full(blocks, value) for value in (0, 0, capacity))
    last_places = (1.5 * lengths.sum(1) / np.maximum((lengths > 0).sum(1), 1)).astype(np.int64)
    lane, origin = np.arange(blocks), np.arange(blocks) * width
    steps = []  # (row, number of documents that entered it in order), per block

    while (cursor < documents).any():
        entered, used = _in_order(waiting, origin + cursor, room, capacity, last_places)
        steps.append((row, entered))
        room, cursor = room - used, cursor + entered
        closing = entered < _STRIDE  # else the row may take more in order
        places = (origin + cursor)[:, None] + np.arange(WINDOW)
        candidates = waiting.reshape(-1)[places]
        candidates[candidates == 0] = capacity + 1
        smallest = candidates.min(axis=1)
        first, second, best = _best_pair(candidates, room)
        fitting = np.flatnonzero(closing & (best > 0))
        for member in (first, second):
            place = places[fitting, member[fitting]]
            row_of.reshape(-1)[place] = row[fitting]
            waiting.reshape(-1)[place] = 0
        room[fitting] -= best[fitting]
        closing &= (room < capacity) & ((best == 0) | (room < smallest))
        row, room = row + closing, np.where(closing, capacity, room)
        cursor = np.minimum(cursor, documents)

    rows, entered = (np.stack(column, axis=1) for column in zip(*steps))
    for block in lane:
        in_order = np.repeat(rows[block], entered[block])[:documents]
        block_rows = row_of[block, : len(in_order)]
        block_rows[block_rows < 0] = in_order[block_rows < 0]
    row_of = row_of[:, :documents]
    row_of[lengths == 0] = -1
    return row_of, row + (room < capacity)


def _in_order(waiting, start, room, capacity, last_places) -> tuple[np.ndarray, np.ndarray]:
    """Number of documents that enter each block's open row in order, and their tokens.

    Documents enter while room for the last places remains; the first document of a row always enters.
    """
    lane = np.arange(len(start))
    ahead = waiting.reshape(-1)[start[:, None] + np.arange(_STRIDE)]
    total = ahead.cumsum(axis=1, dtype=np.int64)
    oldest = ahead[lane, (ahead > 0).argmax(axis=1)]
    limit = np.where(room == capacity, np.maximum(room - last_places, oldest), room - last_places)
    entered = (total <= limit[:, None]).sum(axis=1)
    return entered, np.where(entered > 0, total[lane, entered - 1], 0)


def _best_pair(candidates, room) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two candidates of each block that leave the least room (the same index twice: a single candidate), and their
    tokens (0: none fits)."""
    blocks, window = candidates.shape
    pairs = (candidates[:, :, None] + candidates[:, None, :]).reshape(blocks, -1)
    pairs[:, :: window + 1] = candidates
    pairs *= pairs <= room.astype(pairs.dtype)[:, None]
    best = pairs.argmax(axis=1)
    first, second = np.divmod(best, window)
    return first, second, pairs[np.arange(blocks), best].astype(np.int64)

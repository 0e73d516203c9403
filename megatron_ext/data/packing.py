"""Documents into rows of fixed length, from their lengths alone.

Documents fill a row in the order in which they were drawn until only the last one or two places are left. Those go to
the pair, among the next ``WINDOW`` documents, that fills the row best, and again while a document fits. The order stays
as well mixed as it was drawn: the oldest document always opens the next row, and none is called forward past more than
the window. Rows of 512 tokens with documents of about 100 lose 1.4 % to padding instead of 9 %.

Blocks of documents are packed independently of one another, many at once in vectorised numpy.
"""

import numpy as np

WINDOW = 48
"""Documents among which the last pair of a row is chosen. The rows depend on it, as they do on ``_STRIDE``."""

_STRIDE = 64
"""Documents that may enter a row in one step."""


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
    waiting = np.zeros((blocks, width), dtype=np.int16 if small else np.int32)  # length of who is not in a row yet
    waiting[:, :documents] = lengths
    row_of = np.full((blocks, width), -1, dtype=np.int64)
    row, cursor, room = (np.full(blocks, value) for value in (0, 0, capacity))
    last_places = (1.5 * lengths.sum(1) / np.maximum((lengths > 0).sum(1), 1)).astype(np.int64)
    lane, origin = np.arange(blocks), np.arange(blocks) * width
    steps = []  # (row, how many documents entered it in order), per block

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
        found = np.flatnonzero(closing & (best > 0))
        for chosen in (first, second):
            place = places[found, chosen[found]]
            row_of.reshape(-1)[place] = row[found]
            waiting.reshape(-1)[place] = 0
        room[found] -= best[found]
        closing &= (room < capacity) & ((best == 0) | (room < smallest))
        row, room = row + closing, np.where(closing, capacity, room)
        cursor = np.minimum(cursor, documents)

    rows, entered = (np.stack(column, axis=1) for column in zip(*steps))
    for block in lane:
        in_order = np.repeat(rows[block], entered[block])[:documents]
        mine = row_of[block, : len(in_order)]
        mine[mine < 0] = in_order[mine < 0]
    row_of = row_of[:, :documents]
    row_of[lengths == 0] = -1
    return row_of, row + (room < capacity)


def _in_order(waiting, start, room, capacity, last_places) -> tuple[np.ndarray, np.ndarray]:
    """How many documents enter each block's open row as they come, and their tokens.

    They enter while room for the last places remains; the first document of a row enters in any case.
    """
    lane = np.arange(len(start))
    ahead = waiting.reshape(-1)[start[:, None] + np.arange(_STRIDE)]
    total = ahead.cumsum(axis=1, dtype=np.int64)
    oldest = ahead[lane, (ahead > 0).argmax(axis=1)]
    limit = np.where(room == capacity, np.maximum(room - last_places, oldest), room - last_places)
    entered = (total <= limit[:, None]).sum(axis=1)
    return entered, np.where(entered > 0, total[lane, entered - 1], 0)


def _best_pair(candidates, room) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two candidates of each block (the same twice: a single one) that leave least room, and their tokens (0: none
    fits)."""
    blocks, window = candidates.shape
    pairs = (candidates[:, :, None] + candidates[:, None, :]).reshape(blocks, -1)
    pairs[:, :: window + 1] = candidates
    pairs *= pairs <= room.astype(pairs.dtype)[:, None]
    best = pairs.argmax(axis=1)
    first, second = np.divmod(best, window)
    return first, second, pairs[np.arange(blocks), best].astype(np.int64)

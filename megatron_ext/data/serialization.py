"""Structures of integers and arrays as one buffer, to send from a worker process to the trainers."""

import pickle

import numpy as np

ALIGNMENT = 64
"""Every array begins at a multiple of this many bytes in its buffer."""


def to_bytes(value) -> np.ndarray:
    """A structure of arrays as one buffer, uint8 [bytes]."""
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    parts = [np.frombuffer(part, dtype=np.uint8) for part in (head, *(array.raw() for array in arrays))]
    sizes = np.array([len(parts), *map(len, parts)], dtype=np.int64)
    starts, total = _places(sizes)
    buffer = np.empty(total, dtype=np.uint8)
    buffer[: sizes.nbytes] = sizes.view(np.uint8)
    for start, part in zip(starts, parts):
        buffer[start : start + len(part)] = part
    return buffer


def from_bytes(buffer: np.ndarray):
    """The structure that :func:`to_bytes` stored; its arrays are views of ``buffer``."""
    count = int(buffer[:8].view(np.int64)[0])
    sizes = buffer[: 8 * (count + 1)].view(np.int64)
    starts, _ = _places(sizes)
    head, *arrays = (buffer[start : start + size] for start, size in zip(starts, sizes[1:].tolist()))
    return pickle.loads(head, buffers=arrays)


def _places(sizes: np.ndarray) -> tuple[list[int], int]:
    """Start of each part of a buffer that begins with ``sizes`` (the number of parts, the bytes of each), and the size
    of the buffer."""
    aligned = -(-np.array([sizes.nbytes, *sizes[1:]]) // ALIGNMENT) * ALIGNMENT
    ends = aligned.cumsum()
    return ends[:-1].tolist(), int(ends[-1])

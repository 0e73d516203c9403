"""Random numbers as pure functions of counters, vectorised.

Any sample can be computed without the samples before it, so the order of training follows from (seed, position) alone.
The arithmetic is written out here because the streams of ``numpy.random`` may change between releases, and a run must
resume exactly under a newer one.
"""

import numpy as np

_ROUNDS = 6
_STEP = np.uint64(0x9E3779B97F4A7C15)
_POWERS_OF_TWO = np.uint64(1) << np.arange(63, dtype=np.uint64)


def mix(x: np.ndarray) -> np.ndarray:
    """Hash 64-bit integers (the finaliser of SplitMix64): every input bit flips every output bit with probability 1/2.

    Args:
        x: uint64, any shape; arithmetic wraps around.
    """
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def key(*parts) -> np.ndarray:
    """A uint64 key from integers or integer arrays (broadcast together), sensitive to their order."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            part = np.asarray(part).astype(np.uint64)
            state = mix(state * np.uint64(0xD6E8FEB86659FD93) + part + _STEP)
    return state


def uniform(*parts) -> np.ndarray:
    """A float64 in [0, 1) for each combination of integers."""
    return (key(*parts) >> np.uint64(11)) * 2.0**-53


def permute(index: np.ndarray, size: int | np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Map each index by a keyed random permutation of ``0 .. size - 1``.

    A Feistel network permutes the next power of four; indices that land outside ``size`` are permuted again until they
    are inside.

    Args:
        index: integers in ``0 .. size - 1``.
        size: one per index, or one for all.
        keys: uint64, one per index (or one for all); indices with the same key and size see the same permutation.

    Returns:
        int64, the shape of ``index``.
    """
    result = np.asarray(index).astype(np.uint64)
    keys, sizes = np.broadcast_to(keys, result.shape), np.broadcast_to(size, result.shape).astype(np.uint64)
    bits = np.searchsorted(_POWERS_OF_TWO, sizes - np.uint64(1), side="right")
    halves = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    outside = np.arange(result.size)
    while outside.size:
        half = halves[outside]
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = result[outside] >> half, result[outside] & mask
        outside_keys = keys[outside]
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix(right ^ mix(outside_keys + np.uint64(number))) & mask)
        moved = (left << half) | right
        result[outside] = moved
        outside = outside[moved >= sizes[outside]]
    return result.astype(np.int64)

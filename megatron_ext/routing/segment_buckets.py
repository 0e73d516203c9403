"""Buckets: segments of attention that share a kernel call.

A call per segment costs more than its arithmetic where documents are short, so segments of similar length are brought
together and filled up to the longest of them. Fillers stand at the end of a segment, where causality hides them.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np

STEPS_PER_OCTAVE = 4
"""Lengths within a quarter of an octave share a bucket; lengths below :data:`SHORT` do in steps of two."""
SHORT = 8
LONGEST = 128
"""Longer segments are not filled: the arithmetic of fillers would cost more than a call."""
LONGEST_MEAN = 48
"""Queries of a segment on average above which fewer calls do not pay for bringing rows into another order."""


@dataclass
class Bucket:
    """Consecutive segments, each with the same number of rows, fillers included.

    Attributes:
        segments: number of segments.
        queries, keys: rows of each.
        offsets: the first query of a segment sees ``offset + 1`` keys, each later query one more; int32 [segments], or
            [1] for all of them. None: 0 for all.
    """

    segments: int
    queries: int
    keys: int
    offsets: np.ndarray | None


@dataclass
class BucketOrder:
    """Buckets, and the places of rows that have segment after segment in them.

    Attributes:
        query_index, key_index: the row of each place, -1 for fillers.
    """

    buckets: list[Bucket]
    query_index: np.ndarray
    key_index: np.ndarray


def in_order(query_lengths: np.ndarray, key_lengths: np.ndarray) -> list[Bucket]:
    """Buckets that keep the order of segments and have no fillers: neighbours of the same shape."""
    lengths = zip(query_lengths.tolist(), key_lengths.tolist())
    return [_bucket(q, k, [k - q] * len(list(same))) for (q, k), same in groupby(lengths)]


def filled(query_lengths: np.ndarray, key_lengths: np.ndarray) -> BucketOrder | None:
    """Buckets of similar segments; None if they would not pay off against :func:`in_order`.

    Args:
        query_lengths, key_lengths: rows of each segment, int [segments].
    """
    if query_lengths.sum() > LONGEST_MEAN * query_lengths.size:
        return None
    classes = np.stack([_length_class(query_lengths), _length_class(key_lengths), key_lengths != query_lengths])
    _, bucket_of = np.unique(classes, axis=1, return_inverse=True)
    bucket_of = bucket_of.ravel()
    count = int(bucket_of.max(initial=-1)) + 1
    if count == len(in_order(query_lengths, key_lengths)):
        return None
    members = [np.flatnonzero(bucket_of == b) for b in range(count)]
    buckets = [
        _bucket(int(query_lengths[m].max()), int(key_lengths[m].max()), (key_lengths - query_lengths)[m].tolist())
        for m in members
    ]
    query_index, key_index = (
        np.concatenate([_places(lengths, m, n) for m, n in zip(members, longest)])
        for lengths, longest in (
            (query_lengths, [bucket.queries for bucket in buckets]),
            (key_lengths, [bucket.keys for bucket in buckets]),
        )
    )
    return BucketOrder(buckets, query_index, key_index)


def _bucket(queries: int, keys: int, offsets: list[int]) -> Bucket:
    same = len(set(offsets)) == 1
    array = None if not any(offsets) else np.array(offsets[:1] if same else offsets, dtype=np.int32)
    return Bucket(len(offsets), queries, keys, array)


def _length_class(lengths: np.ndarray) -> np.ndarray:
    """Equal numbers for lengths that may share a bucket."""
    octave = np.log2(np.maximum(lengths, SHORT)).astype(int)
    step = np.maximum(2**octave // STEPS_PER_OCTAVE, 1)
    return np.where(lengths > LONGEST, lengths, -(-lengths // step) * step)


def _places(lengths: np.ndarray, members: np.ndarray, longest: int) -> np.ndarray:
    """The rows of the segments ``members``, each filled up with -1 to ``longest``."""
    starts = lengths.cumsum() - lengths
    place = np.arange(longest)
    return np.where(place < lengths[members, None], starts[members, None] + place, -1).ravel()

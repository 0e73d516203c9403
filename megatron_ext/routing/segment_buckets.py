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
        key_start: row of the keys at which those of its first segment begin; those of its other segments follow.
        offsets: the first query of a segment sees ``offset + 1`` keys, each later query one more; int32 [segments], or
            [1] for all of them. None: 0 for all.
    """

    segments: int
    queries: int
    keys: int
    key_start: int
    offsets: np.ndarray | None


@dataclass
class BucketOrder:
    """Buckets, and the places of rows in them.

    Attributes:
        query_index, key_index: the row of each place, -1 for fillers: of queries segment after segment, and of keys
            with each document's keys once.
    """

    buckets: list[Bucket]
    query_index: np.ndarray
    key_index: np.ndarray


def in_order(query_lengths: np.ndarray, key_lengths: np.ndarray, key_starts: np.ndarray) -> list[Bucket]:
    """Buckets that keep the order of segments and have no fillers: neighbours of the same shape.

    Such neighbours belong to different documents, since a later segment of a document sees more keys; so the keys of
    one begin where those of the one before end.
    """
    segments = zip(query_lengths.tolist(), key_lengths.tolist(), key_starts.tolist())
    alike = (list(same) for _, same in groupby(segments, key=lambda segment: segment[:2]))
    return [_bucket(q, k, start, [k - q] * len(same)) for same in alike for q, k, start in same[:1]]


def filled(query_lengths: np.ndarray, key_lengths: np.ndarray, key_starts: np.ndarray) -> BucketOrder | None:
    """Buckets of similar segments; None if they would not pay off against :func:`in_order`.

    Args:
        query_lengths, key_lengths: rows of each segment, int [segments].
        key_starts: row at which its keys begin, the same for all segments of a document.
    """
    if query_lengths.sum() > LONGEST_MEAN * query_lengths.size:
        return None
    # Segments that share a bucket have keys of their own, which a document with many segments must not repeat.
    new = np.ones(key_starts.size, dtype=bool)
    new[1:] = key_starts[1:] != key_starts[:-1]
    shares_keys = ~(new & np.roll(new, -1)) & (key_lengths > LONGEST)
    single = np.where(shares_keys, 1 + np.arange(key_lengths.size), 0)
    lengths = _length_class(query_lengths), _length_class(key_lengths)
    classes = np.stack([*lengths, key_lengths != query_lengths, single])
    _, bucket_of = np.unique(classes, axis=1, return_inverse=True)
    bucket_of = bucket_of.ravel()
    count = int(bucket_of.max(initial=-1)) + 1
    if count == len(in_order(query_lengths, key_lengths, key_starts)):
        return None
    members = [np.flatnonzero(bucket_of == b) for b in range(count)]
    key_index, bucket_starts = _key_places(members, key_lengths, key_starts)
    offsets = key_lengths - query_lengths
    buckets = [
        _bucket(int(query_lengths[m].max()), int(key_lengths[m].max()), start, offsets[m].tolist())
        for m, start in zip(members, bucket_starts)
    ]
    query_starts = query_lengths.cumsum() - query_lengths
    places = [_places(query_starts[m], query_lengths[m], bucket.queries) for m, bucket in zip(members, buckets)]
    return BucketOrder(buckets, np.concatenate(places), key_index)


def _key_places(
    members: list[np.ndarray], key_lengths: np.ndarray, key_starts: np.ndarray
) -> tuple[np.ndarray, list[int]]:
    """The key of each place, and the place at which each bucket's keys begin.

    Segments that share a bucket have their keys in it. The others of a document share the keys of the longest of them.
    """
    longest, documents = {}, {}
    for i in (m[0] for m in members if m.size == 1):
        longest[key_starts[i]] = max(longest.get(key_starts[i], 0), key_lengths[i])
    places, starts, size = [], [], 0
    for m in members:
        document = key_starts[m[0]]
        if m.size == 1 and document in documents:
            starts.append(documents[document])
            continue
        if m.size == 1:
            documents[document] = size
            places.append(document + np.arange(longest[document]))
        else:
            places.append(_places(key_starts[m], key_lengths[m], key_lengths[m].max()))
        starts.append(size)
        size += places[-1].size
    return np.concatenate(places), starts


def _bucket(queries: int, keys: int, key_start: int, offsets: list[int]) -> Bucket:
    same = len(set(offsets)) == 1
    array = None if not any(offsets) else np.array(offsets[:1] if same else offsets, dtype=np.int32)
    return Bucket(len(offsets), queries, keys, key_start, array)


def _length_class(lengths: np.ndarray) -> np.ndarray:
    """Equal numbers for lengths that may share a bucket."""
    octave = np.log2(np.maximum(lengths, SHORT)).astype(int)
    step = np.maximum(2**octave // STEPS_PER_OCTAVE, 1)
    return np.where(lengths > LONGEST, lengths, -(-lengths // step) * step)


def _places(starts: np.ndarray, lengths: np.ndarray, longest: int) -> np.ndarray:
    """The rows of segments, each filled up with -1 to ``longest``."""
    place = np.arange(longest)
    return np.where(place < lengths[:, None], starts[:, None] + place, -1).ravel()

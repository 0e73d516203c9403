"""Packing from lengths alone: nothing lost, nothing too long, little padding, order kept."""

import numpy as np
import pytest

from megatron_ext.data.packing import WINDOW, pack


def narrow(count, seed=0):
    return np.random.default_rng(seed).integers(80, 121, count)


def wide(count, seed=0):
    return np.random.default_rng(seed).integers(20, 401, count)


def tiny(count, seed=0):
    return np.random.default_rng(seed).integers(1, 6, count)


def rows_if_packed_in_order(lengths, capacity):
    """Next fit: a new row whenever a document does not fit."""
    rows, room = 1, capacity
    for length in lengths:
        if length > room:
            rows, room = rows + 1, capacity
        room -= length
    return rows


@pytest.mark.parametrize("lengths", [narrow(3000), wide(3000), tiny(3000), np.full(100, 512), np.ones(5, dtype=int)])
def test_every_document_is_in_one_row_and_no_row_is_too_long_or_empty(lengths):
    row_of, rows = pack(lengths[None], 512)
    totals = np.bincount(row_of[0], weights=lengths)
    assert len(totals) == rows[0] and totals.min() > 0 and totals.max() <= 512
    assert row_of.min() == 0


@pytest.mark.parametrize("lengths, padding", [(narrow(8192), 0.02), (wide(8192), 0.05), (tiny(8192), 0.01)])
def test_padding_is_small(lengths, padding):
    _, rows = pack(lengths[None], 512)
    assert 1 - lengths.sum() / (rows[0] * 512) < padding
    assert rows[0] <= rows_if_packed_in_order(lengths, 512)


def test_small_documents_in_small_rows_lose_far_less_than_packed_in_order():
    lengths = narrow(8192)
    _, rows = pack(lengths[None], 512)
    lost, in_order = rows[0] - lengths.sum() / 512, rows_if_packed_in_order(lengths, 512) - lengths.sum() / 512
    assert lost < in_order / 4


def test_no_document_is_called_far_ahead_of_its_turn():
    lengths = narrow(8192)
    row_of, _ = pack(lengths[None], 512)
    first_of_row = np.full(row_of.max() + 1, len(lengths))
    np.minimum.at(first_of_row, row_of[0], np.arange(len(lengths)))
    assert (np.diff(first_of_row) > 0).all()  # the oldest document opens the next row
    assert (np.arange(len(lengths)) - first_of_row[row_of[0]]).max() <= 2 * WINDOW


def test_blocks_do_not_know_of_each_other():
    blocks = np.stack([narrow(600, seed) for seed in range(5)])
    together, rows = pack(blocks, 512)
    for block, row_of, count in zip(blocks, together, rows):
        alone, alone_count = pack(block[None], 512)
        np.testing.assert_array_equal(alone[0], row_of)
        assert alone_count[0] == count


def test_a_block_may_end_early():
    lengths = np.zeros((2, 50), dtype=int)
    lengths[0], lengths[1, :7] = narrow(50), narrow(7, 1)
    row_of, rows = pack(lengths, 512)
    assert (row_of[1, 7:] == -1).all()
    np.testing.assert_array_equal(row_of[1, :7], pack(lengths[1:, :7], 512)[0][0])
    assert rows[1] == row_of[1].max() + 1


def test_long_rows_are_packed_too():
    lengths = np.random.default_rng(0).integers(200, 40_000, 2000)
    row_of, rows = pack(lengths[None], 1 << 16)
    assert np.bincount(row_of[0], weights=lengths).max() <= 1 << 16
    assert 1 - lengths.sum() / (rows[0] << 16) < 0.1

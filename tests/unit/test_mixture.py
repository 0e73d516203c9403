"""The mixture: samples are pure functions of (seed, number), weights exact, epochs whole; bad sources are refused."""

import dataclasses

import numpy as np
import pytest

from megatron_ext.data import counter_random
from megatron_ext.data.format import ANSWER, IMAGE, TEXT
from megatron_ext.data.mixture import blend_counts
from megatron_ext.errors import UserError
from support.data_sets import FIRST_CODE, captions, mixture, texts, write

PICTURE = (IMAGE, [FIRST_CODE] * 8)


@pytest.fixture
def blend(tmp_path):
    pairs, plain = captions(tmp_path / "pairs", 30), texts(tmp_path / "plain", 17)
    return mixture(
        (pairs, "generation", 1.0), (pairs, "understanding", 0.5), (plain, "text", 0.25), caption_dropout=0.1
    )


def test_a_sample_depends_on_its_number_alone(blend):
    whole = blend.samples(0, 3000)
    for start, stop in ((0, 1), (7, 2000), (2999, 3000)):
        part = blend.samples(start, stop)
        for field in dataclasses.fields(part):
            np.testing.assert_array_equal(getattr(part, field.name), getattr(whole, field.name)[start:stop])


def test_another_seed_gives_another_order(tmp_path):
    pairs = captions(tmp_path / "pairs", 30)
    samples = [mixture((pairs, "generation", 1.0), seed=seed).samples(0, 60).document for seed in (1, 1, 2)]
    np.testing.assert_array_equal(samples[0], samples[1])
    assert not np.array_equal(samples[0], samples[2])


def test_weights_are_kept_exactly_in_every_round_and_nearly_at_any_time(blend):
    source = blend.samples(0, 7000).source
    assert len(blend.blend) == 7
    for start in range(0, 7000, 7):
        assert np.bincount(source[start : start + 7]).tolist() == [4, 2, 1]
    for number, share in enumerate((4 / 7, 2 / 7, 1 / 7)):
        seen = np.cumsum(source == number)
        assert np.abs(seen - share * np.arange(1, 7001)).max() < 2


def test_weights_that_have_no_short_round_are_rounded_to_a_long_one():
    counts = blend_counts([1.0, 0.123456789, 1e-9])
    assert sum(counts) == pytest.approx(1 << 20, abs=2)
    assert counts[0] / counts[1] == pytest.approx(1 / 0.123456789, rel=1e-4)
    assert counts[2] == 1


def test_every_epoch_has_each_document_once_in_a_new_order(blend):
    samples = blend.samples(0, 4000)
    for number, documents in enumerate((30, 30, 17)):
        order = samples.document[samples.source == number]
        epochs = [order[start : start + documents] for start in range(0, len(order) - documents, documents)]
        assert all(sorted(epoch) == list(range(documents)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs) > 10
        np.testing.assert_array_equal(samples.epoch[samples.source == number], np.arange(len(order)) // documents)


def test_two_sources_of_the_same_data_set_have_independent_orders(blend):
    samples = blend.samples(0, 700)
    generation, understanding = (samples.document[samples.source == number][:30] for number in (0, 1))
    assert not np.array_equal(generation, understanding)


def test_captions_are_dropped_at_the_configured_rate_from_generation_alone(blend):
    samples = blend.samples(0, 70_000)
    assert samples.dropped[samples.source == 0].mean() == pytest.approx(0.1, abs=0.005)
    assert not samples.dropped[samples.source != 0].any()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000])
def test_permutations_are_permutations(size):
    permuted = counter_random.permute(np.arange(size), size, counter_random.key(1, size))
    assert sorted(permuted) == list(range(size))


def test_permutations_send_every_index_everywhere():
    keys = counter_random.key(np.repeat(np.arange(4000), 10))
    index = np.tile(np.arange(10), 4000)
    counts = np.zeros((10, 10))
    np.add.at(counts, (index, counter_random.permute(index, 10, keys)), 1)
    assert np.abs(counts - 400).max() < 100  # five standard deviations


@pytest.mark.parametrize(
    "documents, task, why",
    [
        ([[PICTURE, (ANSWER, [2])], [PICTURE, (TEXT, [2])]], "understanding", "document 1 holds no answer"),
        ([[(TEXT, [2])]], "generation", "document 0 holds no image"),
        ([[(TEXT, [2])], [PICTURE, (TEXT, [2])]], "text", "document 1 holds an image"),
    ],
)
def test_a_data_set_of_no_use_for_the_task_is_refused(tmp_path, documents, task, why):
    path = write(tmp_path / "set", documents)
    with pytest.raises(UserError, match=rf"data.train\[0\] \(.*set\): {why}.*; not usable for task {task}"):
        mixture((path, task, 1.0))


def test_a_document_with_an_image_that_is_longer_than_a_row_is_refused(tmp_path):
    path = write(tmp_path / "set", [[PICTURE, (ANSWER, [2])], [PICTURE, (ANSWER, [2] * 20)]])
    mixture((path, "understanding", 1.0), length=32)
    with pytest.raises(UserError, match=r"document 1 is 32 tokens long .* raise data.sequence_length \(31\)"):
        mixture((path, "understanding", 1.0), length=31)


def test_the_tree_lists_sizes_shares_and_epochs(tmp_path):
    pairs = write(tmp_path / "pairs", [[PICTURE, (ANSWER, [2] * 8)]] * 10)  # 20 tokens for understanding
    plain = write(tmp_path / "plain", [[(TEXT, [2] * 8)]] * 5)  # 10 tokens
    blend = mixture((pairs, "understanding", 3.0), (plain, "text", 1.0))
    tree = blend.tree(rows=35, row_length=64)  # 2240 tokens = 128 documents of 17.5 tokens
    assert "10 documents, 200 tokens (20 a document), 10 images" in tree
    assert "weight 3: 75.0% of documents, 85.7% of tokens, 9.60 epochs in this run" in tree
    assert "weight 1: 25.0% of documents, 14.3% of tokens, 6.40 epochs in this run" in tree
    assert blend.fingerprint in tree and "vocabulary tiny" in tree


def test_the_fingerprint_changes_with_what_decides_the_samples(tmp_path):
    a, b = captions(tmp_path / "a", 5), captions(tmp_path / "b", 5, seed=1)
    fingerprints = [
        mixture((path, task, 1.0), (a, "generation", weight), seed=seed).fingerprint
        for path, task, weight, seed in [
            (a, "generation", 1.0, 1),
            (b, "generation", 1.0, 1),
            (a, "understanding", 1.0, 1),
            (a, "generation", 2.0, 1),
            (a, "generation", 1.0, 2),
        ]
    ]
    assert len(set(fingerprints)) == 5

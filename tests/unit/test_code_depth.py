"""Image tokens of several codes: stored, packed and read back; everything else is as with one code a token."""

import numpy as np
import pytest

from megatron_ext.config import DataConfig, SourceConfig
from megatron_ext.data import build_mixture
from megatron_ext.data.batch import Batch
from megatron_ext.data.copying import merge
from megatron_ext.data.format import ANSWER, DRAWN, IMAGE, TEXT, Dataset, is_image, verify
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.packed_rows import PackedRows
from megatron_ext.data.rendering import SpecialTokens
from megatron_ext.data.show import describe_row
from megatron_ext.data.writer import DatasetWriter
from megatron_ext.errors import UserError
from support.data_sets import CODES, FIRST_CODE, SPECIAL, mixture, vq_metadata, write, write_pairs, write_texts

POSITIONS, LENGTH = 8, 64


def documents(depth: int) -> dict[str, list]:
    """Documents of every layout whose images have ``depth`` codes a token; the same but for codes 2 to D."""
    random, codes = np.random.default_rng(0), np.random.default_rng(1)

    def image():
        tokens = np.concatenate(
            [random.integers(0, CODES, (POSITIONS, 1)), codes.integers(0, CODES, (POSITIONS, depth - 1))], axis=1
        )
        return FIRST_CODE + tokens.reshape(-1)

    def words(longest):
        return random.integers(2, 92, random.integers(1, longest))

    return {
        "generation": [[(IMAGE, image()), (ANSWER, words(20))] for _ in range(40)],
        "understanding": [[(IMAGE, image()), (TEXT, words(5)), (ANSWER, words(9))] for _ in range(40)],
        "text": [[(TEXT, words(200))] for _ in range(20)],
        "interleaved": [[(IMAGE, image()), (TEXT, words(9)), (DRAWN, image())] for _ in range(40)],
    }


def rows_of(folder, depth: int, by_task=False) -> PackedRows:
    paths = {task: write(folder / task, of_task, depth=depth) for task, of_task in documents(depth).items()}
    blend = mixture(*((path, task, 1.0) for task, path in paths.items()), length=LENGTH, caption_dropout=0.3)
    return PackedRows(blend, LENGTH, by_task)


@pytest.mark.parametrize("depth, by_task", [(2, False), (3, True), (4, False), (16, False)])
def test_rows_have_each_image_s_codes_and_are_otherwise_those_of_its_first_codes(tmp_path, depth, by_task):
    one, several = rows_of(tmp_path / "one", 1, by_task), rows_of(tmp_path / "several", depth, by_task)
    batch, expected = several.batch(0, 120), one.batch(0, 120)
    for name in Batch.names():
        np.testing.assert_array_equal(getattr(batch, name), getattr(expected, name), err_msg=name)
    assert expected.codes is None and batch.codes.shape == (120, LENGTH, depth) and batch.codes.dtype == np.int32
    assert not batch.codes[batch.modality == 0].any()
    images = 0
    for row in range(120):
        for number, (source, document, _) in enumerate(several.documents(row)):
            stored = several.mixture.sources[source].dataset.document(document)
            codes = [np.reshape(ids, (-1, depth)) - FIRST_CODE for mode, ids in stored if is_image(mode)]
            of_document = (batch.document[row] == number) & (batch.modality[row] == 1)
            np.testing.assert_array_equal(batch.codes[row][of_document], np.concatenate([np.empty((0, depth)), *codes]))
            images += len(codes)
    assert images > 100


def test_counts_are_of_tokens_and_not_of_codes(tmp_path):
    path = write(tmp_path / "set", documents(4)["interleaved"][:1], depth=4)
    metadata, text = verify(path), len(documents(4)["interleaved"][0][1][1])
    assert {key: metadata[key] for key in ("format", "tokens", "image_tokens", "images")} == {
        "format": 3,
        "tokens": 2 * POSITIONS + text,
        "image_tokens": 2 * POSITIONS,
        "images": 2,
    }
    assert Dataset(path).document_lengths.tolist() == [2 * POSITIONS + text]
    assert merge([path, path], tmp_path / "both") == verify(tmp_path / "both")
    with pytest.raises(ValueError, match="an image of 8 codes, but the VQ grid is 2 x 4 of 4 codes"):
        write(tmp_path / "short", documents(1)["generation"], depth=4)


def test_shards_of_another_depth_are_not_merged(tmp_path):
    shards = [write(tmp_path / str(depth), documents(depth)["generation"], depth=depth) for depth in (1, 4)]
    with pytest.raises(UserError, match=r"4\.json: 'vq' is .*'depth': 4.*, cannot be merged with"):
        merge(shards, tmp_path / "both")


def test_a_codebook_beyond_16_bits_is_refused_with_several_codes_alone(tmp_path):
    with pytest.raises(UserError, match=r"set: a codebook of 65537 codes; with 2 codes an image token at most 65536"):
        DatasetWriter(tmp_path / "set", "tiny", vq_metadata(depth=2, codebook_size=65537), {})
    DatasetWriter(tmp_path / "set", "tiny", vq_metadata(codebook_size=65537), {})


def test_the_greatest_code_comes_back(tmp_path):
    greatest = [FIRST_CODE, FIRST_CODE + 65535] * POSITIONS
    path = write(tmp_path / "set", [[(IMAGE, greatest), (ANSWER, [2])]], depth=2)
    batch = PackedRows(mixture((path, "understanding", 1.0)), LENGTH).batch(0, 1)
    assert batch.codes[batch.modality == 1].tolist()[:POSITIONS] == [[0, 65535]] * POSITIONS


def test_sources_of_different_depth_and_models_of_another_are_refused_by_name(tmp_path, vocabulary):
    pairs = {n: write_pairs(tmp_path / f"of{n}", vocabulary, [["red"]] * 4, depth=n) for n in (1, 4)}
    text = write_texts(tmp_path / "text", vocabulary, ["a red square"] * 4)

    def mixture_of(*sources, depth=None) -> Mixture:
        opened = [SourceConfig(path, task) for path, task in sources]
        return build_mixture(opened, DataConfig(sequence_length=LENGTH), vocabulary, train=True, depth=depth)

    one, four = (pairs[1], "generation"), (pairs[4], "understanding")
    with pytest.raises(UserError, match=rf"{pairs[4]}: an image token has 4 codes, in {pairs[1]} 1;"):
        mixture_of((text, "text"), one, four)
    with pytest.raises(UserError, match=rf"{pairs[4]}: an image token has 4 codes, 'model.image_codes.depth' is 1"):
        mixture_of(four, depth=1)
    with pytest.raises(UserError, match=rf"{pairs[1]}: an image token has 1 codes, 'model.image_codes.depth' is 4"):
        mixture_of((text, "text"), one, depth=4)
    both = mixture_of((text, "text"), four, depth=4)
    assert both.depth == 4 and both.vq == Dataset(pairs[4]).metadata["vq"]
    alone = mixture_of((text, "text"), depth=4)  # its rows are read as those of any other mixture of the model
    assert alone.depth == 4 and alone.vq is None
    assert PackedRows(alone, LENGTH).batch(0, 2).codes.shape == (2, LENGTH, 4)


def test_generation_text_is_part_of_the_fingerprint_only_where_it_is_asked_for(tmp_path):
    path = write(tmp_path / "set", documents(1)["generation"])
    source = mixture((path, "generation", 1.0)).sources
    without = Mixture(source, SPECIAL, 1, 0.0)
    assert Mixture(source, SPECIAL, 1, 0.0, generation_text=False).fingerprint == without.fingerprint
    assert Mixture(source, SPECIAL, 1, 0.0, generation_text=True).fingerprint != without.fingerprint


def test_shown_rows_have_the_codes_of_each_token(tmp_path, vocabulary):
    path = write_pairs(tmp_path / "pairs", vocabulary, [["red"]], grid=[1, 2], depth=3)
    special = SpecialTokens.of(vocabulary)
    rows = PackedRows(mixture((path, "generation", 1.0), special=special, vocabulary=vocabulary.fingerprint), 16)
    (a, b, c, d, e, f) = (Dataset(path).document(0)[0][1] - vocabulary.image_offset).tolist()
    assert f"[[(2 tokens of 3 codes: {a}/{b}/{c} {d}/{e}/{f})]] <eoi>" in describe_row(rows, 0, vocabulary)

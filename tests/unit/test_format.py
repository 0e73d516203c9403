"""The on-disk data set: what is written is read, and what is damaged or unfinished is refused by name."""

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.data import format as data_format
from megatron_ext.data.copying import merge
from megatron_ext.data.format import ANSWER, IMAGE, TEXT, Dataset, verify
from megatron_ext.data.writer import DatasetWriter
from megatron_ext.errors import UserError
from support.data_sets import FIRST_CODE, captions, write

IMAGE_IDS = list(range(FIRST_CODE, FIRST_CODE + 8))
DOCUMENTS = [
    [(IMAGE, IMAGE_IDS), (TEXT, [5, 6]), (ANSWER, [7])],
    [(TEXT, [8, 9, 10])],
    [(IMAGE, IMAGE_IDS[::-1]), (ANSWER, [11, 12])],
]


def as_lists(document):
    return [(mode, list(ids)) for mode, ids in document]


def test_documents_come_back_as_written(tmp_path):
    dataset = Dataset(write(tmp_path / "set", DOCUMENTS))
    assert [as_lists(dataset.document(i)) for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_lengths.tolist() == [11, 3, 10]
    counts = {key: dataset.metadata[key] for key in ("documents", "sequences", "tokens", "images", "image_tokens")}
    assert counts == {"documents": 3, "sequences": 6, "tokens": 24, "images": 2, "image_tokens": 16}
    assert verify(tmp_path / "set") == dataset.metadata


def test_megatron_core_reads_the_same(tmp_path):
    megatron_dataset = IndexedDataset(write(tmp_path / "set", DOCUMENTS), multimodal=True)
    sequences, modes = megatron_dataset[0:6]
    stored = [sequence for document in DOCUMENTS for sequence in document]
    assert [(int(mode), list(ids)) for mode, ids in zip(modes, sequences)] == stored
    assert megatron_dataset.document_indices.tolist() == [0, 3, 4, 6]


def test_an_interrupted_writer_leaves_nothing_and_harms_nothing(tmp_path):
    write(tmp_path / "set", DOCUMENTS)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path / "set", "tiny", None, {}) as writer:
        writer.add([(TEXT, [1, 2])])
        raise KeyboardInterrupt
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_without_a_card_there_is_no_data_set(tmp_path):
    write(tmp_path / "set", DOCUMENTS)
    (tmp_path / "set.json").unlink()
    with pytest.raises(UserError, match=r"set\.json: not found; there is no finished data set"):
        Dataset(tmp_path / "set")


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_a_truncated_file_is_named(tmp_path, kind):
    write(tmp_path / "set", DOCUMENTS)
    file = tmp_path / f"set.{kind}"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=rf"set\.{kind}: .* bytes, the metadata says .*; truncated or replaced"):
        Dataset(tmp_path / "set")


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_an_altered_file_is_named(tmp_path, kind):
    write(tmp_path / "set", DOCUMENTS)
    flip_a_bit(tmp_path / f"set.{kind}")
    with pytest.raises(UserError, match=rf"set\.{kind}: sha256 differs"):
        Dataset(tmp_path / "set")


def test_a_large_bin_is_hashed_only_on_request(tmp_path, monkeypatch):
    write(tmp_path / "set", DOCUMENTS)
    flip_a_bit(tmp_path / "set.bin")
    monkeypatch.setattr(data_format, "FULL_CHECK_LIMIT", 0)
    Dataset(tmp_path / "set")
    with pytest.raises(UserError, match=r"set\.bin: sha256 differs"):
        verify(tmp_path / "set")


def test_merging_joins_the_documents_in_order(tmp_path):
    parts = [write(tmp_path / "a", DOCUMENTS), write(tmp_path / "b", DOCUMENTS[::-1])]
    metadata = merge(parts, tmp_path / "both")
    dataset = Dataset(tmp_path / "both")
    assert [as_lists(dataset.document(i)) for i in range(6)] == DOCUMENTS + DOCUMENTS[::-1]
    assert metadata == verify(tmp_path / "both")


def test_merging_refuses_another_vocabulary(tmp_path):
    parts = [write(tmp_path / "a", DOCUMENTS), write(tmp_path / "b", DOCUMENTS, vocabulary="other")]
    with pytest.raises(UserError, match=r"b\.json: 'vocabulary' is other, cannot be merged with tiny"):
        merge(parts, tmp_path / "both")
    assert not list(tmp_path.glob("*both*"))


@pytest.mark.parametrize(
    "document, why",
    [
        ([], "at least one sequence"),
        ([(TEXT, [])], "non-empty"),
        ([(4, [1])], "mode 4"),
        ([(TEXT, [-1])], "negative"),
        ([(IMAGE, IMAGE_IDS[:7])], "7 codes, but the VQ grid is 2 x 4"),
    ],
)
def test_the_writer_refuses_nonsense(tmp_path, document, why):
    with pytest.raises(ValueError, match=why):
        write(tmp_path / "set", [[(IMAGE, IMAGE_IDS)], document])
    assert not list(tmp_path.iterdir())


def test_document_lengths_of_many(tmp_path):
    dataset = Dataset(captions(tmp_path / "set", 50))
    expected = [sum(len(ids) for _, ids in dataset.document(i)) for i in range(50)]
    np.testing.assert_array_equal(dataset.document_lengths, expected)

"""tools/dataset.py: merging, splitting, showing and counting prepared data sets."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ext.data import copying
from megatron_ext.data.copying import merge, split
from megatron_ext.data.format import ANSWER, DRAWN, IMAGE, TEXT, Dataset, is_image, verify
from megatron_ext.data.statistics import Statistics
from megatron_ext.errors import UserError
from support.data_sets import CODES, FIRST_CODE, captions, write
from support.vocabularies import make_vocabulary
from tools import dataset as tool


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(copying, "BLOCK", 7)


def mixed(prefix, count: int, seed: int, depth: int = 1) -> str:
    """Documents of one to four sequences of every kind; the first token is different for each."""
    random = np.random.default_rng(seed)

    def sequence(mode):
        if is_image(mode):
            return mode, FIRST_CODE + random.integers(0, CODES, 8 * depth)
        return mode, random.integers(2, 92, random.integers(1, 9))

    modes = [[TEXT, IMAGE, *random.permutation([TEXT, ANSWER, DRAWN])[: random.integers(0, 3)]] for _ in range(count)]
    return write(prefix, [[sequence(mode) for mode in of_one] for of_one in modes], depth=depth)


def contents(*prefixes) -> list:
    return [
        [(mode, ids.tolist()) for mode, ids in dataset.document(i)]
        for dataset in map(Dataset, prefixes)
        for i in range(len(dataset))
    ]


@pytest.mark.parametrize("depth", [1, 4])
def test_merged_files_are_those_of_megatron_core(tmp_path, depth):
    parts = [mixed(tmp_path / name, count, seed, depth) for name, count, seed in (("a", 20, 1), ("b", 9, 2))]
    metadata = merge(parts, tmp_path / "both")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32, multimodal=True)
    for part in parts:
        builder.add_index(part)
    builder.finalize(str(tmp_path / "theirs.idx"))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"both.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()
    assert verify(tmp_path / "both") == metadata
    assert contents(tmp_path / "both") == contents(*parts)


def test_a_split_has_every_document_once_in_stored_order_and_is_repeatable(tmp_path):
    whole = contents(mixed(tmp_path / "all", 50, 1))

    def parts(folder, seed):
        sizes = {f"{tmp_path}/{folder}/{name}": size for name, size in (("train", None), ("five", 5), ("tenth", 0.1))}
        made = split(tmp_path / "all", sizes, seed)
        assert [metadata["documents"] for metadata in made] == [40, 5, 5]
        assert [verify(prefix) for prefix in sizes] == made
        return [contents(prefix) for prefix in sizes]

    made = parts("first", 3)
    places = [[whole.index(document) for document in part] for part in made]
    assert sorted(sum(places, [])) == list(range(50))
    assert all(part == sorted(part) for part in places)
    assert parts("second", 3) == made
    assert parts("third", 4) != made


def test_a_split_without_drawn_images_says_so(tmp_path):
    merge(
        [write(tmp_path / "one", [[(DRAWN, range(FIRST_CODE, FIRST_CODE + 8))]]), captions(tmp_path / "b", 3)],
        tmp_path / "all",
    )
    made = split(tmp_path / "all", {str(tmp_path / name): 1 for name in "wxyz"})
    assert sorted(metadata["format"] for metadata in made) == [1, 1, 1, 2]


def test_more_documents_than_there_are_cannot_be_split_off(tmp_path):
    captions(tmp_path / "set", 3)
    with pytest.raises(UserError, match="set: 3 documents cannot be divided into 4, -1"):
        split(tmp_path / "set", {str(tmp_path / "a"): 4, str(tmp_path / "b"): None})


def test_statistics_are_those_of_the_documents(tmp_path):
    prefixes = [mixed(tmp_path / "a", 40, 1), mixed(tmp_path / "b", 9, 2)]
    documents = contents(*prefixes)
    numbers = Statistics.of([Dataset(prefix) for prefix in prefixes]).numbers()
    lengths = [sum(len(ids) for _, ids in document) for document in documents]
    tokens = Counter()
    for document in documents:
        for mode, ids in document:
            tokens[mode] += len(ids)
    assert numbers["documents"] == 49 and numbers["tokens"] == sum(lengths)
    assert list(numbers["tokens_by_kind"].values()) == [tokens[mode] for mode in (TEXT, ANSWER, IMAGE, DRAWN)]
    assert numbers["length"]["50%"] == np.percentile(lengths, 50, method="inverted_cdf")
    assert numbers["length"]["longest"] == max(lengths)
    images = Counter(str(sum(is_image(mode) for mode, _ in document)) for document in documents)
    assert numbers["images_per_document"] == images
    assert sum(count for *_, count in numbers["length_histogram"]) == 49


def test_the_commands_of_the_tool(tmp_path, monkeypatch, capsys):
    vocabulary = make_vocabulary(tmp_path / "vocabulary", codes=64, sentences=["how many shapes", "two"] * 20)
    question, answer = vocabulary.encode("how many shapes"), vocabulary.encode("two")
    image = vocabulary.image_ids(np.arange(8)).tolist()
    write(tmp_path / "set", [[(IMAGE, image), (TEXT, question), (ANSWER, answer)]] * 6, vocabulary.fingerprint)

    def run(*arguments) -> dict:
        monkeypatch.setattr(sys, "argv", ["dataset.py", *map(str, arguments), "--json", str(tmp_path / "numbers.json")])
        tool.main()
        return json.loads((tmp_path / "numbers.json").read_text())

    made = run("split", tmp_path / "set", "--into", f"{tmp_path}/a=50%", f"{tmp_path}/b=1", f"{tmp_path}/c=rest")
    assert [metadata["documents"] for metadata in made.values()] == [3, 1, 2]
    assert run("merge", tmp_path / "a", tmp_path / "c", "--out", tmp_path / "joined")["documents"] == 5
    assert run("statistics", tmp_path / "joined", tmp_path / "b")["documents"] == 6
    shown = run("inspect", tmp_path / "set", "--documents", "5", "--vocabulary", vocabulary.folder)
    assert [entry.get("text") for entry in shown["5"]] == [None, "how many shapes", "two"]
    assert shown["5"][0]["codes"] == list(range(8))
    assert "given images, 8 tokens: 0 1 2 3 4 5 6 7\n" in capsys.readouterr().out

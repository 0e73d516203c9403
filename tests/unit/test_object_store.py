"""Data sets in object stores: read as those on disk are, by exact ranges; by boto3 from a server where installed."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data import object_store
from megatron_ext.data.format import Dataset, verify
from megatron_ext.data.packed_rows import PackedRows
from megatron_ext.data.writer import DatasetWriter
from megatron_ext.errors import UserError
from support.data_sets import captions, mixture, texts

BUCKET = "s3://bucket/sets"


class FolderClient:
    """Objects that are files of a folder, with a record of what was read."""

    root: Path
    requests: list[tuple[int, int]]

    def _file(self, address: str) -> Path:
        return self.root / address.removeprefix("s3://")

    def size(self, address: str) -> int:
        return self._file(address).stat().st_size

    def read(self, address: str, start: int, stop: int) -> bytes:
        if address.endswith(".bin"):
            self.requests.append((start, stop))
        return self._file(address).read_bytes()[start:stop]

    def download(self, address: str, file: Path) -> None:
        shutil.copy(self._file(address), file)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of the objects of ``BUCKET``."""
    FolderClient.root, FolderClient.requests = tmp_path / "objects", []
    monkeypatch.setitem(object_store._CLIENTS, "s3", (FolderClient, "boto3"))
    monkeypatch.setenv(object_store.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "objects" / "bucket" / "sets"


def rows(prefix: str, count: int) -> np.ndarray:
    return PackedRows(mixture((prefix, "understanding", 1)), 64).packed_tokens(0, count)


def test_rows_are_those_of_the_files(folder):
    captions(folder / "pairs", 40)
    assert np.array_equal(rows(f"{BUCKET}/pairs", 16), rows(str(folder / "pairs"), 16))
    assert verify(f"{BUCKET}/pairs") == verify(folder / "pairs")


def test_requests_have_the_documents_and_little_else(folder, monkeypatch):
    monkeypatch.setattr(object_store, "NEAR", 0)
    captions(folder / "pairs", 40)
    remote = Dataset(f"{BUCKET}/pairs")
    wanted = np.array([31, 4, 5])
    first, stop = remote.document_ends[wanted], remote.document_ends[wanted + 1]
    sequences = np.concatenate([np.arange(a, b) for a, b in zip(first, stop)])
    starts = remote.sequence_pointers[sequences] // 4
    read = list(remote.ranges(starts, starts + remote.sequence_lengths[sequences]))
    local = Dataset(folder / "pairs")
    stored = [ids for document in wanted.tolist() for _, ids in local.document(document)]
    assert all(np.array_equal(a, b) for a, b in zip(read, stored, strict=True))
    assert len(FolderClient.requests) == 2  # documents 4 and 5 lie side by side
    assert sum(stop - start for start, stop in FolderClient.requests) == sum(ids.nbytes for ids in stored)


def test_a_damaged_copy_of_the_index_is_fetched_again(folder, tmp_path):
    texts(folder / "texts", 5)
    Dataset(f"{BUCKET}/texts")
    copy = tmp_path / "cache" / "bucket" / "sets" / "texts.idx"
    assert copy.read_bytes() == (folder / "texts.idx").read_bytes()
    copy.write_bytes(b"damaged")
    assert len(Dataset(f"{BUCKET}/texts")) == 5


def test_what_is_wrong_with_an_object_is_named(folder):
    with pytest.raises(UserError, match=f"^{BUCKET}/none.json: not found$"):
        Dataset(f"{BUCKET}/none")
    texts(folder / "texts", 5)
    file = folder / "texts.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=rf"{BUCKET}/texts\.bin: \d+ bytes, the metadata says \d+"):
        Dataset(f"{BUCKET}/texts")


@pytest.mark.parametrize(
    ("scheme", "module", "package"), [("s3", "boto3", "boto3"), ("msc", "multistorageclient", "multi-storage-client")]
)
def test_a_missing_package_is_named(monkeypatch, scheme, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    object_store._client.cache_clear()
    with pytest.raises(UserError, match=rf"^{scheme}://a/b\.json: needs the package {package} \(pip install"):
        Dataset(f"{scheme}://a/b")


def test_data_sets_are_not_written_to_object_stores():
    with pytest.raises(UserError, match="s3://a/b: data sets are written to disk"):
        DatasetWriter("s3://a/b", "tiny", None, {})


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A client of a server that speaks S3, on this machine."""
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    names |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    names |= {object_store.CACHE_VARIABLE: str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    object_store._client.cache_clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    server.stop()
    object_store._client.cache_clear()


def test_boto3_and_megatron_core_read_the_same_objects(tmp_path, server):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.object_storage_utils import ObjectStorageConfig

    captions(tmp_path / "pairs", 40)
    for kind in ("bin", "idx", "json"):
        server.upload_file(f"{tmp_path / 'pairs'}.{kind}", "bucket", f"sets/pairs.{kind}")
    assert np.array_equal(rows(f"{BUCKET}/pairs", 16), rows(str(tmp_path / "pairs"), 16))
    assert verify(f"{BUCKET}/pairs") == verify(tmp_path / "pairs")
    storage = ObjectStorageConfig(path_to_idx_cache=str(tmp_path / "cache"))
    theirs = IndexedDataset(f"{BUCKET}/pairs", multimodal=True, mmap=False, object_storage_config=storage)
    sequences, _ = theirs[0 : len(theirs)]
    assert np.array_equal(np.concatenate(sequences), Dataset(f"{BUCKET}/pairs").tokens[0 : sum(map(len, sequences))])
    with pytest.raises(UserError, match=f"^{BUCKET}/none.json: not found$"):
        Dataset(f"{BUCKET}/none")

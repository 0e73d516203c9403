"""Data sets in object stores: ``s3://BUCKET/KEY`` (boto3) and ``msc://PROFILE/PATH`` (NVIDIA's multi-storage client).

The addresses and the cache of .idx files, ``CACHE/BUCKET/KEY.idx``, are those of Megatron-Core's ``IndexedDataset``.
That reads a .bin in chunks of 256 MiB, for documents in stored order. Training takes them in random order, so here only
the bytes of the documents are requested, many requests at a time.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

from megatron_ext.errors import UserError

CACHE_VARIABLE = "UNIFIED_DATA_CACHE"
"""Environment variable: the folder of the .idx files, best on a disk of the machine."""

REQUESTS = 32
"""Requests of a process at a time."""

NEAR = 1 << 14
"""Ranges that are at most this many bytes apart are one request: less than what comes in the time of a request."""

LARGEST = 16 << 20
"""Most bytes of a request of several ranges, and of a file that is hashed."""


class _S3:
    """Objects by boto3, which takes credentials, region and ``AWS_ENDPOINT_URL`` from where it always does."""

    def __init__(self):
        import boto3
        from botocore.config import Config

        retries = {"max_attempts": 10, "mode": "standard"}
        self._client = boto3.client("s3", config=Config(max_pool_connections=REQUESTS, retries=retries))

    def size(self, address: str) -> int:
        return self._client.head_object(**self._names(address))["ContentLength"]

    def read(self, address: str, start: int, stop: int) -> bytes:
        return self._client.get_object(**self._names(address), Range=f"bytes={start}-{stop - 1}")["Body"].read()

    def download(self, address: str, file: Path) -> None:
        bucket, key = self._names(address).values()
        self._client.download_file(bucket, key, str(file))

    def _names(self, address: str) -> dict[str, str]:
        bucket, _, key = address.removeprefix("s3://").partition("/")
        return {"Bucket": bucket, "Key": key}


class _MultiStorage:
    """Objects by the multi-storage client, whose configuration names the profiles."""

    def __init__(self):
        import multistorageclient

        self._package = multistorageclient

    def size(self, address: str) -> int:
        return self._package.info(address).content_length

    def read(self, address: str, start: int, stop: int) -> bytes:
        client, path = self._package.resolve_storage_client(address)
        return client.read(path, byte_range=self._package.types.Range(offset=start, size=stop - start))

    def download(self, address: str, file: Path) -> None:
        self._package.download_file(address, str(file))


_CLIENTS = {"s3": (_S3, "boto3"), "msc": (_MultiStorage, "multi-storage-client")}


def is_remote(prefix: str | Path) -> bool:
    """Whether this is an address in an object store instead of a path."""
    return str(prefix).startswith(tuple(f"{scheme}://" for scheme in _CLIENTS))


def read(address: str) -> bytes:
    """A whole object.

    Raises:
        UserError: it is not there, or cannot be read; as for the functions below.
    """
    return _call(address, lambda store: store.read(address, 0, store.size(address)))


def size(address: str) -> int:
    """Bytes of an object."""
    return _call(address, lambda store: store.size(address))


def sha256(address: str) -> str:
    """Hexadecimal, of an object that is read in pieces."""
    digest = hashlib.sha256()
    for start in range(0, total := size(address), LARGEST):
        stop = min(start + LARGEST, total)
        digest.update(_call(address, lambda store, start=start, stop=stop: store.read(address, start, stop)))
    return digest.hexdigest()


def cached(address: str, is_valid: Callable[[Path], bool]) -> Path:
    """The copy of an object in the cache, downloaded unless it is there and valid. The processes of a machine do so one
    after the other."""
    folder = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "unified_megatron")
    file = folder / address.partition("://")[2]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_name(f".{file.name}.lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_valid(file):
                temporary = file.with_name(f".{file.name}.tmp")
                _call(address, lambda store: store.download(address, temporary))
                os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); set {CACHE_VARIABLE}") from None
    return file


class RemoteArray:
    """An object as an array, of which slices and ranges are fetched.

    Attributes:
        itemsize: bytes of an element.
    """

    def __init__(self, address: str, dtype: type):
        self._address, self._dtype = address, np.dtype(dtype)
        self.itemsize = self._dtype.itemsize

    def __getitem__(self, place: slice) -> np.ndarray:
        [values] = self.ranges(np.array([place.start]), np.array([place.stop]))
        return values

    def ranges(self, starts: np.ndarray, stops: np.ndarray) -> Iterator[np.ndarray]:
        """The elements from ``starts`` to ``stops``, int64 [ranges] each, in the given order."""
        starts, stops = starts * self.itemsize, np.maximum(starts, stops) * self.itemsize
        requests = joined_ranges(starts, stops)
        fetched = list(_pool(os.getpid()).map(self._fetch, *zip(*requests)) if requests else ())
        firsts = np.array([start for start, _ in requests], dtype=np.int64)
        places = np.searchsorted(firsts, starts, side="right") - 1
        for start, stop, place in zip(starts.tolist(), stops.tolist(), places.tolist()):
            if start == stop:
                yield np.zeros(0, self._dtype)
            else:
                first = requests[place][0]
                yield np.frombuffer(fetched[place], self._dtype, (stop - start) // self.itemsize, start - first)

    def _fetch(self, start: int, stop: int) -> bytes:
        content = _call(self._address, lambda store: store.read(self._address, start, stop))
        if len(content) != stop - start:
            raise UserError(f"{self._address}: {len(content)} bytes from byte {start} on instead of {stop - start}")
        return content


def joined_ranges(starts: np.ndarray, stops: np.ndarray) -> list[tuple[int, int]]:
    """The requests, ascending, that cover ranges of bytes: near ranges together, up to a size."""
    requests: list[tuple[int, int]] = []
    for i in np.argsort(starts, kind="stable").tolist():
        start, stop = int(starts[i]), int(stops[i])
        if start == stop:
            continue
        if requests and start - requests[-1][1] <= NEAR and stop - requests[-1][0] <= LARGEST:
            requests[-1] = (requests[-1][0], max(stop, requests[-1][1]))
        else:
            requests.append((start, stop))
    return requests


def _call(address: str, action: Callable):
    """``action`` with the client of an address; its errors as one line that names the address."""
    scheme = address.partition("://")[0]
    client, package = _CLIENTS[scheme]
    try:
        return action(_client(client, os.getpid()))
    except UserError:
        raise
    except ModuleNotFoundError:
        raise UserError(f"{address}: needs the package {package} (pip install {package})") from None
    except FileNotFoundError:
        raise UserError(f"{address}: not found") from None
    except Exception as error:  # the clients' own errors have no class in common
        answer = getattr(error, "response", None) or {}
        if answer.get("Error", {}).get("Code") in ("404", "NoSuchKey"):
            raise UserError(f"{address}: not found") from None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{address}: {lines[0]}") from None


@cache
def _client(client: type, process: int):
    """A client for each process: connections do not survive a fork."""
    return client()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(REQUESTS, thread_name_prefix="object-store")

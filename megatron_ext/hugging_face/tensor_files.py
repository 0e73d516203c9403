"""The safetensors of a folder, whole or in shards."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.files import read_json

TYPES = {"BF16", "F16", "F32"}
"""Types of elements that are read."""


class TensorFiles:
    """Tensors by name, of which only what is asked for is read. Files stay open: a model has hundreds of tensors."""

    def __init__(self, folder: Path):
        """
        Raises:
            UserError: names a missing or damaged file.
        """
        self.folder = folder
        self._tensors = {name: (path, opened) for path, opened in self._files() for name in list(opened.keys())}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows of a tensor, or elements of a vector."""
        return self._slice(name)[begin:end]

    def columns(self, name: str, begin: int, end: int) -> Tensor:
        """Columns of a matrix."""
        return self._slice(name)[:, begin:end]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def file(self, name: str) -> Path:
        """The file of a tensor."""
        return self._tensors[name][0]

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> set[str]:
        """Refuse a folder without tensors of these names and shapes. Returns the types of their elements.

        Raises:
            UserError: names the first that is missing or different.
        """
        types = set()
        for name, shape in expected.items():
            if name not in self:
                raise UserError(f"{self.folder}: lacks the parameter {name}")
            types.add(self._slice(name).get_dtype())
            if self.shape(name) != shape:
                raise UserError(
                    f"{self.file(name)}: {name} has the shape {list(self.shape(name))}, by config.json it is "
                    f"{list(shape)}"
                )
        if other := types - TYPES:
            raise UserError(f"{self.folder}: has parameters of the type {min(other)}, must be BF16, F16 or F32")
        return types

    def _slice(self, name: str):
        return self._tensors[name][1].get_slice(name)

    def _files(self) -> Iterator[tuple[Path, object]]:
        """Every file of tensors, opened."""
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.is_file():
            try:
                files = sorted({self.folder / name for name in read_json(index)["weight_map"].values()})
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index}: not an index of safetensors ({error!r})") from None
        elif single.is_file():
            files = [single]
        else:
            raise UserError(
                f"{self.folder}: has neither {single.name} nor {index.name}; convert other formats with "
                "from_pretrained and save_pretrained of transformers"
            )
        for path in files:
            yield path, _opened(path)


def _opened(path: Path):
    """A safetensors file, opened so that slices of single tensors can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}") from None

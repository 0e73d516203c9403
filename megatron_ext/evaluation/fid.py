"""FID: the Frechet distance between Gaussians fitted to a network's features of two sets of images.

The published FID uses the 2048 features of Inception-v3, from a local file; nothing is downloaded.
:class:`ColorAndEdges` needs no weights and is for trying things out. Every result must name its feature extractor:
distances of different extractors cannot be compared, and distances of few images are larger than those of many.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from megatron_ext.command_line import progress
from megatron_ext.errors import UserError

BATCH = 32


class FeatureExtractor(Protocol):
    """Images -> features. ``name`` accompanies every result."""

    name: str

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features [n, d] of uint8 images [n, 3, h, w]."""


class ColorAndEdges:
    """Mean colors and edge strengths in a 4 x 4 grid: 80 features, no weights. Not an Inception distance."""

    name = "built-in color and edge statistics (not Inception: not comparable with any published FID)"
    side, cells = 64, 4

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        pixels = torch.nn.functional.interpolate(
            images.double() / 255, size=(self.side, self.side), mode="bilinear", antialias=True
        )
        gray = pixels.mean(1)
        edges = torch.stack(
            [
                torch.nn.functional.pad(gray.diff(dim=2).abs(), (0, 1)),
                torch.nn.functional.pad(gray.diff(dim=1).abs(), (0, 0, 0, 1)),
            ],
            dim=1,
        )
        # Edges are weak: scaled to the magnitude of the colors.
        maps = torch.cat([pixels, 4 * edges], dim=1)
        return torch.nn.functional.adaptive_avg_pool2d(maps, self.cells).flatten(1)


class Inception:
    """Inception-v3 of 2015-12-05 up to its 2048 pooled features; resizes to 299 pixels itself, as the original does.

    Args:
        weights: ``inception-2015-12-05.pt``, the TorchScript translation of the original graph that StyleGAN's metrics
            and clean-fid use; network and weights in one file.

    Raises:
        UserError: the file is missing or not this network.
    """

    def __init__(self, weights: Path, device: str | torch.device = "cpu"):
        if not weights.is_file():
            raise UserError(
                f"{weights}: no such file; FID needs inception-2015-12-05.pt (TorchScript, as StyleGAN's metrics and "
                "clean-fid use it) there; it is not downloaded"
            )
        try:
            self._network = torch.jit.load(weights, map_location=device).eval()
        except RuntimeError:
            raise UserError(f"{weights}: not a TorchScript file; it must be inception-2015-12-05.pt") from None
        self._device, self._file = torch.device(device), weights
        if "return_features" not in {argument.name for argument in self._network.forward.schema.arguments}:
            raise UserError(f"{weights}: does not give features; it must be inception-2015-12-05.pt")
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        self.name = f"Inception-v3, 2048 features ({weights.name}, SHA-256 {digest[:16]})"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        rows = self._network(images.to(self._device), return_features=True)
        if tuple(rows.shape) != (len(images), 2048):
            raise UserError(f"{self._file}: does not give 2048 features; it must be inception-2015-12-05.pt")
        return rows.cpu()


def feature_extractor(weights: Path | None, device: str | torch.device = "cpu") -> FeatureExtractor:
    """Inception with these weights; without weights, the built-in features.

    Raises:
        UserError: see :class:`Inception`.
    """
    return Inception(weights, device) if weights else ColorAndEdges()


@dataclass(frozen=True)
class Features:
    """Features of image files: ``rows`` float64 [n, d] for ``files`` (the readable ones)."""

    files: list[Path]
    rows: np.ndarray
    unreadable: list[Path]


def features(files: Sequence[Path], extract: FeatureExtractor) -> Features:
    """Features of image files; unreadable ones are left out and listed."""
    readable, rows, unreadable = [], [], []
    for batch_files, images in _batches(files, unreadable):
        readable += batch_files
        rows.append(extract(images).double().numpy())
    return Features(readable, np.concatenate(rows) if rows else np.zeros((0, 0)), unreadable)


def read_picture(file: Path) -> Image.Image | None:
    """An image file as RGB; None if it cannot be read."""
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, [n, d] and [m, d].

    Raises:
        UserError: a set has fewer than two members.
    """
    if min(len(a), len(b)) < 2:
        raise UserError(f"a Frechet distance needs two images or more on both sides, not {len(a)} and {len(b)}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    difference = a.mean(0) - b.mean(0)
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)), which is symmetric: real and stable also where A or B is singular.
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(max(difference @ difference + np.trace(first) + np.trace(second) - 2 * cross, 0.0))


def _batches(files: Sequence[Path], unreadable: list[Path]) -> Iterator[tuple[list[Path], torch.Tensor]]:
    """Batches of consecutive readable images of one size."""
    names: list[Path] = []
    images: list[np.ndarray] = []
    for file in progress(files, desc="features", unit="image"):
        picture = read_picture(file)
        if picture is None:
            unreadable.append(file)
            continue
        pixels = np.asarray(picture)
        if images and (pixels.shape != images[0].shape or len(images) == BATCH):
            yield names, _tensor(images)
            names, images = [], []
        names.append(file)
        images.append(pixels)
    if images:
        yield names, _tensor(images)


def _tensor(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

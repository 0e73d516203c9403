"""Settings of the two trainings: of a VQ network (:mod:`.training`), of a patch dictionary."""

import math
from dataclasses import asdict, dataclass

from megatron_ext.data.vq_metadata import MAX_CODEBOOK
from megatron_ext.errors import UserError


class _Settings:
    depth: int

    def settings(self) -> dict:
        """The settings as JSON; without the depth if it is one, as they were before there was another."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("depth", 1)}

    def _check_codes(self, codebook_size: int) -> None:
        if codebook_size < 1:
            raise UserError(f"codebook size {codebook_size}: must be at least 1")
        if not 1 <= self.depth <= codebook_size:
            raise UserError(f"depth {self.depth}: must be from 1 to the codebook size {codebook_size}")
        if self.depth > 1 and codebook_size > MAX_CODEBOOK:
            raise UserError(f"codebook size {codebook_size}: with depth {self.depth} at most {MAX_CODEBOOK}")


@dataclass
class VQTrainingConfig(_Settings):
    """The shape of a small tokenizer and its training.

    Attributes:
        image_size, grid: pixels and codes along a side.
        patch: pixels along a side of the network's input patches; larger is faster and coarser.
        local: the encoder sees only the patch of a code (and the norms' statistics of the image), so codes describe
            what is in a patch, not what surrounds it. Needs a network without halvings. For images of many different
            patches: on images of a few flat colors the norms remove too much.
        channels: of the convolutions at the finest level; doubled once, at the first halving. At least 64: the norms
            have 32 groups, and with one channel per group they would remove the colors.
        depth: codes of a position. With more than one they are residual, and latents are no unit vectors.
        warmup: fraction of the steps before the codebook starts.
        commitment: weight of the distance between a latent and its code.
    """

    image_size: int = 64
    grid: int = 8
    patch: int = 4
    codebook_size: int = 512
    embed_dim: int = 8
    channels: int = 64
    steps: int = 2000
    batch_size: int = 16
    lr: float = 2e-3
    local: bool = False
    warmup: float = 0.3
    commitment: float = 0.25
    codebook_decay: float = 0.97
    held_out: int = 128
    seed: int = 1234
    depth: int = 1

    def __post_init__(self):
        self._check_codes(self.codebook_size)
        halvings = math.log2(self.image_size / self.patch / self.grid) if self.image_size % self.patch == 0 else 0.5
        if halvings < 0 or halvings % 1:
            raise UserError(
                f"image size {self.image_size}, patch {self.patch}, grid {self.grid}: image size / patch / grid "
                "must be a power of two"
            )
        if self.channels % 32 or self.channels < 64:
            raise UserError(f"channels {self.channels}: must be a multiple of 32 (the groups of the norms), 64 or more")
        if self.local and halvings:
            raise UserError(f"local: image size / patch / grid must be 1, it is {2**halvings:g}")
        self.multipliers = [1] + [2] * int(halvings)


@dataclass
class DictionaryConfig(_Settings):
    """The shape of a patch dictionary.

    Attributes:
        image_size, grid: pixels and codes along a side; a patch has image_size / grid pixels along a side.
        codebook_size: most codes.
        held_out: images held out to measure the quality.
        seed: of the start of k-means.
        depth: codes of a position, residual if there are several.
    """

    image_size: int = 64
    grid: int = 8
    codebook_size: int = 512
    held_out: int = 128
    seed: int = 1234
    depth: int = 1

    def __post_init__(self):
        self._check_codes(self.codebook_size)
        if self.grid < 1 or self.image_size % self.grid:
            raise UserError(f"image size {self.image_size}, grid {self.grid}: image size must be a multiple of grid")

    @property
    def patch_size(self) -> int:
        """Pixels along a side of a patch."""
        return self.image_size // self.grid

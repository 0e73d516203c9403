"""Image files for the tests of preprocessing."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.vocabularies import WORDS


def picture(seed: int, height: int = 24, width: int = 30) -> Image.Image:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(seed: int, kind: str = "PNG", **size) -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    picture(seed, **size).save(buffer, kind)
    return buffer.getvalue()


def write_tar(file: Path, members: dict[str, bytes | str | dict]) -> Path:
    """A tar with these members in this order; a dict is stored as JSON."""
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            if isinstance(content, dict):
                content = json.dumps(content)
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def caption_tar(file: Path, count: int, first: int = 0) -> Path:
    """A WebDataset tar of captioned pictures."""
    members = {}
    for i in range(first, first + count):
        members[f"{i:04d}.jpg"] = encoded(i, "JPEG")
        members[f"{i:04d}.txt"] = f"a {WORDS[i % 6]} picture"
    return write_tar(file, members)


def two_colored_pictures(count: int) -> torch.Tensor:
    """Halves of flat colors: easy to code, but no constant picture comes close to them."""
    random = torch.Generator().manual_seed(0)
    palette = torch.tensor([[220, 30, 30], [30, 60, 220], [250, 220, 40], [20, 20, 30]], dtype=torch.uint8)
    colors = palette[torch.randint(4, (count, 2), generator=random)]
    pictures = colors[:, :1].repeat_interleave(256, 1).view(count, 16, 16, 3).permute(0, 3, 1, 2).clone()
    pictures[:, :, :, 8:] = colors[:, 1, :, None, None]
    return pictures.contiguous()

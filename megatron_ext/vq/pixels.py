"""Images as tokenizers see them, floats in [-1, 1], and as files hold them, bytes."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


def from_bytes(pixels: Tensor) -> Tensor:
    """uint8 of any shape as floats in [-1, 1]."""
    return pixels / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [-1, 1] of any shape as uint8; what lies outside is clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_picture(image: Tensor) -> "Image.Image":
    """An image [3, H, W] in [-1, 1] as a Pillow image."""
    from PIL import Image

    return Image.fromarray(to_bytes(image).permute(1, 2, 0).cpu().numpy())

"""The folder of a trained tokenizer: weights and config.json, its quality on held-out images, reconstructions.png."""

import os
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.files import write_json
from megatron_ext.vq.codebook import residual_codes
from megatron_ext.vq.loading import load
from megatron_ext.vq.model import VQModel
from megatron_ext.vq.pixels import from_bytes, to_bytes

BATCH_SIZE = 32
"""Held-out images that are encoded or decoded at once."""

LEAST_ERROR = 1e-3
"""Least mean square error (of bytes) in the PSNR; a lossless reconstruction has 78 dB."""


def split_held_out(images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images, held out for :func:`evaluate`, and the others, to train on.

    Raises:
        UserError: no image is left to train on.
    """
    if len(images) <= count:
        raise UserError(f"{len(images)} images are too few: {count} are held out for evaluation")
    return images[:count], images[count:]


def publish(out: Path, weights: dict[str, Tensor], config: dict) -> None:
    """Write the tokenizer to ``out``; config.json, without which it does not load, comes last."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)
    temporary = out / ".model.safetensors.tmp"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary, metadata={"format": "pt"})
    os.replace(temporary, out / "model.safetensors")
    write_json(out / "config.json", config)


def evaluate(out: Path, held_out: Tensor, facts: dict) -> dict:
    """Measure the tokenizer in ``out`` on held-out images uint8 [n, 3, s, s].

    Args:
        facts: what else OUT/training.json tells.

    Returns:
        The contents of OUT/training.json, which is written last: held-out PSNR (dB), codebook size, use and perplexity,
        the fingerprint and ``facts``. With several codes a position also, for the first 1, 2, ... of them, the PSNR,
        and for each the share of codes in use and the share that distances in bfloat16 would choose as well.
    """
    vq = load(out)
    codes, reconstructed = reconstruct(vq, held_out)
    numbers = {
        **quality(held_out, reconstructed, codes, vq.codebook_size),
        **(_quality_by_depth(vq, held_out, codes) if vq.depth > 1 else {}),
        "codebook_size": vq.codebook_size,
        "fingerprint": vq.fingerprint,
        **facts,
    }
    _save_reconstructions(held_out[:16], reconstructed[:16], out / "reconstructions.png")
    write_json(out / "training.json", numbers)
    return numbers


def _quality_by_depth(vq: VQModel, images: Tensor, codes: Tensor) -> dict:
    depths = range(1, vq.depth + 1)
    decoded = [
        torch.cat([to_bytes(vq.decode_first(batch, count)).cpu() for batch in codes.split(BATCH_SIZE)])
        for count in depths
    ]
    by_depth = codes.view(-1, vq.depth)
    qualities = [
        quality(images, pictures, by_depth[:, depth - 1], vq.codebook_size) for depth, pictures in zip(depths, decoded)
    ]
    latents = torch.cat([vq.latents(from_bytes(batch)).bfloat16() for batch in images.split(BATCH_SIZE)])
    rounded = residual_codes(latents, vq.vectors.bfloat16(), vq.depth)
    return {
        "psnr_by_depth": [figures["psnr"] for figures in qualities],
        "codebook_use_by_depth": [figures["codebook_use"] for figures in qualities],
        "bfloat16_agreement_by_depth": (rounded == by_depth).double().mean(0).tolist(),
    }


def reconstruct(vq: VQModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n, h*w*D] of images uint8 [n, 3, s, s], and the images decoded from them, uint8."""
    codes = torch.cat([vq.encode(from_bytes(batch)) for batch in images.split(BATCH_SIZE)])
    decoded = torch.cat([vq.decode(batch) for batch in codes.split(BATCH_SIZE)])
    return codes, to_bytes(decoded).cpu()


def quality(originals: Tensor, reconstructed: Tensor, codes: Tensor, codebook_size: int) -> dict:
    """Peak signal-to-noise ratio (dB, mean over images), share of codes in use, and their perplexity."""
    error = (originals.float() - reconstructed.float()).square().mean((1, 2, 3)).clamp(min=LEAST_ERROR)
    share = torch.bincount(codes.flatten().cpu(), minlength=codebook_size).double() / codes.numel()
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return {
        "psnr": float((10 * torch.log10(255**2 / error)).mean()),
        "codebook_use": float((share > 0).double().mean()),
        "codebook_perplexity": float(entropy.exp()),
    }


def _save_reconstructions(originals: Tensor, reconstructed: Tensor, file: Path) -> None:
    """Save a PNG of images uint8 [n, 3, s, s] beside their reconstructions, four pairs per row."""
    pairs = torch.cat([originals, reconstructed], dim=3)
    rows = [torch.cat(list(row), dim=2) for row in pairs.split(4) if len(row) == 4]
    sheet = torch.cat(rows, dim=1).permute(1, 2, 0).contiguous()
    Image.fromarray(sheet.numpy()).save(file)

"""A tiny VQ tokenizer, a vocabulary, and image files for the tests of preprocessing."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import transformers
from PIL import Image

from megatron_ext.vocabulary import Vocabulary

CODES, PIXELS, GRID = 32, 16, 4
WORDS = (
    "a",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "what",
    "colour",
    "is",
    "this",
    "picture",
    "left",
    "right",
    "two",
    "one",
)


def make_vq(folder: Path) -> Path:
    """A random VQ tokenizer of 16 x 16 pixels and 4 x 4 codes whose codes are not all alike."""
    torch.manual_seed(0)
    config = transformers.JanusVQVAEConfig(
        embed_dim=4,
        num_embeddings=CODES,
        latent_channels=4,
        num_patches=GRID,
        base_channels=32,
        channel_multiplier=[1, 1, 1],
        num_res_blocks=0,
    )
    network = transformers.JanusVQVAE(config)
    # The random network maps all pictures close together; spread the codebook there.
    torch.nn.init.normal_(network.quantize.embedding.weight)
    network.save_pretrained(folder)
    return folder


def make_vocabulary(folder: Path, codes: int = CODES) -> Vocabulary:
    """LLaMA's conventions, few pieces."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(random.choice(WORDS, 8)) for _ in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "made"), vocab_size=60, minloglevel=2, hard_vocab_limit=False
    )
    return Vocabulary.create(folder, folder / "made.model", codes)


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
    """A tar with these members in order; a dict is stored as JSON."""
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

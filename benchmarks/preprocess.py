"""Speed of preprocessing: images per second from image files to a data set, and of the encoder alone.

Whole: reading a tar, decoding, resizing, encoding, tokenising, writing, joining. Alone: the same VQ model in a loop
over the same pictures, decoded beforehand. The rounds alternate, so that a busy machine slows both alike; the ratio
is the median of the rounds' ratios. The VQ model is small and has random weights; the pictures are random. Without a
GPU both need the same cores, so the ratio shows how much of them decoding takes beside a small encoder.
"""

import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image

from megatron_ext import vq as vq_package
from megatron_ext.command_line import parser, progress, run
from megatron_ext.files import write_json
from megatron_ext.preprocess import PreprocessOptions, preprocess
from megatron_ext.vocabulary import Vocabulary
from megatron_ext.vq import VQModel
from megatron_ext.vq.image_decoder import CROP, PillowDecoder
from megatron_ext.vq.training_config import VQTrainingConfig

WORDS = (
    "red",
    "green",
    "blue",
    "white",
    "circle",
    "square",
    "triangle",
    "left",
    "right",
    "above",
    "below",
    "two",
)


def main() -> None:
    arguments = parser(__doc__, "python benchmarks/preprocess.py --images 4000 --json preprocess.json")
    arguments.add_argument("--images", type=int, default=1536, help="pictures, half JPEG and half PNG (default 1536)")
    arguments.add_argument("--pixels", type=int, default=64, help="shorter side of the files (default 64)")
    arguments.add_argument("--batch-size", type=int, default=64, help="images encoded at once (default 64)")
    arguments.add_argument("--rounds", type=int, default=5, help="rounds of each (default 5)")
    arguments.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that decode")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(Path(folder), options)
    print(
        f"{options.images} files of {options.pixels} pixels, batches of {options.batch_size}, {numbers['device']}\n"
        f"encoder alone       {numbers['encoder_images_per_second']:9.1f} images/s\n"
        f"whole preprocessing {numbers['preprocess_images_per_second']:9.1f} images/s\n"
        f"whole / alone       {numbers['ratio']:9.2f}"
    )
    if options.json:
        write_json(options.json, numbers)


def measure(folder: Path, options) -> dict:
    """Images per second of both, and their ratio."""
    vocabulary, tokenizer = _vocabulary(folder / "vocabulary"), _tokenizer(folder / "vq")
    files = _pictures(options.images, options.pixels)
    tar = _tar(folder / "pictures.tar", files)
    decoder = PillowDecoder(tokenizer.image_size, CROP, options.workers)
    decoded = torch.stack(decoder(files)).permute(0, 3, 1, 2).float() / 127.5 - 1
    decoder.close()
    batches = [batch.to(_device()) for batch in decoded.split(options.batch_size)]
    seconds = {"alone": [], "whole": []}
    for i in progress(range(options.rounds + 1), desc="rounds"):
        alone = _timed(lambda: _alone(tokenizer, batches))
        prepared = PreprocessOptions([tar], folder / f"set{i}", batch_size=options.batch_size, workers=options.workers)
        whole = _timed(lambda prepared=prepared: preprocess(prepared, vocabulary, tokenizer))
        if i:  # the first round imports libraries and warms caches
            seconds["alone"].append(alone)
            seconds["whole"].append(whole)
    speeds = {name: options.images / statistics.median(times) for name, times in seconds.items()}
    return {
        "encoder_images_per_second": speeds["alone"],
        "preprocess_images_per_second": speeds["whole"],
        "ratio": statistics.median(alone / whole for alone, whole in zip(seconds["alone"], seconds["whole"])),
        "seconds": seconds,
        "device": _device(),
    }


@torch.inference_mode()
def _alone(tokenizer: VQModel, batches: list[torch.Tensor]) -> None:
    torch.cat([tokenizer.encode(batch) for batch in batches]).cpu()


def _timed(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _tokenizer(folder: Path) -> VQModel:
    """A random tokenizer of the size that tools/train_vq.py trains by default."""
    import transformers

    size = VQTrainingConfig()
    channels = 3 * size.patch**2
    torch.manual_seed(0)
    transformers.JanusVQVAE(
        transformers.JanusVQVAEConfig(
            in_channels=channels,
            out_channels=channels,
            embed_dim=size.embed_dim,
            num_embeddings=size.codebook_size,
            latent_channels=size.channels * size.multipliers[-1],
            base_channels=size.channels,
            channel_multiplier=size.multipliers,
            num_res_blocks=1,
            num_patches=size.grid,
        )
    ).save_pretrained(folder)
    return vq_package.load(folder, _device(), torch.bfloat16 if _device() == "cuda" else torch.float32)


def _vocabulary(folder: Path) -> Vocabulary:
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 50),
        model_prefix=str(folder / "text"),
        vocab_size=80,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return Vocabulary.create(folder, folder / "text.model", VQTrainingConfig().codebook_size)


def _pictures(count: int, pixels: int) -> list[bytes]:
    """Encoded files of smooth random pictures of several shapes."""
    random = np.random.default_rng(0)
    files = []
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
        width = int(pixels * random.uniform(1, 1.5))
        buffer = io.BytesIO()
        coarse.resize((width, pixels), Image.Resampling.BICUBIC).save(buffer, "JPEG" if i % 2 else "PNG")
        files.append(buffer.getvalue())
    return files


def _tar(file: Path, files: list[bytes]) -> Path:
    random = np.random.default_rng(1)
    with tarfile.open(file, "w") as archive:
        for i, content in enumerate(files):
            turns = [
                {"from": "human", "value": "<image>\nwhat"},
                {"from": "gpt", "value": " ".join(random.choice(WORDS, 12))},
            ]
            members = {"jpg" if i % 2 else "png": content, "json": json.dumps({"conversations": turns}).encode()}
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return file


if __name__ == "__main__":
    run(main)

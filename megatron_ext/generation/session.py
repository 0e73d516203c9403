"""A trained model and its VQ tokenizer at work for a person: captions in, pictures out; questions in, answers out."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from PIL import Image
from torch import Tensor

from megatron_ext import command_line, distributed
from megatron_ext import vq as vq_package
from megatron_ext.errors import UserError
from megatron_ext.generation import prompts
from megatron_ext.generation.checkpoint import Trained
from megatron_ext.generation.generator import Generator, Request
from megatron_ext.generation.sampling import Sampling
from megatron_ext.vq.image_decoder import CROP, PillowDecoder

SHEET = "sheet.png"
SHEET_COLUMNS = 4


class Session:
    """Everything that ``tools/generate.py``, ``tools/evaluate.py`` and evaluations during training need."""

    def __init__(self, trained: Trained, vq: Path, batch_size: int, say: Callable[[str], None] = distributed.report):
        """
        Args:
            trained: a checkpoint's (:func:`~megatron_ext.generation.checkpoint.load`) or one that is being trained.
                It must be in evaluation mode whenever something is asked of it.
            vq: folder of the VQ tokenizer.
            batch_size: documents that are decoded together.
            say: is given every line for the person, on every rank.

        Raises:
            UserError: there is no such VQ tokenizer, or it does not fit the vocabulary.
        """
        self.trained, self._say = trained, say
        device = next(trained.model.parameters()).device
        self.vq = vq_package.load(vq, device)
        words = self.trained.vocabulary
        if self.vq.codebook_size != words.codebook_size:
            raise UserError(
                f"{vq}: has {self.vq.codebook_size} codes, the vocabulary in {words.folder} {words.codebook_size}"
            )
        self.generator = Generator(self.trained.model, self.trained.plan, words, self.vq.grid)
        self.batch_size = batch_size

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return dist.get_rank() == 0

    def encode(self, image: Path) -> list[int]:
        """The VQ codes of a picture, cut to the tokenizer's shape from its middle.

        Raises:
            UserError: it cannot be read.
        """
        try:
            file = image.read_bytes()
        except OSError as error:
            raise UserError(f"{image}: {error.strerror}") from None
        decoder = PillowDecoder(self.vq.image_size, CROP, 1)
        (pixels,) = decoder([file])
        decoder.close()
        if isinstance(pixels, str):
            raise UserError(f"{image}: {pixels}")
        return self.vq.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1)[0].tolist()

    def draw(self, captions: Sequence[str], out: Path, settings: dict, first: int = 0) -> list[dict]:
        """A PNG for each caption and a sheet of all of them in ``out``. Collective.

        Returns:
            For each picture its file, caption and codes; the files are there once this returns.
        """
        words = self.trained.vocabulary
        requests = [prompts.picture(words, caption, first + i) for i, caption in enumerate(captions)]
        made = self._continue(requests, Sampling(**settings), "pictures")
        codes = self.codes(made)
        files = [out / f"{number:04d}.png" for number in range(first, first + len(captions))]
        distributed.from_rank_zero(lambda: self._save(codes, files, out / SHEET))
        for file, caption in zip(files, captions):
            self._say(f"{file}: {caption}")
        if len(files) > 1:
            self._say(str(out / SHEET))
        return [{"file": str(f), "caption": caption, "codes": c} for f, caption, c in zip(files, captions, codes)]

    def codes(self, made: Sequence[Sequence[int]]) -> list[list[int]]:
        """The VQ codes in continuations."""
        words = self.trained.vocabulary
        return [[words.codes(token) for token in tokens if words.is_image(token)] for tokens in made]

    def pictures(self, codes: Sequence[Sequence[int]]) -> list[Image.Image]:
        """The pictures that VQ codes, h*w each, stand for."""
        return [_picture(image) for image in self.vq.decode(torch.tensor(codes)).cpu()]

    def ask(self, image: Path, questions: Sequence[str], max_new_tokens: int, settings: dict) -> list[dict]:
        """An answer to each question about a picture."""
        words, codes = self.trained.vocabulary, self.encode(image)
        requests = [prompts.answer(words, codes, question, max_new_tokens, i) for i, question in enumerate(questions)]
        answers = [words.decode(tokens) for tokens in self._continue(requests, Sampling(**settings), "answers")]
        for question, answer in zip(questions, answers):
            self._say(f"{question} {answer}")
        return [{"image": str(image), "question": q, "answer": a} for q, a in zip(questions, answers)]

    def line(self, what: str) -> str:
        """A line from the person, the same on every rank; empty at the end of input."""
        given = [""]
        if self.first:
            try:
                given = [input(f"{what}: ").strip()]
            except EOFError:
                print()
        dist.broadcast_object_list(given, src=0)
        return given[0]

    def close(self) -> None:
        """Leave the process group."""
        distributed.shut_down()

    def _continue(self, requests: list[Request], sampling: Sampling, what: str) -> list[list[int]]:
        """What follows each request, the same on every rank; each replica makes every n-th."""
        replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        mine = requests[replica::replicas]
        groups = [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
        memory = max((self.generator.memory(group, sampling) for group in groups), default=0)
        self._say(f"{len(requests)} {what}; cache of keys and values: {memory / 2**20:.1f} MiB on each device")
        made = []
        with command_line.progress(desc=what, unit=" tokens") as bar:
            for group in groups:
                made += self.generator(group, sampling, bar.update)
        shares: list = [None] * replicas
        dist.all_gather_object(shares, made, parallel_state.get_data_parallel_group())
        return [shares[i % replicas][i // replicas] for i in range(len(requests))]

    def _save(self, codes: list[list[int]], files: Sequence[Path], sheet: Path) -> None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        pictures = self.pictures(codes)
        for file, picture in zip(files, pictures):
            picture.save(file)
        if len(pictures) > 1:
            _sheet(pictures).save(sheet)


def _picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1]"""
    return Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def _sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """All pictures in rows, a few pixels apart."""
    width, height, gap = *pictures[0].size, 4
    columns = min(SHEET_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet

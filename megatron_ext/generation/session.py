"""A trained model with its VQ tokenizer: pictures from captions, and answers to questions about pictures."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from PIL import Image

from megatron_ext import command_line, distributed
from megatron_ext import vq as vq_package
from megatron_ext.chat_template import UnusableConversation
from megatron_ext.errors import UserError
from megatron_ext.generation import prompts
from megatron_ext.generation.checkpoint import TrainedModel
from megatron_ext.generation.generator import Generator
from megatron_ext.generation.pipelined_model import PipelinedModel
from megatron_ext.generation.request import Request
from megatron_ext.generation.sampling import Sampling
from megatron_ext.vq.image_decoder import PillowDecoder
from megatron_ext.vq.pixels import from_bytes, to_picture

SHEET = "sheet.png"
GIVEN = "given.png"
"""The picture to edit, as the VQ tokenizer reconstructs it."""
SHEET_COLUMNS = 4


class Session:
    """Generation for ``tools/generate.py``, ``tools/evaluate.py`` and evaluations during training."""

    def __init__(
        self,
        trained: TrainedModel,
        vq: Path,
        batch_size: int,
        report: Callable[[str], None] = distributed.report,
    ):
        """
        Args:
            trained: of a checkpoint (:func:`~megatron_ext.generation.checkpoint.load`), or a model that is being
                trained, which must be in evaluation mode during every call.
            vq: folder of the VQ tokenizer.
            batch_size: documents that are decoded together.
            report: called with every line for the user, on every rank.

        Raises:
            UserError: there is no such VQ tokenizer, or it does not fit the vocabulary.
        """
        self.trained, self._report = trained, report
        device = next(trained.chunks[0].parameters()).device
        self.vq = vq_package.load(vq, device)
        vocabulary = trained.vocabulary
        if self.vq.codebook_size != vocabulary.codebook_size:
            raise UserError(
                f"{vq}: has {self.vq.codebook_size} codes, the vocabulary in {vocabulary.folder} "
                f"{vocabulary.codebook_size}"
            )
        image_codes = trained.config.model.image_codes
        if self.vq.depth != image_codes.depth:
            raise UserError(
                f"{vq}: makes {self.vq.depth} codes of an image token, the model (model.image_codes.depth) has "
                f"{image_codes.depth}"
            )
        if image_codes.fingerprint not in (None, self.vq.fingerprint):
            raise UserError(
                f"{vq}: its fingerprint is {self.vq.fingerprint}, the model was trained with the codes of "
                f"{image_codes.fingerprint} (model.image_codes.fingerprint)"
            )
        self.generator = Generator(PipelinedModel(trained.chunks), trained.plan, vocabulary, self.vq.grid)
        self.batch_size = batch_size

    @property
    def is_reporting_rank(self) -> bool:
        """Whether this process writes files."""
        return dist.get_rank() == 0

    def encode(self, image: Path) -> list[int]:
        """The VQ codes of a picture, prepared as those that the tokenizer is asked about; those of an image token side
        by side. Collective over the replica: one of its ranks reads the picture, so that all ask the same.

        Raises:
            UserError: it cannot be read; on all ranks.
        """
        return distributed.from_replica_source(lambda: self._encode(image))

    def _encode(self, image: Path) -> list[int]:
        try:
            file = image.read_bytes()
        except OSError as error:
            raise UserError(f"{image}: {error.strerror}") from None
        decoder = PillowDecoder(self.vq.image_size, self.vq.preparation.understanding, 1, self.vq.preparation)
        (pixels,) = decoder([file])
        decoder.close()
        if isinstance(pixels, str):
            raise UserError(f"{image}: {pixels}")
        return self.vq.encode(from_bytes(pixels.permute(2, 0, 1)[None]))[0].tolist()

    def generate_pictures(
        self, captions: Sequence[str], out: Path, settings: dict, first_number: int = 0
    ) -> list[dict]:
        """Write a PNG for each caption, and a sheet of all of them, to ``out``. Collective. A caption that the chat
        template cannot write is named on standard error and left out.

        Returns:
            For each picture its file, caption and codes; the files exist on return.
        """
        vocabulary = self.trained.vocabulary
        captions, requests = self._requests(
            captions, lambda text, i: prompts.picture(vocabulary, text, first_number + i)
        )
        if not requests:
            return []
        codes = self.codes(self._generate(requests, Sampling(**settings), "pictures"))
        files = [out / f"{request.number:04d}.png" for request in requests]
        distributed.from_rank_zero(lambda: self._save(codes, files, out / SHEET))
        for file, caption in zip(files, captions):
            self._report(f"{file}: {caption}")
        if len(files) > 1:
            self._report(str(out / SHEET))
        return [{"file": str(f), "caption": caption, "codes": c} for f, caption, c in zip(files, captions, codes)]

    def edit(
        self, image: Path, instructions: Sequence[str], out: Path, settings: dict, earlier: Sequence[dict] = ()
    ) -> list[dict]:
        """Edit a picture by instructions, each of which applies to the picture drawn last; writes a PNG for each, and a
        sheet of all with the given one, to ``out``. Collective.

        Args:
            earlier: what the call for earlier instructions returned, to continue from there.

        Returns:
            Like ``earlier``, and for each instruction its file, instruction and codes; the files exist on return.
        """
        results, given = list(earlier), self.encode(image)
        for instruction in instructions:
            number = len(results)
            pictures = [given, *(result["codes"] for result in results)]
            texts = [*(result["instruction"] for result in results), instruction]
            request = prompts.edit(self.trained.vocabulary, pictures, texts, number)
            (codes,) = self.codes(self._generate([request], Sampling(**settings), "pictures"))
            results.append({"file": str(out / f"{number:04d}.png"), "instruction": instruction, "codes": codes})
            self._report(f"{results[-1]['file']}: {instruction}")
        drawn = [given, *(result["codes"] for result in results)]
        files = [out / GIVEN, *(Path(result["file"]) for result in results)]
        distributed.from_rank_zero(lambda: self._save(drawn, files, out / SHEET))
        self._report(f"{out / SHEET}: all, after the given picture")
        return results

    def codes(self, continuations: Sequence[Sequence[int]]) -> list[list[int]]:
        """The VQ codes in continuations."""
        vocabulary = self.trained.vocabulary
        return [[vocabulary.codes(t) for t in tokens if vocabulary.is_image(t)] for tokens in continuations]

    def pictures(self, codes: Sequence[Sequence[int]]) -> list[Image.Image]:
        """The pictures of VQ codes, h*w times the codes of an image token each."""
        return [to_picture(image) for image in self.vq.decode(torch.tensor(codes)).cpu()]

    def ask(self, image: Path, questions: Sequence[str], max_new_tokens: int, settings: dict) -> list[dict]:
        """Answer each question about a picture. Collective. A question that the chat template cannot write is named on
        standard error and left out."""
        vocabulary, codes = self.trained.vocabulary, self.encode(image)
        questions, requests = self._requests(
            questions, lambda text, i: prompts.answer(vocabulary, codes, text, max_new_tokens, i)
        )
        continuations = self._generate(requests, Sampling(**settings), "answers")
        answers = [vocabulary.decode_answer(tokens) for tokens in continuations]
        for question, answer in zip(questions, answers):
            self._report(f"{question} {answer}")
        return [{"image": str(image), "question": q, "answer": a} for q, a in zip(questions, answers)]

    def read_line(self, prompt: str) -> str:
        """A line of standard input, the same on every rank; empty at the end of input."""
        line = [""]
        if self.is_reporting_rank:
            try:
                line = [input(f"{prompt}: ").strip()]
            except EOFError:
                print()
        dist.broadcast_object_list(line, src=0)
        return line[0]

    def close(self) -> None:
        """Leave the process group."""
        distributed.shut_down()

    def _requests(
        self, texts: Sequence[str], request: Callable[[str, int], Request]
    ) -> tuple[list[str], list[Request]]:
        """The texts that the chat template can write, and what the model is asked for each.

        Args:
            request: called with a text and the number of those before it that can be written.
        """
        written, requests = [], []
        for text in texts:
            try:
                requests.append(request(text, len(requests)))
                written.append(text)
            except UnusableConversation as error:
                if self.is_reporting_rank:
                    print(f"{error}; left out: {text}", file=sys.stderr)
        return written, requests

    def _generate(self, requests: list[Request], sampling: Sampling, kind: str) -> list[list[int]]:
        """The continuation of each request, the same on every rank; each of n replicas generates every n-th."""
        replica, replicas = distributed.decoding_replica()
        share = requests[replica::replicas]
        batches = [share[i : i + self.batch_size] for i in range(0, len(share), self.batch_size)]
        memory = max((self.generator.memory(batch, sampling) for batch in batches), default=0)
        most = torch.tensor(memory, device=self.generator.model.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)  # pipeline stages have different layers
        cache = f"up to {most.item() / 2**20:.1f} MiB on each device"
        self._report(f"{len(requests)} {kind}; cache of keys and values: {cache}")
        continuations = []
        with command_line.progress(desc=kind, unit=" tokens") as bar:
            for batch in batches:
                continuations += self.generator(batch, sampling, bar.update)
        shares: list = [None] * replicas
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_gather_object(shares, continuations, group)
        return [shares[i % replicas][i // replicas] for i in range(len(requests))]

    def _save(self, codes: list[list[int]], files: Sequence[Path], sheet: Path) -> None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        pictures = self.pictures(codes)
        for file, picture in zip(files, pictures):
            picture.save(file)
        if len(pictures) > 1:
            _sheet(pictures).save(sheet)


def _sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """All pictures in rows, a few pixels apart."""
    width, height, gap = *pictures[0].size, 4
    columns = min(SHEET_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet

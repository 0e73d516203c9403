"""VILA-U (arXiv 2409.04429): its published folder as a vocabulary, a checkpoint and a shape to start from."""

import re
from collections import Counter
from pathlib import Path

import torch

from megatron_ext import text_model, vq
from megatron_ext.config import Config
from megatron_ext.conversion.published_model import convert, require_no_checkpoints
from megatron_ext.errors import UserError
from megatron_ext.hugging_face.vila_u import IMAGE_TOKENS, VilaUFolder
from megatron_ext.templates import Templates
from megatron_ext.transformer.config_checks import validate_image_codes
from megatron_ext.vocabulary import Vocabulary

_MODULES = re.compile(r".*?\.(text_model|vision_model\.(encoder\.layers\.\d+|\w+))")
CHAT_TEMPLATE = Path(__file__).with_name("vicuna_v1.jinja")
TEMPLATES = {"captions": "conversation", "before_image": " ", "after_image": "\n", "text_after_image": "continued"}


def create_vocabulary(folder: Path, text_file: Path, codebook_size: int, given_images: str = "marked") -> Vocabulary:
    """The vocabulary of a VILA-U: Llama 2's tokens, and documents in the form of VILA-U's training.

    Args:
        text_file: Llama 2's ``tokenizer.model``.
        given_images: as :attr:`~megatron_ext.templates.Templates.given_images`; VILA-U's own inference has them bare.

    Raises:
        UserError: as :meth:`~megatron_ext.vocabulary.Vocabulary.create`.
    """
    return Vocabulary.create(
        folder,
        text_file,
        codebook_size,
        answer_end="</s>",
        chat_template=CHAT_TEMPLATE.read_text(),
        templates=Templates(given_images=given_images, **TEMPLATES),
    )


def convert_vila_u(folder: Path, out: Path, seed: int = 1234) -> dict:
    """Write a published VILA-U as ``out``/vocabulary, ``out``/iter_0000000 and ``out``/model.yaml; its vision tower
    stays where it is. Memory is that of :func:`~megatron_ext.conversion.published_model.convert_published`.

    Returns:
        As :func:`~megatron_ext.conversion.published_model.convert_published`, with the "vocabulary", the "vq" folder,
        "left_out", the rows and tensors by name that are not used, and the number of "tensors" that are, by folder.

    Raises:
        UserError: names the file and the key, tensor or token that does not fit.
    """
    require_no_checkpoints(out)
    source = VilaUFolder(folder)
    vectors, unused = read_tokenizer(source)
    _check(source)
    vocabulary = create_vocabulary(out / "vocabulary", source.text_file, source.model.image_codes.codebook_size)
    numbers = convert(source, vocabulary, out, seed, vectors)
    rows = [f"{name} ({i})" for name, i in source.added_tokens.items() if name not in IMAGE_TOKENS]
    stored = {name: set(files) for name, files in source.files.items()}
    used = {name: len(stored[name]) - sum(tensor in stored[name] for tensor in unused) for name in stored}
    return numbers | {
        "vocabulary": str(vocabulary.folder),
        "vq": source.model.image_codes.codebook,
        "tensors": used,
        "left_out": {"rows": rows, "tensors": unused},
    }


def _check(source: VilaUFolder) -> None:
    """What the conversion would refuse after it has written the vocabulary."""
    if (kept := text_model.load(source.text_file).size) > min(source.added_tokens[name] for name in IMAGE_TOKENS):
        raise UserError(f"{source.text_file}: has {kept} tokens, but the ids of {' and '.join(IMAGE_TOKENS)} are lower")
    try:
        validate_image_codes(Config(model=source.model))
    except UserError as error:
        raise UserError(f"{source.model.image_codes.codebook}: {error}") from None


def left_out_by_kind(tensors: list[str]) -> dict[str, int]:
    """How many tensors there are of each module that is left out as a whole, or of each name with a number."""

    def kind(name: str) -> str:
        module = _MODULES.match(name)
        return module[0] if module else re.sub(r"\.\d+\.", ".N.", name)

    return dict(Counter(map(kind, tensors)))


def read_tokenizer(source: VilaUFolder) -> tuple[torch.Tensor, list[str]]:
    """Code vectors, and the names of tensors that neither the VQ tokenizer nor the model needs; completes the shape of
    image tokens."""
    tower, codes = vq.load(source.model.image_codes.codebook), source.model.image_codes
    own = (tower.depth, tower.codebook_size, tower.vectors.shape[1])
    if own != (codes.depth, codes.codebook_size, codes.width):
        raise UserError(
            f"{codes.codebook}: the VQ tokenizer has {own[0]} codes a position, a codebook of {own[1]} and vectors of "
            f"{own[2]}, the depth head {codes.depth}, {codes.codebook_size} and {codes.width}"
        )
    codes.fingerprint = tower.fingerprint
    return tower.vectors.clone(), sorted(tower.left_out)

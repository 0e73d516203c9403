"""VILA-U (arXiv 2409.04429): its published folder as a vocabulary, a checkpoint and a shape to start from."""

from pathlib import Path

from megatron_ext.templates import Templates
from megatron_ext.vocabulary import Vocabulary

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

"""The unified token space: text | special | VQ codes.

::

    0 ............ text_size          text_size + 4 ................ size      (padded for tensor parallelism)
    | SentencePiece pieces | <pad> <eod> <boi> <eoi> | VQ codes 0 .. codebook_size-1 |  never used  |

A vocabulary is a folder with ``tokenizer.model`` (any SentencePiece model; LLaMA's works unchanged) and
``vocabulary.json``. Data sets and checkpoints record its fingerprint, so that token ids are never read with another
vocabulary.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece

from megatron_ext.errors import UserError
from megatron_ext.files import write_json

SPECIAL_TOKENS = ("<pad>", "<eod>", "<boi>", "<eoi>")


class Vocabulary:
    """Token ids of text, special tokens and VQ codes.

    Attributes:
        text_size: number of SentencePiece pieces.
        image_offset: id of VQ code 0.
        codebook_size: number of VQ codes.
        size: number of ids in use; the embedding may be padded beyond it.
        bos: id that starts every document (SentencePiece's own).
        pad, eod, boi, eoi: ids of the special tokens.
    """

    def __init__(self, folder: str | Path):
        """Load the vocabulary in ``folder``.

        Raises:
            UserError: a file is missing, damaged, or not the one that ``vocabulary.json`` was created with.
        """
        self.folder = Path(folder)
        metadata_file, model_file = self.folder / "vocabulary.json", self.folder / "tokenizer.model"
        for file in (metadata_file, model_file):
            if not file.is_file():
                raise UserError(f"{file}: not found (create a vocabulary with tools/train_tokenizer.py)")
        try:
            metadata = json.loads(metadata_file.read_text())
            self.codebook_size = int(metadata["codebook_size"])
            expected = metadata["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{metadata_file}: not the metadata of a vocabulary ({error!r})") from None
        try:
            self.text = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{model_file}: not a SentencePiece model ({error})") from None
        self.text_size = self.text.vocab_size()
        self.bos = self.text.bos_id()
        if self.bos < 0:
            raise UserError(f"{model_file}: has no beginning-of-sentence piece; train it with bos_id >= 0")
        self.pad, self.eod, self.boi, self.eoi = range(self.text_size, self.text_size + len(SPECIAL_TOKENS))
        self.image_offset = self.text_size + len(SPECIAL_TOKENS)
        self.size = self.image_offset + self.codebook_size
        if expected != self.fingerprint:
            raise UserError(
                f"{metadata_file}: fingerprint {expected} does not match the files beside it ({self.fingerprint}); "
                "the tokenizer or the metadata was changed"
            )

    @classmethod
    def create(cls, folder: str | Path, tokenizer_model: str | Path, codebook_size: int) -> "Vocabulary":
        """Create a vocabulary folder from a SentencePiece model file and the size of a VQ codebook."""
        folder, tokenizer_model = Path(folder), Path(tokenizer_model)
        if not tokenizer_model.is_file():
            raise UserError(f"{tokenizer_model}: not found")
        if codebook_size < 1:
            raise UserError(f"codebook size {codebook_size}: must be at least 1")
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "tokenizer.model"
        if tokenizer_model.resolve() != target.resolve():
            shutil.copyfile(tokenizer_model, target)
        metadata = {
            "codebook_size": codebook_size,
            "special_tokens": list(SPECIAL_TOKENS),
            "fingerprint": _fingerprint(target, codebook_size),
        }
        write_json(folder / "vocabulary.json", metadata)
        return cls(folder)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the text model, the special tokens or the codebook size."""
        return _fingerprint(self.folder / "tokenizer.model", self.codebook_size)

    def padded_size(self, divisible_by: int) -> int:
        """Rows of the embedding table: ``size`` rounded up to equal shares for tensor-parallel ranks."""
        return -(-self.size // divisible_by) * divisible_by

    def encode(self, text: str) -> list[int]:
        """Text to ids, without ``bos`` or ``eod``."""
        return self.text.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; special tokens and VQ codes are left out."""
        return self.text.decode([int(i) for i in ids if i < self.text_size])

    def image_ids(self, codes):
        """VQ codes (any integer array or tensor) to token ids."""
        return codes + self.image_offset

    def codes(self, ids):
        """Token ids of image tokens (any integer array or tensor) to VQ codes."""
        return ids - self.image_offset

    def is_image(self, ids):
        """Whether each id (any integer array or tensor) is a VQ code."""
        return (ids >= self.image_offset) & (ids < self.size)


def _fingerprint(tokenizer_model: Path, codebook_size: int) -> str:
    digest = hashlib.sha256(tokenizer_model.read_bytes())
    digest.update(json.dumps([SPECIAL_TOKENS, codebook_size]).encode())
    return digest.hexdigest()[:16]

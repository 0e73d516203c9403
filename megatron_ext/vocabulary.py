"""The unified token space: text | special | VQ codes.

::

    0 ............ text_size          text_size + 4 ................ size      (padded for tensor parallelism)
    | pieces of a text model | <pad> <eod> <boi> <eoi> | VQ codes 0 .. codebook_size-1 |  never used  |

A vocabulary is a folder with ``vocabulary.json`` and the file of a text model (:mod:`megatron_ext.text_model`):
``tokenizer.model`` (any SentencePiece model; LLaMA's works unchanged) or ``tokenizer.json``. ``chat_template.jinja``
may lie beside them: the format in which conversations are written (:mod:`megatron_ext.chat_template`); and
``templates.json``: what else that format is used for (:mod:`megatron_ext.templates`). Data sets and checkpoints record
the vocabulary's fingerprint, so that token ids are never read with another vocabulary; the template and its uses are
not part of it.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from megatron_ext import text_model
from megatron_ext.errors import UserError
from megatron_ext.files import write_json, write_text
from megatron_ext.templates import NO_TEMPLATES, TEMPLATES, Templates
from megatron_ext.text_model import SENTENCEPIECE, TOKENIZER_JSON, TextModel, segment_prefix

SPECIAL_TOKENS = ("<pad>", "<eod>", "<boi>", "<eoi>")
METADATA, CHAT_TEMPLATE = "vocabulary.json", "chat_template.jinja"


VOCABULARY_MULTIPLE = 128
"""The embedding is padded to a multiple of this under every tensor-parallel size, so that it can be resharded."""


def padded_size(size: int, tensor: int) -> int:
    """Rows of the embedding of ``size`` ids on so many tensor-parallel ranks."""
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor)
    return -(-size // multiple) * multiple


def code_name(code: int) -> str:
    """The name of a VQ code's token in exported tokenizers."""
    return f"<vq_{code}>"


class Vocabulary:
    """Token ids of text, special tokens and VQ codes.

    Attributes:
        text: the text model.
        text_size: its size; some ids below it may stand for nothing.
        image_offset: id of VQ code 0.
        codebook_size: number of VQ codes.
        size: number of ids in use; the embedding may be padded beyond it.
        bos: id that starts every document.
        pad, eod, boi, eoi: ids of the special tokens.
        answer_end: id that ends an answer: the end of a turn in the language model's own conversations, or ``eod``.
        ends: ids that end generated text: ``answer_end``, ``eod``, and the token that ended documents in the language
            model's training, unless that is ``bos``. Its weights are those of ``eod`` when training begins.
        segment_prefix: put before each text that is encoded apart, except at the start of a document.
        chat_template: a Jinja template that writes conversations, or None.
        templates: what it is used for.
    """

    def __init__(self, folder: str | Path):
        """Load the vocabulary in ``folder``.

        Raises:
            UserError: a file is missing, damaged, or not the one that ``vocabulary.json`` was created with.
        """
        self.folder = Path(folder)
        metadata_file = self.folder / METADATA
        if not metadata_file.is_file():
            raise UserError(f"{metadata_file}: not found (create a vocabulary with tools/train_tokenizer.py)")
        self.text_file = _text_file(self.folder)
        try:
            metadata = json.loads(metadata_file.read_text())
            self.codebook_size = int(metadata["codebook_size"])
            expected = metadata["fingerprint"]
            self.text = text_model.load(self.text_file, metadata.get("end"))
            self.text_size = self.text.size
            self.pad, self.eod, self.boi, self.eoi = range(self.text_size, self.text_size + len(SPECIAL_TOKENS))
            self._layout = {key: metadata[key] for key in _LAYOUT} if _LAYOUT[0] in metadata else None
            layout = self._layout or _sentencepiece_layout(self.text, self.text_file)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{metadata_file}: not the metadata of a vocabulary ({error!r})") from None
        self.bos, self.answer_end, self.segment_prefix = (layout[key] for key in _LAYOUT)
        self.ends = list(dict.fromkeys([self.answer_end, self.eod]))
        if self.text.end is not None and self.text.end not in (self.bos, *self.ends):
            self.ends.append(self.text.end)
        self.image_offset = self.text_size + len(SPECIAL_TOKENS)
        self.size = self.image_offset + self.codebook_size
        template = self.folder / CHAT_TEMPLATE
        self.chat_template = template.read_text() if template.is_file() else None
        self.templates = Templates.read(self.folder)
        if self.chat_template is None and self.templates != NO_TEMPLATES:
            raise UserError(f"{self.folder / TEMPLATES}: the vocabulary has no {CHAT_TEMPLATE}")
        if expected != self.fingerprint:
            raise UserError(
                f"{metadata_file}: fingerprint {expected} does not match the files beside it ({self.fingerprint}); "
                "the tokenizer or the metadata was changed"
            )

    @classmethod
    def create(
        cls,
        folder: str | Path,
        text_file: str | Path,
        codebook_size: int,
        *,
        bos: str | None = None,
        end: str | None = None,
        answer_end: str | None = None,
        chat_template: str | None = None,
        templates: Templates = NO_TEMPLATES,
    ) -> "Vocabulary":
        """Create a vocabulary folder from the file of a text model and the size of a VQ codebook.

        Args:
            text_file: ``tokenizer.model`` or ``tokenizer.json``, under any name with one of these endings.
            bos: token that opens documents. By default SentencePiece's own, or else ``end``: it stood before each new
                document when the language model was trained.
            end: token that ended documents in the language model's training. By default SentencePiece's own.
            answer_end: token that ends answers; by default ``<eod>``.
            chat_template: the Jinja template of conversations.
            templates: what it is used for.

        Raises:
            UserError: a file or a token is missing, or the folder holds another vocabulary's files.
        """
        folder, text_file = Path(folder), Path(text_file)
        model = text_model.load(text_file)
        if codebook_size < 1:
            raise UserError(f"codebook size {codebook_size}: must be at least 1")
        if chat_template is not None and answer_end is None:
            raise UserError("a chat template without a token that ends answers (--answer-end TOKEN)")
        target = folder / (TOKENIZER_JSON if text_file.suffix == ".json" else SENTENCEPIECE)
        own_end = model.end
        if end is not None:
            model.end = token_id(model, text_file, end)
        metadata = {"codebook_size": codebook_size, "special_tokens": list(SPECIAL_TOKENS)}
        layout = _layout(model, text_file, bos, answer_end)
        if model.bos is not None and layout == _sentencepiece_layout(model, text_file) and model.end == own_end:
            layout = None  # the metadata and the fingerprint of all vocabularies before there were others
        else:
            metadata |= {**layout, "end": model.end}
        metadata["fingerprint"] = _fingerprint(text_file, codebook_size, layout)
        _fill(folder, text_file, target, chat_template, templates)
        write_json(folder / METADATA, metadata)
        return cls(folder)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the text model, the special tokens, the codebook size, and the tokens
        and the prefix that rendering adds."""
        return _fingerprint(self.text_file, self.codebook_size, self._layout)

    def encode(self, text: str) -> list[int]:
        """Raw text to ids; nothing is added, and the strings of control tokens are text."""
        return self.text.encode(text)

    def encode_segment(self, text: str) -> list[int]:
        """Ids of a text that is encoded apart and is not the first of a stored document."""
        return self.text.encode(self.segment_prefix + text)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; special tokens, control tokens and VQ codes are left out."""
        return self.text.decode([int(i) for i in ids if i < self.text_size])

    def decode_answer(self, ids: Sequence[int]) -> str:
        """The text of a generated answer, without the prefix of segments and, where it was cut at its greatest length,
        without half a character at its end."""
        ended = len(ids) > 0 and ids[-1] in self.ends
        text = self.decode(ids[:-1] if ended else ids)
        text = text.removeprefix(self.segment_prefix)
        return text if ended else text.rstrip("\ufffd")

    def image_ids(self, codes):
        """VQ codes (any integer array or tensor) to token ids."""
        return codes + self.image_offset

    def codes(self, ids):
        """Token ids of image tokens (any integer array or tensor) to VQ codes."""
        return ids - self.image_offset

    def is_image(self, ids):
        """Whether each id (any integer array or tensor) is a VQ code."""
        return (ids >= self.image_offset) & (ids < self.size)


_LAYOUT = ("bos", "answer_end", "segment_prefix")  # keys of the metadata that rendering depends on


def token_id(model: TextModel, file: Path, token: str) -> int:
    """The id of a token of the text model in ``file``.

    Raises:
        UserError: it has no such token.
    """
    i = model.id(token)
    if i is None:
        raise UserError(f"{file}: has no token {token!r}")
    return i


def _sentencepiece_layout(model: TextModel, file: Path) -> dict:
    """What rendering adds where the metadata does not say it."""
    if model.bos is None:
        raise UserError(f"{file}: has no beginning-of-sentence piece; train it with bos_id >= 0, or use --bos")
    return dict(zip(_LAYOUT, (model.bos, model.size + SPECIAL_TOKENS.index("<eod>"), "")))


def _layout(model: TextModel, file: Path, bos: str | None, answer_end: str | None) -> dict:
    if bos is not None:
        opens = token_id(model, file, bos)
    else:
        opens = model.end if model.bos is None else model.bos
    if opens is None:
        raise UserError(f"{file}: no token is known that opens documents; name one with --bos TOKEN")
    eod = model.size + SPECIAL_TOKENS.index("<eod>")
    ends = eod if answer_end is None else token_id(model, file, answer_end)
    return dict(zip(_LAYOUT, (opens, ends, segment_prefix(model))))


def _text_file(folder: Path) -> Path:
    present = [folder / name for name in (SENTENCEPIECE, TOKENIZER_JSON) if (folder / name).is_file()]
    if len(present) != 1:
        raise UserError(
            f"{folder}: holds {'both' if present else 'neither'} {SENTENCEPIECE} {'and' if present else 'nor'} "
            f"{TOKENIZER_JSON}; a vocabulary has one of them (tools/train_tokenizer.py)"
        )
    return present[0]


def _fill(folder: Path, text_file: Path, target: Path, chat_template: str | None, templates: Templates) -> None:
    """Copy the files of a vocabulary into its folder, byte for byte."""
    other = folder / (SENTENCEPIECE if target.name == TOKENIZER_JSON else TOKENIZER_JSON)
    if other.is_file():
        raise UserError(f"{other}: a vocabulary has {target.name} or {other.name}; choose another folder")
    template, uses = folder / CHAT_TEMPLATE, folder / TEMPLATES
    for file, wanted in ((template, chat_template is not None), (uses, templates != NO_TEMPLATES)):
        if not wanted and file.is_file():
            raise UserError(f"{file}: would become part of the vocabulary; choose another folder or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    if text_file.resolve() != target.resolve():
        shutil.copyfile(text_file, target)
    if chat_template is not None:
        write_text(template, chat_template)
    if templates != NO_TEMPLATES:
        write_json(uses, asdict(templates))


def _fingerprint(text_file: Path, codebook_size: int, layout: dict | None) -> str:
    digest = hashlib.sha256(text_file.read_bytes())
    digest.update(json.dumps([SPECIAL_TOKENS, codebook_size]).encode())
    if layout is not None:
        digest.update(json.dumps([layout[key] for key in _LAYOUT]).encode())
    return digest.hexdigest()[:16]

"""Text models: the tokenizers of language models, read from their own files.

A vocabulary holds one file, copied byte for byte: ``tokenizer.model`` (:class:`SentencePieceModel`) or
``tokenizer.json`` (:class:`TokenizerJson`). Both classes have the same members:

- ``size``: largest id + 1; an id below it may have no piece.
- ``bos``, ``end``: ids that opened and ended documents when the language model was trained; None if the file does not
  say them.
- ``control``: the string of each control token by id. In raw text such a string is text.
- ``encode(text | list of texts)``: ids of raw text, without any token added.
- ``encode_template(text)``: ids of text in which control tokens count as such, and the range of ``text``, in
  characters, that each id stands for.
- ``decode(ids)``: text without control tokens.
- ``piece(i)``, ``id(piece)``: a piece of an id and the other way round; None if there is none.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2, sentencepiece_pb2

from megatron_ext.errors import UserError

SENTENCEPIECE, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"
"""Names of the files."""

Offsets = list[tuple[int, int]]


class SentencePieceModel:
    """A SentencePiece model; see the module for its members."""

    def __init__(self, file: Path):
        """
        Raises:
            UserError: ``file`` is not a SentencePiece model.
        """
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{file}: not a SentencePiece model ({error})") from None
        self.size = self._model.vocab_size()
        self.bos, self.end = (i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id()))

    @cached_property
    def control(self) -> dict[int, str]:
        return {i: self.piece(i) for i in range(self.size) if self._model.is_control(i)}

    def encode(self, text: str | Sequence[str]) -> list:
        return self._model.encode(text)  # takes a list in threads of its own

    def encode_template(self, text: str) -> tuple[list[int], Offsets]:
        """SentencePiece does not look for control pieces in text, so they are cut out first. Only text at the start, or
        after ``bos``, gets the space that the model puts before a text."""
        ids, offsets, place = [], [], 0
        for part in self._control_pieces.split(text):
            if part and (i := self._control_ids.get(part)) is not None:
                ids.append(i)
                offsets.append((place, place + len(part)))
            elif part:
                model = self._without_prefix if ids and ids[-1] != self.bos else self._model
                for i, begin, end in _pieces(model, part):
                    ids.append(i)
                    offsets.append((place + begin, place + end))
            place += len(part)
        return ids, offsets

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        return {piece: i for i, piece in self.control.items()}

    @cached_property
    def _control_pieces(self) -> re.Pattern:
        return any_of(self._control_ids)

    @cached_property
    def _without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        model = sentencepiece_model_pb2.ModelProto.FromString(self._model.serialized_model_proto())
        model.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))

    def piece(self, i: int) -> str | None:
        return self._model.id_to_piece(i) if 0 <= i < self.size else None

    def id(self, piece: str) -> int | None:
        i = self._model.piece_to_id(piece)
        return i if self._model.id_to_piece(i) == piece else None


class TokenizerJson:
    """A ``tokenizer.json`` of Hugging Face's tokenizers; see the module for its members.

    The file is read as it is. The classes of transformers would rebuild parts of it from their own code.
    """

    bos = end = None  # the file does not say them

    def __init__(self, file: Path):
        """
        Raises:
            UserError: ``file`` is not a tokenizer.
        """
        self._file = file
        self._raw = _tokenizer(file)
        self._raw.encode_special_tokens = True  # text of users never becomes a control token
        self.size = max(self._raw.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.size:
            raise UserError(f"{file}: has no tokens")

    @cached_property
    def control(self) -> dict[int, str]:
        added = self._raw.get_added_tokens_decoder()
        return {i: token.content for i, token in added.items() if token.special}

    @cached_property
    def _template(self) -> tokenizers.Tokenizer:
        tokenizer = _tokenizer(self._file)  # another object: encode_special_tokens is a state of the object
        tokenizer.post_processor = None  # it would only leave spaces out of offsets
        return tokenizer

    def encode(self, text: str | Sequence[str]) -> list:
        if isinstance(text, str):
            return self._raw.encode(text, add_special_tokens=False).ids
        return [encoding.ids for encoding in self._raw.encode_batch(list(text), add_special_tokens=False)]

    def encode_template(self, text: str) -> tuple[list[int], Offsets]:
        encoding = self._template.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self._raw.decode(list(ids), skip_special_tokens=True)

    def piece(self, i: int) -> str | None:
        return self._raw.id_to_token(i)

    def id(self, piece: str) -> int | None:
        return self._raw.token_to_id(piece)


TextModel = SentencePieceModel | TokenizerJson


def load(file: Path, end: int | None = None) -> TextModel:
    """The text model in ``file``, by the ending of its name.

    Args:
        end: id that ended documents, where it is not what the file says.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not file.is_file():
        raise UserError(f"{file}: not found")
    model = TokenizerJson(file) if file.suffix == ".json" else SentencePieceModel(file)
    model.end = model.end if end is None else end
    return model


def segment_prefix(model: TextModel) -> str:
    """What keeps a text apart from the text before it when both are encoded separately: nothing where the model itself
    begins every text with the mark of a space, else a space."""
    ids = model.encode("a")
    return "" if ids and (model.piece(ids[0]) or "").startswith("\u2581") else " "


def any_of(strings: Iterable[str]) -> re.Pattern:
    """Matches any of the strings, the longest first, as its only group."""
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _pieces(model: sentencepiece.SentencePieceProcessor, text: str) -> Iterator[tuple[int, int, int]]:
    """(id, begin, end) of each piece of a text, by characters."""
    sizes = [len(character.encode()) for character in text]
    characters = list(accumulate(sizes, initial=0))  # byte at which each character begins
    encoded = sentencepiece_pb2.SentencePieceText.FromString(model.encode(text, out_type="serialized_proto"))
    for piece in encoded.pieces:
        yield piece.id, bisect_left(characters, piece.begin), bisect_left(characters, piece.end)


def _tokenizer(file: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{file}: not a tokenizer.json ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

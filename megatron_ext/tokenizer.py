"""Trains a small SentencePiece model on the texts of the training data."""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from megatron_ext.errors import UserError

MAX_SENTENCE_BYTES = 1 << 20


def texts(file: str | Path) -> Iterator[str]:
    """The texts in a file, according to its suffix.

    ``.tar`` (WebDataset): members ``*.txt`` and the conversations of ``*.json``. ``.json``: a list of LLaVA samples.
    ``.jsonl``: ``text`` or ``caption`` of each line. Any other file: one text per line.

    Raises:
        UserError: the file cannot be read, or a line does not have the expected form.
    """
    file, number = Path(file), 0
    try:
        if file.suffix == ".tar":
            yield from _tar_texts(file)
        elif file.suffix == ".json":
            for sample in json.loads(file.read_text()):
                yield from _turns(sample)
        else:
            with file.open() as lines:
                for line in lines:
                    number += 1
                    yield _line_text(line) if file.suffix == ".jsonl" else line
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, tarfile.TarError) as error:
        location = f"{file}:{number}" if number else file
        raise UserError(f"{location}: not a text of the expected form ({error!r})") from None


def train(files: list[Path], model_file: Path, vocab_size: int) -> int:
    """Train a model with LLaMA's conventions: ``<unk> <s> </s>`` first, digits split, bytes for unknown characters.

    The same files in the same order give the same model. The model file is written atomically.

    Returns:
        Number of texts read.

    Raises:
        UserError: a file cannot be read, or there is too little text for ``vocab_size`` pieces.
    """
    count = 0

    def sentences() -> Iterator[str]:
        nonlocal count
        for file in files:
            for text in texts(file):
                count += 1
                yield from (line for line in text.splitlines() if line.strip())

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"cannot make {vocab_size} pieces from {count} texts: {str(error).rsplit(') ', 1)[-1]}"
        ) from None
    model_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = model_file.with_name(f".{model_file.name}.{os.getpid()}.tmp")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, model_file)
    return count


def _tar_texts(file: Path) -> Iterator[str]:
    with tarfile.open(file) as archive:
        for member in archive:
            if member.name.endswith(".txt"):
                yield archive.extractfile(member).read().decode()
            elif member.name.endswith(".json"):
                yield from _turns(json.loads(archive.extractfile(member).read()))


def _turns(sample: dict) -> Iterator[str]:
    for turn in sample.get("conversations", ()):
        yield turn["value"].replace("<image>", "").strip()


def _line_text(line: str) -> str:
    entry = json.loads(line)
    return entry["text"] if "text" in entry else entry["caption"]

"""The vocabulary: training a text model, laying out the token space, and refusing what does not fit."""

import io
import json
import tarfile

import numpy as np
import pytest

from megatron_ext import tokenizer
from megatron_ext.errors import UserError
from megatron_ext.vocabulary import Vocabulary

SENTENCES = [
    f"a {c} {s} is left of {n} small dots" for c in ("red", "blue") for s in ("ring", "bar") for n in range(40)
]


@pytest.fixture
def model(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    tokenizer.train([tmp_path / "text.txt"], tmp_path / "made" / "tokenizer.model", 300)
    return tmp_path / "made" / "tokenizer.model"


def test_all_forms_of_input_give_their_texts(tmp_path):
    turns = [{"from": "human", "value": "<image>\nhow many?"}, {"from": "gpt", "value": "two"}]
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{"image": "a.png", "caption": "two"}\n')
    (tmp_path / "llava.json").write_text(json.dumps([{"id": 1, "conversations": turns}]))
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name, content in (
            ("0.txt", b"a ring"),
            ("0.png", b"\x89PNG"),
            ("0.json", json.dumps({"conversations": turns}).encode()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert list(tokenizer.texts(tmp_path / "lines.jsonl")) == ["one", "two"]
    assert list(tokenizer.texts(tmp_path / "llava.json")) == ["how many?", "two"]
    assert list(tokenizer.texts(tmp_path / "shard.tar")) == ["a ring", "how many?", "two"]


def test_damaged_input_names_file_and_line(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(UserError, match="lines.jsonl:2"):
        list(tokenizer.texts(tmp_path / "lines.jsonl"))
    with pytest.raises(UserError, match="absent.txt"):
        list(tokenizer.texts(tmp_path / "absent.txt"))


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(UserError, match="cannot make 4000 pieces from 1 texts"):
        tokenizer.train([tmp_path / "text.txt"], tmp_path / "tokenizer.model", 4000)
    assert not (tmp_path / "tokenizer.model").exists()


def test_training_is_deterministic(tmp_path, model):
    tokenizer.train([tmp_path / "text.txt"], tmp_path / "again.model", 300)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()


def test_the_token_space_is_text_special_codes(tmp_path, model):
    vocabulary = Vocabulary.create(tmp_path / "vocabulary", model, codebook_size=50)
    assert (vocabulary.text_size, vocabulary.bos) == (300, 1)
    assert [vocabulary.pad, vocabulary.eod, vocabulary.boi, vocabulary.eoi] == [300, 301, 302, 303]
    assert (vocabulary.image_offset, vocabulary.size) == (304, 354)
    codes = np.arange(50)
    ids = vocabulary.image_ids(codes)
    assert vocabulary.is_image(ids).all() and (vocabulary.codes(ids) == codes).all()
    assert not vocabulary.is_image(np.array([0, 299, 300, 303, 354])).any()
    for text in (SENTENCES[5], "unseen: 漢字 & émigré"):
        assert vocabulary.decode(vocabulary.encode(text)) == text
        assert vocabulary.decode([vocabulary.boi, *ids, vocabulary.eoi, *vocabulary.encode(text)]) == text


def test_the_fingerprint_follows_the_meaning_of_ids(tmp_path, model):
    vocabulary = Vocabulary.create(tmp_path / "vocabulary", model, codebook_size=50)
    assert Vocabulary.create(tmp_path / "same", model, codebook_size=50).fingerprint == vocabulary.fingerprint
    assert Vocabulary.create(tmp_path / "more", model, codebook_size=51).fingerprint != vocabulary.fingerprint


def test_a_changed_tokenizer_is_refused(tmp_path, model):
    Vocabulary.create(tmp_path / "vocabulary", model, codebook_size=50)
    tokenizer.train([tmp_path / "text.txt"], tmp_path / "vocabulary" / "tokenizer.model", 299)
    with pytest.raises(UserError, match="fingerprint"):
        Vocabulary(tmp_path / "vocabulary")
    (tmp_path / "vocabulary" / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Vocabulary(tmp_path / "vocabulary")
    with pytest.raises(UserError, match=r"absent.*not found"):
        Vocabulary(tmp_path / "absent")

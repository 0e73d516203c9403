"""The form of VILA-U's documents: ids are those of transformers' LlamaTokenizer over the same SentencePiece model."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaTokenizer

from megatron_ext import chat_template
from megatron_ext.config import DataConfig, SourceConfig
from megatron_ext.conversion import vila_u
from megatron_ext.data import build_mixture
from megatron_ext.data.copying import merge
from megatron_ext.data.format import ANSWER, IMAGE, TEXT
from megatron_ext.data.writer import DatasetWriter
from megatron_ext.errors import UserError
from megatron_ext.generation import prompts
from megatron_ext.preprocess.parts import tokenise
from megatron_ext.preprocess.samples import ImageFile, ReadOptions, make_sample
from megatron_ext.templates import TEMPLATES
from megatron_ext.vocabulary import Vocabulary
from support.vila_u import SYSTEM, write_llama_tokenizer

CODES = 16


class Family:
    """A vocabulary with VILA-U's templates, and the tokenizer of transformers."""

    def __init__(self, folder: Path):
        file = write_llama_tokenizer(folder / "tokenizer.model")
        self.vocabulary = vila_u.create_vocabulary(folder / "vocabulary", file, CODES)
        self.reference = LlamaTokenizer.from_pretrained(folder)
        self.reference.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)

    def ids(self, prompt: str) -> list[int]:
        """``prompt`` as VILA-U encodes it: in calls of their own for what stands between images."""
        start, end = self.reference.convert_tokens_to_ids(["<im_start>", "<im_end>"])
        own = {start: self.vocabulary.boi, end: self.vocabulary.eoi}
        ids = [self.reference.bos_token_id]
        for part in re.split("(<image>)", prompt):
            image = part == "<image>"
            called = [self.vocabulary.image_offset + 3] if image else self.reference(part, add_special_tokens=False)
            ids += called if image else [own.get(i, i) for i in called.input_ids]
        return ids

    def joined(self, segments) -> list[int]:
        """A document of segments, with what rendering adds."""
        vocabulary, ids = self.vocabulary, [self.vocabulary.bos]
        for mode, item in segments:
            ids += [vocabulary.boi, vocabulary.image_offset + 3, vocabulary.eoi] if mode == IMAGE else item
            ids += [vocabulary.answer_end] if mode == ANSWER else []
        return ids


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return Family(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("caption", ["two red circles, 漢字.", "Émigré  left\nof 42"])
def test_a_prompt_of_a_picture_is_vila_u_s(family, caption):
    request = prompts.picture(family.vocabulary, f" {caption} ")
    assert request.tokens == family.ids(f"{SYSTEM} USER: {caption} ASSISTANT: <im_start>")
    assert request.unconditional == family.ids(f"{SYSTEM} USER:ASSISTANT: <im_start>")
    assert family.vocabulary.text.piece(request.tokens[-2]) == "▁"


def test_a_question_is_vila_u_s_of_training_or_of_inference(family, tmp_path):
    question = prompts.answer(family.vocabulary, [3], "what color is it?", 9).tokens
    assert question == family.ids(f"{SYSTEM} USER: <im_start><image><im_end>\nwhat color is it? ASSISTANT:")
    bare = vila_u.create_vocabulary(tmp_path, family.vocabulary.text_file, CODES, given_images="bare")
    question = prompts.answer(bare, [3], "what color is it?", 9).tokens
    assert question == family.ids(f"{SYSTEM} USER: <image>\nwhat color is it? ASSISTANT:")
    assert bare.fingerprint == family.vocabulary.fingerprint


def test_a_conversation_is_vila_u_s(family):
    turns = [
        ("user", [(IMAGE, "a"), (TEXT, "what is red?")]),
        ("assistant", [(ANSWER, "the circle.")]),
        ("user", [(TEXT, "left of"), (IMAGE, "b")]),
        ("assistant", [(ANSWER, "no")]),
    ]
    first = f"{SYSTEM} USER: <im_start><image><im_end>\nwhat is red? ASSISTANT: the circle.</s>"
    whole = first + "USER: left of <im_start><image><im_end> ASSISTANT: no</s>"
    assert family.joined(chat_template.of(family.vocabulary).segments(turns)) == family.ids(whole)


def test_a_stored_caption_is_the_prompt_of_its_picture(family):
    options = ReadOptions(None, prefer="caption", chat_template=True)
    image = ImageFile("image", "image")
    samples = [make_sample(caption, {"caption": caption}, [image], options) for caption in ("a red", " ")]
    part = tokenise("0", samples, True, options, family.vocabulary)
    ((_, [[stored, (mode, ids)]]),) = part.documents
    assert stored == (IMAGE, image) and mode == TEXT
    request = prompts.picture(family.vocabulary, "a red")
    assert [family.vocabulary.bos, *ids, family.vocabulary.boi] == request.tokens
    assert [skipped["reason"] for skipped in part.skipped] == ["its text is empty"]


def test_captions_of_conversations_are_not_dropped(one_process, family, tmp_path):
    vq = {"fingerprint": "0" * 16, "grid": [1, 2], "codebook_size": CODES}
    written = {"settings": {"chat_template": chat_template.description(family.vocabulary)}}
    for name, source in (("plain", {"settings": {}}), ("captions", written)):
        with DatasetWriter(tmp_path / name, family.vocabulary.fingerprint, vq, source) as writer:
            writer.add([(IMAGE, family.vocabulary.image_ids(np.arange(2))), (TEXT, [5])])
    merge([tmp_path / "plain", tmp_path / "captions"], tmp_path / "merged")
    one_process()
    for name in ("captions", "merged"):
        source = SourceConfig(str(tmp_path / name), "generation")
        with pytest.raises(UserError, match=f"'data.caption_dropout' is 0.1, must be 0: the captions of .*{name} are"):
            build_mixture([source], DataConfig(), family.vocabulary, train=True)
        build_mixture([source], DataConfig(caption_dropout=0.0), family.vocabulary, train=True)
        build_mixture([source], DataConfig(), family.vocabulary, train=False)
    build_mixture([SourceConfig(str(tmp_path / "plain"), "generation")], DataConfig(), family.vocabulary, train=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"captions": "chat"}, "'captions' is 'chat', must be 'plain' or 'conversation'"),
        ({"after_image": 1}, "'after_image' is 1, must be a text"),
        ({"caption": "plain"}, "unknown key 'caption', must be one of captions, before_image"),
        ([], "not a JSON object"),
    ],
)
def test_a_wrong_file_is_refused(family, content, message):
    file = family.vocabulary.folder / TEMPLATES
    before = file.read_text()
    try:
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"^{file}: {message}"):
            Vocabulary(family.vocabulary.folder)
    finally:
        file.write_text(before)

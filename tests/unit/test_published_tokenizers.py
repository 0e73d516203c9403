"""The tokenizers of published models, where their folders are at hand:

MODEL_FOLDERS=models/llama-3.2-1b:models/qwen3-0.6b pytest tests/unit/test_published_tokenizers.py
"""

import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_ext import chat_template, tokenizer_files
from megatron_ext.data.format import ANSWER, TEXT
from megatron_ext.vocabulary import Vocabulary
from support.text_models import sentences

FOLDERS = [Path(folder) for folder in os.environ.get("MODEL_FOLDERS", "").split(os.pathsep) if folder]
pytestmark = pytest.mark.skipif(not FOLDERS, reason="MODEL_FOLDERS names no folder of a published model")
TEXTS = [
    *sentences(200),
    "e\u0301 \u212b ﬁ",
    "👩‍🚀🇩🇪 안녕 مرحبا नमस्ते ሰላም",
    "it's 12345\n\n\t x",
    "  a  ",
    "def f(x):\n    y",
]


@pytest.fixture(scope="module", params=FOLDERS, ids=str)
def model(request, tmp_path_factory):
    """A vocabulary with the model's chat template, and transformers' tokenizer of the same file."""
    names = tokenizer_files.read(request.param, tokenizer_files.MODEL)
    tokens = {"bos": names.bos, "end": names.end, "answer_end": names.answer_end}
    folder = tmp_path_factory.mktemp("vocabulary")
    vocabulary = Vocabulary.create(folder, names.file, 16384, **tokens, chat_template=names.chat_template)
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(names.file),
        chat_template=names.chat_template,
        bos_token=names.bos,
        eos_token=names.answer_end,
    )
    return vocabulary, reference


def test_raw_text_has_the_ids_of_transformers(model):
    vocabulary, reference = model
    texts = TEXTS + [f"a {token} b{token}" for token in vocabulary.text.control.values()]
    expected = reference(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    assert vocabulary.text.encode(texts) == expected


def test_conversations_have_the_ids_of_transformers(model):
    vocabulary, reference = model
    for question, answer in zip(map(str.strip, TEXTS), map(str.strip, reversed(TEXTS))):
        turns = [("user", [(TEXT, question)]), ("assistant", [(ANSWER, answer)])]
        messages = [{"role": role, "content": text} for role, ((_, text),) in turns]
        segments = chat_template.of(vocabulary).segments(turns)
        ids = [i for mode, item in segments for i in [*item, *[vocabulary.answer_end] * (mode == ANSWER)]]
        day = chat_template.DATE.strftime("%d %b %Y")
        expected = reference.apply_chat_template(messages, date_string=day, enable_thinking=False, return_dict=False)
        assert ids == (expected[1:] if expected[0] == vocabulary.bos else expected)

"""The tokenizer, chat template and processor of an exported folder give prompts the ids that training gave them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_chat_template import CONVERSATION, STYLES, Family
from transformers import AutoTokenizer

from megatron_ext.data.format import ANSWER, IMAGE
from megatron_ext.errors import UserError
from megatron_ext.export_hf.chat_format import Glue
from megatron_ext.export_hf.own_code.processing_unified import UnifiedImageProcessor, UnifiedProcessor
from megatron_ext.export_hf.tokenizer_files import drops_leading_space, exported_tokenizer, write_tokenizer
from megatron_ext.generation import prompts
from megatron_ext.vocabulary import Vocabulary
from support.exported import llama_vocabulary
from support.text_models import CONTROL, byte_level, metaspace
from support.vocabularies import make_vocabulary

PICTURE = Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8))
QUESTION = "what Color is 42?"


def llama_with_template(folder: Path) -> Vocabulary:
    """Llama 2: a SentencePiece model whose template has no control tokens but those of the model."""
    vocabulary = llama_vocabulary(folder)
    template = (
        "{% for message in messages %}"
        "{% if message.role == 'user' %}{{ bos_token + '[I] ' + message.content + ' [/I]' }}"
        "{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    file = vocabulary.folder / "tokenizer.model"
    return Vocabulary.create(folder / "with", file, 50, answer_end="</s>", chat_template=template)


VOCABULARIES = {
    **{style: lambda folder, style=style: Family(folder, style).vocabulary for style in STYLES},
    "SentencePiece": llama_vocabulary,
    "SentencePiece with a template": llama_with_template,
    "bytes": lambda folder: Vocabulary.create(folder / "v", byte_level(folder / "tokenizer.json"), 50, end=CONTROL[1]),
    "words": lambda folder: Vocabulary.create(folder / "v", metaspace(folder / "tokenizer.json"), 50, bos=CONTROL[0]),
}


@pytest.fixture(scope="module", params=VOCABULARIES)
def exported(request, tmp_path_factory) -> tuple[Vocabulary, UnifiedProcessor]:
    folder = tmp_path_factory.mktemp("exported")
    vocabulary = VOCABULARIES[request.param](folder)
    glue = write_tokenizer(folder, vocabulary, sequence_length=99, with_images=True)
    # A folder with a configuration, as exported ones: some classes of tokenizers are chosen by it.
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text()
    settings = {"text_prefix": glue.alone, "repeats_leading_space": drops_leading_space(vocabulary)}
    processor = UnifiedProcessor(UnifiedImageProcessor((4, 4)), tokenizer, template, 2, **settings)
    return vocabulary, processor


def ids_of(processor, vocabulary, **inputs) -> list[int]:
    """A prompt's ids, with VQ codes 5, 6 in the places of images."""
    codes = iter([vocabulary.image_offset + 5, vocabulary.image_offset + 6] * 9)
    ids = processor(**inputs)["input_ids"][0].tolist()
    return [next(codes) if i == vocabulary.size else i for i in ids]


def test_questions_are_asked_as_in_training(exported):
    vocabulary, processor = exported
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = prompts.answer(vocabulary, [5, 6], QUESTION, 1).tokens
    assert ids_of(processor, vocabulary, text=text, images=PICTURE) == expected
    assert processor.tokenizer.eos_token_id == vocabulary.answer_end


def test_questions_with_the_names_of_codes_are_asked_as_in_training(exported):
    """As the README of the plain form writes them."""
    vocabulary, processor = exported
    tokenizer = processor.tokenizer
    bos, end = tokenizer.bos_token, tokenizer.eos_token
    prefix = Glue.of(vocabulary, exported_tokenizer(vocabulary, with_images=True), bos, end).after_image
    message = {"role": "user", "content": f"<boi><vq_5><vq_6><eoi>{prefix}{QUESTION}"}
    ids = tokenizer(processor.apply_chat_template([message], add_generation_prompt=True), add_special_tokens=False)
    assert ids["input_ids"] == prompts.answer(vocabulary, [5, 6], QUESTION, 1).tokens


def test_captions_and_edits_are_asked_as_in_training(exported):
    vocabulary, processor = exported
    assert ids_of(processor, vocabulary, text="Two red", generation_mode="image") == (
        prompts.picture(vocabulary, "Two red").tokens
    )
    request = prompts.edit(vocabulary, [[5, 6], [5, 6]], ["left of it", QUESTION])
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "left of it"}]},
        {"role": "assistant", "content": [{"type": "image"}]},
        {"role": "user", "content": QUESTION},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = {"text": text, "images": [PICTURE] * 2, "generation_mode": "image", "drawn": [1]}
    assert ids_of(processor, vocabulary, **inputs) == request.tokens
    assert processor(**inputs)["token_uses"].tolist() == [request.prompt_tasks(request.tokens, vocabulary)]


def test_conversations_of_several_turns_are_those_of_training(exported):
    vocabulary, processor = exported
    turns = CONVERSATION
    apart = [*vocabulary.encode("a"), *vocabulary.encode_segment("a")]
    if vocabulary.chat_template is None and vocabulary.encode("a a") != apart:
        turns = turns[2:3]  # a text after another cannot get its ids where pieces lie across spaces
    image = [vocabulary.boi, vocabulary.image_offset + 5, vocabulary.image_offset + 6, vocabulary.eoi]
    expected = [vocabulary.bos]
    if vocabulary.chat_template is None:
        segments = [(m, p if m == IMAGE else vocabulary.encode_segment(p)) for _, parts in turns for m, p in parts]
    else:
        from megatron_ext import chat_template

        segments = chat_template.of(vocabulary).segments(turns)
    for mode, item in segments:
        expected += image if mode == IMAGE else item
        expected += [vocabulary.answer_end] if mode == ANSWER else []
    messages = [
        {"role": role, "content": [{"type": "image"} if m == IMAGE else {"type": "text", "text": p} for m, p in parts]}
        for role, parts in turns
    ]
    text = processor.apply_chat_template(messages)
    assert ids_of(processor, vocabulary, text=text, images=[PICTURE] * text.count("<image>")) == expected


def test_text_gets_the_ids_of_the_text_model_and_its_pieces_keep_theirs(exported):
    vocabulary, processor = exported
    tokenizer = processor.tokenizer
    for text in ("red 42 circle", "é 漢字\n\n ሰ?", "no  such"):
        ids = vocabulary.encode(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids) == vocabulary.decode(ids)
    pieces = {i: vocabulary.text.piece(i) for i in range(vocabulary.text_size)}
    assert all(tokenizer.convert_ids_to_tokens(i) == piece for i, piece in pieces.items() if piece is not None)
    assert tokenizer.convert_ids_to_tokens(vocabulary.image_offset + 7) == "<vq_7>"


def test_a_text_model_that_cannot_be_expressed_is_refused_by_name(tmp_path):
    vocabulary = make_vocabulary(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer.model: is not a BPE model, which tokenizer.json cannot express"):
        exported_tokenizer(vocabulary, with_images=True)

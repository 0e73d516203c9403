"""Text models: tokenizer.json gives the ids of transformers, and what users write stays text."""

import hashlib
import io
import json
import sys

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from megatron_ext import text_model, tokenizer, tokenizer_files
from megatron_ext.errors import UserError
from megatron_ext.vocabulary import Vocabulary
from support.programs import run_program
from support.text_models import CONTROL, HOLES, byte_level, metaspace, sentences

BEGIN, END, TURN, EOT = CONTROL
TEXTS = [
    *sentences(60, seed=1),
    "",
    " red",
    "red  \n\n a\t",
    f"is {END} a token, and{EOT}too? {BEGIN}",
    "<tool> is an added token that is not special",
    "e\u0301migre\u0301 \u1e9b\u0323 \u212b",  # not in the normal form NFC
    "👩‍🚀 unseen: ሰላም 12345",
    "<0x0A> ▁ <unk>",
]
KINDS = {
    "byte-level": byte_level,
    "byte-level with bos": lambda file: byte_level(file, add_bos=True),
    "metaspace first": metaspace,
    "metaspace always": lambda file: metaspace(file, "always"),
    "no prefix": lambda file: metaspace(file, "never"),
}


@pytest.fixture(scope="module", params=KINDS)
def files(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp("model") / "tokenizer.json")


def test_raw_text_has_the_ids_of_transformers_with_control_tokens_split(files):
    model, reference = text_model.load(files), PreTrainedTokenizerFast(tokenizer_file=str(files))
    expected = [reference(t, add_special_tokens=False, split_special_tokens=True).input_ids for t in TEXTS]
    assert [model.encode(text) for text in TEXTS] == expected
    assert model.encode(TEXTS) == expected
    assert not any(i in model.control for ids in expected for i in ids)


def test_templates_have_the_ids_of_transformers_and_the_places_of_their_text(files):
    model, reference = text_model.load(files), PreTrainedTokenizerFast(tokenizer_file=str(files))
    for text in TEXTS:
        ids, offsets = model.encode_template(text)
        assert ids == reference(text, add_special_tokens=False).input_ids
        assert all(text[begin:end] == model.control[i] for i, (begin, end) in zip(ids, offsets) if i in model.control)
    text = f"{TURN}red  green{EOT}"
    ids, offsets = model.encode_template(text)
    assert "".join(text[begin:end] for begin, end in offsets) == text


def test_text_in_normal_form_is_decoded_to_itself(files):
    model = text_model.load(files)
    for text in (*sentences(20, seed=2), "👩‍🚀 ሰላም", f"is {END} text"):
        assert model.decode(model.encode(text)) == text
    assert model.decode([model.id(TURN), *model.encode("red"), model.id(EOT), model.size - 10]) == "red"


def test_the_size_counts_ids_that_stand_for_nothing(files):
    model = text_model.load(files)
    assert model.id(BEGIN) - HOLES - 1 >= 0 and model.piece(model.id(BEGIN) - HOLES) is None
    assert model.size == model.id("<tool>") + 1
    assert list(model.control) == [model.id(token) for token in CONTROL]
    assert model.id("<absent>") is None


def test_segments_are_kept_apart_by_a_space_where_the_model_has_none(tmp_path):
    files = {kind: make(tmp_path / kind / "tokenizer.json") for kind, make in KINDS.items()}
    assert {kind: text_model.segment_prefix(text_model.load(file)) for kind, file in files.items()} == {
        "byte-level": " ",
        "byte-level with bos": " ",
        "metaspace first": "",
        "metaspace always": "",
        "no prefix": " ",
    }


@pytest.fixture
def vocabulary(tmp_path):
    file = byte_level(tmp_path / "model" / "tokenizer.json")
    return Vocabulary.create(tmp_path / "vocabulary", file, 50, bos=BEGIN, end=END, answer_end=EOT)


def test_a_vocabulary_of_tokenizer_json(tmp_path, vocabulary):
    file, again = tmp_path / "model" / "tokenizer.json", Vocabulary(tmp_path / "vocabulary")
    assert (tmp_path / "vocabulary" / "tokenizer.json").read_bytes() == file.read_bytes()
    size = vocabulary.text.size
    assert (again.pad, again.eod, again.boi, again.eoi, again.image_offset, again.size) == (
        *range(size, size + 5),
        size + 54,
    )
    ids = {name: again.text.piece(i) for name, i in (("bos", again.bos), ("end", again.text.end))}
    assert ids == {"bos": BEGIN, "end": END} and again.answer_end == again.text.id(EOT)
    assert again.encode_segment("red") == again.encode(" red") != again.encode("red")


def test_an_answer_loses_the_prefix_its_end_and_half_a_character(vocabulary):
    ids = vocabulary.encode_segment("not 👩 漢")
    for end in (vocabulary.answer_end, vocabulary.eod):
        assert vocabulary.decode_answer([*ids, end]) == "not 👩 漢"
    cut = vocabulary.encode_segment("not 👩")[:-1]
    assert vocabulary.decode(cut) == " not \ufffd" and vocabulary.decode_answer(cut) == "not "
    assert vocabulary.decode_answer(vocabulary.encode_segment("a\ufffd") + [vocabulary.eod]) == "a\ufffd"
    assert vocabulary.decode_answer(vocabulary.encode("  a")) == " a"
    assert vocabulary.decode_answer([]) == ""


def test_the_fingerprint_follows_what_rendering_adds_but_not_the_template(tmp_path, vocabulary):
    file = vocabulary.text_file

    def fingerprint(name, **tokens):
        tokens = {"bos": BEGIN, "end": END, "answer_end": EOT} | tokens
        return Vocabulary.create(tmp_path / name, file, 50, **tokens).fingerprint

    assert fingerprint("same") == fingerprint("template", chat_template="{{ messages }}") == vocabulary.fingerprint
    others = {fingerprint("bos", bos=END), fingerprint("answer", answer_end=END), fingerprint("eod", answer_end=None)}
    assert len(others | {vocabulary.fingerprint}) == 4


def test_old_vocabularies_keep_their_metadata_and_fingerprint(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"a red ring is left of {n} dots" for n in range(40)))
    model = tmp_path / "made.model"
    tokenizer.train([tmp_path / "text.txt"], model, 290)
    vocabulary = Vocabulary.create(tmp_path / "vocabulary", model, 50)
    old = hashlib.sha256(model.read_bytes() + b'[["<pad>", "<eod>", "<boi>", "<eoi>"], 50]').hexdigest()[:16]
    assert json.loads((tmp_path / "vocabulary" / "vocabulary.json").read_text()) == {
        "codebook_size": 50,
        "special_tokens": ["<pad>", "<eod>", "<boi>", "<eoi>"],
        "fingerprint": old,
    }
    assert (vocabulary.bos, vocabulary.text.end, vocabulary.answer_end) == (1, 2, vocabulary.eod)
    assert vocabulary.segment_prefix == "" and vocabulary.chat_template is None
    named = Vocabulary.create(tmp_path / "named", model, 50, bos="<s>", end="</s>")
    other = Vocabulary.create(tmp_path / "other", model, 50, answer_end="</s>")
    assert named.fingerprint == old != other.fingerprint and Vocabulary(other.folder).answer_end == 2


def test_sentencepiece_leaves_control_pieces_in_text_and_finds_them_in_templates(tmp_path):
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=content,
        vocab_size=370,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(content.getvalue())
    model = text_model.load(tmp_path / "tokenizer.model")
    assert set(model.control.values()) == {"<s>", "</s>", "[INST]", "[/INST]"}
    assert model.decode(model.encode("[INST] red")) == "[INST] red"
    assert not set(model.encode("[INST] red</s>")) & set(model.control)
    text = "[INST] red 漢 ሰ[/INST] no</s>"
    ids, offsets = model.encode_template(text)
    # A space that the template writes is the one that SentencePiece would put before a text.
    between = [model.encode("red 漢 ሰ"), model.encode("no")]
    assert ids == [model.id("[INST]"), *between[0], model.id("[/INST]"), *between[1], model.id("</s>")]
    assert [text[b:e] for i, (b, e) in zip(ids, offsets) if i in model.control] == ["[INST]", "[/INST]", "</s>"]
    assert offsets[-2][1] == len(text) - len("</s>") and offsets[1][0] == len("[INST]")
    assert model.encode_template("red")[0] == model.encode("red")
    assert model.encode_template("<s>red</s><s>no")[0] == [1, *model.encode("red"), 2, 1, *model.encode("no")]


def model_folder(folder, config=None, generation=None, **files):
    byte_level(folder / "tokenizer.json")
    for name, content in (("tokenizer_config", config), ("generation_config", generation)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


CHAT = """{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|eot|>\n{% endfor %}
{%- if add_generation_prompt %}<|turn|>assistant
{% endif %}"""


def test_the_tokens_are_those_that_a_model_s_files_name(tmp_path):
    turn_end = text_model.load(byte_level(tmp_path / "m" / "tokenizer.json")).id(EOT)
    config = {"bos_token": {"content": BEGIN}, "eos_token": EOT, "chat_template": CHAT}
    folder = model_folder(tmp_path / "m", config, {"eos_token_id": [turn_end, turn_end - 2]})
    names = tokenizer_files.read(folder)
    assert (names.bos, names.end, names.answer_end, names.chat_template) == (BEGIN, END, None, None)
    names = tokenizer_files.read(folder / "tokenizer.json", template="model")
    assert (names.bos, names.end, names.answer_end, names.chat_template) == (BEGIN, END, EOT, CHAT)
    assert tokenizer_files.read(folder, bos=TURN).bos == TURN
    assert tokenizer_files.read(folder, answer_end=END).end == EOT


@pytest.mark.parametrize("template", ["{% for", "{{ messages[1].content }}", "{{ messages[9].content.x }}", 5, [5]])
def test_a_template_that_is_not_asked_for_may_be_odd(tmp_path, template):
    turn_end = text_model.load(byte_level(tmp_path / "m" / "tokenizer.json")).id(EOT)
    config = {"bos_token": BEGIN, "eos_token": EOT, "chat_template": template}
    folder = model_folder(tmp_path / "m", config, {"eos_token_id": [turn_end, turn_end - 2]})
    assert tokenizer_files.read(folder).end == EOT
    assert tokenizer_files.read(folder, answer_end=EOT).end == END
    with pytest.raises(UserError, match="m: has no chat|tokenizer_config.json: "):
        tokenizer_files.read(folder, template="model")


def test_without_a_token_that_opens_documents_the_end_of_the_one_before_does(tmp_path):
    folder = model_folder(tmp_path / "m", {"bos_token": None, "eos_token": END})
    names = tokenizer_files.read(folder)
    vocabulary = Vocabulary.create(tmp_path / "v", names.file, 50, bos=names.bos, end=names.end)
    assert vocabulary.bos == vocabulary.text.end == vocabulary.text.id(END)
    assert vocabulary.answer_end == vocabulary.eod


@pytest.mark.parametrize(
    "config, generation, template, message",
    [
        (
            {"bos_token": "<s>"},
            None,
            None,
            r"tokenizer_config.json: 'bos_token' is '<s>', which .*tokenizer.json lacks",
        ),
        ({}, {"eos_token_id": [2, 9999]}, None, "generation_config.json: 'eos_token_id' has 9999, which .* lacks"),
        ({}, None, "model", "m: has no chat template; name the file of one"),
        ({"chat_template": "{{ messages[1].content }}"}, None, "model", "writes no control token after an answer"),
        ({"chat_template": CHAT + "ok"}, None, "model", "json: its generation prompt is not what it writes before"),
        ({"chat_template": "{% for"}, None, "model", "tokenizer_config.json: not a Jinja template"),
        ([], None, None, "tokenizer_config.json: not a JSON object"),
    ],
)
def test_what_a_model_s_files_lack_is_named(tmp_path, config, generation, template, message):
    with pytest.raises(UserError, match=message):
        tokenizer_files.read(model_folder(tmp_path / "m", config, generation), template)


def test_the_tool_makes_a_vocabulary_of_a_model_s_folder(tmp_path):
    config = {"bos_token": BEGIN, "eos_token": END, "chat_template": CHAT}
    folder = model_folder(tmp_path / "m", config)
    command = [sys.executable, "tools/train_tokenizer.py", "--from-model", folder, "--codebook-size", "50"]
    command += ["--chat-template", "model", "--bos", END, "--out", tmp_path / "v", "--json", tmp_path / "n.json"]
    shown = run_program(command).stdout
    assert "documents open with <|end|>, answers end with <|eot|>, a chat template" in shown
    vocabulary, numbers = Vocabulary(tmp_path / "v"), json.loads((tmp_path / "n.json").read_text())
    assert vocabulary.chat_template == CHAT
    assert numbers["bos"] == vocabulary.bos == vocabulary.text.id(END)
    assert numbers["answer_end"] == vocabulary.answer_end == vocabulary.text.id(EOT)


def test_wrong_files_and_tokens_are_named(tmp_path, vocabulary):
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    file = vocabulary.text_file
    for call, message in (
        (lambda: Vocabulary.create(tmp_path / "v", tmp_path / "bad.json", 50), "bad.json: not a tokenizer.json"),
        (lambda: Vocabulary.create(tmp_path / "v", file, 50), "no token is known that opens documents"),
        (lambda: Vocabulary.create(tmp_path / "v", file, 50, bos="<s>"), "tokenizer.json: has no token '<s>'"),
        (lambda: tokenizer_files.read(tmp_path / "empty"), "has neither tokenizer.json nor tokenizer.model"),
        (lambda: Vocabulary(tmp_path / "empty"), "vocabulary.json: not found"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    (vocabulary.folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="holds both tokenizer.model and tokenizer.json"):
        Vocabulary(vocabulary.folder)
    with pytest.raises(UserError, match="a vocabulary has tokenizer.json or tokenizer.model; choose another folder"):
        Vocabulary.create(vocabulary.folder, tmp_path / "model" / "tokenizer.json", 50, bos=BEGIN)

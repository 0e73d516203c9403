"""Conversations become documents in the format of a chat template; all else stays plain text."""

import json
from pathlib import Path

import pytest

from megatron_ext import chat_template
from megatron_ext.config import SourceConfig
from megatron_ext.data.format import ANSWER, IMAGE, TEXT, Dataset
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.packed_rows import PackedRows
from megatron_ext.data.rendering import SpecialTokens
from megatron_ext.data.show import describe_row
from megatron_ext.data.source import Source
from megatron_ext.errors import UserError
from megatron_ext.preprocess import PreprocessOptions, preprocess
from megatron_ext.preprocess.parts import tokenise
from megatron_ext.preprocess.samples import ImageFile, ReadOptions, make_sample
from megatron_ext.vocabulary import Vocabulary
from support.text_models import CONTROL, byte_level

BEGIN, END, TURN, EOT = CONTROL
TEMPLATE = """\
{% for m in messages %}<|turn|>{{ m.role }}
{{ m.content }}<|eot|>
{% endfor %}{% if add_generation_prompt %}<|turn|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    file = byte_level(folder / "tokenizer.json")
    return Vocabulary.create(
        folder / "vocabulary", file, 50, bos=BEGIN, end=END, answer_end=EOT, chat_template=TEMPLATE
    )


def turns(*values: str, system: str | None = None) -> list[dict]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return turns if system is None else [{"from": "system", "value": system}, *turns]


def documents(vocabulary, *records, images: int = 0, split: bool = False, template: bool = True):
    """The part of these records; images are named 0, 1, ..."""
    files = [ImageFile(str(i), str(i)) for i in range(images)]
    options = ReadOptions(None, "conversation", split, template)
    samples = [make_sample(str(i), record, files, options) for i, record in enumerate(records)]
    return tokenise("part", samples, True, options, vocabulary)


def written(vocabulary, document) -> str:
    """A document as text, with images by name in brackets and answers between ** and **."""
    return "".join(
        f"[{item.name}]"
        if mode == IMAGE
        else ("**{}**" if mode == ANSWER else "{}").format(
            "".join(vocabulary.text.control.get(i) or vocabulary.decode([i]) for i in item.tolist())
        )
        for mode, item in document
    )


def only(vocabulary, *arguments, **options) -> list[str]:
    """The documents of the only sample."""
    ((_, made),) = documents(vocabulary, *arguments, **options).documents
    return [written(vocabulary, document) for document in made]


def test_turns_have_the_template_s_form_and_images_their_place_in_it(vocabulary):
    record = {"conversations": turns("what <image> is\nleft?", "red", "<image>", "no")}
    assert only(vocabulary, record, images=2) == [
        "<|turn|>user\nwhat[0]is\nleft?<|eot|>\n<|turn|>assistant\n**red**\n"
        "<|turn|>user\n[1]<|eot|>\n<|turn|>assistant\n**no**\n"
    ]


@pytest.mark.parametrize("system", [None, "two"])
def test_images_without_a_place_open_the_first_question(vocabulary, system):
    before = f"<|turn|>system\n{system}<|eot|>\n" if system else ""
    record = {"conversations": turns("what?", "red", system=system)}
    assert only(vocabulary, record, images=2) == [
        f"{before}<|turn|>user\n[0][1]what?<|eot|>\n<|turn|>assistant\n**red**\n"
    ]


def test_each_question_apart_is_a_conversation_of_its_own(vocabulary):
    record = {"conversations": turns("what <image>", "red", "and <image>", "no", "is it", system="two")}
    begin = "<|turn|>system\ntwo<|eot|>\n<|turn|>user\n"
    assert only(vocabulary, record, images=2, split=True) == [
        f"{begin}what[0]<|eot|>\n<|turn|>assistant\n**red**\n",
        f"{begin}[0]and[1]<|eot|>\n<|turn|>assistant\n**no**\n",
    ]


def test_a_question_with_a_blank_answer_is_no_part_of_the_next_question(vocabulary):
    record = {"conversations": turns("what <image>", " ", "is it", "no")}
    assert only(vocabulary, record, images=1, split=True) == [
        "<|turn|>user\n[0]is it<|eot|>\n<|turn|>assistant\n**no**\n"
    ]


@pytest.mark.parametrize("split", [False, True])
def test_images_without_a_question_follow_the_instructions(vocabulary, split):
    record = {"conversations": [{"from": "system", "value": "two"}, {"from": "gpt", "value": "red"}]}
    assert only(vocabulary, record, images=1, split=split) == [
        "<|turn|>system\ntwo<|eot|>\n<|turn|>user\n[0]<|eot|>\n<|turn|>assistant\n**red**\n"
    ]


def test_a_conversation_of_blank_turns_is_skipped(vocabulary):
    part = documents(vocabulary, {"conversations": turns("", " ")})
    assert part.skipped == [{"sample": "0", "reason": "its text is empty"}]


def test_captions_and_plain_text_are_never_written_by_the_template(vocabulary):
    assert only(vocabulary, {"caption": "a red circle"}, images=1) == ["[0]** a red circle**"]
    assert only(vocabulary, {"text": f"two {EOT} circle"}) == [f"two {EOT} circle"]
    ((_, [[(_, ids)]]),) = documents(vocabulary, {"text": f"two {EOT}"}).documents
    assert vocabulary.answer_end not in ids


def test_without_the_template_texts_that_meet_are_kept_apart(vocabulary):
    record = {"conversations": turns("what?", "red", "and <image> left?", "no")}
    (document,) = only(vocabulary, record, images=1, template=False)
    assert document == "what?** red** and[0] left?** no**"
    assert only(vocabulary, record, images=1, template=False, split=True) == ["what?** red**", "and[0] left?** no**"]


def test_a_conversation_that_cannot_be_written_is_skipped_and_the_reason_is_told(vocabulary):
    good, bad = {"conversations": turns("what?", "red")}, {"conversations": turns("what?", f"red{EOT}")}
    empty = {"conversations": turns("what?", "")}
    part = documents(vocabulary, good, bad, good, empty)
    assert [name for name, _ in part.documents] == ["0", "2"]
    assert part.skipped == [
        {"sample": "1", "reason": "a text has the control token '<|eot|>': 'red<|eot|>'"},
        {"sample": "3", "reason": "its text is empty"},
    ]
    assert [name for name, _ in documents(vocabulary, good, bad, template=False).documents] == ["0", "1"]


def test_the_data_set_says_which_template_wrote_it(tmp_path, vocabulary):
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps({"conversations": turns("what?", "red")}) + "\n")

    def made(name: str, **options) -> Dataset:
        preprocess(PreprocessOptions([Path(file)], tmp_path / name, **options), vocabulary, None)
        return Dataset(tmp_path / name)

    by_default, plain = made("set"), made("plain", chat_template=False)
    assert by_default.metadata["source"]["settings"]["chat_template"] == chat_template.description(vocabulary)
    assert "chat_template" not in plain.metadata["source"]["settings"]
    assert [mode for mode, _ in by_default.document(0)] == [TEXT, ANSWER, TEXT]
    assert written(vocabulary, plain.document(0)) == "what?** red**"
    with pytest.raises(UserError, match=r"set\.json: made with chat_template \w{16}, now None"):
        made("set", chat_template=False)


def test_a_row_shows_control_tokens_and_learns_answers_up_to_the_end_of_their_turn(tmp_path, vocabulary):
    file, length = tmp_path / "talk.jsonl", 32
    file.write_text(json.dumps({"conversations": turns("what?", "red")}) + "\n")
    preprocess(PreprocessOptions([file], tmp_path / "set"), vocabulary, None)
    config = SourceConfig(str(tmp_path / "set"), "understanding")
    source = Source.open("data.train[0]", config, vocabulary.fingerprint, length)
    rows = PackedRows(Mixture([source], SpecialTokens.of(vocabulary), 1, 0.0), length)
    shown = describe_row(rows, 0, vocabulary)
    turn = "<bos> <|turn|> user\nwhat? <|eot|> \n <|turn|> assistant\n [[red <|eot|>]] \n"
    assert turn in shown


def test_a_template_that_the_vocabulary_lacks_is_refused(tmp_path, vocabulary):
    (tmp_path / "talk.jsonl").write_text('{"text": "a"}\n')
    plain = Vocabulary.create(tmp_path / "v", vocabulary.text_file, 50, end=END)
    options = PreprocessOptions([tmp_path / "talk.jsonl"], tmp_path / "set", chat_template=True)
    with pytest.raises(UserError, match="v: has no chat template"):
        preprocess(options, plain, None)

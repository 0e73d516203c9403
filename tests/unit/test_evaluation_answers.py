"""Answers files: resumable, and nothing wrong with one passes in silence."""

from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.evaluation.answers import AnswersWriter, read_answers
from megatron_ext.evaluation.benchmark import Item


def test_answers_are_read_as_written_with_further_keys_and_any_characters(tmp_path):
    with AnswersWriter(tmp_path / "new" / "a.jsonl") as writer:
        writer.write("1", "a\nb\u2028北", likelihoods=[-1.0, -2.0], seconds=0.5)
        assert read_answers(tmp_path / "new" / "a.jsonl").answers == {"1": "a\nb\u2028北"}, "flushed as it comes"
        writer.write("2", "")
    read = read_answers(tmp_path / "new" / "a.jsonl")
    assert read.records["1"]["seconds"] == 0.5
    assert read.likelihoods == {"1": [-1.0, -2.0]}
    assert list(read.answers) == ["1", "2"]
    assert (read.duplicates, read.malformed, read.cut_short) == ([], [], False)


def test_a_file_cut_at_any_byte_can_be_resumed(tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    with AnswersWriter(whole) as writer:
        for id in ("x/1", "x/2", "x/3"):
            writer.write(id, f"wörd {id}")
    content = whole.read_bytes()
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        assert set(read_answers(cut).records) <= {"x/1", "x/2", "x/3"} and not read_answers(cut).malformed
        with AnswersWriter(cut) as writer:
            for id in ("x/1", "x/2", "x/3"):
                if id not in writer.answered:
                    writer.write(id, f"wörd {id}")
        assert cut.read_bytes() == content, f"cut after {length} bytes"


def test_everything_wrong_with_a_file_is_reported_and_the_first_answer_counts(tmp_path):
    lines = [
        '{"id": "1", "answer": "first"}',
        '{"id": "1", "answer": "second"}',
        "",
        "not json",
        '{"id": "2"}',
        '{"id": "3", "answer": null}',
        "[1, 2]",
        '{"id": 4, "answer": "a number as id"}',
        '{"id": "1", "answer": "third"}',
        '{"id": "5", "ans',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    read = read_answers(tmp_path / "a.jsonl")
    assert read.answers == {"1": "first", "4": "a number as id"}
    assert read.duplicates == ["1", "1"]
    assert read.malformed == [4, 5, 6, 7]
    assert read.cut_short
    assert read.unknown([Item("4", Path("x.jpg"), "q", "a")]) == ["1"]


def test_a_file_that_is_no_answers_file_is_not_cut(tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"precious": 1}')
    with pytest.raises(UserError, match=r"other\.json: its last line does not belong to an answers file"):
        AnswersWriter(other)
    assert other.read_text() == '{"precious": 1}'


def test_no_file_is_one_line():
    with pytest.raises(UserError, match=r"^nowhere\.jsonl: No such file"):
        read_answers("nowhere.jsonl")

"""Prompts that the chat template cannot write are named and left out; the others become pictures."""

from types import SimpleNamespace

from PIL import Image

from megatron_ext.chat_template import UnusableConversation
from megatron_ext.evaluation.mjhq import Prompt
from megatron_ext.evaluation.picture_generation import generate
from megatron_ext.generation import prompts
from megatron_ext.generation.sampling import Sampling
from megatron_ext.generation.session import Session

TEXTS = ["a", "unwritable", "c"]


def refuse(text: str) -> None:
    if text == "unwritable":
        raise UnusableConversation("the chat template refuses it")


def test_a_benchmark_goes_on_without_the_picture(one_process, tmp_path, capsys):
    one_process()
    session = SimpleNamespace(
        batch_size=2,
        generator=lambda requests, sampling: requests,
        codes=lambda tokens: tokens,
        pictures=lambda codes: [Image.new("RGB", (4, 4))] * len(codes),
    )
    items = [Prompt(text, "things", text, number) for number, text in enumerate(TEXTS)]
    arguments = (session, items, tmp_path, Sampling(), {"seed": 0})
    assert generate(*arguments, request=lambda _, prompt: refuse(prompt.prompt)) == 2
    assert {file.stem for file in (tmp_path / "things").iterdir()} == {"a", "c"}
    assert "unwritable is left out" in capsys.readouterr().err
    assert generate(*arguments, request=lambda _, prompt: refuse(prompt.prompt)) == 0


def test_a_session_draws_the_other_captions_under_numbers_without_gaps(one_process, tmp_path, capsys, monkeypatch):
    one_process()
    monkeypatch.setattr(prompts, "picture", lambda _, text, i: refuse(text) or SimpleNamespace(number=i))
    session, drawn = Session.__new__(Session), []
    vars(session).update(
        trained=SimpleNamespace(vocabulary=None),
        codes=lambda tokens: tokens,
        _generate=lambda requests, *_: [[request.number] for request in requests],
        _save=lambda codes, files, sheet: drawn.extend(files),
        _report=lambda line: None,
    )
    results = session.generate_pictures(TEXTS, tmp_path, {}, first_number=5)
    assert [(result["caption"], result["codes"]) for result in results] == [("a", [5]), ("c", [6])]
    assert [file.name for file in drawn] == ["0005.png", "0006.png"]
    assert "left out: unwritable" in capsys.readouterr().err
    assert session.generate_pictures(TEXTS[1:2], tmp_path, {}) == []

"""The contents of picture files are detected once."""

import json

import pytest
from PIL import Image

from megatron_ext.errors import UserError
from megatron_ext.evaluation import detected_files
from megatron_ext.evaluation.detected_files import detect_files, saved_file
from megatron_ext.picture_world.render import render
from megatron_ext.picture_world.world import make_scene


@pytest.fixture
def files(tmp_path):
    (tmp_path / "mjhq").mkdir()
    pictures = {str(i): tmp_path / "mjhq" / f"{i}.png" for i in range(2)}
    for i, file in enumerate(pictures.values()):
        render(make_scene(0, "train", i), 48).save(file)
    return pictures


def refuse(picture):
    raise AssertionError("a known picture was looked at again")


def test_kept_contents_are_those_of_the_pictures(files, tmp_path, monkeypatch):
    saved = saved_file(tmp_path / "mjhq")
    seen = detect_files(files, saved)
    assert seen == detect_files(files) and saved.parent == tmp_path and seen["0"].objects
    monkeypatch.setattr(detected_files, "detect", refuse)
    assert detect_files(files, saved) == seen
    assert detect_files({"b": files["1"]}, saved) == {"b": seen["1"]}


def test_a_changed_picture_and_another_detector_are_noticed(files, tmp_path, monkeypatch):
    saved = saved_file(tmp_path / "mjhq")
    seen = detect_files(files, saved)
    files["0"].write_bytes(files["1"].read_bytes())
    assert detect_files(files, saved)["0"] == seen["1"]
    record = json.loads(saved.read_text())
    saved.write_text(json.dumps({**record, "detector": "another"}))
    monkeypatch.setattr(detected_files, "detect", refuse)
    with pytest.raises(AssertionError, match="looked at again"):
        detect_files(files, saved)


def test_an_unreadable_picture_is_left_out(files, tmp_path):
    files["0"].write_text("no picture")
    assert detect_files(files, saved_file(tmp_path / "mjhq")).keys() == {"1"}


def test_a_picture_of_another_shape_is_named(tmp_path):
    Image.new("RGB", (40, 64)).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match="a-wide-one"):
        detect_files({"a-wide-one": tmp_path / "wide.png"})

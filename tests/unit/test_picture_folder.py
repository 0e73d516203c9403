"""A folder of generated pictures belongs to the settings that it was started with."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.evaluation.mjhq import Prompt
from megatron_ext.evaluation.picture_folder import claim, picture_file, read_manifest, save
from megatron_ext.evaluation.picture_generation import picture_settings
from megatron_ext.generation.sampling import Sampling
from megatron_ext.templates import Templates

SETTINGS = {"path": "runs/a", "checkpoint": "iter_0000010 (12ab)", "guidance": 3.0, "seed": 0}


def test_the_same_settings_go_on_also_where_the_run_was_moved(tmp_path):
    claim(tmp_path / "mjhq", SETTINGS)
    claim(tmp_path / "mjhq", SETTINGS | {"path": "runs/b"})
    assert read_manifest(tmp_path / "mjhq") == SETTINGS


@pytest.mark.parametrize("key, value", [("checkpoint", "iter_0000020 (34cd)"), ("guidance", 1.0), ("seed", 7)])
def test_other_settings_are_refused_by_name(tmp_path, key, value):
    claim(tmp_path / "mjhq", SETTINGS)
    with pytest.raises(UserError, match=f"made with {key} "):
        claim(tmp_path / "mjhq", SETTINGS | {key: value})


def test_another_chat_template_or_use_of_it_is_another_setting(monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "read_marker", lambda checkpoint: {"files": {}})

    def template_of(**settings) -> str | None:
        vocabulary = SimpleNamespace(fingerprint="v", **settings)
        session = SimpleNamespace(
            trained=SimpleNamespace(config=Config(), vocabulary=vocabulary), vq=SimpleNamespace(fingerprint="q")
        )
        return picture_settings(session, Path("iter_0000010"), "p", Sampling())["chat_template"]

    assert template_of(chat_template=None) is None  # left out of the manifest
    conversations = Templates(captions="conversation")
    uses = [("a", Templates()), ("b", Templates()), ("a", conversations)]
    assert len({template_of(chat_template=source, templates=templates) for source, templates in uses}) == 3


def test_a_folder_that_nobody_accounts_for_is_left_alone(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"")
    with pytest.raises(UserError, match="no settings.json"):
        claim(tmp_path, SETTINGS)


def test_a_picture_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    file = picture_file(tmp_path, Prompt("7", "food", "soup", 0))
    assert file == tmp_path / "food" / "7.png"

    def cut_short(picture, target, format):
        target.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr(Image.Image, "save", cut_short)
        save(Image.new("RGB", (4, 4)), file)
    assert not file.exists()
    save(Image.new("RGB", (4, 4), "red"), file)
    assert Image.open(file).getpixel((0, 0)) == (255, 0, 0)

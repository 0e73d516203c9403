"""When a folder of files counts as a checkpoint."""

import os
import zlib

import pytest

from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.errors import UserError


def save(folder, iteration, content=b"weights", **description):
    partial = checkpoint_folder.begin(folder, iteration)
    (partial / "data").write_bytes(content)
    return checkpoint_folder.complete(partial, {"iteration": iteration, **description}, {})


def test_a_checkpoint_appears_when_it_is_complete_and_says_what_is_in_it(tmp_path):
    partial = checkpoint_folder.begin(tmp_path / "runs" / "checkpoints", 20)
    (partial / "data").write_bytes(b"weights")
    assert checkpoint_folder.checkpoints(partial.parent) == []

    path = checkpoint_folder.complete(partial, {"iteration": 20, "state": {"rows": 3}}, {})
    assert checkpoint_folder.checkpoints(path.parent) == [path]
    assert (path.name, checkpoint_folder.iteration_of(path)) == ("iter_0000020", 20)
    marker = checkpoint_folder.read_marker(path)
    assert (marker["iteration"], marker["state"]) == (20, {"rows": 3})
    assert marker["files"] == {"data": {"bytes": 7, "crc32": f"{zlib.crc32(b'weights'):08x}"}}


def test_checkpoints_are_ordered_by_iteration_whatever_their_number_of_digits(tmp_path):
    for iteration in (20, 12_345_678, 3):
        save(tmp_path, iteration)
    (tmp_path / "iter_0000030.bak").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert [checkpoint_folder.iteration_of(p) for p in checkpoint_folder.checkpoints(tmp_path)] == [3, 20, 12_345_678]
    assert checkpoint_folder.checkpoints(tmp_path / "nowhere") == []


def test_what_killed_saves_left_is_ignored_and_then_removed(tmp_path):
    killed = checkpoint_folder.begin(tmp_path, 10)
    (killed / "data").write_bytes(b"half of it")
    assert checkpoint_folder.checkpoints(tmp_path) == []
    path = save(tmp_path, 10)
    assert list(tmp_path.iterdir()) == [path]


def test_two_attempts_at_one_iteration_never_share_a_folder(tmp_path):
    assert checkpoint_folder.begin(tmp_path, 10) != checkpoint_folder.begin(tmp_path, 10)


def test_saving_an_iteration_again_replaces_its_checkpoint(tmp_path):
    save(tmp_path, 10, b"first")
    path = save(tmp_path, 10, b"second")
    assert list(tmp_path.iterdir()) == [path]
    assert (path / "data").read_bytes() == b"second"


def test_a_runs_folder_stands_for_its_newest_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint in"):
        checkpoint_folder.of_run(tmp_path)
    paths = [save(tmp_path / "checkpoints", iteration) for iteration in (10, 9)]
    assert checkpoint_folder.of_run(tmp_path) == paths[0]
    assert checkpoint_folder.of_run(paths[1]) == paths[1]
    renamed = paths[1].rename(tmp_path / "best")
    assert checkpoint_folder.of_run(renamed) == renamed


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4]), (0, [1, 2, 3, 4])])
def test_the_newest_are_kept(tmp_path, keep, left):
    for iteration in range(1, 5):
        save(tmp_path, iteration)
    checkpoint_folder.keep_newest(tmp_path, keep)
    assert [checkpoint_folder.iteration_of(p) for p in checkpoint_folder.checkpoints(tmp_path)] == left


def test_a_checkpoint_loses_its_name_before_it_loses_a_file(tmp_path, monkeypatch):
    path, seen = save(tmp_path, 10), []
    monkeypatch.setattr(
        checkpoint_folder.shutil, "rmtree", lambda folder, **_: seen.append((path.exists(), os.listdir(folder)))
    )
    checkpoint_folder.delete(path)
    assert [(exists, sorted(files)) for exists, files in seen] == [(False, ["COMPLETE.json", "data"])]


def test_damage_names_each_file_that_is_not_as_it_was_written(tmp_path):
    partial = checkpoint_folder.begin(tmp_path, 10)
    for name in ("whole", "shorter", "altered", "gone"):
        (partial / name).write_bytes(bytes(5_000_000))
    path = checkpoint_folder.complete(partial, {"iteration": 10}, {})
    (path / "shorter").write_bytes(bytes(4_999_999))
    (path / "altered").write_bytes(bytes(4_999_999) + b"\1")
    (path / "gone").unlink()
    files = checkpoint_folder.read_marker(path)["files"]
    assert checkpoint_folder.damage(path, files, sorted(files)) == [
        f"{path}/altered: damaged, its checksum is wrong",
        f"{path}/gone: missing",
        f"{path}/shorter: damaged, has 4999999 bytes instead of 5000000",
    ]


def test_the_remedy_for_a_damaged_checkpoint_is_the_next_older_whole_one(tmp_path):
    paths = [save(tmp_path, iteration) for iteration in (10, 20, 30, 40)]
    (paths[2] / "data").write_bytes(b"short")
    assert checkpoint_folder.remedy(paths[3]) == "; to resume from the older iter_0000020, move iter_0000040 away"
    assert checkpoint_folder.remedy(paths[0]) == "; there is no older complete checkpoint beside it"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing, so this is not a complete checkpoint"),
        ("", "damaged, cannot be read"),
        ("[]", "damaged, cannot be read"),
        ('{"format": 1}', "damaged, cannot be read"),
        ('{"format": 2, "checksum": "0"}', "checkpoint format 2, this version reads 1"),
        ('{"format": 1, "iteration": 11, "checksum": "00000000"}', "damaged, its checksum is wrong"),
    ],
)
def test_a_marker_that_cannot_be_trusted_is_refused(tmp_path, content, message):
    path = save(tmp_path, 10)
    marker = path / checkpoint_folder.MARKER
    marker.unlink() if content is None else marker.write_text(content)
    with pytest.raises(UserError, match=f"{marker}: {message}"):
        checkpoint_folder.read_marker(path)


def test_the_folder_of_all_checkpoints_is_not_taken_for_one(tmp_path):
    path = save(tmp_path, 10)
    with pytest.raises(UserError, match=f"{tmp_path}: holds checkpoints, name one of them, such as {path}"):
        checkpoint_folder.read_marker(tmp_path)

"""What a checkpoint's plain state may be, and what a run may ask of it."""

import pytest

from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints.checkpointer import Checkpointer, read_state
from megatron_ext.checkpoints.checks import check_compatible
from megatron_ext.errors import UserError

STATE = {"model": {"hidden_size": 128, "layers": [1, 2]}, "fingerprints": {"vocabulary": "5f0c", "vq": None}, "rows": 8}


@pytest.mark.parametrize(
    "expected",
    [
        {},
        {"model": {"hidden_size": 128, "layers": (1, 2)}},
        {"model": {"hidden_size": 128, "layers": [1, 2], "experts": None}},
        {"fingerprints": {"vocabulary": "5f0c"}},
        STATE,
    ],
)
def test_a_checkpoint_that_agrees_with_the_run_is_accepted(expected):
    check_compatible(STATE, expected)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"fingerprints": {"vocabulary": "abcd"}}, "its fingerprints.vocabulary is 5f0c, this run's is abcd"),
        ({"model": {"hidden_size": 256}}, "its model.hidden_size is 128, this run's is 256"),
        ({"model": {"layers": [1, 2, 3]}}, r"its model.layers is \[1, 2\], this run's is \[1, 2, 3\]"),
        ({"model": {"hidden_size": 128}}, r"its model.layers is \[1, 2\], this run's is None"),
        ({"model": {"layers": [1, 2], "hidden_size": 128, "experts": 4}}, "its model.experts is None, this run's is 4"),
        ({"plan": {"preset": "dense"}}, "its plan.preset is None, this run's is dense"),
    ],
)
def test_a_checkpoint_made_for_something_else_is_refused_naming_both_values(expected, message):
    with pytest.raises(UserError, match=f"runs/a/iter_0000001: {message}"):
        check_compatible(STATE, expected, "runs/a/iter_0000001")


def test_the_state_can_be_read_without_loading_anything(tmp_path):
    path = checkpoint_folder.complete(checkpoint_folder.begin(tmp_path, 1), {"iteration": 1, "state": STATE}, {})
    assert read_state(path) == STATE
    with pytest.raises(UserError, match="no such checkpoint folder"):
        read_state(tmp_path / "iter_0000002")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"rows": [1, (2, 3)]}, r"state.rows\[1\] is a tuple"),
        ({"data": {3: "x"}}, "state.data: key 3 is not a string"),
        ({"folder": {1, 2}}, "state.folder is a set"),
    ],
)
def test_a_state_that_would_come_back_changed_is_refused_before_anything_is_written(tmp_path, state, message):
    with pytest.raises(TypeError, match=message):
        Checkpointer(tmp_path / "checkpoints").save(1, [], None, state)
    assert not (tmp_path / "checkpoints").exists()


def test_newest_needs_no_process_group(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.newest() is None
    for iteration in (1, 2):
        path = checkpoint_folder.complete(checkpoint_folder.begin(tmp_path, iteration), {"iteration": iteration}, {})
    assert checkpointer.newest() == path

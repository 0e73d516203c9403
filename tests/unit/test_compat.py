"""Where versions of Megatron-Core differ; the same tests hold at both ends of the supported range."""

import logging

import pytest

from megatron_ext import compat
from megatron_ext.checkpoints.checkpointer import Checkpointer, load_weights
from megatron_ext.errors import UserError
from megatron_ext.training.setup import build_model
from megatron_ext.transformer.resolved import resolve

TINY = ("model.num_layers=1", "model.hidden_size=16", "model.num_attention_heads=2", "model.ffn_hidden_size=32")


@pytest.mark.parametrize(
    ("writer", "newer_here", "reason"),
    [
        ("0.16.1", False, None),
        ("0.18.2", False, None),
        ("0.19.0rc1", False, "written with megatron-core 0.19.0rc1, which .* cannot read; install megatron-core>=0.19"),
        ("0.19.2", False, "written with megatron-core 0.19.2, which .* cannot read; install megatron-core>=0.19"),
        ("0.16.1", True, None),
        ("0.19.2", True, None),
    ],
)
def test_a_checkpoint_of_a_newer_version_is_refused_with_one_line(
    tmp_path, one_process, monkeypatch, writer, newer_here, reason
):
    chunks = build_model(resolve(one_process(*TINY), 32))
    checkpointer = Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda package: writer)
        checkpointer.save(1, chunks, None, {})
    monkeypatch.setattr(compat, "reads_common_state", lambda: newer_here)
    if reason is None:
        load_weights(checkpointer.newest(), chunks)
    else:
        with pytest.raises(UserError, match=f"^{checkpointer.newest()}: {reason}.*$"):
            load_weights(checkpointer.newest(), chunks)


def test_nothing_is_logged_that_a_user_could_not_mend(tmp_path, one_process, caplog):
    config = one_process(*TINY)
    with caplog.at_level(logging.WARNING):
        chunks = build_model(resolve(config, 32))
        Checkpointer(tmp_path).save(1, chunks, None, {})
    assert not [record.getMessage() for record in caplog.records]

"""The references of benchmarks/parity.py: only a CPU computes them, and mismatched ones are refused."""

import os

import pytest
import torch

import parity
from megatron_ext import cpu
from megatron_ext.errors import UserError
from one_gpu import share_one_gpu
from parity_references import Measured, References, errors

NUMBERS = torch.arange(4.0)


def measured(scale: float = 1.0) -> Measured:
    gradients = {"decoder.final_layernorm.weight": scale * torch.ones(3)}
    losses, norms, targets = [2.0 * scale, 1.0], [3.0, 3.0], [torch.arange(5)]
    return Measured(gradients, [scale * torch.ones(5, 1, 4)], losses, norms, targets)


def test_references_are_loaded_as_saved(tmp_path):
    references = References(tmp_path, NUMBERS)
    assert references.missing(["dense", "rank 4"]) == ["dense", "rank 4"]
    references.save("rank 4", measured())
    assert references.missing(["dense", "rank 4"]) == ["dense"]
    loaded = References(tmp_path, NUMBERS + 1e-7).load("rank 4")
    assert (loaded.losses, loaded.norms) == ([2.0, 1.0], [3.0, 3.0])
    assert torch.equal(loaded.logits[0], measured().logits[0]) and len(loaded.logits) == 1
    assert loaded.gradients.keys() == measured().gradients.keys()
    assert torch.equal(*(m.gradients["decoder.final_layernorm.weight"] for m in (loaded, measured())))


def test_errors_are_relative(one_process):
    one_process()
    equal = {"loss": 0.0, "logits": 0.0, "gradient": 0.0, "gradient_norm": 0.0, "later_losses": 0.0}
    assert errors(measured(), measured()) == equal
    half_too_large = equal | {"loss": 0.5, "logits": 0.5, "gradient": 0.5, "later_losses": 0.5}
    assert errors(measured(1.5), measured()) == pytest.approx(half_too_large)


@pytest.mark.parametrize("numbers", [NUMBERS[:3], NUMBERS + 0.01], ids=["another shape", "other numbers"])
def test_references_of_other_weights_or_rows_are_refused(tmp_path, numbers):
    References(tmp_path, NUMBERS).save("dense", measured())
    with pytest.raises(UserError, match="dense.pt: computed with other settings"):
        References(tmp_path, numbers).load("dense")


def test_a_gpu_computes_no_references(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    with pytest.raises(UserError, match="no reference, and a GPU computes none; on a CPU: python benchmarks/parity.py"):
        References(tmp_path, NUMBERS).save("dense", measured())
    with pytest.raises(UserError, match="no reference for himix, and a GPU computes none"):
        parity.compare(["tp1"], ["himix"], [], minutes=1, references=tmp_path)
    assert not list(tmp_path.iterdir())


def test_ranks_share_a_gpu_where_there_are_too_few_and_only_there(monkeypatch):
    for name in ("LOCAL_RANK", "NCCL_HOSTID", "NCCL_NET", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "as it was")  # and is again after the test
    for name in ("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    share_one_gpu()
    assert os.environ["NCCL_HOSTID"] == "as it was"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    share_one_gpu()
    assert (os.environ["LOCAL_RANK"], os.environ["NCCL_HOSTID"]) == ("0", "rank-1")

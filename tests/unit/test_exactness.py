"""float32 is float32, and deterministic training is, on GPUs too: what is chosen and set, with a GPU pretended."""

import os
from pathlib import Path

import pytest
import torch

from megatron_ext import config_file, cpu
from megatron_ext.config import Config
from megatron_ext.distributed import _local_device
from megatron_ext.errors import UserError
from megatron_ext.training.config_checks import validate
from megatron_ext.training.prepare import prepare
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.training.step import train_step
from megatron_ext.transformer import transformer_engine
from megatron_ext.transformer.resolved import resolve
from megatron_ext.transformer.specs import transformer_config
from parity import VOCABULARY, packed_batch

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))
BF16 = "training.precision=bf16"


def load(*overrides: str) -> Config:
    return config_file.load(Config, [], overrides)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU and Transformer Engine are there, as far as choices go."""
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(transformer_engine, "installed", lambda: True)


def test_float32_takes_torchs_layers_and_bf16_transformer_engines(gpu):
    assert resolve(load()).implementation == "local"
    assert resolve(load(BF16)).implementation == "transformer_engine"
    assert resolve(load(BF16, "model.implementation=local")).implementation == "local"


def test_transformer_engine_in_float32_is_refused():
    with pytest.raises(UserError, match="model.implementation.*TF32.*training.precision=bf16"):
        validate(load("model.implementation=transformer_engine"), world_size=1)


def test_the_loss_is_fused_under_bf16_alone_and_not_where_order_matters(gpu):
    assert not transformer_config(resolve(load())).cross_entropy_loss_fusion
    fused = transformer_config(resolve(load(BF16)))
    assert fused.cross_entropy_loss_fusion and fused.cross_entropy_fusion_impl == "native"
    assert not transformer_config(resolve(load(BF16, "training.deterministic=true"))).cross_entropy_loss_fusion


def test_a_batch_of_messages_is_not_waited_for_and_outputs_stay(gpu):
    core_config = transformer_config(resolve(load("parallel.pipeline=2")))
    assert core_config.batch_p2p_comm and not core_config.batch_p2p_sync and not core_config.deallocate_pipeline_outputs


def test_no_process_starts_with_tf32(one_process):
    torch.set_float32_matmul_precision("high")
    one_process()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32


def test_deterministic_is_told_to_all_who_ask(one_process, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "NCCL_ALGO": "Ring"})
    config = one_process("training.deterministic=true")
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # or else flash attention does not heed it
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
        assert os.environ["NCCL_ALGO"] == "Ring"  # the user's choice, which is as good
        assert transformer_config(resolve(config)).deterministic_mode
        assert _losses(config) == _losses(config)
    finally:
        torch.use_deterministic_algorithms(False)


def _losses(config: Config) -> list[float]:
    chunks = build_model(resolve(config, VOCABULARY))
    optimizer = build_optimizer(config, chunks)
    steps = [prepare(packed_batch(8, 48, seed), resolve(config)) for seed in range(2)]
    return [train_step(chunks, optimizer, step, config).loss for step in steps]


@pytest.mark.parametrize(
    "local_rank, visible, device",
    [(0, 1, 0), (5, 1, 0), (0, 8, 0), (5, 8, 5)],
    ids=["alone", "a GPU per task", "first of a node", "sixth of a node"],
)
def test_a_process_takes_the_gpu_that_is_its_own(local_rank, visible, device):
    assert _local_device(local_rank, visible) == device


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(UserError, match="LOCAL_RANK is 5, but 4 GPUs are visible"):
        _local_device(5, 4)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_do_not_recompute_what_kernels_recompute_themselves(file):
    assert config_file.load(Config, [file]).training.recompute != "selective"

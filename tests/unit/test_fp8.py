"""FP8: what cannot be computed is refused at once, and what of a model's products is in FP8."""

import dataclasses

import pytest
import torch

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.training.config_checks import validate
from megatron_ext.transformer import specs
from megatron_ext.transformer.linear import FreshWeights
from megatron_ext.transformer.resolved import resolve

BF16 = ["training.precision=bf16", "model.hidden_size=128", "model.ffn_hidden_size=256", "model.num_attention_heads=4"]


def check(*overrides: str, processes: int = 1) -> None:
    validate(config_file.load(Config, [], [*BF16, *overrides]), processes)


@pytest.mark.parametrize(
    "overrides, processes, parts",
    [
        (["training.fp8=current", "model.hidden_size=136"], 1, ["current", "16", "model.hidden_size is 136"]),
        (
            ["training.fp8=current", "parallel.tensor=2", "model.ffn_hidden_size=80"],
            2,
            ["model.ffn_hidden_size / parallel.tensor is 40", "training.fp8=none"],
        ),
        (
            ["training.fp8=mxfp8", "parallel.tensor=4", "model.hidden_size=192"],
            4,
            ["mxfp8", "32", "model.head_size x model.num_attention_heads / parallel.tensor is 48"],
        ),
        (
            ["training.fp8=current", "model.num_attention_heads=16", "model.num_query_groups=1"],
            1,
            ["model.num_query_groups / parallel.tensor is 8"],
        ),
        (["training.fp8=delayed", "plan.preset=himix"], 1, ["delayed", "plan.preset=himix", "current"]),
        (["training.fp8=delayed", "plan.projections.kind=separate"], 1, ["delayed", "plan.preset=dense"]),
    ],
)
def test_settings_that_fp8_cannot_compute_are_refused(overrides, processes, parts):
    with pytest.raises(UserError) as error:
        check(*overrides, processes=processes)
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


def test_settings_that_fp8_can_compute_are_accepted():
    check("training.fp8=delayed")
    check("training.fp8=current", "plan.preset=himix_hmgen_share_partial")
    check("training.fp8=mxfp8", "parallel.tensor=4", processes=4)
    check("model.hidden_size=136")


def test_an_evaluation_begins_with_fresh_weights():
    class Linear(FreshWeights, torch.nn.Linear):
        is_first_microbatch = False

    model = torch.nn.Sequential(Linear(2, 2), torch.nn.Sequential(Linear(2, 2)))
    model.train()
    assert not any(m.is_first_microbatch for m in (model[0], model[1][0]))
    model.eval()
    assert model[0].is_first_microbatch and model[1][0].is_first_microbatch


@pytest.mark.parametrize(
    "overrides, fused",
    [
        ([], {"qkv", "proj", "fc1", "fc2"}),
        (["plan.preset=himix"], {"proj", "fc1", "fc2"}),
        (["plan.preset=hmgen", "plan.projections.kind=shared"], {"qkv", "proj", "fc1", "fc2"}),
        (["plan.preset=hmgen"], {"fc1", "fc2"}),
        (["plan.projections.kind=delta", "plan.projections.modules=[fc1]"], {"qkv", "proj", "fc2"}),
    ],
)
def test_a_weight_gradient_is_fused_where_the_weight_is_used_whole(overrides, fused):
    local = resolve(config_file.load(Config, [], overrides))
    assert not any(specs.fuses_weight_gradient(local, name) for name in ("qkv", "proj", "fc1", "fc2"))
    resolved = dataclasses.replace(local, implementation="transformer_engine")
    assert {name for name in ("qkv", "proj", "fc1", "fc2") if specs.fuses_weight_gradient(resolved, name)} == fused

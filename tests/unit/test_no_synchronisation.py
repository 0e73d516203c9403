"""From the start of a step to the reduction of its losses the host waits for nothing, and layers start few kernels."""

import pytest
import torch

from megatron_ext.routing.plan import PRESETS
from megatron_ext.token_classes import Modality
from megatron_ext.training import step as step_module
from megatron_ext.training.prepare import prepare
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.transformer.resolved import resolve
from parity import PLANS, VOCABULARY, packed_batch
from support.tracing import Trace, world_on_meta

SHAPE = (
    "model.hidden_size=64",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "data.sequence_length=96",
    "training.precision=bf16",
    "training.global_batch_size=2",
    "training.micro_batch_size=1",
)
LAYOUTS = {"tp1": [], "tp4-sp": ["parallel.tensor=4", "parallel.sequence=true"]}


def traced(config, images_first: bool = False) -> Trace:
    """Forward, loss and backward of all micro-batches, and what finishes gradients.

    Args:
        images_first: documents have one run of text, after their images.
    """
    chunks = build_model(resolve(config, VOCABULARY))
    optimizer = build_optimizer(config, chunks)
    batch = packed_batch(2, 96, seed=1, depth=config.model.image_codes.depth)
    if images_first:
        order = (2 * batch.document - (batch.modality == Modality.IMAGE).int()).argsort(dim=1, stable=True)
        batch.modality = batch.modality.gather(1, order)
    step = prepare(batch, resolve(config), torch.device("meta"))
    with Trace() as trace:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        step_module._run(chunks, step, config, forward_only=False)
        optimizer.prepare_grads()
    return trace


def layers(count: int) -> list[str]:
    return [f"model.num_layers={count}", f"plan.shallow_count={count // 4}"]


CEILINGS = {
    # forward and backward together: without parallelism, and under TP 4 with sequence parallelism
    "dense": (47, 64),
    "dense_lossless": (49, 66),
    "himix": (65, 87),
    "hmgen": (61, 102),
    "himix_hmgen_share_all": (67, 88),
    "himix_hmgen_share_all_separate": (90, 137),
    "himix_hmgen_share_partial": (98, 143),
}
"""Operators that start a kernel, per layer and micro-batch, on average over the layers of a model."""
SHARED_KEYS = 24
"""Operators more where keys are shared: keys and values are repeated forward and backward, and gradients added."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_no_step_waits_for_the_device_and_a_layer_takes_few_operators(monkeypatch, preset, layout):
    per_layer = operators_of_a_layer(monkeypatch, preset, layout, images_first=True)
    assert per_layer <= CEILINGS[preset][list(LAYOUTS).index(layout)]


def test_keys_that_several_runs_of_text_share_take_few_operators(monkeypatch):
    """They are repeated for the length of a kernel's call."""
    shared, own = (operators_of_a_layer(monkeypatch, "himix", "tp1", images_first) for images_first in (False, True))
    assert own < shared <= own + SHARED_KEYS


def operators_of_a_layer(monkeypatch, preset: str, layout: str, images_first: bool) -> float:
    totals = []
    for count in (4, 8):
        overrides = [*SHAPE, *LAYOUTS[layout], *layers(count), f"plan.preset={preset}"]
        with world_on_meta(monkeypatch, *overrides) as config:
            totals.append(traced(config, images_first).operators.total())
    return (totals[1] - totals[0]) / 4 / 2  # 4 layers more, 2 micro-batches


def test_no_step_with_every_feature_of_the_model_waits_for_the_device(monkeypatch):
    features = ("model.qkv_bias=true", "model.qk_norm=true", "model.head_size=16", "training.z_loss=1e-5")
    with world_on_meta(
        monkeypatch, *SHAPE, *LAYOUTS["tp4-sp"], *features, "plan.preset=himix_hmgen_share_partial"
    ) as config:
        assert traced(config).operators["amax"] == 2  # the z-loss of two micro-batches


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_step_with_several_codes_an_image_token_waits_for_the_device(monkeypatch, layout):
    with world_on_meta(monkeypatch, *SHAPE, *LAYOUTS[layout], *PLANS["4 codes"]) as config:
        assert traced(config).operators["index_copy"] == 2  # the image tokens of two micro-batches


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.to("cpu"),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: x.__setitem__(0, 2.0),
        lambda x: torch.cuda.synchronize(),
    ],
    ids=["item", "mask", "to the host", "from the host", "number", "synchronize"],
)
def test_the_trace_fails_at_what_waits(monkeypatch, operation):
    with (
        world_on_meta(monkeypatch, *SHAPE),
        Trace(),
        pytest.raises((AssertionError, NotImplementedError, RuntimeError)),
    ):
        operation(torch.zeros(3, device="meta"))

"""One training step: the objective, recomputation, refused steps."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.routing.plan import Plan
from megatron_ext.routing.route import Route
from megatron_ext.token_classes import Task
from megatron_ext.training.losses import MeanLosses
from megatron_ext.training.prepare import prepare
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.training.step import evaluate_step, train_step
from megatron_ext.transformer.resolved import resolve
from parity import VOCABULARY, packed_batch

SMALL = ("data.sequence_length=48", "training.global_batch_size=4", "training.micro_batch_size=2")


def gradients_and_loss(config) -> tuple[dict, float]:
    chunks = build_model(resolve(config, VOCABULARY))
    optimizer = build_optimizer(config, chunks)
    gradients = {}

    def keep(loss, norm):
        gradients.update({name: p.main_grad.clone() for name, p in chunks[0].named_parameters()})
        return False

    return gradients, train_step(
        chunks, optimizer, prepare(packed_batch(4, 48, seed=3), resolve(config)), config, accept=keep
    ).loss


def test_objective_is_the_weighted_sum_of_task_means_over_the_global_batch(one_process):
    config = one_process(*SMALL, "training.task_weights={understanding: 2.0, generation: 0.5, text: 1.0}")
    chunks = build_model(resolve(config, VOCABULARY))
    batch = packed_batch(4, 48, seed=3)
    expected = {}
    with torch.no_grad():
        route = Route.of(batch, Plan.of(config.plan, config.model.num_layers))
        logits = chunks[0].module(route).view(-1, VOCABULARY)
        losses = torch.zeros(4 * 48)
        losses[route.targets] = F.cross_entropy(logits, batch.labels.flatten()[route.targets], reduction="none")
        losses = losses.view(4, 48)
    for task in Task:
        counted = (batch.task == task) & (batch.loss_mask > 0)
        expected[task.name.lower()] = float(losses[counted].mean())
    result = train_step(chunks, build_optimizer(config, chunks), prepare(batch, resolve(config)), config)
    assert result.losses.tasks == pytest.approx(expected, rel=1e-5)
    weighted = 2 * expected["understanding"] + 0.5 * expected["generation"] + expected["text"]
    assert result.loss == pytest.approx(weighted, rel=1e-5)


def test_a_task_without_loss_tokens_contributes_nothing(one_process):
    config = one_process(*SMALL)
    chunks = build_model(resolve(config, VOCABULARY))
    batch = packed_batch(4, 48, seed=3)
    batch.loss_mask[batch.task == Task.GENERATION] = 0
    result = train_step(chunks, build_optimizer(config, chunks), prepare(batch, resolve(config)), config)
    assert "generation" not in result.losses.tasks
    assert result.loss == pytest.approx(sum(result.losses.tasks.values()), rel=1e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient(one_process, recompute):
    config = one_process(*SMALL)
    expected, loss = gradients_and_loss(config)
    config.training.recompute = recompute
    gradients, recomputed_loss = gradients_and_loss(config)
    assert recomputed_loss == loss
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("preset", ["dense", "himix_hmgen_share_all", "himix_hmgen_share_partial"])
@pytest.mark.parametrize("key, value", [("micro_batch_size", 1), ("row_multiple", 16)])
def test_how_rows_are_cut_and_filled_up_changes_no_gradient(one_process, preset, key, value):
    config = one_process(*SMALL, f"plan.preset={preset}")
    expected, loss = gradients_and_loss(config)
    setattr(config.training, key, value)
    gradients, other_loss = gradients_and_loss(config)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name in expected:
        assert (gradients[name] - expected[name]).norm() <= 1e-5 * expected[name].norm()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_refused_step_changes_no_weight_and_an_accepted_one_does(one_process, precision):
    config = one_process(*SMALL, f"training.precision={precision}")
    chunks = build_model(resolve(config, VOCABULARY))
    optimizer = build_optimizer(config, chunks)
    batch = packed_batch(4, 48, seed=3)
    before = [p.detach().clone() for p in chunks[0].parameters()]
    refused = train_step(chunks, optimizer, prepare(batch, resolve(config)), config, accept=lambda loss, norm: False)
    assert not refused.applied
    assert all(torch.equal(p, q) for p, q in zip(chunks[0].parameters(), before))
    assert train_step(chunks, optimizer, prepare(batch, resolve(config)), config).applied
    assert not all(torch.equal(p, q) for p, q in zip(chunks[0].parameters(), before))


def test_a_gradient_that_is_not_finite_is_refused_by_default(one_process):
    config = one_process(*SMALL)
    chunks = build_model(resolve(config, VOCABULARY))
    chunks[0].module.decoder.final_layernorm.weight.data[0] = float("inf")
    assert not train_step(
        chunks, build_optimizer(config, chunks), prepare(packed_batch(4, 48, seed=3), resolve(config)), config
    ).applied


def test_training_lowers_the_loss_and_evaluation_agrees_with_training(one_process):
    config = one_process(*SMALL, "optimizer.lr=1e-2")
    chunks = build_model(resolve(config, VOCABULARY))
    optimizer = build_optimizer(config, chunks)
    batch = packed_batch(4, 48, seed=3)
    sums = evaluate_step(chunks, prepare(batch, resolve(config)), config)
    evaluated = MeanLosses.of(*(x.tolist() for x in sums), config.training)
    losses = [train_step(chunks, optimizer, prepare(batch, resolve(config)), config).loss for _ in range(8)]
    assert evaluated.objective == pytest.approx(losses[0], rel=1e-6)
    assert losses[-1] < 0.7 * losses[0]


def test_the_z_loss_is_weighted_as_its_tokens_and_reported_apart(one_process):
    weights = "training.task_weights={understanding: 2.0, generation: 0.5, text: 1.0}"
    config = one_process(*SMALL, weights, "training.z_loss=0.01")
    chunks = build_model(resolve(config, VOCABULARY))
    optimizer, batch = build_optimizer(config, chunks), packed_batch(4, 48, seed=3)
    route = Route.of(batch, Plan.of(config.plan, config.model.num_layers))
    logits = chunks[0].module(route).squeeze(1)
    labels, tasks = (x.flatten()[route.targets] for x in (batch.labels, batch.task))
    cross_entropy, squares = F.cross_entropy(logits, labels, reduction="none"), logits.logsumexp(1).square()
    z_loss = objective = 0
    for task, weight in zip(Task, (2.0, 0.5, 1.0)):
        z_loss = z_loss + 0.01 * weight * squares[tasks == task].mean()
        objective = objective + weight * cross_entropy[tasks == task].mean()
    parameters = dict(chunks[0].module.named_parameters())
    expected = torch.autograd.grad(objective + z_loss, tuple(parameters.values()))

    step = prepare(batch, resolve(config))
    evaluated = MeanLosses.of(*(x.tolist() for x in evaluate_step(chunks, step, config)), config.training)
    result = train_step(chunks, optimizer, step, config, accept=lambda *_: False)
    for losses in (result.losses, evaluated):
        assert losses.objective == pytest.approx(float(objective), rel=1e-5)
        assert losses.z_loss == pytest.approx(float(z_loss), rel=1e-5)
        assert set(losses.named("v_")) == {"v_loss", *(f"v_loss_{task.name.lower()}" for task in Task), "v_z_loss"}
    for (name, parameter), gradient in zip(parameters.items(), expected):
        torch.testing.assert_close(parameter.main_grad, gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_without_a_z_loss_the_loss_is_megatron_cores(one_process, monkeypatch):
    monkeypatch.setattr("megatron_ext.training.step.cross_entropy_and_square", None)
    config = one_process(*SMALL)
    chunks = build_model(resolve(config, VOCABULARY))
    step = prepare(packed_batch(4, 48, seed=3), resolve(config))
    losses = train_step(chunks, build_optimizer(config, chunks), step, config).losses
    assert losses.z_loss is None and "z_loss" not in losses.named()

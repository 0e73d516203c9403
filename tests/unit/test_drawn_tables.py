"""Roles drawn per document: which tables there are, which documents take them, and what they cost."""

import dataclasses

import numpy as np
import pytest
import torch
from test_dense_share import rows
from test_routing import LAYERS, SHAPE, assert_equals_reference, assert_near, build, config_of, filled, plan_of
from torch.nn.functional import cross_entropy

from megatron_ext.config import DrawnTablesConfig, PlanConfig, RoleChoice
from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError
from megatron_ext.routing.dense_share import Selection
from megatron_ext.routing.document_mix import mix_batch
from megatron_ext.routing.flops import count, forward_flops
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import CLASSES, Role
from megatron_ext.routing.route import Route
from megatron_ext.token_classes import Modality, Task

EVERYTHING = [RoleChoice("all", "all", "all", ["full", "kv_only", "skip"])]


def plan(preset: str = "dense_lossless", **settings) -> Plan:
    return Plan.of(PlanConfig(preset, drawn_tables=DrawnTablesConfig(**{"count": 8} | settings)), LAYERS)


def test_documents_draw_every_table_whole_with_the_configured_odds_and_anew_in_each_step():
    batch = rows(400)
    drawn = plan(count=4, own=0.2).drawn_tables
    taken = [drawn.numbers(batch, Selection(0.2, step)) for step in range(20)]
    first = filled(batch).numpy() & (batch.positions == 0).numpy()
    odds = np.bincount(np.concatenate([numbers[first] for numbers in taken]), minlength=5) / (20 * first.sum())
    assert odds == pytest.approx([0.2] * 5, abs=0.03)
    assert not np.array_equal(taken[0], taken[1])
    for row in range(40):
        for number in batch.document[row][filled(batch)[row]].unique():
            assert len(np.unique(taken[0][row][batch.document[row] == number])) == 1
    parts = [drawn.numbers(batch.rows(i, i + 5), Selection(0.2, 0)) for i in range(0, 400, 5)]
    assert np.array_equal(np.concatenate(parts), taken[0])
    assert not drawn.numbers(batch, None).any()


def test_tables_of_every_cost_occur_and_give_no_role_that_is_not_a_choice():
    drawn = plan(count=64)
    batch = mix_batch("understanding: 30 image, 5 text, 2 answer; generation: 5 text, 30 image")
    model = config_of().model
    costs = [forward_flops(model, 64, p, count(batch, p)) for p in map(drawn.with_table, range(65))]
    assert np.histogram(costs, 4)[0].min() >= 3 and max(costs) == costs[0]
    assert drawn.with_table(0) == dataclasses.replace(
        plan(), roles=Plan.of(PlanConfig("dense_lossless"), LAYERS).roles, drawn_tables=None, name=drawn.name
    )
    seen = {}
    for layer in range(LAYERS):
        for task, modality in CLASSES:
            seen[layer, task, modality] = {drawn.with_table(n).role(layer, task, modality) for n in range(65)}
    full, kv_only, skip = ({role} for role in Role)
    for (layer, task, modality), roles in seen.items():
        last = layer == LAYERS - 1
        if (task, modality) == (Task.UNDERSTANDING, Modality.IMAGE):
            assert roles == (kv_only | skip if last else full | kv_only | skip)
        elif task == Task.GENERATION and not last:
            assert roles == full | (skip if modality == Modality.IMAGE else kv_only)
        else:
            assert roles == full


def test_drawn_tables_equal_the_reference(one_process):
    one_process(*SHAPE)
    for seed in range(4):
        roles = PlanConfig("himix_hmgen_share_partial", drawn_tables=DrawnTablesConfig(5, seed, 0.1, EVERYTHING))
        config = dataclasses.replace(config_of(), plan=roles)
        batch = rows(2) if seed == 0 else rows(8).rows(2 * seed - 2, 2 * seed)
        assert_equals_reference(build(config, seed), config, batch, 1e-9, f"seed {seed}:", Selection(0.1, seed))


def test_a_document_in_a_packed_row_equals_the_document_alone_under_a_plan_of_its_table(one_process):
    config = one_process(*SHAPE, "plan.preset=dense_lossless", "plan.drawn_tables={count: 6, own: 0.1}")
    model, plan, packed = build(config), plan_of(config), rows(4)

    def losses(batch: Batch, plan: Plan, selection: Selection | None) -> torch.Tensor:
        route = Route.of(batch, plan, logit_mask=filled(batch), selection=selection)
        return cross_entropy(model(route)[:, 0], batch.labels.flatten()[route.targets], reduction="none")

    selection, checked = plan.selection(3, 10), set()
    numbers = plan.drawn_tables.numbers(packed, selection)
    with torch.no_grad():
        together = torch.full(packed.shape, torch.nan, dtype=torch.float64)
        together[filled(packed)] = losses(packed, plan, selection)
        for row in range(4):
            for document in packed.document[row][filled(packed)[row]].unique():
                columns = packed.document[row] == document
                alone = Batch(*(getattr(packed, name)[row : row + 1, columns] for name in Batch.names()))
                alone.document = torch.zeros_like(alone.document)
                (number,) = set(numbers[row][columns.numpy()].tolist())
                checked.add(number)
                expected = losses(alone, plan.with_table(number), None)
                assert_near(together[row][columns], expected, 1e-9, f"row {row}, document {document}")
    assert len(checked) > 3


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"count": -1}, "'plan.drawn_tables.count' is -1"),
        ({"own": 1.0}, "'plan.drawn_tables.own' is 1"),
        ({"choices": [RoleChoice("all", "text", "all", ["full"])]}, "'plan.drawn_tables.choices' allow no role but"),
        ({"choices": [RoleChoice(9, "all", "image", ["skip"])]}, r"choices\[0\].layers' names layer 9"),
    ],
)
def test_an_impossible_setting_is_named(settings, named):
    with pytest.raises(UserError, match=named):
        plan(**settings)

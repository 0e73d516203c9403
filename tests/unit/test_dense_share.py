"""A share of the data with dense roles: which documents or tokens are selected, how many, and when."""

import numpy as np
import pytest
import torch
from test_routing import filled, random_rows

from megatron_ext.config import DenseShareConfig, ModelConfig, PlanConfig
from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError
from megatron_ext.routing.dense_share import Selection
from megatron_ext.routing.document_mix import mix_batch
from megatron_ext.routing.flops import count, dense, forward_flops
from megatron_ext.routing.plan import Plan
from megatron_ext.token_classes import Modality


def plan(**settings) -> Plan:
    return Plan.of(PlanConfig("himix_hmgen_share_all", dense_share=DenseShareConfig(**settings)), 4)


def rows(count: int = 40) -> Batch:
    batches = [random_rows(seed) for seed in range(count // 2)]
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in Batch.names()))


def test_documents_are_selected_whole_and_image_tokens_singly():
    batch = rows()
    of_documents = plan(of="documents").dense_share.selected(batch, Selection(0.5, 3))
    of_tokens = plan(of="image_tokens").dense_share.selected(batch, Selection(0.5, 3))
    mixed = {"documents": 0, "tokens": 0}
    for row in range(batch.shape[0]):
        for number in batch.document[row][filled(batch)[row]].unique():
            document = batch.document[row] == number
            mixed["documents"] += len(np.unique(of_documents[row][document])) > 1
            mixed["tokens"] += len(np.unique(of_tokens[row][document])) > 1
    assert mixed["documents"] == 0 and mixed["tokens"] > 20


@pytest.mark.parametrize("unit", ["documents", "image_tokens"])
def test_the_selected_share_is_the_configured_share_and_each_step_selects_others(unit):
    batch, share = rows(400), plan(of=unit).dense_share
    chosen = filled(batch) & (batch.positions == 0 if unit == "documents" else batch.modality == Modality.IMAGE)
    shares = [np.mean([share.selected(batch, Selection(p, n))[chosen].mean() for n in range(20)]) for p in (0.2, 0.7)]
    assert shares == pytest.approx([0.2, 0.7], abs=0.05)
    assert not np.array_equal(share.selected(batch, Selection(0.5, 1)), share.selected(batch, Selection(0.5, 2)))


@pytest.mark.parametrize("unit", ["documents", "image_tokens"])
def test_the_selection_does_not_depend_on_how_a_batch_is_split(unit):
    batch, share = rows(), plan(of=unit).dense_share
    whole = share.selected(batch, Selection(0.5, 7))
    assert 0 < whole.sum() < whole.size
    parts = [share.selected(batch.rows(i, i + 5), Selection(0.5, 7)) for i in range(0, 40, 5)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_the_share_moves_in_a_straight_line_and_evaluation_has_its_own():
    share = plan(of="documents", start=1, end=0, begin_at=0.25, end_at=0.75).dense_share
    assert [share.selection(i, 8).share for i in range(8)] == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    step = plan(of="documents", start=0, end=1, begin_at=0.5, end_at=0.5).dense_share
    assert [step.selection(i, 4).share for i in range(4)] == [0, 0, 1, 1]
    assert [s.evaluation for s in (share, step)] == [0, 1]
    assert plan(of="documents").dense_share.evaluation == 0
    assert plan(of="image_tokens", start=0.3).dense_share.evaluation == 0.3
    batch = rows(2)
    assert not share.selected(batch, None).any() and step.selected(batch, None).all()


def test_selected_tokens_cost_what_dense_costs():
    model = ModelConfig(4, 8, 4, 2, 16)
    batch = mix_batch("understanding: 30 image, 5 text, 2 answer; generation: 5 text, 30 image")

    def flops(measured: Plan, selection=None) -> int:
        return forward_flops(model, 100, measured, count(batch, measured, selection))

    shared = plan(of="documents")
    assert flops(shared, Selection(1.0)) == flops(dense(shared)) > flops(shared, Selection(0.0))
    assert flops(shared, Selection(0.0)) == flops(shared) == flops(Plan.of(PlanConfig("himix_hmgen_share_all"), 4))
    some = plan(of="image_tokens", start=0.5)
    taken = some.dense_share.selected(batch, None)
    assert 0 < taken.sum() < 60 and (batch.modality[taken] == Modality.IMAGE).all()
    assert flops(shared) < flops(some) < flops(dense(shared))


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"start": 1.5}, "plan.dense_share.start"),
        ({"end": -1}, "plan.dense_share.end"),
        ({"begin_at": 0.6, "end_at": 0.5}, "plan.dense_share.end_at"),
        ({"evaluation": 0.5}, "plan.dense_share.evaluation"),
    ],
)
def test_an_impossible_setting_is_named(settings, named):
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        plan(of="documents", **settings)

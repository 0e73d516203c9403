"""The costs that the paper prints follow from the cost model."""

import pytest

from megatron_ext.analysis import published_costs
from megatron_ext.config import PlanConfig
from megatron_ext.routing.plan import Plan


@pytest.mark.parametrize(
    "plan, mix, ratio",
    [
        ({"preset": "hmgen", "shallow_count": 3}, "generation: 1 image", 0.852),
        ({"preset": "hmgen", "shallow_count": 5}, "generation: 1 image", 0.754),
        ({"preset": "hmgen", "shallow_count": 3}, "generation: 30 text, 256 image", 0.867),
        ({"preset": "hmgen", "shallow_count": 5}, "generation: 30 text, 256 image", 0.779),
        ({"preset": "himix"}, "understanding: 256 image, 72 text", 0.242),
    ],
)
def test_the_papers_accounting_gives_the_papers_figures(plan, mix, ratio):
    assert round(published_costs.flops_ratio(Plan.of(PlanConfig(**plan), 16), mix), 3) == ratio


def test_the_published_depth_head_has_the_published_number_of_parameters():
    heads = {row["head"]: row["parameters"] for row in published_costs.compare_heads()}
    assert round(heads["7B, 4 codes, 6 x 2560"] / 1e6, 1) == 527.1


def test_printed_ratios_are_ours_to_the_digits_printed():
    for row in published_costs.compare():
        digits = 0.005 if "HiMix-HMGen" not in row["method"] else 0.015  # unified: about the mean of the two tasks
        assert abs(row["ours"] - row["paper"]) <= digits, row

"""Rows of a step are spread over replicas and micro-batches by their exact cost, which needs no token of them."""

import pickle

import numpy as np
import pytest

from megatron_ext import config_file
from megatron_ext.config import Config, micro_batch_count
from megatron_ext.data.composition import Composition, rise_and_fall, shares_of, spread
from megatron_ext.data.format import ANSWER, DRAWN, IMAGE, TEXT
from megatron_ext.data.packed_rows import NO_ROW, PackedRows
from megatron_ext.routing.flops import count, dense, forward_flops
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.row_costs import RowCosts
from megatron_ext.training.run import describe_replicas
from support.data_sets import captions, mixture, texts, write

LENGTH = 64
SHARE = "plan.dense_share={of: documents, start: 0.25, evaluation: 0}"

INTERLEAVED = ["parallel.pipeline=4", "parallel.virtual_pipeline=2"]


def row_costs(*overrides: str) -> RowCosts:
    config = config_file.load(Config, [], ["model.num_layers=6", *overrides])
    return RowCosts(Plan.from_config(config), config.model, vocab_size=200, iterations=10)


@pytest.fixture
def every_layout(tmp_path):
    """A mixture of all four layouts, with long documents that are cut and dropped texts."""
    random, image = np.random.default_rng(0), list(range(110, 118))

    def text(longest):
        return random.integers(2, 92, random.integers(1, longest)).tolist()

    edits = [[(IMAGE, image), (TEXT, text(9)), (DRAWN, image), (TEXT, text(9)), (ANSWER, text(5))] for _ in range(20)]
    edits += [[(IMAGE, image), (TEXT, text(9)), (DRAWN, image)] for _ in range(20)]
    edits += [[(TEXT, text(200))] for _ in range(9)] + [[(TEXT, text(5)), (IMAGE, image), (TEXT, text(9))]]
    questions = [[(TEXT, text(90)), (ANSWER, text(90)), (TEXT, text(9)), (ANSWER, text(9))] for _ in range(20)]
    pairs = captions(tmp_path / "pairs", 40)
    sources = {
        pairs: ("generation", "understanding"),
        texts(tmp_path / "plain", 30, longest=200): ("text",),
        write(tmp_path / "edits", edits): ("interleaved",),
        write(tmp_path / "questions", questions): ("understanding",),
    }
    named = [(path, task, 1.0) for path, tasks in sources.items() for task in tasks]
    return mixture(*named, caption_dropout=0.3, generation_text=True)


@pytest.mark.parametrize(
    "plan",
    ["plan.preset=dense", "plan.preset=himix_hmgen_share_partial", "plan.projections={kind: delta, rank: 4}"],
)
def test_the_cost_of_a_row_is_the_flops_of_its_tokens(every_layout, plan):
    rows, costs = PackedRows(every_layout, LENGTH), row_costs(plan)
    expected = [
        forward_flops(costs.model, 200, costs.plan, count(rows.batch(row, row + 1), costs.plan)) for row in range(7, 47)
    ]
    assert costs(rows.contents(7, 47), 0).tolist() == expected


def test_the_cost_of_a_row_of_several_codes_counts_projector_and_depth_head(tmp_path):
    pairs, plain = captions(tmp_path / "pairs", 40, depth=4), texts(tmp_path / "plain", 9)
    blend = mixture((pairs, "generation", 1.0), (pairs, "understanding", 1.0), (plain, "text", 1.0))
    codes = "model.image_codes={depth: 4, codebook: random, codebook_size: 64, width: 8}"
    rows, costs = PackedRows(blend, LENGTH), row_costs("plan.preset=himix_hmgen_share_all", codes)
    batches = [rows.batch(row, row + 1) for row in range(20)]
    expected = [forward_flops(costs.model, 200, costs.plan, count(batch, costs.plan)) for batch in batches]
    assert costs(rows.contents(0, 20), 0).tolist() == expected


def test_with_a_dense_share_a_row_costs_what_is_expected(every_layout):
    rows, costs = PackedRows(every_layout, LENGTH), row_costs("plan.preset=himix_hmgen_share_all", SHARE)
    contents = rows.contents(0, 30)
    plain, whole = row_costs("plan.preset=himix_hmgen_share_all"), row_costs()
    expected = 0.75 * plain(contents, 0) + 0.25 * whole(contents, 0)
    np.testing.assert_allclose(costs(contents, 0), expected, rtol=1e-4)
    assert whole.plan.roles == dense(costs.plan).roles


def test_with_drawn_tables_a_row_costs_their_mean(every_layout):
    rows, costs = PackedRows(every_layout, LENGTH), row_costs("plan.drawn_tables={count: 3, own: 0.25}")
    contents = rows.contents(0, 30)
    batch, of_tables = [rows.batch(row, row + 1) for row in range(30)], []
    for plan in map(costs.plan.with_table, range(4)):
        of_tables.append([forward_flops(costs.model, 200, plan, count(rows, plan)) for rows in batch])
    np.testing.assert_allclose(costs(contents, 0), np.mean(of_tables, axis=0), rtol=1e-3)
    assert len(set(map(tuple, of_tables))) > 2


@pytest.mark.parametrize("replicas, size, multiple", [(1, 4, 1), (3, 2, 1), (5, 3, 4), (30, 1, 1)])
def test_balanced_replicas_share_the_rows_of_a_step_and_resume_alike(every_layout, replicas, size, multiple):
    whole = Composition(size, multiple, row_costs("plan.preset=himix_hmgen_share_all"))
    whole = pickle.loads(pickle.dumps(whole))  # a worker process gets it so
    rows = PackedRows(every_layout, LENGTH)
    numbers = [whole.row_numbers(rows, 2, 24, replica, replicas) for replica in range(replicas)]
    held = [own[own != NO_ROW] for own in numbers]
    assert sorted(np.concatenate(held).tolist()) == list(range(48, 72))
    assert [len(own) for own in held] == shares_of(24, replicas)
    assert [len(own) for own in numbers] == [size * micro_batch_count(len(own), size, multiple) for own in held]
    resumed = PackedRows(every_layout, LENGTH)
    np.testing.assert_array_equal(whole.row_numbers(resumed, 2, 24, 0, replicas), numbers[0])


def test_balanced_work_is_more_equal_than_work_in_order(every_layout):
    rows, costs = PackedRows(every_layout, LENGTH), row_costs("plan.preset=himix_hmgen_share_all")
    of_row = costs(rows.contents(0, 64), 0)

    def most(composition):
        """The work of the busiest replica and of the largest micro-batch, relative to the means."""
        numbers = [composition.row_numbers(rows, 0, 64, replica, 4) for replica in range(4)]
        work = np.array([of_row[own].reshape(-1, 2).sum(axis=1) for own in numbers])
        return work.sum(axis=1).max() / work.sum(axis=1).mean(), work.max() / work.mean()

    in_order, balanced = most(Composition(2)), most(Composition(2, costs=costs))
    assert balanced[0] < 1.001 and in_order[0] > 1.02
    assert balanced[1] < 1.06 < in_order[1]  # the two rows of a micro-batch cannot be more equal


def test_rows_are_given_out_by_falling_cost_to_where_work_is_least_and_exchanged_while_that_helps():
    assert [b.tolist() for b in spread(np.array([1, 5, 4, 4, 3]), [2, 3, 0])] == [[1, 4], [0, 2, 3], []]
    # 9 + 6 + 5 and 7 + 6 + 5 to begin with; then the first gives its second 6 for a 5 of the other.
    assert [b.tolist() for b in spread(np.array([5, 6, 9, 7, 6, 5]), [3, 3])] == [[0, 2, 5], [1, 3, 4]]
    assert rise_and_fall([7, 1, 5, 3, 9]) == [1, 2, 4, 0, 3]  # costs 1, 5, 9, 7, 3


@pytest.mark.parametrize(
    "rows, replicas, settings, line",
    [
        (24, 8, [], "data 8"),
        (24, 5, [], "data 5 (up to 5 of 24 rows each, 4 % idle)"),
        (6, 1, INTERLEAVED, "data 1 (2 of 8 micro-batches empty, 25 % idle, training.micro_batch_size=2 fills them)"),
        (2, 1, INTERLEAVED, "data 1 (2 of 4 micro-batches empty, 50 % idle)"),
    ],
)
def test_a_run_says_what_its_replicas_lose(rows, replicas, settings, line):
    more = ["training.micro_batch_size=1", f"training.global_batch_size={rows}"]
    config = config_file.load(Config, [], [*settings, *more])
    assert describe_replicas(config, replicas) == line
    composition = Composition(1, config.micro_batch_multiple)
    numbers = composition.row_numbers(None, 0, rows, 0, replicas)
    assert (numbers == NO_ROW).sum() == (2 if settings else 0)

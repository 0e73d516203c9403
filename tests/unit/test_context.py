"""Context ranks hold every token once, have equal work, and send one another the keys that their queries see."""

from dataclasses import replace

import numpy as np
import pytest

import parity
from megatron_ext import config_file
from megatron_ext.config import Config, PlanConfig
from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError
from megatron_ext.routing.context import attention_load
from megatron_ext.routing.groups import plan_groups
from megatron_ext.routing.image_code_costs import depth_head_multiply_adds
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import Role
from megatron_ext.routing.route import Route, placed
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from megatron_ext.training.prepare import Preparation
from megatron_ext.transformer.config_checks import validate_layout
from megatron_ext.transformer.resolved import resolve
from support import reference

LAYERS, HIDDEN, FFN, VOCABULARY = 8, 4096, 11008, 32000
SHAPE = [f"model.num_layers={LAYERS}", f"model.hidden_size={HIDDEN}", "model.num_attention_heads=32"]
CODES = [
    "model.image_codes={depth: 4, codebook: random, codebook_size: 16384, width: 64, head: {num_layers: 4, "
    "hidden_size: 2048, num_attention_heads: 16}}"
]


def random_plan(seed: int) -> Plan:
    """A table of random roles, with runs of layers that are alike."""
    random, dense = np.random.default_rng(seed), Plan.of(PlanConfig(), LAYERS)
    classes, roles = len(dense.roles[0]), []
    while len(roles) < LAYERS:
        chosen = tuple(Role(int(r)) for r in random.choice(list(Role), classes, p=[0.6, 0.25, 0.15]))
        roles += [chosen] * int(random.integers(1, 4))
    return replace(dense, roles=tuple(roles[:LAYERS]))


def gathered(route: Route, layer, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of the FULL and of the KV_ONLY rows, gathered from the ranks of sequence parallelism."""
    of_ranks = [np.split(rows, np.cumsum(layer.slices.sizes)[:-1]) for rows in route.order.reshape(ranks, -1)]
    return tuple(
        np.concatenate([rows[i] for rows in of_ranks for i in chosen] or [route.order[:0]])
        for chosen in (layer.slices.full, layer.slices.kv_only)
    )


def sent(route: Route, layer, ranks: int, to: int) -> list[int]:
    """The tokens whose keys a rank sends another one, in the order in which they arrive."""
    exchange, (full, kv_only) = layer.exchange, gathered(route, layer, ranks)
    of_full = np.cumsum([0, *exchange.sent_full])[to : to + 2]
    of_kv_only = np.cumsum([0, *(n - f for n, f in zip(exchange.sent, exchange.sent_full))])[to : to + 2]
    return [*full[exchange.full[slice(*of_full)]], *kv_only[exchange.kv_only[slice(*of_kv_only)]]]


def computed_pairs(routes: list[Route], number: int, ranks: int) -> list[tuple[int, int]]:
    """The pairs of query and key that all context ranks compute in a layer."""
    pairs = []
    for rank, route in enumerate(routes):
        layer = route.layers[number]
        assert layer.slices == routes[0].layers[number].slices  # equal work in every product
        full, kv_only = gathered(route, layer, ranks)
        queries = full if layer.queries is None else full[layer.queries.index]
        keys = queries
        if layer.exchange is not None:
            messages = [sent(other, other.layers[number], ranks, rank) for other in routes]
            assert [len(message) for message in messages] == layer.exchange.received
            kv_only = np.concatenate([kv_only, *(np.array(message, int) for message in messages)])
        if layer.keys is not None:
            keys = np.concatenate([full, kv_only])[layer.keys.index]
        first_query = 0
        for q, k, first_key in zip(layer.query_lengths, layer.key_lengths, layer.key_starts):
            seen = keys[first_key : first_key + k]
            for i, query in enumerate(queries[first_query : first_query + q]):
                pairs += [(int(query), int(key)) for key in seen[: k - q + i + 1]]
            first_query += q
    return pairs


@pytest.mark.parametrize("seed", range(12))
def test_ranks_together_compute_every_visible_pair_once(seed):
    batch = parity.packed_batch(2, 48, seed, interleaved=seed % 2 == 0).arrays()
    plan, size, ranks, multiple = random_plan(seed), 2 + seed % 3, 1 + seed % 2, 1 + 3 * (seed % 4 == 3)
    options = {"fixed_length": seed % 3 == 0}
    routes = [Route.arrays(batch, plan, ranks, multiple, context=(c, size), **options) for c in range(size)]
    real = np.flatnonzero(batch.document != PADDING_DOCUMENT)
    assert sorted(np.concatenate([route.order[route.order >= 0] for route in routes])) == list(real)
    learnt = np.flatnonzero((batch.loss_mask > 0) & (batch.document != PADDING_DOCUMENT))
    assert sorted(np.concatenate([route.targets for route in routes])) == list(learnt)
    document, messages = batch.document_starts().ravel().cumsum(), 0
    for number in range(LAYERS):
        role = np.array(reference.roles_of(plan, number, batch.tensors())).ravel()
        keys = [np.flatnonzero((document == document[q]) & (role != Role.SKIP)) for q in range(role.size)]
        visible = {(q, int(k)) for q in np.flatnonzero(role == Role.FULL) for k in keys[q] if k <= q}
        pairs = computed_pairs(routes, number, ranks)
        assert len(pairs) == len(visible) and set(pairs) == visible
        messages += sum(sum(r.layers[number].exchange.received) for r in routes if r.layers[number].exchange)
    assert messages


def rows_of(documents: list[tuple[Task, list[tuple[Modality, int]]]], length: int) -> Batch:
    """One row of documents, each a task and its runs of tokens; those that do not fit are left out."""
    fields = {name: np.zeros((1, length), kind) for name, kind in Batch.DTYPES.items()}
    fields["document"][:] = PADDING_DOCUMENT
    start = 0
    for number, (task, runs) in enumerate(documents):
        modality = np.repeat(*zip(*runs))
        if start + modality.size > length:
            break
        place = slice(start, start + modality.size)
        learnt = Modality.IMAGE if task == Task.GENERATION else Modality.TEXT
        values = {"document": number, "task": task, "modality": modality, "loss_mask": modality == learnt}
        for name, value in (values | {"positions": np.arange(modality.size)}).items():
            fields[name][0, place] = value
        start += modality.size
    return Batch(**fields)


def documents(kind: str, length: int, seed: int) -> list:
    random, text, image = np.random.default_rng(seed), Modality.TEXT, Modality.IMAGE

    def short() -> tuple[Task, list]:
        task, words = Task(int(random.choice(list(Task)))), int(random.integers(10, 60))
        if task == Task.TEXT:
            return task, [(text, 8 * words)]
        runs = [(text, words), (image, 256)]
        return task, [*runs, (text, 2)] if task == Task.GENERATION else [(text, 3), *reversed(runs)]

    interleaved = [run for _ in range(length // 900) for run in ((text, int(random.integers(20, 200))), (image, 256))]
    return {
        "short": [short() for _ in range(length // 100)],
        "interleaved": [(Task.UNDERSTANDING, interleaved), *(short() for _ in range(40))],
        "generation": [(Task.GENERATION, [(text, 77), (image, length - 77)])],
        "text": [(Task.TEXT, [(text, length)])],
    }[kind]


def preparation(*settings: str) -> Preparation:
    return Preparation.of(resolve(config_file.load(Config, [], [*SHAPE, *settings])), VOCABULARY, training=False)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["short", "interleaved", "generation", "text"])
def test_ranks_have_equal_work_under_random_tables(kind, size):
    batch, prepare = rows_of(documents(kind, 16384, size), 16384), preparation(f"parallel.context={size}")
    for seed in range(4):
        plan = random_plan(seed)
        placement = replace(prepare, plan=plan).placement(batch)
        held = placement.owner == np.arange(size)[:, None]
        work = (HIDDEN * VOCABULARY) * (held & (batch.loss_mask.ravel() > 0)).sum(1).astype(float)
        for roles in plan_groups(plan).roles:
            role = np.array([*roles, Role.SKIP])[placement.group]
            pairs = (held * attention_load(placement.group, placement.document, [roles], 1)).sum(1)
            full, kv_only = ((held & (role == r)).sum(1) for r in (Role.FULL, Role.KV_ONLY))
            assert pairs.max() <= 1.15 * pairs.mean()
            assert full.max() <= max(1.01 * full.mean(), full.mean() + len(roles))  # groups are rounded up
            work += full * (4 * HIDDEN + 3 * FFN) * HIDDEN + kv_only * 2 * HIDDEN**2 + 2 * HIDDEN * pairs
        assert work.max() <= 1.05 * work.mean()


@pytest.mark.parametrize("seed", [2, 4, 5])
def test_targets_of_several_codes_weigh_what_the_depth_head_computes_for_them(seed):
    """Here it is seven times the output head; were it taken to be the same, a rank would have 10 % too much work."""
    random, text = np.random.default_rng(seed), Modality.TEXT
    picture = (Task.GENERATION, [(text, 20), (Modality.IMAGE, 256)])
    row = [
        picture if random.random() < 0.3 else (Task.TEXT, [(text, int(random.integers(200, 300)))]) for _ in range(10)
    ]
    batch, prepare = rows_of(row, 2048), preparation("parallel.context=2", *CODES)
    batch.codes = np.zeros((*batch.shape, 4), np.int32)
    held = prepare.placement(batch).owner == np.arange(2)[:, None]
    head = np.where(batch.predicts_image(), depth_head_multiply_adds(prepare.model), HIDDEN * VOCABULARY)
    work = LAYERS * (4 * HIDDEN + 3 * FFN) * HIDDEN * held + (head * (batch.loss_mask > 0)).ravel() * held
    assert work.sum(1).max() <= 1.02 * work.sum(1).mean()


@pytest.mark.parametrize("preset", ["dense", "himix"])
def test_short_documents_send_few_keys(preset):
    """Whole documents need no key from elsewhere; only those that complete a rank's share are cut."""
    batch = rows_of([(Task.UNDERSTANDING, [(Modality.IMAGE, 256), (Modality.TEXT, 256)])] * 64, 64 * 512)
    placement = placed(batch, Plan.of(PlanConfig(preset=preset), LAYERS), 4)
    for roles in set(plan_groups(Plan.of(PlanConfig(preset=preset), LAYERS)).roles):
        needs = placement.needs(roles)
        assert needs is None or needs.sum(1).max() <= 0.02 * 64 * 512


def test_a_rank_copies_its_own_micro_batches_alone():
    config = config_file.load(Config, [], [*parity.BASE, "plan.preset=himix", "parallel.context=2"])
    batch = parity.packed_batch(4, 64, seed=1)
    step = Preparation.of(resolve(config), VOCABULARY, training=False).step_input(batch)
    one, two = step.of_rank(0), step.of_rank(1)
    assert len(one.micro_batches) == len(two.micro_batches) == 4 and not one.others and not two.others
    assert one.micro_batches is step.micro_batches and two.micro_batches is step.others[0]
    assert sum(len(m.labels) for m in one.micro_batches + two.micro_batches) == step.loss_tokens.sum()


def test_decoding_with_a_cache_takes_whole_documents():
    batch = parity.packed_batch(1, 48, seed=1)
    with pytest.raises(ValueError, match="replicas"):
        Route.arrays(batch, Plan.of(PlanConfig(), LAYERS), cached=True, context=(0, 2))


def test_processes_that_context_ranks_do_not_fill_are_refused_in_one_line():
    config = config_file.load(Config, [], ["parallel.tensor=2", "parallel.context=3"])
    with pytest.raises(UserError, match=r"^config: 8 processes .*parallel.tensor x parallel.context x .* \(6\)"):
        validate_layout(config, 8)

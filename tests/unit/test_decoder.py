"""Decoding with a cache gives the logits of the full forward pass, under any plan, for image tokens of one code and of
several."""

import numpy as np
import pytest
import torch

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.generation.cache import Cache, layer_capacities
from megatron_ext.generation.decoder import Decoder
from megatron_ext.generation.document_batch import document_batch
from megatron_ext.generation.pipelined_model import PipelinedModel
from megatron_ext.routing.plan import PRESETS, Plan
from megatron_ext.routing.route import Route
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from megatron_ext.transformer.model import build_chunks
from megatron_ext.transformer.resolved import resolve

VOCABULARY = 64
SHAPE = ["model.num_layers=5", "model.hidden_size=32", "model.num_attention_heads=4", "model.num_query_groups=2"]
DEPTH, CODES = 4, 20
FOUR_CODES = [
    f"model.image_codes={{depth: {DEPTH}, codebook: vq, codebook_size: {CODES}, width: 6,"
    " head: {num_layers: 2, hidden_size: 16, num_attention_heads: 2}}"
]


class TokenIds:
    """The part of a vocabulary that decoding needs: ids from 40 on are image tokens."""

    pad, image_offset = 3, 40

    @staticmethod
    def is_image(ids):
        return ids >= 40


def documents(seed: int) -> list[list[int]]:
    """Runs of text and images in any order, of different lengths."""
    random = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=random))

    return [
        [number(40, 64) if run % 2 else number(0, 40) for run in range(number(1, 6)) for _ in range(number(1, 9))]
        for _ in range(6)
    ]


def tasks_of(tokens: list[list[int]], seed: int) -> list[list[Task]]:
    """The tasks of tokens: a document each of understanding, generation and text, and interleaved ones, in which each
    image is given or drawn."""
    random = torch.Generator().manual_seed(seed)
    tasks = [[task] * len(ids) for task, ids in zip(Task, tokens)]
    for ids in tokens[len(Task) :]:
        image, drawn, interleaved = False, False, []
        for token in ids:
            if token >= 40 and not image:
                drawn = bool(torch.rand(1, generator=random) < 0.5)
            image = token >= 40
            interleaved.append(Task.GENERATION if image and drawn else Task.UNDERSTANDING)
        tasks.append(interleaved)
    return tasks


def full_logits(model, plan: Plan, tokens: list[list[int]], tasks: list[list[Task]]) -> list[torch.Tensor]:
    """[tokens, vocabulary] of each document in one forward pass; ``tasks``: of each token."""
    longest = max(map(len, tokens))
    batch = Batch.zeros(len(tokens), longest)
    batch.document[:] = PADDING_DOCUMENT
    for row, ids in enumerate(tokens):
        n = len(ids)
        batch.tokens[row, :n] = torch.tensor(ids)
        batch.positions[row, :n] = torch.arange(n)
        batch.document[row, :n] = 0
        batch.task[row, :n] = torch.tensor(tasks[row], dtype=batch.task.dtype)
    batch.modality[batch.tokens >= 40] = Modality.IMAGE
    with torch.no_grad():
        route = Route.of(batch, plan, logit_mask=torch.ones(batch.shape, dtype=torch.bool))
        return list(model(route).squeeze(1).split([len(ids) for ids in tokens]))


def full_outputs(
    model, plan: Plan, tokens: list[list[int]], tasks: list[list[Task]], codes: list[list[list[int]]]
) -> list[tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]]:
    """For each document in one forward pass: by place, the logits of the next token where it is text, and those of its
    codes, [depth, codebook], where it is an image token of ``codes``. What follows the last token is text."""
    batch = document_batch(TokenIds, tokens, tasks, torch.zeros(len(tokens), dtype=torch.int64), DEPTH, codes)
    before_image = (batch.modality == Modality.IMAGE).roll(-1, 1) & (batch.labels >= 40)
    route = Route.of(batch, plan, logit_mask=torch.ones(batch.shape, dtype=torch.bool), code_mask=before_image)
    with torch.no_grad():
        logits, hidden = model(route, hidden_rows=True)
        following = batch.codes.roll(-1, 1)[before_image]
        of_codes = model.depth_head.logits(hidden.squeeze(1), following, model.code_vectors)
    outputs = [({}, {}) for _ in tokens]
    before_text = (batch.document == 0) & ~before_image
    for kind, mask, rows in ((0, before_text, logits.squeeze(1)), (1, before_image, of_codes)):
        for (row, place), values in zip(mask.nonzero().tolist(), rows, strict=True):
            outputs[row][kind][place] = values
    return outputs


def build(overrides: list[str]):
    config = config_file.load(Config, [], SHAPE + overrides)
    several = config.model.image_codes.depth > 1
    (model,) = build_chunks(resolve(config, TokenIds.image_offset if several else VOCABULARY))
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        parameter.data.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.2 * noise)
    if model.code_vectors is not None:
        model.code_vectors.weight.normal_(generator=random)
        model.depth_head.hidden_linear.weight.data *= 5  # else the codes hardly depend on what stands before
    return model.eval(), Plan.of(config.plan, config.model.num_layers)


def cache_for(plan: Plan, rows: int, tokens: int, dtype: torch.dtype, head_size: int = 8) -> Cache:
    capacities = layer_capacities(plan, [tokens] * 6)
    return Cache(plan, capacities, rows, groups=2, head_size=head_size, dtype=dtype, device=torch.device("cpu"))


PLANS = {
    **{preset: [f"plan.preset={preset}"] for preset in PRESETS},
    "late himix": ["plan.preset=himix_hmgen_share_partial", "plan.himix_start=3"],
    "some image tokens dense": [
        "plan.preset=himix_hmgen_share_all",
        "plan.dense_share={of: image_tokens, start: 0.5}",
    ],
    "learned image positions": ["plan.preset=himix_hmgen_share_all", "model.max_image_tokens=30"],
    "bias, norms of queries and keys, wider heads": [
        "plan.preset=himix_hmgen_share_partial",
        *("model.qkv_bias=true", "model.qk_norm=true", "model.head_size=12"),
    ],
    "any table": [
        "plan.table=[{layers: '1', task: all, modality: text, role: skip},"
        "{layers: '2', task: all, modality: text, role: kv_only},"
        "{layers: '3', task: all, modality: all, role: kv_only},"
        "{layers: '4', task: generation, modality: image, role: kv_only}]"
    ],
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("chunk_size", [1, 3, 512], ids=["token by token", "chunks of 3", "prompt at once"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=["float32", "float64"]
)
def test_cached_decoding_is_the_full_forward_pass(one_process, monkeypatch, plan, chunk_size, dtype, tolerance):
    """Up to rounding, which grows with the logits."""
    one_process(*SHAPE)
    model, plan = build(PLANS[plan])
    model = model.to(dtype)
    for seed in range(3):
        tokens = documents(seed)
        tasks = tasks_of(tokens, seed)
        expected = full_logits(model, plan, tokens, tasks)
        cache = cache_for(plan, len(tokens), max(map(len, tokens)), dtype, model.config.kv_channels)
        decoder = Decoder(PipelinedModel([model]), plan, TokenIds, len(tokens), cache)
        largest = max(float(logits.abs().max()) for logits in expected)
        monkeypatch.setattr("megatron_ext.generation.decoder.PREFILL_CHUNK", max(2, chunk_size))
        for start in range(0, max(map(len, tokens)), chunk_size):
            chunk, chunk_tasks = ([row[start : start + chunk_size] for row in rows] for rows in (tokens, tasks))
            logits = decoder.advance(chunk, chunk_tasks).logits
            for row, ids in enumerate(chunk):
                if ids:
                    error = logits[row] - expected[row][start + len(ids) - 1]
                    assert error.abs().max() < tolerance * largest
                else:
                    assert not logits[row].any()


@pytest.mark.parametrize("seed", range(3))
def test_an_interleaved_document_step_by_step_is_one_pass_under_any_roles(one_process, seed):
    """Given and drawn images of one document take part, lend their keys or skip, each in layers of its own."""
    one_process(*SHAPE)
    random = np.random.default_rng(seed)
    entries = [
        f"{{layers: '{layer}', task: {task}, modality: {modality}, role: {random.choice(['full', 'kv_only', 'skip'])}}}"
        for layer in range(5)
        for task, modality in (("understanding", "text"), ("understanding", "image"), ("generation", "image"))
    ]
    model, plan = build([f"plan.table=[{','.join(entries)}]"])
    image = random.integers(40, 64, (3, 6))
    drawn = [Task.GENERATION] * 6
    tokens = [1, *image[0], 3, 4, *image[1], 5, *image[2], 6, 7]
    given = [Task.UNDERSTANDING] * 9
    tasks = [*given, *drawn, given[0], *[drawn, given[:6]][seed % 2], *given[:2]]
    (expected,) = full_logits(model, plan, [tokens], [tasks])
    decoder = Decoder(PipelinedModel([model]), plan, TokenIds, 1, cache_for(plan, 1, len(tokens), torch.float32))
    for place, (token, task) in enumerate(zip(tokens, tasks, strict=True)):
        logits = decoder.advance([[token]], [[task]]).logits
        torch.testing.assert_close(logits[0], expected[place], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("plan", ["himix_hmgen_share_partial", "learned image positions", "learned codes"])
def test_cached_decoding_of_four_codes_is_the_full_forward_pass(one_process, monkeypatch, plan):
    """The hidden states, and all depths' logits from them, one depth after the other."""
    one_process(*SHAPE)
    codes_of_model = (
        [FOUR_CODES[0].replace("width: 6,", "").replace("codebook: vq,", "")] if plan == "learned codes" else FOUR_CODES
    )
    model, plan = build(PLANS.get(plan, PLANS["himix_hmgen_share_all"]) + codes_of_model)
    tokens = documents(0)
    tasks = tasks_of(tokens, 0)
    random = torch.Generator().manual_seed(0)
    codes = [torch.randint(CODES, (sum(t >= 40 for t in row), DEPTH), generator=random).tolist() for row in tokens]
    expected = full_outputs(model, plan, tokens, tasks, codes)
    longest, compared = max(map(len, tokens)), 0
    decoder = Decoder(
        PipelinedModel([model]), plan, TokenIds, len(tokens), cache_for(plan, len(tokens), longest, torch.float32)
    )
    monkeypatch.setattr("megatron_ext.generation.decoder.PREFILL_CHUNK", 2)
    ends = [3, *range(4, longest + 1)]
    for start, end in zip([0, *ends], ends):
        read = [sum(t >= 40 for t in row[:start]) for row in tokens]
        draws = [end < len(row) and row[end] >= 40 for row in tokens]
        chunk, chunk_tasks = ([row[start:end] for row in rows] for rows in (tokens, tasks))
        chunk_codes = [row[n : n + sum(t >= 40 for t in part)] for row, n, part in zip(codes, read, chunk)]
        outputs = decoder.advance(chunk, chunk_tasks, chunk_codes, draws)
        for row, (of_text, of_codes) in enumerate(expected):
            place = start + len(chunk[row]) - 1
            if not chunk[row]:
                continue
            if draws[row]:
                decoding = model.depth_head.decoding(outputs.hidden[row : row + 1], model.code_vectors)
                for depth, code in enumerate(codes[row][read[row] + len(chunk_codes[row])]):
                    torch.testing.assert_close(decoding.logits()[0], of_codes[place][depth], atol=1e-4, rtol=1e-4)
                    decoding.append(torch.tensor([code]))
                    compared += 1
            else:
                torch.testing.assert_close(outputs.logits[row], of_text[place], atol=1e-4, rtol=1e-4)
    assert compared > 20 * DEPTH


def test_a_token_that_skips_a_layer_takes_no_room_in_it(one_process):
    one_process(*SHAPE)
    _, plan = build(["plan.preset=hmgen", "plan.shallow_layers=[1, 2]"])
    counts = [0, 0, 7, 100, 0, 0]  # generation: 7 text and 100 image tokens
    assert layer_capacities(plan, counts) == [107, 7, 7, 107, 107]

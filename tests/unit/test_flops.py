"""What a plan costs: by hand, as the paper prints it, as torch counts it, as the model's parameters are."""

import dataclasses
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_ext import config_file, distributed
from megatron_ext.config import Config, ModelConfig, PlanConfig, ProjectionConfig
from megatron_ext.errors import UserError
from megatron_ext.files import read_json
from megatron_ext.routing.document_mix import mix_batch
from megatron_ext.routing.flops import (
    class_flops,
    count,
    dense,
    forward_flops,
    head_flops,
    layer_flops,
    lossless_dense,
    parameter_count,
    query_width,
    stage_flops,
    with_all_logits,
)
from megatron_ext.routing.memory import activation_bytes, depth_head_bytes
from megatron_ext.routing.pipeline_layout import stage_layers
from megatron_ext.routing.plan import PRESETS, Plan, Projections
from megatron_ext.routing.roles import Role, class_index
from megatron_ext.routing.route import Route
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from megatron_ext.training.config_checks import validate
from megatron_ext.training.prepare import Preparation
from megatron_ext.transformer.model import build_chunks
from megatron_ext.transformer.resolved import resolve
from parity import VOCABULARY, packed_batch

REPOSITORY = Path(__file__).parents[2]

UNDERSTANDING_IMAGE = class_index(Task.UNDERSTANDING, Modality.IMAGE)
UNDERSTANDING_TEXT = class_index(Task.UNDERSTANDING, Modality.TEXT)
GENERATION_TEXT = class_index(Task.GENERATION, Modality.TEXT)
GENERATION_IMAGE = class_index(Task.GENERATION, Modality.IMAGE)

# h 8, g 4, f 16: a token's query and output take 64 multiply-adds each, key and value 64 together, the FFN 384.
TINY = ModelConfig(num_layers=4, hidden_size=8, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=16)


CODES = [
    "model.image_codes={depth: 4, codebook: vq, codebook_size: 96, width: 24, "
    "head: {num_layers: 2, hidden_size: 48, num_attention_heads: 4}}"
]
"""Image tokens of four codes."""
LEARNED_CODES = [*CODES, "model.image_codes.codebook=''", "model.image_codes.width=null"]

FEATURES = ["model.head_size=48", "model.qkv_bias=true", "model.qk_norm=true"]
"""The head size is no longer hidden_size / num_attention_heads."""


def plan_of(preset: str, num_layers: int = 4, **settings) -> Plan:
    return Plan.of(PlanConfig(preset, **settings), num_layers)


def random_plan(seed: int) -> Plan:
    generator = random.Random(seed)
    roles = [tuple(generator.choice(list(Role)) for _ in range(6)) for _ in range(3)]
    return Plan("random", (*roles, roles[0]), Projections())


# ---- what is counted


def counted_slowly(batch, plan):
    """Tokens, pairs, logits, image tokens and code targets by going through all pairs of tokens of a row."""
    tokens, logits, images, codes = [0] * 6, 0, 0, 0
    visible = [[0] * 6 for _ in plan.roles]
    for row in range(batch.shape[0]):
        document, position = batch.document[row].tolist(), batch.positions[row].tolist()
        kinds = class_index(batch.task[row], batch.modality[row]).tolist()
        for i, kind in enumerate(kinds):
            if document[i] == PADDING_DOCUMENT:
                continue
            tokens[kind] += 1
            several = batch.codes is not None
            before_image = batch.modality[row, i + 1 : i + 2].tolist() == [Modality.IMAGE]
            before_image &= document[i + 1 : i + 2] == [document[i]]
            images += several and batch.modality[row, i] == Modality.IMAGE
            codes += several and batch.loss_mask[row, i] > 0 and before_image
            logits += batch.loss_mask[row, i] > 0 and not (several and before_image)
            for layer, roles in enumerate(plan.roles):
                visible[layer][kind] += sum(
                    document[j] == document[i] and position[j] <= position[i] and roles[kinds[j]] != Role.SKIP
                    for j in range(len(kinds))
                    if roles[kind] == Role.FULL
                )
    return tuple(tokens), tuple(map(tuple, visible)), int(logits), int(images), int(codes)


@pytest.mark.parametrize("seed, depth", [(0, 1), (1, 1), (2, 4)])
def test_counts_are_those_of_a_loop_over_all_pairs(seed, depth):
    batch, plan = packed_batch(3, 40, seed), random_plan(seed)
    if depth > 1:
        batch.codes = torch.zeros(3, 40, depth, dtype=torch.int32)
        assert count(batch, plan).codes
    assert (batch.document == PADDING_DOCUMENT).any()
    assert dataclasses.astuple(count(batch, plan)) == counted_slowly(batch, plan)


def test_counts_of_rows_add_up_to_those_of_the_batch():
    batch, plan = packed_batch(4, 40, seed=5), random_plan(5)
    assert count(batch.rows(0, 1), plan) + count(batch.rows(1, 4), plan) == count(batch, plan)


def test_rows_of_padding_alone_count_nothing():
    batch = packed_batch(1, 8, seed=0)
    batch.document[:] = PADDING_DOCUMENT
    plan = random_plan(0)
    assert forward_flops(TINY, 100, plan, count(batch, plan)) == 0


def test_lossless_dense_has_the_loss_and_the_gradients_of_dense_and_costs_less(one_process):
    config = one_process("model.num_layers=3")
    (model,) = build_chunks(resolve(config, VOCABULARY))
    batch = mix_batch("understanding: 3 text, 16 image, 4 text, 9 image, 6 answer; generation: 9 text, 25 image")
    batch = batch.tensors()
    batch.tokens[:] = torch.randint(VOCABULARY, batch.shape, generator=torch.Generator().manual_seed(0))
    batch.labels[:] = batch.tokens.roll(-1, 1)
    results, costs = [], []
    for plan in (dense(Plan.from_config(config)), lossless_dense(Plan.from_config(config))):
        model.zero_grad()
        route = Route.of(batch, plan)
        losses = model.token_losses(model(route), batch.labels.flatten()[route.targets])
        losses.sum().backward()
        results.append([losses.detach(), *(p.grad.clone() for p in model.parameters())])
        costs.append(forward_flops(config.model, VOCABULARY, plan, count(batch, plan)))
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    # Of 25 image tokens of understanding: query, output and FFN; and keys before each, two tokens of text in between.
    h, f, keys = config.model.hidden_size, config.model.ffn_hidden_size, sum(range(4, 20)) + sum(range(24, 33))
    assert costs[0] - costs[1] == 2 * (25 * (2 * h * h + 3 * h * f) + 2 * h * keys)


# ---- FLOPs by hand


def test_every_role_costs_what_is_written_down_by_hand():
    plan = plan_of("himix_hmgen_share_all", shallow_layers=[1])
    mix = mix_batch("understanding: 3 image, 2 text, 1 answer; generation: 2 text, 4 image")
    counts = count(mix, plan)
    full, attention = 64 + 64 + 64 + 384, 2 * 8
    # Understanding: 3 texts see the 3 image tokens and 1, 2, 3 texts. Generation: captions see 1 and 2 captions, image
    # tokens 3, 4, 5, 6 tokens before them and themselves.
    expected = {
        UNDERSTANDING_IMAGE: 3 * 64,
        UNDERSTANDING_TEXT: 3 * full + attention * (4 + 5 + 6),
        GENERATION_TEXT: 2 * full + attention * (1 + 2),
        GENERATION_IMAGE: 4 * full + attention * (3 + 4 + 5 + 6),
    }
    by_class = class_flops(TINY, plan, counts)
    for layer in range(4):
        skipped = {GENERATION_IMAGE: 0} if layer == 1 else {}
        for index, multiply_adds in (expected | skipped).items():
            assert by_class[layer][index] == 2 * multiply_adds, (layer, index)
    assert head_flops(TINY, 100, counts) == 2 * 8 * 100 * (1 + 4)
    assert forward_flops(TINY, 100, plan, counts) == sum(map(sum, by_class)) + 2 * 8 * 100 * 5


def test_low_rank_differences_cost_the_tokens_that_use_them_and_whole_ones_nobody():
    mix = mix_batch("understanding: 3 image, 2 text; generation: 2 text, 4 image; text: 5 text")

    def layer(**projections):
        plan = plan_of("himix_hmgen_share_all", shallow_layers=[1], projections=ProjectionConfig(**projections))
        return class_flops(TINY, plan, count(mix, plan))[0]

    shared = layer()
    assert layer(kind="delta") == layer(kind="separate", per_task=True) == shared
    low = layer(kind="delta", rank=2, modules=["qkv", "fc2"])
    extra = {i: (a - b) // 2 for i, (a, b) in enumerate(zip(low, shared)) if a != b}
    assert extra == {
        UNDERSTANDING_IMAGE: 3 * 2 * (8 + 2 * 4),  # key and value alone
        GENERATION_IMAGE: 4 * 2 * ((8 + 8 + 2 * 4) + (16 + 8)),
    }


def test_dense_is_the_sum_over_documents_of_the_textbook_formula():
    batch = packed_batch(3, 48, seed=1)
    plan = dense(plan_of("himix_hmgen_share_partial"))
    total = 0
    for row in batch.document:
        for length in row[row != PADDING_DOCUMENT].unique(return_counts=True)[1].tolist():
            total += 4 * 2 * (length * (64 + 64 + 64 + 384) + 2 * 8 * length * (length + 1) // 2)
    assert sum(layer_flops(TINY, plan, count(batch, plan))) == total


def test_stages_hold_megatron_cores_layers_and_the_last_the_head():
    assert stage_layers(8, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert stage_layers(8, 2, 2) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    plan = plan_of("hmgen", 8, shallow_layers=[2, 3])
    counts = count(mix_batch("generation: 3 text, 5 image"), plan)
    layers, stages = layer_flops(TINY, plan, counts), stage_flops(TINY, 100, plan, counts, 2, 2)
    assert stages == [4 * layers[0], 2 * layers[0] + 2 * layers[2] + head_flops(TINY, 100, counts)]
    assert sum(stages) == forward_flops(TINY, 100, plan, counts)


def test_all_logits_are_those_of_tokens_that_are_full_in_the_last_layer():
    plan = plan_of("himix")
    counts = count(mix_batch("understanding: 9 image, 2 text, 1 answer; text: 4 text"), plan)
    assert counts.logits == 1 + 4
    assert with_all_logits(counts, plan).logits == 3 + 4


# ---- against the real model


@pytest.mark.parametrize(
    "projections",
    [
        "kind: shared",
        "kind: separate",
        "kind: separate, per_task: true",
        "kind: delta",
        "kind: delta, rank: 2",
    ],
)
def test_parameters_are_counted(one_process, projections):
    for modules, shape in (
        ("[qkv, proj]", LEARNED_CODES if "per_task" in projections else CODES if "delta" in projections else []),
        ("[qkv, proj, fc1, fc2]", ["model.tie_embeddings=true", *FEATURES]),
    ):
        config = one_process(
            "model.num_query_groups=2",
            *shape,
            f"plan.projections={{{projections}, modules: {modules}}}",
        )
        (chunk,) = build_chunks(resolve(config, VOCABULARY))
        plan = Plan.of(config.plan, config.model.num_layers)
        expected = parameter_count(config.model, VOCABULARY, plan.projections)
        assert sum(p.numel() for p in chunk.parameters()) == expected
        distributed.shut_down()


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"plan.preset={preset}"] for preset in PRESETS),
        ["plan.preset=himix_hmgen_share_partial", "plan.projections.rank=4"],
        ["plan.preset=himix_hmgen_share_partial", "plan.projections.rank=4", *FEATURES],
        ["plan.preset=himix_hmgen_share_all", *CODES],
        ["plan.preset=dense", *LEARNED_CODES],
    ],
    ids=" ".join,
)
def test_cost_is_what_torch_counts(one_process, overrides):
    """The plain attention kernel computes masked pairs too, as matrix products over all keys of a segment."""
    config = one_process("plan.shallow_count=2", *overrides)
    plan = Plan.of(config.plan, config.model.num_layers)
    (model,) = build_chunks(resolve(config, VOCABULARY))
    batch = mix_batch(
        "understanding: 16 image, 12 text, 5 answer; understanding: 7 text, 16 image, 4 text, 16 image, 6 answer; "
        "generation: 9 text, 25 image; text: 13 text",
        config.model.image_codes.depth,
    ).tensors()
    batch.tokens[:] = torch.randint(VOCABULARY, batch.shape, generator=torch.Generator().manual_seed(0))
    counts, route = count(batch, plan), Route.of(batch, plan)
    assert (counts.codes > 0) == (config.model.image_codes.depth > 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits, *code_losses = output if isinstance(output := model(route), tuple) else (output,)
        losses = model.token_losses(logits, batch.labels.flatten()[route.targets])
        forward = counter.get_total_flops()
        sum(x.sum() for x in (losses, *code_losses)).backward()
    pairs = sum(q * k for layer in route.layers for q, k in zip(layer.query_lengths, layer.key_lengths))
    masked = query_width(config.model) * (pairs - sum(map(sum, counts.visible))) + masked_in_depth_head(config, counts)
    expected = forward_flops(config.model, VOCABULARY, plan, counts) + 2 * 2 * masked
    assert forward == pytest.approx(expected, rel=1e-3)
    # Code vectors are frozen, so the matrices that they enter have gradients of their weights alone.
    inputs = frozen_inputs(config, counts)
    assert counter.get_total_flops() == pytest.approx(3 * forward - 2 * inputs, rel=1e-3)


def masked_in_depth_head(config, counts) -> int:
    """Width times masked pairs of the depth head's attention, over its layers and places."""
    codes, head = config.model.image_codes, config.model.image_codes.head
    return counts.codes * head.num_layers * head.hidden_size * codes.depth * (codes.depth - 1) // 2


def frozen_inputs(config, counts) -> int:
    """Multiply-adds of the products with code vectors."""
    codes = config.model.image_codes
    later = counts.codes * (codes.depth - 1)
    return (codes.width or 0) * (counts.images * config.model.hidden_size + later * codes.head.hidden_size)


@pytest.mark.parametrize("preset, ratio", [("dense", (1, 1)), ("himix_hmgen_share_all", (0.1, 0.9))])
def test_a_step_s_input_has_training_flops_of_the_plan_and_of_dense(one_process, preset, ratio):
    config = one_process(f"plan.preset={preset}")
    plan = Plan.of(config.plan, config.model.num_layers)
    batch = packed_batch(4, 64, seed=2)
    step = Preparation.of(resolve(config), VOCABULARY).step_input(batch)
    assert step.flops == 3 * forward_flops(config.model, VOCABULARY, plan, count(batch, plan))
    assert ratio[0] <= step.flops / step.dense_flops <= ratio[1]
    assert step.tokens == (batch.document != PADDING_DOCUMENT).sum()


# ---- activation memory


def kept_bytes(model, route, labels) -> list[int]:
    """Bytes of the storages that each layer keeps for the backward pass, each storage once.

    Parameters are not the layers' own.
    """
    kept = [{} for _ in model.decoder.layers]  # tensors by address; holding them keeps addresses from being used twice
    current = None

    def enter(layer, *_):
        nonlocal current
        current = layer.layer_number - 1

    def leave(*_):
        nonlocal current
        current = None

    def keep(tensor):
        address = tensor.untyped_storage().data_ptr()
        if current is not None and not any(address in layer for layer in kept):
            kept[current][address] = tensor
        return tensor

    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.token_losses(model(route), labels)
    others = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return [sum(t.untyped_storage().nbytes() for address, t in k.items() if address not in others) for k in kept]


@pytest.mark.parametrize(
    "settings",
    [
        ["plan.preset=dense"],
        ["plan.preset=dense", "training.recompute=selective"],
        ["plan.preset=himix"],
        ["plan.preset=himix", "plan.projections={kind: delta, rank: 8}"],
        ["plan.preset=hmgen"],
        ["plan.preset=himix_hmgen_share_all_separate"],
        ["plan.preset=himix_hmgen_share_partial", "plan.projections.modules=[qkv, proj, fc1]"],
        ["plan.preset=dense", "model.head_size=48"],
        ["plan.preset=himix", *FEATURES],
    ],
    ids=" ".join,
)
def test_activation_memory_is_what_autograd_keeps(one_process, settings):
    config = one_process("model.num_layers=5", "model.num_query_groups=2", "plan.shallow_count=2", *settings)
    plan = Plan.of(config.plan, 5)
    (model,) = build_chunks(resolve(config, VOCABULARY))
    batch = mix_batch(
        "understanding: 48 image, 24 text, 9 answer; generation: 9 text, 64 image; text: 13 text"
    ).tensors()
    route = Route.of(batch, plan)
    measured = kept_bytes(model, route, batch.labels.flatten()[route.targets])
    recompute = config.training.recompute
    expected = activation_bytes(config.model, plan, count(batch, plan), 4, recompute=recompute)
    assert measured == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("chunk", [0, 16])
def test_depth_head_memory_is_what_autograd_keeps(one_process, chunk):
    config = one_process(*CODES, f"model.image_codes.head.chunk={chunk}")
    (model,) = build_chunks(resolve(config, VOCABULARY))
    plan = Plan.of(config.plan, config.model.num_layers)
    counts = count(mix_batch("generation: 9 text, 64 image", 4), plan)
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = tensor
        return tensor

    tokens = chunk or counts.codes  # the backward pass computes a chunk again
    hidden = torch.randn(tokens, config.model.hidden_size, requires_grad=True)
    codes = torch.zeros(tokens, 4, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.depth_head._losses(hidden, codes, model.code_vectors)
    inputs = 4 * tokens * (config.model.hidden_size + 3 * config.model.image_codes.width)
    measured = sum(t.untyped_storage().nbytes() for t in kept.values()) - inputs
    assert measured == pytest.approx(depth_head_bytes(config.model, counts, 4), rel=0.02)


# ---- mixes and the tool


def test_a_mix_is_documents_with_their_loss():
    batch = mix_batch("understanding: 2 image, 1 text, 1 answer; generation: 1 text, 2 image x 2; text: 2 text")
    assert batch.document.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]]
    assert batch.task.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2]]
    assert batch.modality.tolist() == [[1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 1]]


def test_a_mix_may_learn_the_special_tokens_around_drawn_images():
    mix = "generation: 3 text, 2 image, 2 text; understanding: 2 image, 1 text, 1 answer"
    assert mix_batch(mix, generation_text=True).loss_mask.tolist() == [[0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1]]
    assert mix_batch(mix, 4, generation_text=True).loss_mask.tolist() == [[0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 1]]


def test_a_mix_of_an_edit_has_given_and_drawn_images():
    batch = mix_batch("interleaved: 2 image, 1 text, 2 drawn, 1 text, 1 answer")
    assert batch.modality.tolist() == [[1, 1, 0, 1, 1, 0, 0]]
    assert batch.task.tolist() == [[0, 0, 0, 1, 1, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 0, 0, 1, 1, 0, 1]]


@pytest.mark.parametrize(
    "mix, message",
    [
        ("", "no document"),
        ("drawing: 4 image", "task of understanding, generation, text"),
        ("generation: 4 pictures", "'4 pictures' is not a run"),
        ("generation: 0 image", "'0 image' is not a run"),
        ("generation: 3 answer", "only understanding and interleaved documents have runs of 'answer'; write text"),
        ("understanding: 3 drawn", "only interleaved documents have runs of 'drawn'; write image"),
    ],
)
def test_a_mix_that_cannot_be_read_is_quoted(mix, message):
    with pytest.raises(UserError, match=message):
        mix_batch(mix)


def flops_tool(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/flops.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_the_tool_shows_what_several_codes_a_token_cost(tmp_path):
    codes = "model.image_codes={depth: 4, codebook: tower, codebook_size: 16384, width: 1024}"
    model = ["--config", "examples/configs/llama-3.2-1b.yaml", "data.vocabulary=''", "parallel.pipeline=2", codes]
    mix = "generation: 256 image"
    completed = flops_tool(
        *model, "plan.preset=hmgen", "--mix", mix, "--logits", "all", "--json", tmp_path / "cost.json"
    )
    assert completed.returncode == 0, completed.stderr
    numbers = read_json(tmp_path / "cost.json")
    assert "0.854 of dense (flops_ratio), 0.812 in the layers (stack_flops_ratio)" in completed.stdout
    assert numbers["image_codes"]["depth_head_flops"] == 256 * 6 * 273_760_256
    assert numbers["image_codes"]["projector_flops"] == 256 * 6 * (1024 * 2048 + 2048**2)
    assert numbers["flops"] == sum(stage["flops"] for stage in numbers["stages"])
    first, last = (stage["activation_bytes"] for stage in numbers["stages"])
    layers = [layer["activation_bytes"] for layer in numbers["layers"]]
    assert first == sum(layers[:8]) + numbers["image_codes"]["projector_bytes"]
    assert last == sum(layers[8:]) + numbers["image_codes"]["depth_head_bytes"]
    assert numbers["activation_bytes"] == first + last
    # What the projector keeps of each token of a micro-batch in bf16.
    assert numbers["image_codes"]["projector_bytes"] == 2 * numbers["micro_batch_tokens"] * (1024 + 2 * 2048)


def test_the_tool_writes_what_it_prints(tmp_path):
    model = ["--config", "examples/configs/llama-3.2-1b.yaml", "data.vocabulary=''", "parallel.pipeline=4"]
    mix = "understanding: 256 image, 72 text"
    completed = flops_tool(
        *model, "plan.preset=himix", "--mix", mix, "--logits", "all", "--balance", "8", "--json", tmp_path / "cost.json"
    )
    assert completed.returncode == 0, completed.stderr
    numbers = read_json(tmp_path / "cost.json")
    assert "0.242 of dense" in completed.stdout
    assert round(numbers["flops_ratio"], 3) == 0.242
    assert numbers["vocabulary"] == 128256
    layers = sum(sum(layer["flops"].values()) for layer in numbers["layers"])
    assert layers + numbers["head"]["flops"] == numbers["flops"] == sum(stage["flops"] for stage in numbers["stages"])
    balanced = numbers["balance"]["layouts"]["balanced"]
    assert f"parallel.layout='{balanced['layout']}'" in completed.stdout and balanced["of_even"] < 1
    unbalanced = config_file.load(Config, ["examples/configs/llama-3.2-1b.yaml"], ["parallel.pipeline=4"])
    unbalanced.parallel.layout = balanced["layout"]
    validate(unbalanced, 4)


def test_the_tool_names_what_it_cannot_read():
    wrong = flops_tool("--mix", "generation: many image")
    assert wrong.returncode == 1
    assert wrong.stderr.count("\n") == 1 and "'many image'" in wrong.stderr


def shown_by_the_tool(monkeypatch, capsys, *arguments: str) -> dict[str, list[str]]:
    """The lines that tools/flops.py prints, by their first cell. Cells are two or more spaces apart."""
    monkeypatch.setattr(sys, "argv", ["flops.py", *arguments])
    runpy.run_path(str(REPOSITORY / "tools" / "flops.py"))["main"]()
    lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    return {cells[0]: cells[1:] for cells in lines}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1e9"], "--tokens needs --paper"),
        (["--paper", "--tokens", "-1"], "--tokens -1: must be above 0"),
        (["--paper", "--mfu", "0.3"], "--gpu and --mfu need --tokens"),
        (["--paper", "--tokens", "1e9", "--mfu", "35"], "--mfu 35: must be above 0 and at most 1"),
    ],
)
def test_options_that_would_be_ignored_are_refused(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        shown_by_the_tool(monkeypatch, capsys, *arguments)
    assert message in capsys.readouterr().err


def test_the_tool_shows_the_role_of_every_class_in_every_layer(monkeypatch, capsys):
    shown = shown_by_the_tool(monkeypatch, capsys, "plan.preset=himix", "plan.himix_start=1", "--plan")
    assert shown["layer"] == [
        "understanding image",
        "understanding text",
        "generation text",
        "generation image",
        "text text",
    ]
    assert shown["0"] == ["full"] * 5
    assert all(shown[layer] == ["kv", "full", "full", "full", "full"] for layer in ("1", "2", "3"))


def test_the_tool_shows_the_papers_figures_beside_ours(monkeypatch, capsys):
    shown = shown_by_the_tool(monkeypatch, capsys, "--paper")
    assert shown["FLOPs relative to dense"] == ["paper", "ours", "ours with captions"]
    assert shown["HiMix"] == ["0.24", "0.242", "0.242"]
    assert shown["HMGen, 3 shallow layers"] == ["0.85", "0.852", "0.867"]
    assert shown["HMGen, 5 shallow layers"] == ["0.75", "0.753", "0.779"]
    assert shown["HiMix-HMGen (Share All)"] == ["0.56", "0.547", "0.555"]
    assert shown["HiMix-HMGen (Share Partial)"] == ["0.55", "0.547", "0.555"]
    assert shown["7B, 4 codes, 6 x 2560"] == ["6476", "2074", "0.32"]
    assert shown["7B, 16 codes, 6 x 2560"] == ["6476", "8280", "1.28"]
    assert shown["1B, 1 code, output head"] == ["973", "263", "0.27", "0.852 0.753"]
    assert shown["1B, 4 codes, 6 x 2560"] == ["973", "2069", "2.13", "0.940 0.900"]
    assert shown["1B, 4 codes, 4 x 1024"] == ["973", "274", "0.28", "0.854 0.757"]

"""Attention allocation equals what the definitions give by hand, by Hugging Face's attention, and by a plain model."""

import math

import pytest
import torch

from megatron_ext import config_file
from megatron_ext.analysis import attention_report
from megatron_ext.analysis.attention import Allocation
from megatron_ext.analysis.token_sets import ObjectTokens
from megatron_ext.config import Config
from megatron_ext.routing.plan import Plan, Role
from megatron_ext.transformer.model import build_chunks
from megatron_ext.transformer.resolved import resolve
from support import reference
from support.labelled_rows import SPECIAL, VOCABULARY, allocate, generation, interleaved, rows_of, text, understanding

SHAPE = ["model.num_layers=4", "model.hidden_size=32", "model.num_attention_heads=4", "model.num_query_groups=2"]
ROWS = (
    [understanding(6, (3, 2), (1, 3)), generation(4, 5), text(3)],
    [generation(0, 7), understanding(4, (2, 1)), understanding(3, (1, 1), (2, 2), (1, 1))],
)
INTERLEAVED = (
    [interleaved(4, (2, 0), (3, 2), (1, 0)), generation(2, 4)],
    [understanding(4, (2, 1)), interleaved(3, (1, 1), (2, 0)), interleaved(4, (2, 0))],
)
SETS = ("answer", "text_after_image", "image")
PLANS = {
    "dense": [],
    "himix": ["plan.preset=himix", "plan.himix_start=1"],
    "partial": ["plan.preset=himix_hmgen_share_partial", "plan.shallow_layers=[1, 2]"],
    "odd table": [
        "plan.table=[{layers: '1', task: understanding, modality: image, role: skip},"
        "{layers: '2', task: all, modality: text, role: kv_only}]"
    ],
}


def model_of(plan: list[str]):
    config = config_file.load(Config, [], SHAPE + plan)
    (model,) = build_chunks(resolve(config, VOCABULARY))
    return model.eval(), Plan.of(config.plan, config.model.num_layers), config.model


def randomize(model) -> None:
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        parameter.data.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.3 * noise)


def measured(model, plan, batch) -> dict:
    allocation = Allocation(model, plan, SPECIAL)
    allocation.read(batch)
    assert not any(layer.self_attention.core_attention._forward_pre_hooks for layer in model.decoder.layers)
    return allocation.result()


def check(allocation: dict, layer: int, attention, visible, batch, names) -> None:
    def known(figures: dict) -> dict:
        return {name: value for name, value in figures.items() if value is not None}

    for queries in SETS:
        expected, result = allocate(attention, visible, batch, names, queries), allocation[queries]["layers"][layer]
        for figure in ("mass", "over_uniform"):
            known_classes = {name: expected[figure].get(name) for name in result[figure]}
            assert known(result[figure]) == pytest.approx(known(known_classes), rel=1e-5, abs=1e-7)
        figures = ("queries", "entropy", "entropy_share", "left_out")
        expected_figures = known({f: expected[f] for f in figures})
        assert known({f: result[f] for f in figures}) == pytest.approx(expected_figures, rel=1e-5)
        if result["queries"]:
            assert sum(result["mass"].values()) == pytest.approx(1)


def roles_and_visible(plan, layer, batch):
    """Flat: the role of each token, and the keys that it sees, [t], [t, t]."""
    role = reference.roles_of(plan, layer, batch)
    return role.flatten(), torch.block_diag(*reference.visible(role, batch))


@pytest.mark.parametrize(
    "plan, factor", [("dense", 1.0), ("odd table", 1.0), ("dense", 4.0), ("himix", 4.0), ("partial", 4.0)]
)
def test_hand_set_attention(one_process, plan, factor):
    """Every layer's scores are log ``factor`` for image tokens and 0 for the others, by weights that are set so."""
    one_process(*SHAPE)
    # The slowest of the rotary frequencies, 1e16 ** -0.75, does not turn: scores there do not depend on positions.
    model, plan, shape = model_of([*PLANS[plan], "model.rotary_base=1e16"])
    size, still = 8, 3
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0 if parameter.dim() == 1 else 0.0)
        if name.endswith("linear_qkv.weight"):
            of_group = parameter.data.view(shape.num_query_groups, -1, size, shape.hidden_size)
            of_group[:, :-2, still, :2] = 1  # queries know any token,
            of_group[:, -2, still, 1] = math.log(factor) * size**0.5 / shape.hidden_size  # keys images
    model.embedding.word_embeddings.weight.data[:40, 0] = 100
    model.embedding.word_embeddings.weight.data[40:, 1] = 100

    batch, names = rows_of(*ROWS, length=48)
    weight = torch.tensor([factor if name == "image" else 1.0 for name in names])
    allocation = measured(model, plan, batch)
    for layer in range(shape.num_layers):
        role, visible = roles_and_visible(plan, layer, batch)
        attention = visible * weight / (visible * weight).sum(1, keepdim=True).clamp(min=1)
        attention[role != Role.FULL] = 0
        check(allocation, layer, attention.expand(shape.num_attention_heads, -1, -1), visible, batch, names)
        if factor == 1.0:
            ratios = [v for queries in SETS for v in allocation[queries]["layers"][layer]["over_uniform"].values()]
            assert all(ratio is None or ratio == pytest.approx(1, rel=1e-5) for ratio in ratios)


def test_the_numbers_of_one_document_by_hand(one_process):
    """bos <boi> I I <eoi> Q A <eod>: with uniform attention Q counts 2 images of 3 keys, for it leaves out 3 of the 6
    that it sees, bos, <boi> and itself; A counts 2 of 4."""
    one_process(*SHAPE)
    model, plan, _ = model_of([])
    for parameter in model.parameters():
        parameter.data.zero_()
    batch, _ = rows_of([understanding(2, (1, 1))], length=10)
    result = measured(model, plan, batch)["answer"]["layers"][0]
    assert result["queries"] == 2
    expected = {"image": (2 / 3 + 2 / 4) / 2, "question": (0 / 3 + 1 / 4) / 2, "special": (1 / 3 + 1 / 4) / 2}
    assert result["mass"] == pytest.approx(expected)
    assert result["entropy"] == pytest.approx((math.log(3) + math.log(4)) / 2)
    assert result["left_out"] == pytest.approx((3 / 6 + 3 / 7) / 2)


def test_given_and_drawn_images_are_apart_and_only_answers_are_answers(one_process):
    """bos <boi> I I <eoi> T <boi> D D <eoi> T A <eod>: T before A counts 8 keys, A 9; the first D counts 5, the second
    6."""
    one_process(*SHAPE)
    model, plan, _ = model_of([])
    for parameter in model.parameters():
        parameter.data.zero_()
    batch, _ = rows_of([interleaved(2, (1, 0), (1, 1))], length=14)
    assert int((batch.loss_mask > 0).sum()) == 5
    result = {name: figures["layers"][0] for name, figures in measured(model, plan, batch).items()}
    assert [result[queries]["queries"] for queries in ("answer", "image")] == [2, 2]
    images = {"image": (2 / 8 + 2 / 9) / 2, "drawn image": (2 / 8 + 2 / 9) / 2}
    assert {name: result["answer"]["mass"][name] for name in images} == pytest.approx(images)
    drawn = {"image": (0 / 5 + 1 / 6) / 2, "given image": (2 / 5 + 2 / 6) / 2, "caption": (1 / 5 + 1 / 6) / 2}
    assert {name: result["image"]["mass"][name] for name in drawn} == pytest.approx(drawn)


def test_the_tokens_of_an_object_by_hand(one_process):
    """bos <boi> I I I I <eoi> Q A <eod> with object 1 in the first two image tokens and object 2 in the second: Q
    counts the four and <eoi>, A also Q. Then bos T <boi> I I I I <eoi> <eod> with object 1 in the second and last."""
    one_process(*SHAPE)
    model, plan, _ = model_of([])
    for parameter in model.parameters():
        parameter.data.zero_()
    batch, _ = rows_of([understanding(4, (1, 1)), generation(1, 4)], length=20)
    objects = ObjectTokens(*torch.zeros(2, 1, 20, dtype=torch.int64))
    objects.shows[0, [2, 3]], objects.about[0, [7, 8]] = torch.tensor([1, 3]), torch.tensor([1, 1])
    objects.shows[0, [14, 16]], objects.about[0, [13, 15]] = 1, 1
    allocation = Allocation(model, plan, SPECIAL)
    allocation.read(batch, objects)
    result = {name: figures["layers"][0] for name, figures in allocation.result().items()}
    answers, drawn = result["answer_about_object"], result["image_of_object"]
    assert answers["queries"] == 2 and answers["over_uniform"]["its object"] == pytest.approx(1)
    shares = {"its object": (2 / 5 + 2 / 6) / 2, "rest of image": (2 / 5 + 2 / 6) / 2, "question": 1 / 12}
    assert answers["mass"] == pytest.approx(shares | {"special": (1 / 5 + 1 / 6) / 2})
    assert result["answer"]["mass"]["image"] == pytest.approx((4 / 5 + 4 / 6) / 2)
    # The first I counts T and <boi>, the third also two image tokens, of which the second shows the object.
    shares = {"its object": 1 / 8, "rest of image": 1 / 8, "caption": (1 / 2 + 1 / 4) / 2}
    assert drawn["mass"] == pytest.approx(shares | {"special": (1 / 2 + 1 / 4) / 2})


@pytest.mark.parametrize(
    "plan, block, rows",
    [("himix", 150, ROWS), ("partial", 2**23, ROWS), ("odd table", 150, ROWS), ("partial", 150, INTERLEAVED)],
    ids=["himix", "partial", "odd table", "interleaved"],
)
def test_random_weights_against_a_model_that_masks(one_process, monkeypatch, plan, block, rows):
    one_process(*SHAPE)
    monkeypatch.setattr("megatron_ext.analysis.attention.BLOCK", block)
    model, plan, shape = model_of(PLANS[plan])
    randomize(model)
    batch, names = rows_of(*rows, length=48)
    allocation, weights = measured(model, plan, batch), model.state_dict()
    inputs = [weights[reference.EMBEDDING][batch.tokens], *reference.hidden_states(weights, shape, plan, batch)]
    for layer, x in zip(range(shape.num_layers), inputs):
        prefix = f"decoder.layers.{layer}."
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        normed = reference.rms_norm(x, own["input_layernorm.weight"], shape.norm_epsilon)
        component = reference.components_of(plan, batch)
        qkv = reference.projection(own, "self_attention.linear_qkv", normed, component, plan)
        query, key, _ = reference.heads_of(qkv, shape)
        query, key = (reference.rotate(y, batch.positions, shape.rotary_base).flatten(0, 1) for y in (query, key))
        role, visible = roles_and_visible(plan, layer, batch)
        scores = torch.einsum("qnd,knd->nqk", query, key) / query.shape[-1] ** 0.5
        attention = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        attention[:, role != Role.FULL] = 0
        check(allocation, layer, attention, visible, batch, names)


def test_hugging_face_s_attention(one_process):
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_ext.hugging_face.weights import StateDict, parameters_of

    one_process(*SHAPE)
    model, plan, shape = model_of([])
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=shape.norm_epsilon,
            attn_implementation="eager",
        )
    )
    randomize(llama)
    model.load_state_dict(parameters_of(StateDict(llama.state_dict(), shape)), strict=False)
    batch, names = rows_of([understanding(6, (3, 2), (1, 3))], [generation(4, 12)], length=20)
    with torch.no_grad():
        attentions = llama(batch.tokens, output_attentions=True).attentions  # of each layer [b, heads, s, s]
    allocation = measured(model, plan, batch)
    for layer, of_rows in enumerate(attentions):
        together = torch.stack([torch.block_diag(*of_rows[:, head]) for head in range(4)])
        _, visible = roles_and_visible(plan, layer, batch)
        check(allocation, layer, together, visible, batch, names)


def test_observing_changes_nothing_and_shows_everything(one_process, tmp_path):
    one_process(*SHAPE)
    model, plan, _ = model_of(PLANS["partial"])
    randomize(model)
    batch, _ = rows_of(*ROWS, length=48)
    seen = []
    model.decoder.final_layernorm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    allocation = Allocation(model, plan, SPECIAL)
    allocation.read(batch.rows(0, 1))
    with torch.no_grad():
        model(allocation._route)
    assert torch.equal(*seen)
    allocation.read(batch.rows(1, 2))
    result = allocation.result()
    # Of 12 image tokens the first of the document without a caption sees bos and <boi> alone, which are left out.
    assert [layer["queries"] for layer in result["image"]["layers"]] == [11, 0, 0, 11]
    table = attention_report.table(result, result)
    assert "image (11 queries)" in table and table.count("%") > 20
    attention_report.plot(result, tmp_path / "figure.png", "title", result)
    assert (tmp_path / "figure.png").stat().st_size > 10_000

"""The model of an exported folder computes what this project's model does, whole and step by step."""

from functools import cache

import pytest
import torch
from test_decoder import full_logits
from torch.utils.flop_counter import FlopCounterMode

from megatron_ext import config_file, distributed
from megatron_ext.config import Config
from megatron_ext.export_hf.form import Exported, own_config
from megatron_ext.export_hf.own_code.configuration_unified import UnifiedConfig
from megatron_ext.export_hf.own_code.modeling_unified import UnifiedForConditionalGeneration
from megatron_ext.export_hf.weights import tensors
from megatron_ext.routing.plan import PRESETS, Plan
from megatron_ext.token_classes import Task
from megatron_ext.transformer.model import build_chunks
from megatron_ext.transformer.resolved import resolve
from support.exported import ALL_FEATURES, SHAPE, randomize

VQ = {"grid": [2, 3], "image_size": [4, 6], "vq_config": None, "vq_fingerprint": None}
TASKS = [Task.UNDERSTANDING, Task.GENERATION, Task.TEXT, Task.GENERATION]
ALL_MODULES = "modules: [qkv, proj, fc1, fc2]"
ANY_TABLE = (
    "plan.table=[{layers: '0', task: all, modality: image, role: skip},"
    "{layers: '0', task: text, modality: all, role: skip},"
    "{layers: '1', task: all, modality: text, role: kv_only}, {layers: '2', task: all, modality: all, role: kv_only},"
    "{layers: '3', task: generation, modality: image, role: kv_only}]"
)
MODELS = {
    **{preset: [f"plan.preset={preset}"] for preset in PRESETS},
    "any table": [ANY_TABLE, "model.rotary_interpolation_factor=2"],
    "any table with all features": [ANY_TABLE, *ALL_FEATURES, "model.tie_embeddings=true"],
    "separate": [f"plan.projections={{kind: separate, {ALL_MODULES}}}", *ALL_FEATURES],
    "delta per task": [f"plan.projections={{kind: delta, per_task: true, {ALL_MODULES}}}", "model.max_image_tokens=9"],
    "low rank": [f"plan.projections={{kind: delta, rank: 4, {ALL_MODULES}}}", "plan.preset=himix", *ALL_FEATURES],
    "low rank per task": ["plan.projections={kind: delta, rank: 4, per_task: true, modules: [fc1, proj]}"],
    "image positions": ["plan.preset=himix_hmgen_share_all", "model.max_image_tokens=9", "model.tie_embeddings=true"],
    "all image tokens dense": ["plan.preset=himix", "plan.dense_share={of: image_tokens, start: 1}"],
    "bias": ["model.qkv_bias=true"],
    "norms": ["model.qk_norm=true", "model.head_size=16"],
}


class TokenIds:
    """Ids from 40 on are image tokens; padded to 64."""

    text_size, bos, pad, eod, boi, eoi, image_offset, codebook_size, size = 34, 1, 34, 35, 36, 37, 40, 20, 60
    answer_end = eod
    ends = (eod,)


def build(settings: list[str]):
    """This project's model with its plan, and the exported one; float64."""
    config = config_file.load(Config, [], [*SHAPE, *settings])
    (model,) = build_chunks(resolve(config, 64))
    randomize(model)
    model.double().eval()
    plan = Plan.from_config(config)
    exported = Exported(config.model, plan, TokenIds, vocab_size=64, dtype="float32", sequence_length=99)
    own = UnifiedForConditionalGeneration(UnifiedConfig(**own_config(exported, VQ))).double()
    weights = dict(tensors(dict(model.named_parameters()), config.model, plan.projections))
    absent, unknown = own.load_state_dict(weights, strict=False)
    assert not unknown and absent == (["lm_head.weight"] if config.model.tie_embeddings else [])
    own.tie_weights()
    return model, plan, own.eval()


def documents() -> list[list[int]]:
    """Text and images in turn, of different lengths."""
    random = torch.Generator().manual_seed(3)
    lengths = [[3, 5, 4], [5, 7], [2, 4, 1, 6, 3], [9]]

    def run(image: int, n: int) -> list[int]:
        return torch.randint(*((40, 60) if image else (0, 34)), (n,), generator=random).tolist()

    return [[token for i, n in enumerate(row) for token in run(i % 2, n)] for row in lengths]


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[TokenIds.pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    uses = torch.tensor([int(task) for task in TASKS])[:, None].expand(ids.shape)
    return {"input_ids": ids, "attention_mask": mask, "token_uses": uses}


@pytest.fixture(scope="module")
def models():
    """What :func:`build` makes of the settings of a name, made once."""
    distributed.initialize(Config())
    yield cache(lambda name: build(MODELS[name]))
    distributed.shut_down()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_of_left_padded_rows_are_those_of_the_trained_model(models, name):
    model, plan, own = models(name)
    rows = documents()
    expected = full_logits(model, plan, rows, TASKS)
    logits = own(**left_padded(rows), use_cache=False).logits
    for row, wanted in zip(logits, expected):
        error = (row[-len(wanted) :] - wanted).abs().max()
        assert error < 1e-10 * wanted.abs().max()


@pytest.mark.parametrize("name", ["any table with all features", "delta per task", "himix_hmgen_share_partial"])
@pytest.mark.parametrize("chunk", [1, 3])
@torch.no_grad()
def test_decoding_with_a_cache_is_one_pass(models, name, chunk):
    _, _, own = models(name)
    inputs = left_padded(documents())
    expected, cache, parts = own(**inputs, use_cache=False).logits, None, []
    for start in range(0, expected.shape[1], chunk):
        end = start + chunk
        output = own(
            inputs["input_ids"][:, start:end],
            attention_mask=inputs["attention_mask"][:, :end],
            token_uses=inputs["token_uses"][:, start:end],
            past_key_values=cache,
        )
        cache = output.past_key_values
        parts.append(output.logits)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_cache_can_be_cut_and_its_rows_reordered(models):
    _, _, own = models("any table with all features")
    inputs = left_padded(documents())
    n = inputs["input_ids"].shape[1]
    order = torch.tensor([2, 0, 0, 3])
    cache = own(**inputs).past_key_values
    assert cache.get_seq_length() == n
    cache.crop(-6)
    cache.crop(n - 7)
    cache.reorder_cache(order)
    logits = own(
        inputs["input_ids"][order, -7:],
        attention_mask=inputs["attention_mask"][order],
        token_uses=inputs["token_uses"][order, -7:],
        past_key_values=cache,
    ).logits
    expected = own(**{name: x[order] for name, x in inputs.items()}, use_cache=False).logits[:, -7:]
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_token_takes_room_only_in_the_layers_that_it_does_not_skip(models):
    _, _, own = models("hmgen")
    ids = torch.tensor([[1, 5, 36, *range(40, 46), 37, 35]])
    cache = own(ids, token_uses=torch.full_like(ids, Task.GENERATION)).past_key_values
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert sorted(lengths) == [5, 11, 11, 11] and cache.get_seq_length() == 11


def test_tokens_that_take_no_part_are_not_computed(models):
    """The linear layers of each token cost what its role says."""
    _, _, dense = models("dense")
    _, _, himix = models("himix")
    ids = torch.tensor([[1, 36, *range(40, 52), 37, 5, 6, 7]])
    flops = []
    for own in (dense, himix):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            own(ids, logits_to_keep=1)
        counts = counter.get_flop_counts()["Global"]
        flops.append(sum(n for operation, n in counts.items() if "mm" in str(operation)))
    h, ffn, images = 32, own.config.intermediate_size, 12
    saved = 4 * images * 2 * (h * h + h * h + 3 * h * ffn)  # of 4 layers: queries, outputs, FFN
    assert flops[0] - flops[1] == saved > 0.5 * flops[0]


def test_the_loss_has_gradients_for_every_weight_that_is_used(models):
    _, _, own = models("any table with all features")
    inputs = left_padded(documents())
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    own(**inputs, labels=labels).loss.backward()
    gradients = {name: p.grad for name, p in own.named_parameters()}
    assert all(g is not None and g.isfinite().all() for name, g in gradients.items() if "layers.2" not in name)

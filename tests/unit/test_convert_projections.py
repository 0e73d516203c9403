"""Checkpoints with other projections: the model computes what it computed before, or the conversion is refused."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext import config_file, distributed
from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints.checkpointer import Checkpointer, load_weights, read_state
from megatron_ext.checkpoints.state import steps_taken
from megatron_ext.checkpoints.stored_weights import StoredWeights
from megatron_ext.config import Config, ParameterGroup
from megatron_ext.conversion.projections import convert, converted
from megatron_ext.errors import UserError
from megatron_ext.routing.plan import Plan, Projections
from megatron_ext.routing.route import Route
from megatron_ext.training.run import identity_of
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.transformer.resolved import resolve
from parity import CODES, VOCABULARY, packed_batch, perturb

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
LAYERS = 2
SMALL = (
    f"model={{num_layers: {LAYERS}, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2}}",
    "model.ffn_hidden_size=48",
    "model={qkv_bias: true, qk_norm: true, head_size: 12}",
    "data.sequence_length=48",
    "plan={preset: himix_hmgen_share_all, himix_start: 1}",
)
QKV = "decoder.layers.1.self_attention.linear_qkv"
FC1 = "decoder.layers.0.mlp.linear_fc1"

SHARED = Projections()
ALL = ("qkv", "proj", "fc1", "fc2")
SEPARATE, DECOMPOSED, RANK_4 = (
    Projections(kind, ALL, rank) for kind, rank in (("separate", None), ("delta", None), ("delta", 4))
)
ATTENTION_ALONE = Projections("separate", ("qkv", "proj"))


def per_task(projections: Projections) -> Projections:
    return dataclasses.replace(projections, per_task=True)


def of_rank(rank: int) -> Projections:
    return dataclasses.replace(RANK_4, rank=rank)


def override(projections: Projections) -> str:
    return f"plan.projections={json.dumps(dataclasses.asdict(projections))}"


def build(projections: Projections, trained: bool = False) -> torch.nn.Module:
    """A model with these projections under HiMix and HMGen, in float64: as it starts, or with every matrix its own."""
    config = config_file.load(Config, [], [*SMALL, override(projections)])
    chunks = build_model(resolve(config, VOCABULARY))
    if trained:
        perturb(chunks)
    return chunks[0].module.double()


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def fill(model, weights) -> None:
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


@torch.no_grad()
def logits(model, projections: Projections) -> torch.Tensor:
    config = config_file.load(Config, [], [*SMALL, override(projections)])
    return model(Route.of(packed_batch(4, 48, seed=3), Plan.of(config.plan, LAYERS)))


def from_to(original, source: Projections, target: Projections) -> dict[str, torch.Tensor]:
    """Converted weights of a model, which compute what it computes."""
    target_model = build(target)
    new_weights = converted(weights_of(original), source, target, weights_of(target_model))
    fill(target_model, new_weights)
    torch.testing.assert_close(logits(target_model, target), logits(original, source), atol=1e-9, rtol=1e-9)
    return new_weights


@pytest.mark.parametrize(
    "target", [SEPARATE, per_task(SEPARATE), DECOMPOSED, RANK_4, per_task(RANK_4), ATTENTION_ALONE]
)
def test_a_dense_model_starts_any_other_with_what_that_starts_with(one_process, target):
    one_process(*SMALL)
    original = build(SHARED, trained=True)
    new_weights = from_to(original, SHARED, target)
    fresh = weights_of(build(target))
    for name, weight in weights_of(original).items():
        assert torch.equal(new_weights.pop(name), weight)
    assert len(new_weights) == LAYERS * len(target.modules) * len(target.components) * (2 if target.rank else 1)
    for name, value in new_weights.items():
        prefix, own = name.rsplit(".", 1)
        expected = original.get_parameter(f"{prefix}.weight") if own.endswith("_weight") else fresh[name]
        assert torch.equal(value, expected), name
        assert value.any() == own.endswith(("_weight", "_down")), name


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (SEPARATE, DECOMPOSED),
        (SEPARATE, of_rank(32)),
        (SEPARATE, per_task(DECOMPOSED)),
        (DECOMPOSED, SEPARATE),
        (DECOMPOSED, per_task(SEPARATE)),
        (RANK_4, DECOMPOSED),
        (RANK_4, SEPARATE),
        (RANK_4, of_rank(6)),
        (RANK_4, per_task(RANK_4)),
        (per_task(RANK_4), per_task(SEPARATE)),
        (per_task(SEPARATE), per_task(DECOMPOSED)),
        (ATTENTION_ALONE, DECOMPOSED),
    ],
)
def test_a_trained_model_computes_the_same_afterwards(one_process, source, target):
    one_process(*SMALL)
    original = build(source, trained=True)
    bare = {name: p for name, p in weights_of(original).items() if name in weights_of(build(SHARED))}
    dense = build(SHARED)
    fill(dense, bare)
    assert (logits(dense, SHARED) - logits(original, source)).abs().max() > 1e-3  # the components have a say
    from_to(original, source, target)


def test_separate_to_delta_and_back_is_the_same_model(one_process):
    one_process(*SMALL)
    original = build(SEPARATE, trained=True)
    between = from_to(original, SEPARATE, DECOMPOSED)
    back = converted(between, DECOMPOSED, SEPARATE, weights_of(build(SEPARATE)))
    for name, weight in weights_of(original).items():
        torch.testing.assert_close(back[name], weight, rtol=0, atol=1e-15)


def test_a_difference_of_lower_rank_leaves_the_rest_of_the_factors_as_they_start(one_process):
    one_process(*SMALL)
    converted_weights = from_to(build(RANK_4, trained=True), RANK_4, of_rank(6))
    down, up = converted_weights[f"{FC1}.image_down"], converted_weights[f"{FC1}.image_up"]
    assert torch.equal(down[4:], weights_of(build(of_rank(6)))[f"{FC1}.image_down"][4:])
    assert not up[:, 4:].any()
    torch.testing.assert_close(down[:4].norm(dim=1), up[:, :4].norm(dim=0))


def test_a_matrix_of_higher_rank_is_refused(one_process):
    one_process(*SMALL)
    weights = weights_of(build(SEPARATE, trained=True))
    first = "decoder.layers.0.self_attention.linear_proj.image_weight"
    message = rf"^{first}: .* matrix of rank 32, of which rank 16 leaves out \d\.\de-0\d of W .*rank=32 or more"
    fresh = weights_of(build(of_rank(16)))
    with pytest.raises(UserError, match=message):
        converted(weights, SEPARATE, of_rank(16), fresh)
    converted(weights, SEPARATE, of_rank(16), fresh, tolerance=2.0)


@pytest.mark.parametrize("source", [SEPARATE, DECOMPOSED, RANK_4, per_task(SEPARATE)])
def test_merging_into_dense_is_exact_or_refused_naming_the_parameter(one_process, source):
    one_process(*SMALL)
    original = build(SHARED, trained=True)
    split = from_to(original, SHARED, source)
    merged = converted(split, source, SHARED, {})
    assert merged.keys() == weights_of(original).keys()
    assert all(torch.equal(merged[name], weight) for name, weight in weights_of(original).items())

    own = {"separate": "weight", "delta": "delta"}[source.kind] if source.rank is None else "up"
    changed = f"{QKV}.{source.components[-1]}_{own}"
    split[changed][0, 0] += 1e-3 * split[f"{QKV}.weight"].norm() * (1 if source.rank is None else 50)
    with pytest.raises(UserError, match=rf"^{changed}: its matrix differs from W by \d\.\de-0\d of W .* with qkv in"):
        converted(split, source, SHARED, {})
    if source.rank is None:
        assert QKV + ".weight" in converted(split, source, SHARED, {}, tolerance=1.1e-3)


@pytest.mark.parametrize("source", [SEPARATE, DECOMPOSED, RANK_4])
def test_two_tasks_become_one_where_they_agree(one_process, source):
    one_process(*SMALL)
    original = build(source, trained=True)
    split = from_to(original, source, per_task(source))
    merged = converted(split, per_task(source), source, weights_of(build(source)))
    assert merged.keys() == weights_of(original).keys()
    assert all(torch.equal(merged[name], weight) for name, weight in weights_of(original).items())

    name = next(name for name in split if name.startswith(f"{FC1}.generation_"))
    split[name] *= 1.01
    with pytest.raises(UserError, match=rf"^{FC1}.understanding_\w+: .* from that of generation .*per_task=true.*fc1"):
        converted(split, per_task(source), source, weights_of(build(source)))


def run_tool(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
    runpy.run_path(str(TOOL))["main"]()


@pytest.mark.parametrize(
    "precision, codes", [("float32", []), ("bf16", []), ("bf16", CODES)], ids=["float32", "bf16", "bf16-4 codes"]
)
def test_the_tool_writes_a_checkpoint_that_a_run_with_other_projections_starts_from(
    one_process, vocabulary, tmp_path, monkeypatch, precision, codes
):
    settings = (*SMALL, *codes, f"training.precision={precision}")
    config = one_process(*settings)
    vectors = torch.randn(VOCABULARY, config.model.image_codes.width) if codes else None
    chunks = build_model(resolve(config, VOCABULARY), vectors)
    perturb(chunks)
    batch = packed_batch(4, 48, seed=3, depth=config.model.image_codes.depth)
    with torch.no_grad():
        expected = chunks[0].module(Route.of(batch, Plan.of(config.plan, LAYERS)))
    groups = [ParameterGroup("*.image_weight", 0.5)]  # of components that only the source may have
    recorded = dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, tensor=2),
        optimizer=dataclasses.replace(config.optimizer, groups=groups),
    )
    state = {"progress": {"iteration": 7}, "config": dataclasses.asdict(recorded), "data": "5f0c"}
    state |= identity_of(resolve(config), vocabulary)
    Checkpointer(tmp_path / "dense").save(7, chunks, build_optimizer(config, chunks), state)
    distributed.shut_down()

    dense, split = tmp_path / "dense" / "iter_0000007", tmp_path / "split" / "iter_0000000"
    changes = ("plan.projections={kind: delta, rank: 2}", "plan.projections.per_task=true")
    numbers = tmp_path / "numbers.json"
    run_tool(monkeypatch, "--checkpoint", dense, "--out", split.parent, *changes, "--json", numbers)
    assert not torch.distributed.is_initialized()

    written = read_state(split)
    assert written["progress"]["iteration"] == written["progress"]["consumed_tokens"] == 0
    assert written["data"] == "5f0c"
    assert config_file.from_tree(Config, written["config"]) == config_file.override(recorded, changes)

    frozen = "[{parameters: embedding.*, lr_multiplier: 0}, {parameters: '*.understanding_*', lr_multiplier: 0.5}]"
    config = one_process(*settings, *changes, f"optimizer.groups={frozen}")
    chunks = build_model(resolve(config, VOCABULARY))
    identity = identity_of(resolve(config), vocabulary)
    with pytest.raises(UserError, match="its plan.projections.kind is shared, this run's is delta; tools/convert"):
        load_weights(dense, chunks, identity)
    load_weights(split, chunks, identity)
    with torch.no_grad():
        actual = chunks[0].module(Route.of(batch, Plan.of(config.plan, LAYERS)))
    if codes:
        assert torch.equal(chunks[0].module.code_vectors.weight, vectors)
        assert StoredWeights(split).dtype == torch.bfloat16
    tolerance = {"float32": 1e-5, "bf16": 0.02}[precision]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    counted = json.loads(numbers.read_text())
    assert counted["parameters"] == sum(p.numel() for p in chunks[0].parameters()) > counted["source"]["parameters"]

    optimizer = build_optimizer(config, chunks)
    Checkpointer(split.parent).load(split, chunks, optimizer, identity)
    assert steps_taken(optimizer) == 0


def marked(folder: Path, *settings: str) -> Path:
    """A checkpoint that holds its state alone."""
    config = config_file.load(Config, [], [*SMALL, *settings])
    description = {"iteration": 3, "state": {"config": dataclasses.asdict(config)}}
    return checkpoint_folder.complete(checkpoint_folder.begin(folder, 3), description, {})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.seed=3"], r"'training.seed=3': only plan.projections.\* can be converted"),
        (["plan.preset=hmgen"], "'plan.preset=hmgen': only"),
        (["plan.projections_of=hmgen"], "'plan.projections_of=hmgen': only"),
        (["plan.projections.kind"], "expected section.key=value"),
        (["plan.projections.kinds=separate"], "unknown key 'plan.projections.kinds'"),
        (["plan.projections.kind=apart"], "'plan.projections.kind' is 'apart', must be one of"),
        (["plan.projections.rank=2"], "'plan.projections.rank' is 2, but plan.projections.kind is shared"),
        (["plan.projections={kind: delta, rank: 3}"], r"rank \(3\) is not divisible by parallel.tensor \(2\)"),
        (["plan.projections={per_task: true, modules: [fc1]}"], "its projections stay as they are"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, overrides, message):
    checkpoint = marked(tmp_path / "run", "parallel.tensor=2")
    with pytest.raises(UserError, match=message):
        convert(checkpoint, tmp_path / "out", overrides)
    assert not (tmp_path / "out").exists()


def test_a_preset_that_implies_the_projections_is_understood(tmp_path):
    checkpoint = marked(tmp_path / "run", "plan.preset=hmgen")
    with pytest.raises(UserError, match="its projections stay as they are"):
        convert(checkpoint, tmp_path / "out", ["plan.projections.kind=separate"])


def test_other_checkpoints_are_never_replaced(tmp_path):
    checkpoint = marked(tmp_path / "run")
    with pytest.raises(UserError, match="run: already holds checkpoints, such as iter_0000003"):
        convert(checkpoint, tmp_path / "run", ["plan.projections.kind=separate"])

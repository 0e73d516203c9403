"""The table of roles: presets, custom tables, and what is refused."""

from pathlib import Path

import pytest

from megatron_ext import config_file
from megatron_ext.config import Config, PlanConfig
from megatron_ext.errors import UserError
from megatron_ext.routing.plan import PRESETS, Plan, with_roles
from megatron_ext.routing.roles import Role
from megatron_ext.token_classes import Modality, Task
from megatron_ext.training.config_checks import validate

EXAMPLES = Path(__file__).parents[2] / "examples/configs"


def plan(*overrides: str, num_layers: int = 16) -> Plan:
    config = config_file.load(Config, [], [f"plan.{o}" for o in overrides] + [f"model.num_layers={num_layers}"])
    return Plan.of(config.plan, num_layers)


def layers(plan: Plan, task: Task, modality: Modality, role: Role) -> list[int]:
    return [layer for layer in range(plan.num_layers) if plan.role(layer, task, modality) == role]


def test_dense_is_full_everywhere():
    assert plan("preset=dense").is_dense
    assert all(role == Role.FULL for roles in plan("preset=dense").roles for role in roles)


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "dense"])
def test_presets_touch_image_tokens_of_their_task_alone(preset):
    resolved = plan(f"preset={preset}")
    assert not resolved.is_dense
    for task in Task:
        assert layers(resolved, task, Modality.TEXT, Role.FULL) == list(range(16))
    kept = layers(resolved, Task.UNDERSTANDING, Modality.IMAGE, Role.KV_ONLY)
    skipped = layers(resolved, Task.GENERATION, Modality.IMAGE, Role.SKIP)
    assert kept == (list(range(16)) if "himix" in preset else [15] if preset == "dense_lossless" else [])
    assert skipped == ([6, 7, 8] if "hmgen" in preset else [])
    expected = {"share_partial": "delta", "separate": "separate", "share_all": "shared"}
    expected |= {"himix": "shared", "dense_lossless": "shared"}
    kind = next((kind for end, kind in expected.items() if preset.endswith(end)), "separate")
    assert resolved.projections.kind == kind and resolved.projections.modules == ("qkv", "proj")


@pytest.mark.parametrize(
    "settings, skipped",
    [
        (["shallow_count=5"], [5, 6, 7, 8, 9]),
        (["shallow_count=3", "shallow_placement=evenly"], [4, 8, 12]),
        (["shallow_layers=[9, 2, 2]"], [2, 9]),
        (["shallow_count=0"], []),
    ],
)
def test_shallow_layers_by_count_place_or_list(settings, skipped):
    resolved = plan("preset=hmgen", *settings)
    assert layers(resolved, Task.GENERATION, Modality.IMAGE, Role.SKIP) == skipped


@pytest.mark.parametrize("preset", PRESETS)
def test_a_trained_model_takes_other_roles_and_keeps_its_projections(preset):
    trained = config_file.load(Config, [], [f"plan.preset={preset}", "plan.projections.per_task=true"])
    before = Plan.of(trained.plan, trained.model.num_layers)
    dense = with_roles(trained, ["plan.preset=dense"])
    used = Plan.of(dense.plan, dense.model.num_layers)
    assert used.projections == before.projections and used.name == "dense"
    assert all(role == Role.FULL for roles in used.roles for role in roles)
    other = with_roles(trained, ["plan.preset=dense", "plan.projections.per_task=false"])
    assert not other.plan.projections.per_task


def test_himix_may_begin_late():
    resolved = plan("preset=himix", "himix_start=12")
    assert layers(resolved, Task.UNDERSTANDING, Modality.IMAGE, Role.KV_ONLY) == [12, 13, 14, 15]


def test_later_entries_of_a_table_win():
    resolved = plan(
        "preset=hmgen",
        "table=[{layers: '2-4,7-', task: all, modality: image, role: kv_only},"
        " {layers: 3, task: generation, modality: all, role: full}]",
        num_layers=9,
    )
    assert layers(resolved, Task.UNDERSTANDING, Modality.IMAGE, Role.KV_ONLY) == [2, 3, 4, 7, 8]
    assert layers(resolved, Task.GENERATION, Modality.IMAGE, Role.KV_ONLY) == [2, 4, 7, 8]
    assert resolved.name == "hmgen+table"


def test_components_of_image_tokens():
    per_task = plan("preset=himix_hmgen_share_partial", "projections.per_task=true").projections
    assert per_task.components == ("understanding", "generation")
    assert [per_task.component(task, Modality.IMAGE) for task in Task] == [1, 2, 2]
    assert {per_task.component(task, Modality.TEXT) for task in Task} == {0}
    assert plan("preset=hmgen").projections.components == ("image",)
    assert plan("preset=hmgen", "projections.kind=shared").projections.components == ()


@pytest.mark.parametrize(
    "settings, parts",
    [
        (["preset=himx"], ["plan.preset", "himx", "himix"]),
        (["preset=himix", "himix_start=16"], ["plan.himix_start", "layer 16", "0 .. 15"]),
        (["preset=hmgen", "shallow_count=17"], ["plan.shallow_count", "17", "0 .. 16"]),
        (["preset=hmgen", "shallow_layers=[3, 16]"], ["plan.shallow_layers[1]", "layer 16"]),
        (["table=[{layers: 0-16, task: all, modality: all, role: skip}]"], ["plan.table[0].layers", "layer 16"]),
        (["table=[{layers: 4-2, task: all, modality: all, role: skip}]"], ["plan.table[0].layers", "backwards"]),
        (["table=[{layers: a, task: all, modality: all, role: skip}]"], ["plan.table[0].layers", "'a'"]),
        (["table=[{layers: 0, task: all, modality: all, role: none}]"], ["plan.table[0].role", "none", "kv_only"]),
        (["preset=hmgen", "projections.rank=4"], ["plan.projections.rank", "separate", "delta"]),
        (["projections.modules=[qkv, fc3]"], ["plan.projections.modules[1]", "fc3", "fc1"]),
    ],
)
def test_an_invalid_setting_is_named(settings, parts):
    with pytest.raises(UserError) as refusal:
        plan(*settings)
    assert all(part in str(refusal.value) for part in parts), str(refusal.value)


def test_impossible_plans_are_refused_with_the_configuration():
    config = config_file.load(Config, [], ["plan.preset=himix", "plan.himix_start=9"])
    with pytest.raises(UserError, match="plan.himix_start"):
        validate(config, world_size=1)
    delta = ["plan.projections={kind: delta, rank: 3}", "parallel.tensor=2"]
    with pytest.raises(UserError, match=r"plan.projections.rank \(3\) is not divisible by parallel.tensor \(2\)"):
        validate(config_file.load(Config, [], delta), world_size=2)


@pytest.mark.parametrize("file", sorted((EXAMPLES / "methods").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_example_of_a_method_lies_over_a_model(file):
    config = config_file.load(Config, [EXAMPLES / "tiny.yaml", file])
    validate(config, 1)
    resolved = Plan.of(config.plan, config.model.num_layers)
    share = "himix_hmgen_share_all+dense_share" if resolved.dense_share else file.stem
    assert resolved.name == {"own_table": "dense+table"}.get(file.stem, share)


def test_every_preset_has_an_example():
    assert set(PRESETS) <= {file.stem for file in (EXAMPLES / "methods").glob("*.yaml")}


def test_the_table_says_what_every_class_does():
    text = plan("preset=himix_hmgen_share_partial", num_layers=4).table()
    lines = text.splitlines()
    assert " ".join(lines[0].split()) == (
        "layer understanding image understanding text generation text generation image text text"
    )
    assert [line.split() for line in lines[1:5]] == [
        ["0", "kv", "full", "full", "full", "full"],
        ["1", "kv", "full", "full", "-", "full"],
        ["2", "kv", "full", "full", "full", "full"],
        ["3", "kv", "full", "full", "full", "full"],
    ]
    assert lines[5] == "image tokens: delta projections in qkv, proj"


def test_a_plan_is_plain_data():
    assert Plan.of(PlanConfig(), 2) == Plan.of(PlanConfig(), 2)
    assert hash(Plan.of(PlanConfig(), 2)) == hash(Plan.of(PlanConfig(), 2))

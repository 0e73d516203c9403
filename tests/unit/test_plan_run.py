"""The planner: parameters and memory of layouts, the search, what a run costs, and the tool."""

import json
import sys

import pytest
import yaml

from megatron_ext import config_file
from megatron_ext.config import Config, SourceConfig
from megatron_ext.errors import UserError
from megatron_ext.planning import report
from megatron_ext.planning.calibration import fit_products
from megatron_ext.planning.devices import DEVICES, device_of
from megatron_ext.planning.inputs import mix_of
from megatron_ext.planning.memory import MicroBatchMemory, rank_memory
from megatron_ext.planning.search import Search
from megatron_ext.planning.workload import Workload
from megatron_ext.routing.flops import parameter_count
from megatron_ext.routing.plan import Plan
from megatron_ext.training.config_checks import validate
from megatron_ext.vocabulary import padded_size
from support.programs import run_program

SMALL = [
    "model.num_layers=8",
    "model.hidden_size=512",
    "model.num_attention_heads=8",
    "data.sequence_length=1024",
    "training.global_batch_size=16",
    "training.precision=bf16",
    "plan.preset=himix_hmgen_share_partial",
]
MIX = "understanding: 256 image, 64 text, 8 answer; generation: 30 text, 256 image; text: 100 text"


def loaded(*settings: str) -> tuple[Config, Workload]:
    config = config_file.load(Config, [], [*SMALL, *settings])
    return config, Workload.of_mix(config, Plan.from_config(config), MIX)


def memory_of(config: Config, workload: Workload, devices: int) -> list:
    sizes = MicroBatchMemory(config, workload, 4096, DEVICES["h100"])
    return rank_memory(config, sizes, 4096, devices, DEVICES["h100"])


@pytest.mark.parametrize(
    "settings", [[], ["plan.projections={kind: delta, rank: 8}"], ["model.qk_norm=true", "model.qkv_bias=true"]]
)
def test_stages_hold_the_parameters_of_the_model_together(settings):
    config, workload = loaded("parallel.pipeline=4", *settings)
    ranks = memory_of(config, workload, 4)
    assert sum(rank.parameters for rank in ranks) == parameter_count(config.model, 4096, workload.plan.projections)


def test_earlier_stages_keep_more_micro_batches():
    config, workload = loaded("parallel.pipeline=4", "training.micro_batch_size=1", "plan.preset=dense")
    kept = [rank.activations for rank in memory_of(config, workload, 4)]
    assert kept[0] > kept[1] > kept[2]
    # Four against two micro-batches of two equal layers.
    assert kept[0] / kept[2] == pytest.approx(2, rel=0.02)


def test_the_mix_fills_rows():
    config, workload = loaded()
    tokens = [sum(row.tokens) for row in workload.rows]
    # The longest document has 328 tokens: rows are full when one does not fit.
    assert all(config.data.sequence_length - 328 < n <= config.data.sequence_length for n in tokens)
    assert workload.fill == sum(tokens) / len(tokens) / config.data.sequence_length


def test_documents_longer_than_a_row_are_cut():
    config, workload = loaded("plan.preset=dense")
    cut = Workload.of_mix(config, workload.plan, "text: 2500 text")
    assert sorted(set(cut.documents)) == [2500 - 2 * 1024, 1024]
    assert {row.tokens[4] for row in cut.rows} == {1024, 452}
    # A row sees itself alone.
    assert max(row.visible[0][4] for row in cut.rows) == 1024 * 1025 // 2


def test_the_heaviest_rows_meet_in_memory():
    config, workload = loaded("training.micro_batch_size=2")
    neighbours = MicroBatchMemory(config, workload, 4096, DEVICES["h100"], in_order=True)
    heaviest = MicroBatchMemory(config, workload, 4096, DEVICES["h100"])
    kept = [sizes.chunk([*range(8)], 0, 1).kept.max() for sizes in (neighbours, heaviest)]
    assert kept[0] <= kept[1]


def test_repeated_keys_are_those_of_the_route():
    from megatron_ext.routing.route import Route

    config, workload = loaded()
    mix = "understanding: 100 image, 20 text, 100 image, 20 answer; text: 90 text"
    workload = Workload.of_mix(config, workload.plan, mix)
    route = Route.arrays(workload.batch.rows(0, 1), workload.plan)
    of_layers = [sum(layer.key_lengths) if layer.segment_keys is not None else 0 for layer in route.layers]
    assert workload.segment_keys[0].tolist() == of_layers and max(of_layers) > 0


def test_sources_without_data_are_planned_for_by_their_tasks_and_weights():
    sources = [SourceConfig("a", "understanding", 2), SourceConfig("b", "text", 1), SourceConfig("c", "text", 1)]
    mix = mix_of([*sources, SourceConfig("d", "generation", 4)])
    assert [part.split(" x ")[1] for part in mix.split("; ")] == ["25", "25", "50"]
    assert mix_of(sources) == "understanding: 256 image, 64 text, 8 answer; text: 600 text"


def test_the_best_layout_is_a_configuration_that_training_accepts():
    config, workload = loaded()
    search = Search(config, workload, lambda c: padded_size(4096, c.parallel.tensor), device_of("h100"))
    feasible, misses = search.run(8)
    assert not misses
    best = feasible[0]
    assert all(best.time.seconds <= other.time.seconds for other in feasible)
    assert {c.config.parallel.pipeline for c in feasible} == {1, 2, 4, 8}
    for candidate in feasible[:20]:
        validate(candidate.config, 8)
    settings = yaml.safe_load(yaml.safe_dump(report.overrides(best.config, 100)))
    merged = [
        f"{section}.{key}={json.dumps(value)}" for section, keys in settings.items() for key, value in keys.items()
    ]
    validate(config_file.load(Config, [], [*SMALL, *merged]), 8)


def test_recomputation_is_tried_where_memory_needs_it():
    config, workload = loaded("data.sequence_length=8192", "plan.preset=dense")
    small = device_of("h100")
    small = type(small)(**{**vars(small), "memory": 3.2e9})
    feasible, misses = Search(config, workload, lambda c: 4096, small).run(2)
    assert misses and all(c.worst > small.limit for c in misses)
    assert all(c.worst <= small.limit for c in feasible)
    assert "full" in {c.config.training.recompute for c in feasible}
    assert "none" in {c.config.training.recompute for c in misses}


def test_saves_come_as_often_as_loses_least():
    reliability = report.Reliability(save_seconds=5)
    assert reliability.interval(512) / 60 == pytest.approx(31, abs=0.5)
    best = reliability.goodput(512)
    for factor in (0.5, 2):
        interval, faults = factor * reliability.interval(512), reliability.between_faults(512)
        assert best > 1 - 5 / interval - (interval / 2 + reliability.restart_seconds) / faults


def test_the_fit_finds_rate_and_rows_of_products():
    rate, half = 3e14, 400
    seconds = {n: 1e9 * (n + half) / rate for n in (16, 256, 4096)}
    assert fit_products(seconds, 1e9) == pytest.approx((rate, half))


def test_a_file_that_is_no_calibration_is_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"device": {"speed": 1}}')
    with pytest.raises(UserError, match="other.json: is not a calibration"):
        device_of("cpu", tmp_path / "other.json")


def test_the_tool_says_what_comes_nearest_where_nothing_fits(tmp_path):
    out = tmp_path / "numbers.json"
    model = ["--config", "examples/configs/llama-2-70b.yaml", "data.vocabulary=''", "training.global_batch_size=2"]
    command = [sys.executable, "tools/plan_run.py", *model, "--gpus", 2, "--device", "h100", "--json", out]
    completed = run_program(command, check=False)
    assert completed.returncode == 1
    assert "no layout fits on 2 x H100 SXM: the nearest (parallel.tensor=" in completed.stdout
    assert max(json.loads(out.read_text())["nearest_miss"]["memory_bytes"]) > 80e9

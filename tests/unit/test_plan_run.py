"""The planner: memory, messages and time of layouts, and the tool."""

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.planning.devices import DEVICES, device_of
from megatron_ext.planning.inputs import padded
from megatron_ext.planning.memory import MicroBatchMemory, rank_memory
from megatron_ext.planning.search import Search
from megatron_ext.planning.workload import Workload
from megatron_ext.routing.flops import parameter_count
from megatron_ext.routing.plan import Plan

SMALL = [
    "model.num_layers=8",
    "model.hidden_size=512",
    "model.num_attention_heads=8",
    "data.sequence_length=1024",
    "training.global_batch_size=32",
    "training.precision=bf16",
    "plan.preset=himix_hmgen_share_partial",
]
MIX = "understanding: 256 image, 64 text, 8 answer; generation: 30 text, 256 image; text: 100 text"


def planned(*settings: str, devices: int = 8, name: str = "h100") -> tuple:
    config = config_file.load(Config, [], [*SMALL, *settings])
    workload = Workload.of_mix(config, Plan.from_config(config), MIX)
    search = Search(config, workload, lambda c: padded(4096, c.parallel.tensor), device_of(name))
    return config, workload, *search.run(devices)


def test_parameters_of_all_ranks_are_those_of_the_model():
    for settings in ([], ["plan.projections={kind: delta, rank: 8}"], ["model.qk_norm=true", "model.qkv_bias=true"]):
        config = config_file.load(Config, [], [*SMALL, *settings, "parallel.pipeline=4"])
        plan = Plan.from_config(config)
        workload = Workload.of_mix(config, plan, MIX)
        sizes = MicroBatchMemory(config, workload, 4096, DEVICES["h100"])
        ranks = rank_memory(config, sizes, 4096, 4, DEVICES["h100"])
        assert sum(rank.parameters for rank in ranks) == parameter_count(config.model, 4096, plan.projections)

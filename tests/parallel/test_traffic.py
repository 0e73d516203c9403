"""The bytes that ranks send are those that the planner computes."""

import pytest

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.planning import traffic
from megatron_ext.planning.traffic import Messages
from megatron_ext.routing.groups import plan_groups
from megatron_ext.routing.layer_route import row_count
from megatron_ext.routing.plan import Plan
from megatron_ext.transformer.resolved import resolve
from parity import BASE, VOCABULARY, packed_batch
from parity_layouts import overrides
from support.ranks import world

SETTINGS = [*BASE, "model.num_layers=4", "training.global_batch_size=4", "training.micro_batch_size=2"]


class SentBytes:
    """Counts what this rank sends in collectives, as a ring would, and to other ranks, by the group's ranks."""

    def __new__(cls):
        import torch.distributed as dist
        from torch.utils._python_dispatch import TorchDispatchMode

        class Mode(TorchDispatchMode):
            def __init__(self):
                super().__init__()
                self.bytes = {}

            def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
                name = str(function)
                if name.startswith("c10d."):
                    group = next(a for a in arguments if type(a).__name__ == "ScriptObject")
                    size = dist.ProcessGroup.unbox(group)
                    self._add(name.split(".")[1], arguments, size)
                return function(*arguments, **(keywords or {}))

            def _add(self, name, arguments, group):
                def bytes_of(value):
                    tensors = value if isinstance(value, list | tuple) else [value]
                    return sum(t.numel() * t.element_size() for t in tensors)

                ring = (group.size() - 1) / group.size()
                sent = {
                    "allreduce_": lambda: 2 * ring * bytes_of(arguments[0]),
                    "allreduce_coalesced_": lambda: 2 * ring * bytes_of(arguments[0]),
                    "_allgather_base_": lambda: ring * bytes_of(arguments[0]),
                    "_reduce_scatter_base_": lambda: ring * bytes_of(arguments[1]),
                    "send": lambda: bytes_of(arguments[0]),
                }
                if name in sent:
                    key = group.group_name
                    self.bytes[key] = self.bytes.get(key, 0) + sent[name]()

        return Mode()


def sent_by_a_step(layout: str, plan: list[str], extra: list[str]) -> tuple[dict[str, float], dict]:
    """Bytes that this rank sends in one step in its tensor, pipeline and data parallel groups; what a plan needs."""
    from megatron.core import parallel_state

    from megatron_ext import distributed
    from megatron_ext.training.setup import build_model, build_optimizer
    from megatron_ext.training.step import train_step
    from training_step.random_rows import step_input

    config = config_file.load(Config, [], [*SETTINGS, *plan, *overrides(layout), *extra])
    distributed.initialize(config)
    resolved = resolve(config, VOCABULARY)
    chunks = build_model(resolved)
    optimizer = build_optimizer(config, chunks)
    rows = 4 // parallel_state.get_data_parallel_world_size()
    start = parallel_state.get_data_parallel_rank() * rows
    step = step_input(packed_batch(4, 64, 0).rows(start, start + rows), config)
    routes = [
        {
            "stored": micro_batch.route.tokens.shape[1],
            "layers": [
                [resolved.rows.ranks * row_count(s) for s in (layer.slices.full_splits, layer.slices.kv_only_splits)]
                for layer in micro_batch.route.layers
            ],
            "head": resolved.rows.ranks * row_count(micro_batch.route.head.full_splits),
            "targets": len(micro_batch.labels),
        }
        for micro_batch in step.micro_batches
    ]
    with SentBytes() as sent:
        train_step(chunks, optimizer, step, config)
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "replicas": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    by_group = {name: sent.bytes.get(group.group_name, 0) for name, group in groups.items()}
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    distributed.shut_down()
    return by_group, {"routes": routes, "parameters": parameters, "stored_length": step.stored_length}


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp"])
@pytest.mark.parametrize("preset", ["dense", "himix_hmgen_share_partial"])
def test_a_step_of_tensor_parallelism_sends_what_is_computed(tmp_path, layout, preset):
    settings = [f"plan.preset={preset}"]
    (sent, needed), _ = world(2, sent_by_a_step, layout, settings, [], folder=tmp_path)
    config = config_file.load(Config, [], [*SETTINGS, *settings, *overrides(layout)])
    plan, model, sequence = Plan.from_config(config), config.model, config.parallel.sequence
    assert len(plan_groups(plan).members) > (preset != "dense")
    total = Messages()
    for route in needed["routes"]:
        for full, kv_only in route["layers"]:
            parts = traffic.layer_messages(model, plan.projections, full, kv_only, 2, sequence, 4)
            total = total + parts[0] + parts[1]
        for part in (
            *traffic.embedding_messages(model, route["stored"], 2, sequence, 4),
            *traffic.head_messages(model, route["head"], route["targets"], 2, sequence, 4),
        ):
            total += part
    if sequence:  # gradients of the norms, once a step
        total += traffic.all_reduce((2 * model.num_layers + 1) * model.hidden_size, 2, 4)
    assert sent["tensor"] == total.bytes


def test_stages_send_hidden_states_for_each_micro_batch(tmp_path):
    ranks = world(2, sent_by_a_step, "pp2", ["plan.preset=himix"], [], folder=tmp_path)
    for sent, needed in ranks:
        assert sent["pipeline"] == 2 * 4 * 64 * needed["stored_length"]


@pytest.mark.parametrize("sharded", [False, True])
def test_replicas_send_gradients_and_weights(tmp_path, sharded):
    options = [f"parallel.distributed_optimizer={sharded}".lower()]
    (sent, needed), _ = world(2, sent_by_a_step, "dp2", [], options, folder=tmp_path)
    parts = traffic.replica_messages(needed["parameters"], 2, sharded, 4)
    control = 8 * 4  # loss tokens of each task and of image tokens, all-reduced
    assert sent["replicas"] == pytest.approx(parts[0].bytes + parts[1].bytes + control, rel=1e-3 if sharded else 0)

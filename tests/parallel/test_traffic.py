"""The bytes that ranks send are those that the planner computes."""

import pytest

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.planning import traffic
from megatron_ext.planning.traffic import Messages
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
                    "allgather_into_tensor_coalesced_": lambda: ring * bytes_of(arguments[0]),
                    "reduce_scatter_tensor_coalesced_": lambda: ring * bytes_of(arguments[1]),
                    "send": lambda: bytes_of(arguments[0]),
                }
                if name in sent:
                    key = group.group_name
                    self.bytes[key] = self.bytes.get(key, 0) + sent[name]()

        return Mode()


def sent_by_a_step(layout: str, settings: list[str]) -> tuple[dict[str, float], dict]:
    """Bytes that this rank sends in one step in its tensor, pipeline and data parallel groups; what a plan needs."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ext.training.setup import build_model, build_optimizer
    from megatron_ext.training.step import train_step
    from training_step.random_rows import step_input

    config = config_file.load(Config, [], [*SETTINGS, *settings, *overrides(layout)])
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(config.parallel.tensor, config.parallel.pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(0)
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
    # With the distributed optimizer, buffers are padded.
    parameters = sum(buffer.grad_data.numel() for chunk in chunks for buffer in chunk.buffers)
    return by_group, {
        "routes": routes,
        "parameters": parameters,
        "stored_length": step.stored_length,
        "micro_batches": len(routes),
    }


PRESETS = ("dense", "himix", "himix_hmgen_share_partial")
CASES = [
    *((layout, [f"plan.preset={preset}"]) for layout in ("tp2", "tp2-sp") for preset in PRESETS),
    ("pp2", ["plan.preset=himix"]),
    ("dp2", []),
    ("dp2", ["parallel.distributed_optimizer=true"]),
]


def sent_in(cases: list) -> list:
    return [sent_by_a_step(*case) for case in cases]


@pytest.mark.parametrize("part", [slice(0, 6), slice(6, None)], ids=["tensor", "stages and replicas"])
def test_a_step_sends_what_is_computed(tmp_path, part):
    for (layout, settings), (sent, needed) in zip(CASES[part], world(2, sent_in, CASES[part], folder=tmp_path)[0]):
        config = config_file.load(Config, [], [*SETTINGS, *settings, *overrides(layout)])
        if layout == "pp2":
            border = traffic.border_message(config.model, needed["stored_length"], 1, 4)
            assert sent["pipeline"] == needed["micro_batches"] * border.bytes
        elif layout == "dp2":
            parts = traffic.replica_messages(needed["parameters"], 2, config.parallel.distributed_optimizer, 4)
            assert sent["replicas"] == parts[0].bytes + parts[1].bytes
        else:
            assert sent["tensor"] == tensor_bytes(config, needed["routes"])


def tensor_bytes(config: Config, routes: list[dict]) -> float:
    """What a rank sends in its tensor-parallel group in a step."""
    plan, model, sequence, total = Plan.from_config(config), config.model, config.parallel.sequence, Messages()
    for route in routes:
        for number, (full, kv_only) in enumerate(route["layers"]):
            gathered = number > 0 and plan.roles[number] == plan.roles[number - 1]
            parts = traffic.layer_messages(model, plan.projections, full, kv_only, 2, sequence, 4, gathered)
            total = total + parts[0] + parts[1]
        for part in (
            *traffic.embedding_messages(model, route["stored"], 2, sequence, 4),
            *traffic.head_messages(model, route["head"], route["targets"], 2, sequence, 4),
        ):
            total += part
    if sequence:  # gradients of the norms, once a step
        total += traffic.all_reduce((2 * model.num_layers + 1) * model.hidden_size, 2, 4)
    return total.bytes

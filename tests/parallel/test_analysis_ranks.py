"""Attention allocation and gradient alignment do not depend on how the model and the rows are cut over ranks."""

import pytest

from megatron_ext.transformer.resolved import resolve
from support.ranks import world

SETTINGS = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.tie_embeddings=true",
    "plan.preset=himix_hmgen_share_partial",
    "plan.shallow_layers=[1]",
    "data.sequence_length=48",
    "training.micro_batch_size=1",
    "training.global_batch_size=2",
]
RANK_4 = "plan.projections={kind: delta, rank: 4, modules: [qkv, proj, fc1, fc2]}"
LAYOUTS = {
    "tp2": ["parallel.tensor=2"],
    "tp2-sp": ["parallel.tensor=2", "parallel.sequence=true"],
    "pp2": ["parallel.pipeline=2"],
    "dp2": ["parallel.distributed_optimizer=true", "parallel.overlap=true"],
}


def test_alignment_and_allocation_are_those_of_one_process(tmp_path):
    ((expected, _),) = world(1, _measure, {"tp1": []}, folder=tmp_path)
    for measured_figures, losses in world(2, _measure, LAYOUTS, folder=tmp_path):
        for layout in LAYOUTS:
            names = {n for n in expected["tp1"] if " allocation " not in n or layout in ("tp2", "dp2")}
            assert measured_figures[layout].keys() == names
            for name in names:
                assert measured_figures[layout][name] == pytest.approx(expected["tp1"][name], rel=1e-4, abs=1e-6), (
                    layout,
                    name,
                )
        assert losses["dp2", True] == losses["dp2", False] and len(set(losses["dp2", True])) == 2


def _measure(layouts: dict[str, list[str]]):
    """By layout, all figures under flat names; the losses of two steps with measurements between them, and without."""
    from megatron_ext.analysis.gradients import alignment
    from megatron_ext.training.prepare import prepare

    figures, losses = {}, {}
    for layout, overrides in layouts.items():
        config, chunks, batch = _model([*SETTINGS, RANK_4, *overrides])
        alignment_figures = alignment(chunks, prepare(batch, resolve(config)), resolve(config))
        del alignment_figures["seconds"]
        figures[layout] = dict(_flat(alignment_figures))
        if config.parallel.pipeline == 1 and not config.parallel.sequence:
            figures[layout] |= dict(_flat(_allocation(chunks[0].module, config, batch)))
        if layout == "dp2":
            losses = {(layout, measured): _two_steps([*SETTINGS, *overrides], measured) for measured in (True, False)}
    return figures, losses


def _model(settings: list[str]):
    """A model with weights that make no difference zero, and this replica's rows."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ext import config_file
    from megatron_ext.config import Config
    from megatron_ext.training.setup import build_model
    from parity import perturb
    from support.labelled_rows import VOCABULARY, generation, rows_of, text, understanding

    config = config_file.load(Config, [], settings)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(config.parallel.tensor, config.parallel.pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunks = build_model(resolve(config, VOCABULARY))
    perturb(chunks)
    rows = (
        [understanding(6, (3, 2), (1, 3)), generation(4, 5), text(3)],
        [generation(0, 7), understanding(4, (2, 1)), understanding(3, (1, 1), (2, 2), (1, 1))],
    )
    batch, _ = rows_of(*rows, length=48)
    size, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    return config, chunks, batch.rows(replica * 2 // size, (replica + 1) * 2 // size)


def _allocation(model, config, batch) -> dict:
    from megatron_ext.analysis.attention import Allocation
    from megatron_ext.routing.plan import Plan
    from support.labelled_rows import SPECIAL

    allocation = Allocation(model, Plan.of(config.plan, config.model.num_layers), SPECIAL)
    allocation.read(batch)
    return {f"{name} allocation": queries["layers"] for name, queries in allocation.result().items()}


def _two_steps(settings: list[str], measured: bool) -> list[float]:
    from megatron_ext.analysis.gradients import alignment
    from megatron_ext.training.prepare import prepare
    from megatron_ext.training.setup import build_optimizer
    from megatron_ext.training.step import train_step

    config, chunks, batch = _model(settings)
    optimizer, losses, step = build_optimizer(config, chunks), [], prepare(batch, resolve(config))
    for _ in range(2):
        if measured:
            alignment(chunks, step, resolve(config))
        losses.append(train_step(chunks, optimizer, step, config).loss)
    return losses


def _flat(tree, name: str = ""):
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _flat(value, f"{name} {key}".strip())
    elif tree is not None:
        yield name, tree

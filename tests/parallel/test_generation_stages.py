"""Continuations and likelihoods do not depend on the layout of the model that is being trained, and a training step
does not notice them."""

import pytest

from support.ranks import world

SETTINGS = [
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "plan.preset=himix_hmgen_share_partial",
    "plan.shallow_layers=[1, 2]",
    "data.sequence_length=48",
    "training.micro_batch_size=1",
    "training.global_batch_size=4",
]
CODES = (
    "model.image_codes={depth: 4, codebook: vq, codebook_size: 20, width: 6, head: {num_layers: 1, hidden_size: 16}}"
)
LAYOUTS = {
    "pp2": ["parallel.pipeline=2", "plan.projections={kind: delta}"],
    "pp2-vp2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "pp2, 4 codes": ["parallel.pipeline=2", CODES],
    "cp2": ["parallel.context=2"],
}
ON_FOUR = {"tp2-pp2-sp": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]}


@pytest.mark.parametrize("size, layouts", [(2, LAYOUTS), pytest.param(4, ON_FOUR, marks=pytest.mark.slow)])
def test_ranks_generate_what_one_process_does(tmp_path, size, layouts):
    alone = {name: [s for s in settings if not s.startswith("parallel")] for name, settings in layouts.items()}
    (expected,) = world(1, _generated, alone, folder=tmp_path)
    of_ranks = world(size, _generated, layouts, folder=tmp_path)
    for layout, (continuations, likelihoods, losses) in expected.items():
        for of_rank in of_ranks:
            assert of_rank[layout][0] == continuations and len({tuple(ids) for ids in continuations}) > 5
            assert of_rank[layout][1] == pytest.approx(likelihoods, rel=1e-5)
            undisturbed, disturbed = of_rank[layout][2]
            assert undisturbed == disturbed
        assert losses[0] == losses[1] == pytest.approx(undisturbed, rel=1e-5)


def test_a_picture_that_one_stage_cannot_read_is_read_for_all_by_the_first(tmp_path):
    assert world(2, _read_by, [0], folder=tmp_path) == [([7], True), ([7], False)]
    errors = world(2, _read_by, [1], folder=tmp_path)
    assert errors == [("a.png: no such file", True), ("a.png: no such file", False)]


def _read_by(able: list[int]) -> tuple:
    """The codes of a picture that only some ranks can read, or the error, and whether this rank writes results."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_ext import distributed
    from megatron_ext.errors import UserError

    def read() -> list[int]:
        if dist.get_rank() not in able:
            raise UserError("a.png: no such file")
        return [7]

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    try:
        return distributed.from_replica_source(read), distributed.writes_for_replica()
    except UserError as error:
        return str(error), distributed.writes_for_replica()


def _generated(layouts: dict[str, list[str]]) -> dict[str, tuple]:
    """Of each layout: continuations, likelihoods, the losses of two steps without and with generation before each."""
    return {layout: _generated_under([*SETTINGS, *settings]) for layout, settings in layouts.items()}


def _generated_under(settings: list[str]) -> tuple:
    import torch
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ext import config_file
    from megatron_ext.config import Config
    from megatron_ext.generation.generator import Generator
    from megatron_ext.generation.likelihood import log_likelihoods
    from megatron_ext.generation.pipelined_model import PipelinedModel
    from megatron_ext.generation.sampling import Sampling
    from megatron_ext.training.prepare import prepare
    from megatron_ext.training.setup import build_model, build_optimizer
    from megatron_ext.training.step import evaluation_mode, train_step
    from megatron_ext.transformer.resolved import resolve
    from parity import packed_batch, perturb
    from support.generation import EDITS, REQUESTS, TokenIds, with_codes

    config = config_file.load(Config, [], settings)
    parallel, depth = config.parallel, config.model.image_codes.depth
    parallel_state.destroy_model_parallel()
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    parallel_state.initialize_model_parallel(
        parallel.tensor, parallel.pipeline, virtual, context_parallel_size=parallel.context
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    resolved = resolve(config, 128 if depth == 1 else TokenIds.image_offset)
    vectors = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) if depth > 1 else None
    requests = [*REQUESTS, *EDITS] if depth == 1 else [with_codes(request) for request in [*REQUESTS, *EDITS[:2]]]
    texts = [[4, 5, TokenIds.eod], [9], [], [3, 3, 3, 3]]
    losses = []
    for disturbed in (False, True):
        chunks = build_model(resolved, vectors)
        perturb(chunks)
        optimizer = build_optimizer(config, chunks)
        generator = Generator(PipelinedModel([chunk.module for chunk in chunks]), resolved.plan, TokenIds, grid=(2, 3))
        batch = packed_batch(4, 48, seed=1, depth=depth)
        batch.tokens %= 20
        batch.labels %= 20
        if depth > 1:
            batch.codes %= 20
        losses.append([])
        for _ in range(2):
            if disturbed:
                with evaluation_mode(chunks):
                    continuations = generator(requests, Sampling(temperature=0))
                    continuations += generator(requests[:3], Sampling(guidance=2.0, seed=3))
                    likelihoods = log_likelihoods(generator, requests[:4], texts)
            losses[-1].append(train_step(chunks, optimizer, prepare(batch, resolved), config).loss)
    return continuations, likelihoods, losses

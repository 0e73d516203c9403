"""A published model's weights under any layout: each rank's slices, and the logits of text."""

from pathlib import Path

import pytest
import torch

from support.published_models import OTHER_EDGES, make_published
from support.ranks import world
from support.vocabularies import make_vocabulary

TEXT_SIZE = 34
LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "tp2-sp-pp2": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    make_vocabulary(
        folder / "vocabulary", 300, [f"{n} red rings left of blue bars" for n in range(40)], pieces=TEXT_SIZE
    )
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen2", {"tie_word_embeddings": True}), ("qwen3", {"rope_parameters": OTHER_EDGES})],
    ids=["qwen2-tied", "qwen3"],
)
def test_every_rank_reads_its_slices_and_the_logits_are_the_model_s(folder, tmp_path, family, settings, layout):
    published = make_published(tmp_path / "published", family, rows=TEXT_SIZE, **settings)
    processes, overrides = LAYOUTS[layout]
    weights = tmp_path / "weights.pt"
    world(1, _load, tmp_path / "published", folder / "vocabulary", [], weights, folder=tmp_path)
    ranks = world(processes, _load, tmp_path / "published", folder / "vocabulary", overrides, weights, folder=tmp_path)

    assert set().union(*(rank["equal"] for rank in ranks)) == torch.load(weights).keys()
    logits = torch.cat([torch.tensor(rank["logits"]) for rank in ranks if rank["logits"] is not None], -1)
    tokens, positions = _text()
    with torch.no_grad():
        expected = published(tokens, position_ids=positions).logits
    torch.testing.assert_close(logits.view(*tokens.shape, -1)[..., :TEXT_SIZE], expected, atol=1e-5, rtol=1e-5)


def _text() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [2, 24] at positions past the edges of the rotary scaling."""
    tokens = torch.randint(0, TEXT_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))
    return tokens, (torch.arange(24) * 300).repeat(2, 1)


def _load(published: Path, vocabulary: Path, overrides: list[str], weights: Path) -> dict:
    """Names of this rank's parameters, which equal its slices of those in the file ``weights``, and its logits if it
    has some. A single rank writes the file."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ext import config_file
    from megatron_ext.config import Config
    from megatron_ext.data.batch import Batch
    from megatron_ext.hugging_face.folder import ModelFolder
    from megatron_ext.hugging_face.loading import load_published
    from megatron_ext.training.prepare import prepare
    from megatron_ext.training.setup import build_model
    from megatron_ext.training.step import evaluate_step
    from megatron_ext.transformer.initialization import global_parameters, shard
    from megatron_ext.transformer.resolved import resolve
    from megatron_ext.vocabulary import Vocabulary

    source = ModelFolder(published)
    config = config_file.load(Config, [], ["training.global_batch_size=2", "data.sequence_length=24", *overrides])
    config.model = source.model
    parallel_state.initialize_model_parallel(config.parallel.tensor, config.parallel.pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    chunks = build_model(resolve(config, 384))
    load_published(source, chunks, source.model, Vocabulary(vocabulary))

    parameters = {name: parameter.detach() for name, parameter in global_parameters(chunks[0].module)}
    if dist.get_world_size() == 1:
        torch.save(parameters, weights)
    whole = torch.load(weights)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, shard(whole[name], name)), name
    logits = []
    chunks[0].module.register_forward_hook(
        lambda model, inputs, output: logits.append(output.detach().clone()) if model.post_process else None
    )
    tokens, positions = _text()
    batch = Batch.zeros(*tokens.shape)
    batch.tokens, batch.positions, batch.loss_mask = tokens, positions, torch.ones(tokens.shape)
    evaluate_step(chunks, prepare(batch, resolve(config, 384)), config)
    return {"equal": set(parameters), "logits": logits[0].numpy() if logits else None}

"""Every rank of a replica gets the same batch, and the replicas together get the rows of the step."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.config import DataConfig, SourceConfig
from megatron_ext.data import build_mixture, step_batches
from megatron_ext.data.batch import Batch
from megatron_ext.data.copying import merge
from megatron_ext.errors import UserError
from megatron_ext.vocabulary import Vocabulary
from support.data_sets import write_pairs
from support.ranks import world

ROWS, LENGTH, FIRST_STEP = 8, 64, 3


@pytest.fixture
def data_set(tmp_path, vocabulary) -> str:
    return captions(tmp_path / "pairs", vocabulary)


def captions(prefix, vocabulary, depth=1) -> str:
    texts = [["two red circle " * (1 + number % 4)] for number in range(40)]
    return write_pairs(prefix, vocabulary, texts, depth=depth)


def two_steps(vocabulary_folder, path, loader, workers):
    """The tree that this rank prints, whether it opened files, and the fields of two steps, [2, rows, length]."""
    config = DataConfig(sequence_length=LENGTH, loader=loader, workers=workers, prefetch=2)
    sources = [SourceConfig(path, "generation"), SourceConfig(path, "understanding")]
    mixture = build_mixture(sources, config, Vocabulary(vocabulary_folder), train=True)
    batches = step_batches(mixture, config, ROWS, FIRST_STEP)
    steps = [next(batches) for _ in range(2)]
    batches.close()
    names = [field.name for field in dataclasses.fields(Batch) if getattr(steps[0], field.name) is not None]
    fields = {name: torch.stack([getattr(step, name) for step in steps]).tolist() for name in names}
    return mixture.tree(), any(source.dataset for source in mixture.sources), fields


def in_layouts(layouts, *arguments):
    """On each rank: its replica and :func:`two_steps`, for each layout."""
    results = []
    for tensor, pipeline in layouts:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor, pipeline)
        results.append((parallel_state.get_data_parallel_rank(), *two_steps(*arguments)))
    return results


@pytest.mark.parametrize("loader, workers, depth", [("plain", 0, 1), ("dali", 1, 4)])
def test_all_ranks_of_a_replica_get_the_same_batch(tmp_path, vocabulary, loader, workers, depth):
    data_set = captions(tmp_path / "several", vocabulary, depth)
    layouts = [(2, 1), (1, 2), (2, 2), (1, 1)]
    ranks = world(4, in_layouts, layouts, vocabulary.folder, data_set, loader, workers, folder=tmp_path)
    tree, _, alone = two_steps(vocabulary.folder, data_set, "plain", 0)
    for number, (tensor, pipeline) in enumerate(layouts):
        replicas = 4 // (tensor * pipeline)
        share = ROWS // replicas
        assert sum(opened for _, _, opened, _ in (rank[number] for rank in ranks)) == replicas  # one reader each
        for replica, ranks_tree, _, fields in (rank[number] for rank in ranks):
            assert ranks_tree == tree
            assert ("codes" in fields) == (depth > 1)
            for name, steps in alone.items():
                expected = [rows[replica * share : (replica + 1) * share] for rows in steps]
                assert fields[name] == expected, (tensor, pipeline, replica, name)


def refusal(vocabulary_folder, path_of_rank):
    """The message of the error that this rank gets for a mixture with its own path, in a world of two replicas."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(2, 1)
    sources = [SourceConfig(path_of_rank[dist.get_rank()], "generation")]
    try:
        build_mixture(sources, DataConfig(sequence_length=LENGTH), Vocabulary(vocabulary_folder), train=True)
    except UserError as error:
        return str(error)


def test_a_file_that_one_reader_lacks_is_named_on_every_rank(tmp_path, vocabulary, data_set):
    paths = [data_set, "never opened", str(tmp_path / "elsewhere"), "never opened"]
    messages = world(4, refusal, vocabulary.folder, paths, folder=tmp_path)
    assert len(set(messages)) == 1 and messages[0].startswith(f"{tmp_path / 'elsewhere'}.json: not found")


def test_readers_that_find_different_files_are_stopped(tmp_path, vocabulary, data_set):
    merge([data_set, data_set], tmp_path / "twice")
    paths = [data_set, "never opened", str(tmp_path / "twice"), "never opened"]
    messages = world(4, refusal, vocabulary.folder, paths, folder=tmp_path)
    assert set(messages) == {"data: rank 2 found other files than rank 0 at the same paths; copy the data sets again"}

"""What a plan is made from: the size of the vocabulary, and rows from the run's data or from a mix."""

import math
from pathlib import Path

from megatron_ext.analysis import published_costs
from megatron_ext.config import Config
from megatron_ext.planning.workload import SAMPLED_ROWS, Workload
from megatron_ext.routing.plan import Plan
from megatron_ext.vocabulary import Vocabulary

VOCABULARY_MULTIPLE = 128

MIX = "understanding: 256 image, 64 text, 8 answer; generation: 30 text, 256 image"
"""The data where nothing else is said."""


def with_vocabulary(config: Config) -> tuple[Config, int]:
    """The configuration with the sizes of ``model.image_codes`` that vocabulary and VQ tokenizer tell, and the rows of
    the output head; those of the published models where ``data.vocabulary`` is not there."""
    folder, codes = config.data.vocabulary, config.model.image_codes
    vocabulary = Vocabulary(folder) if folder and Path(folder).is_dir() else None
    if vocabulary is None and (codes.depth == 1 or None not in (codes.codebook_size, codes.width)):
        return config, published_costs.VOCABULARY
    # Imported late: where nothing is to be read, a tool does not wait for torch.
    from megatron_ext.training.image_codes import with_code_shape
    from megatron_ext.transformer.resolved import vocab_size

    size = vocab_size(config, vocabulary) if vocabulary else published_costs.VOCABULARY
    return with_code_shape(config, vocabulary), size


def padded(size: int, tensor: int) -> int:
    """Rows of the embedding of ``size`` ids."""
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor)
    return -(-size // multiple) * multiple


def workload_of(config: Config, mix: str | None) -> tuple[Workload, str]:
    """Rows to plan for, and where they are from: the mix; or the run's data, where all of it is there; or :data:`MIX`.

    Raises:
        UserError: the data cannot be used, or the mix not be read.
    """
    plan, sources, vocabulary = Plan.from_config(config), config.data.train, config.data.vocabulary
    there = bool(sources) and Path(vocabulary).is_dir() and all(Path(f"{s.path}.idx").exists() for s in sources)
    if mix is None and there and vocabulary:
        from megatron_ext.data import PackedRows, build_mixture  # they load torch

        depth = config.model.image_codes.depth
        mixture = build_mixture(sources, config.data, Vocabulary(vocabulary), train=True, depth=depth)
        rows = PackedRows.of(mixture, config.data).batch(0, SAMPLED_ROWS)
        return Workload.of_batch(rows, plan), f"{SAMPLED_ROWS} rows of data.train"
    return Workload.of_mix(config, plan, mix or MIX), f"rows of the mix {mix or MIX!r}"

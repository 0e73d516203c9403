"""What a plan is made from: the size of the vocabulary, and rows from the run's data or from a mix."""

from pathlib import Path

from megatron_ext.analysis import published_costs
from megatron_ext.config import Config, SourceConfig
from megatron_ext.planning.workload import SAMPLED_ROWS, Workload
from megatron_ext.routing.plan import Plan
from megatron_ext.vocabulary import Vocabulary

_DOCUMENTS = {
    "understanding": "256 image, 64 text, 8 answer",
    "generation": "30 text, 256 image",
    "text": "600 text",
    "interleaved": "256 image, 12 text, 256 drawn",
}

MIX = "; ".join(f"{task}: {_DOCUMENTS[task]}" for task in ("understanding", "generation"))
"""The data where nothing else is said."""


def with_vocabulary(config: Config) -> tuple[Config, int, str]:
    """The configuration with the sizes of ``model.image_codes`` that vocabulary and VQ tokenizer tell, the rows of the
    output head, and where they are from; those of the published models where ``data.vocabulary`` is not there."""
    folder, codes = config.data.vocabulary, config.model.image_codes
    vocabulary = Vocabulary(folder) if folder and Path(folder).is_dir() else None
    size = published_costs.VOCABULARY
    source = f"assumed, that of the paper's models; --vocabulary sets it{f' ({folder} not found)' if folder else ''}"
    if vocabulary is None and (codes.depth == 1 or None not in (codes.codebook_size, codes.width)):
        return config, size, source
    # Imported late: where nothing is to be read, a tool does not wait for torch.
    from megatron_ext.training.image_codes import with_code_shape
    from megatron_ext.transformer.resolved import vocab_size

    if vocabulary:
        size, source = vocab_size(config, vocabulary), f"of {folder}"
    return with_code_shape(config, vocabulary), size, source


def workload_of(config: Config, mix: str | None) -> tuple[Workload, str]:
    """Rows to plan for, and where they are from: the mix; or the run's data, where all of it is there; or a mix of the
    tasks of ``data.train``; or :data:`MIX`.

    Raises:
        UserError: the data cannot be used, or the mix not be read.
    """
    plan, sources, vocabulary = Plan.from_config(config), config.data.train, config.data.vocabulary
    if mix is not None or not sources:
        mix = mix or MIX
        return Workload.of_mix(config, plan, mix), f"rows of the mix {mix!r}"
    missing = [str(file) for s in sources if not (file := Path(f"{s.path}.idx")).exists()]
    if not Path(vocabulary or "/dev/null").is_dir():
        missing.append(f"data.vocabulary {vocabulary!r}")
    if missing:
        mix = mix_of(sources)
        return Workload.of_mix(config, plan, mix), f"{missing[0]} not found: planned for the mix {mix!r}"
    from megatron_ext.data import PackedRows, build_mixture  # they load torch

    depth = config.model.image_codes.depth
    mixture = build_mixture(sources, config.data, Vocabulary(vocabulary), train=True, depth=depth)
    rows = PackedRows.of(mixture, config.data).batch(0, SAMPLED_ROWS)
    return Workload.of_batch(rows, plan), f"{SAMPLED_ROWS} rows of data.train"


def mix_of(sources: list[SourceConfig]) -> str:
    """A mix of documents of these tasks, as many of each as their weights say, to a hundredth of them."""
    weights = {}
    for source in sources:
        weights[source.task] = weights.get(source.task, 0.0) + source.weight
    numbers = {task: max(1, round(100 * weight / sum(weights.values()))) for task, weight in weights.items()}
    if len(set(numbers.values())) == 1:
        numbers = dict.fromkeys(numbers, 1)
    return "; ".join(f"{task}: {_DOCUMENTS[task]}{f' x {n}' if n > 1 else ''}" for task, n in numbers.items())

"""A published model's weights in the parameters of a run, under any layout.

::

    row of embedding and head       initial value
    text 0 .. text_size-1           the published model's row of the same id: a vocabulary keeps its token ids
    <eod>                           the row of the token that ended documents in its training
    <pad> <boi> <eoi>, VQ codes,    this project's initial weights (from the seed and the parameter's name), scaled to
    rows of padding                 the standard deviation of the text rows, separately in embedding and head

Initial weights have the standard deviation for training from scratch (``init_std``), which can differ from that of
trained rows. Without the scaling, new tokens would enter the first layer with a smaller or larger norm than text, and
their logits would spread less or more than those of text.
"""

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_ext import command_line, distributed
from megatron_ext.errors import UserError
from megatron_ext.hugging_face.folder import ModelFolder
from megatron_ext.hugging_face.weights import HEAD, TABLES, read_parameter
from megatron_ext.model_config import ModelConfig
from megatron_ext.transformer.initialization import global_parameters
from megatron_ext.vocabulary import Vocabulary

_BLOCK = 512
"""Rows of a table that are read at once."""


@torch.no_grad()
def load_published(
    source: ModelFolder, chunks: Sequence[torch.nn.Module], model: ModelConfig, vocabulary: Vocabulary
) -> dict[str, float]:
    """Copy a published model's weights into this rank's model chunks, which hold initial weights. Collective.

    Every rank reads its own slices, one parameter at a time.

    Args:
        chunks: wrapped for data parallelism or not.
        model: the run's shape. It may have positions inside an image, and any projections: what the published model
            lacks keeps its initial value.
        vocabulary: with the published model's text tokens.

    Returns:
        The standard deviation of new rows in each table.

    Raises:
        UserError: names the file, the key or the token that does not fit.
    """
    require_same_shape(source, model)
    distributed.from_rank_zero(lambda: require_same_text(source, vocabulary))
    stds = distributed.from_rank_zero(
        lambda: {name: _text_std(source, tensor, vocabulary) for name, tensor in _tables(model)}
    )
    rank, size = (
        f()
        for f in (parallel_state.get_tensor_model_parallel_rank, parallel_state.get_tensor_model_parallel_world_size)
    )
    parameters = [pair for chunk in chunks for pair in global_parameters(unwrap_model(chunk))]
    for name, parameter in command_line.progress(parameters, desc="weights", unit=" parameters"):
        if name in TABLES:
            first = rank * parameter.shape[0]
            _fill_rows(parameter, first, source, TABLES[name], vocabulary, stds[name] / model.init_std)
        elif (weight := read_parameter(source, name, rank, size)) is not None:
            parameter.copy_(weight)
    return stds


def _tables(model: ModelConfig) -> list[tuple[str, str]]:
    return [item for item in TABLES.items() if not (model.tie_embeddings and item[0] == HEAD)]


def _text_std(source: ModelFolder, tensor: str, vocabulary: Vocabulary) -> float:
    """Standard deviation of the text rows of a table, read block by block."""
    count, total, squares = 0, 0.0, 0.0
    for begin in range(0, vocabulary.text_size, _BLOCK):
        block = source.rows(tensor, begin, min(begin + _BLOCK, vocabulary.text_size)).double()
        count, total, squares = count + block.numel(), total + float(block.sum()), squares + float(block.square().sum())
    return max((squares - total * total / count) / (count - 1), 0.0) ** 0.5


def _fill_rows(
    rows: Tensor, first: int, source: ModelFolder, tensor: str, vocabulary: Vocabulary, scale: float
) -> None:
    """Copy a table's text rows and its row of the end of documents, and scale the others.

    Args:
        rows: a tensor-parallel rank's rows of the table, ``first`` and on, with initial weights.
    """
    rows.mul_(scale)
    text = max(min(vocabulary.text_size - first, len(rows)), 0)
    for begin in range(0, text, _BLOCK):
        end = min(begin + _BLOCK, text)
        rows[begin:end] = source.rows(tensor, first + begin, first + end).to(rows)
    end_of_document = vocabulary.text.end
    if end_of_document is not None and first <= vocabulary.eod < first + len(rows):
        rows[vocabulary.eod - first] = source.rows(tensor, end_of_document, end_of_document + 1)[0].to(rows)


def require_same_shape(source: ModelFolder, model: ModelConfig) -> None:
    """Refuse a run whose model has another shape.

    Raises:
        UserError: names the first key that differs.
    """
    published, own = source.model.identity, model.identity
    for key in dict.fromkeys((*published, *own)):
        if key != "max_image_tokens" and published.get(key) != own.get(key):
            raise UserError(
                f"{source.folder}: its model.{key} is {published.get(key)}, this run's is {own.get(key)}; write its "
                "shape with tools/convert_hf.py --shape and lay it over the configuration"
            )


def require_same_text(source: ModelFolder, vocabulary: Vocabulary) -> None:
    """Refuse a vocabulary whose text ids stand for other tokens in the published model.

    Raises:
        UserError: names the first token that differs.
    """
    size, rows = vocabulary.text_size, source.vocab_size
    differ = f"{vocabulary.folder}: has {size} text tokens, the embedding of {source.folder} {rows} rows"
    if size > rows:
        raise UserError(f"{differ}; create a vocabulary with tools/train_tokenizer.py --from-model {source.folder}")
    text = source.text(vocabulary.text_file.name)
    if text is None:
        if size < rows:
            raise UserError(f"{differ}, and no tokenizer file shows which rows are tokens; add it")
        return
    for i in range(size):
        own, published = vocabulary.text.piece(i), text.piece(i)
        if own not in (None, published):  # an id without a token stands for nothing
            raise UserError(
                f"{vocabulary.folder}: its text token {i} is {own!r}, that of {source.folder} "
                f"{'missing' if published is None else repr(published)}; a vocabulary must have the model's own tokens "
                f"(tools/train_tokenizer.py --from-model {source.folder})"
            )

"""A published model's weights in the parameters of a run, under any layout.

::

    row of embedding and head       initial value
    text 0 .. text_size-1           the published model's row of the same id: a vocabulary keeps its token ids
    <eod>                           the row of the token that ended documents in its training
    <pad> <boi> <eoi>, VQ codes,    this project's initial weights (from the seed and the parameter's name), scaled to
    rows of padding                 the standard deviation of the text rows, separately in embedding and head

A model that was exported with this vocabulary has rows of all its tokens, which are taken. A tokenizer may have more
tokens than its model has rows (a ``<pad>`` that was added to it): their rows are new, too.

Initial weights have the standard deviation for training from scratch (``init_std``), which can differ from that of
trained rows. Without the scaling, new tokens would enter the first layer with a smaller or larger norm than text, and
their logits would spread less or more than those of text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_ext import command_line, distributed
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.hugging_face.folder import BLOCK, ModelFolder
from megatron_ext.hugging_face.weights import HEAD, TABLES
from megatron_ext.model_config import ModelConfig
from megatron_ext.text_model import TOKENIZER_JSON
from megatron_ext.transformer.initialization import global_parameters
from megatron_ext.transformer.resolved import vocab_size
from megatron_ext.vocabulary import SPECIAL_TOKENS, Vocabulary, code_name

_OWN = ("max_image_tokens", "image_codes")
"""Keys of the model's identity that a published model does not decide: it has no such parameters."""


@dataclass(frozen=True)
class TableRows:
    """Rows of the tables of embedding and head.

    Attributes:
        taken: the first rows, which are the published model's.
        special: rows of the published model by id, of special tokens that are not among the first.
        published, new: tokens that start as the published model's rows, and tokens that start from scaled initial
            weights.
        left_out: rows of the published model that no token starts with.
        stds: standard deviation of new rows by the name of the table.
    """

    taken: int
    special: dict[int, int]
    published: int
    new: int
    left_out: int
    stds: dict[str, float]


@torch.no_grad()
def load_published(
    source: ModelFolder, chunks: Sequence[torch.nn.Module], model: ModelConfig, vocabulary: Vocabulary
) -> TableRows:
    """Copy a published model's weights into this rank's model chunks, which hold initial weights. Collective.

    Every rank reads its own slices, one parameter at a time.

    Args:
        source: checked by :func:`check_published`.
        chunks: wrapped for data parallelism or not.
        model: the run's shape. It may have positions inside an image, and any projections: what the published model
            lacks keeps its initial value.
        vocabulary: with the published model's text tokens.
    """
    table_rows = distributed.from_rank_zero(lambda: _table_rows(source, model, vocabulary))
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    parameters = [pair for chunk in chunks for pair in global_parameters(unwrap_model(chunk))]
    for name, parameter in command_line.progress(parameters, desc="weights", unit=" parameters"):
        if name in TABLES:
            parameter.mul_(table_rows.stds[name] / model.init_std)
            _fill_rows(parameter, rank * parameter.shape[0], source, TABLES[name], table_rows)
        elif (weight := source.parameter(name, rank, size)) is not None:
            parameter.copy_(weight)
    return table_rows


def check_published(source: ModelFolder, model: ModelConfig, vocabulary: Vocabulary) -> None:
    """Refuse a run of another shape or with other text tokens. Collective.

    Raises:
        UserError: names the first key or token that differs.
    """
    require_same_shape(source, model)
    distributed.from_rank_zero(lambda: require_same_text(source, vocabulary))


def _table_rows(source: ModelFolder, model: ModelConfig, vocabulary: Vocabulary) -> TableRows:
    tables = [item for item in TABLES.items() if not (model.tie_embeddings and item[0] == HEAD)]
    stds = {name: _text_std(source, tensor, vocabulary) for name, tensor in tables}
    whole = _has_all_tokens(source, vocabulary)
    size = vocab_size(Config(model=model), vocabulary)
    taken = min(size if whole else vocabulary.text_size, source.vocab_size)
    special = {} if whole else source.special_rows(vocabulary)
    left_out = source.vocab_size - taken - len({row for row in special.values() if row >= taken})
    published = taken + len(special)
    return TableRows(taken, special, published, size - published, left_out, stds)


def _has_all_tokens(source: ModelFolder, vocabulary: Vocabulary) -> bool:
    """Whether the published model knows the vocabulary's special tokens and codes under their ids."""
    text = source.text(TOKENIZER_JSON)
    if text is None or source.vocab_size < vocabulary.size:
        return False
    names = dict(zip(SPECIAL_TOKENS, range(vocabulary.text_size, vocabulary.image_offset)))
    names |= {code_name(code): vocabulary.image_offset + code for code in (0, vocabulary.codebook_size - 1)}
    return all(text.id(name) == i for name, i in names.items())


def _text_std(source: ModelFolder, tensor: str, vocabulary: Vocabulary) -> float:
    """Standard deviation of the text rows of a table, read block by block."""
    count, total, squares = 0, 0.0, 0.0
    text = min(vocabulary.text_size, source.vocab_size)
    for begin in range(0, text, BLOCK):
        block = source.rows(tensor, begin, min(begin + BLOCK, text)).double()
        count, total, squares = count + block.numel(), total + float(block.sum()), squares + float(block.square().sum())
    return max((squares - total * total / count) / (count - 1), 0.0) ** 0.5


def _fill_rows(rows: Tensor, first: int, source: ModelFolder, tensor: str, table_rows: TableRows) -> None:
    """Copy the published model's rows of a table.

    Args:
        rows: a tensor-parallel rank's rows of the table, ``first`` and on.
    """
    own = max(min(table_rows.taken - first, len(rows)), 0)
    for begin in range(0, own, BLOCK):
        end = min(begin + BLOCK, own)
        rows[begin:end] = source.rows(tensor, first + begin, first + end).to(rows)
    for token, row in table_rows.special.items():
        if first <= token < first + len(rows):
            rows[token - first] = source.rows(tensor, row, row + 1)[0].to(rows)


def require_same_shape(source: ModelFolder, model: ModelConfig) -> None:
    """Refuse a run whose model has another shape.

    Raises:
        UserError: names the first key that differs.
    """
    published, own = source.model.identity, model.identity
    for key in dict.fromkeys((*published, *own)):
        if key not in _OWN and published.get(key) != own.get(key):
            if key == "rotary_scaling_factor":  # a short form, of which the model keeps no value
                key = "rotary_scaling"
            raise UserError(
                f"{source.folder}: its model.{key} is {getattr(source.model, key)}, this run's is "
                f"{getattr(model, key)}; write its shape with tools/convert_hf.py --shape and lay it over the "
                "configuration"
            )


def require_same_text(source: ModelFolder, vocabulary: Vocabulary) -> None:
    """Refuse a vocabulary whose text ids stand for other tokens in the published model.

    Raises:
        UserError: names the first token that differs.
    """
    size, rows = vocabulary.text_size, source.vocab_size
    text = source.text(vocabulary.text_file.name)
    if text is None:
        if size != rows:
            raise UserError(
                f"{vocabulary.folder}: has {size} text tokens, the embedding of {source.folder} {rows} rows, and no "
                "tokenizer file there shows which rows are tokens; add it"
            )
        return
    for i in range(size):
        own, published = vocabulary.text.piece(i), text.piece(i)
        if own not in (None, published):  # an id without a token stands for nothing
            raise UserError(
                f"{vocabulary.folder}: its text token {i} is {own!r}, that of {source.folder} "
                f"{'missing' if published is None else repr(published)}; a vocabulary must have the model's own tokens "
                f"(tools/train_tokenizer.py --from-model {source.folder})"
            )

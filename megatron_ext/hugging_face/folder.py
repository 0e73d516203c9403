"""A folder of a published model as ``save_pretrained`` writes it: config.json and safetensors, whole or in shards."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_ext import text_model
from megatron_ext.errors import UserError
from megatron_ext.files import read_json
from megatron_ext.hugging_face.config_json import model_config
from megatron_ext.hugging_face.tensor_files import TensorFiles
from megatron_ext.hugging_face.weights import TABLES, read_parameter
from megatron_ext.model_config import ModelConfig
from megatron_ext.text_model import SENTENCEPIECE, TOKENIZER_JSON, TextModel
from megatron_ext.vocabulary import Vocabulary

EMBED_TOKENS, LM_HEAD = TABLES.values()
BLOCK = 512
"""Rows of a table that are read at once."""


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a published model, rather than a checkpoint or a run of this project."""
    return (folder / "config.json").is_file()


class ModelFolder:
    """A published model's shape, and its tensors by name, of which only what is asked for is read.

    Attributes:
        folder: where it is.
        name: of the model.
        model: its shape as a ``model`` section.
        vocab_size: rows of its embedding.
        precision: ``bf16`` if all weights have it, else ``float32``, which holds them exactly.
    """

    def __init__(self, folder: Path):
        """
        Raises:
            UserError: names a missing or damaged file, or a setting that this project's model cannot express.
        """
        self.folder = Path(folder)
        self.name = self.folder.name
        if not self.folder.is_dir():
            raise UserError(f"{folder}: not a folder of a published model")
        file = self.folder / "config.json"
        config = read_json(file)
        self.model, self.vocab_size = model_config(config, file), config["vocab_size"]
        self._tensors = TensorFiles(self.folder)
        self._texts: dict[str, TextModel] = {}
        types = self._check_tensors()
        self.precision = "bf16" if types == {"BF16"} else "float32"

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows of a tensor, or elements of a vector."""
        return self._tensors.rows(name, begin, end)

    def columns(self, name: str, begin: int, end: int) -> Tensor:
        """Columns of a matrix."""
        return self._tensors.columns(name, begin, end)

    def parameter(self, name: str, rank: int, size: int) -> Tensor | None:
        """As :func:`~megatron_ext.hugging_face.weights.read_parameter`."""
        return read_parameter(self, name, rank, size)

    def special_rows(self, vocabulary: Vocabulary) -> dict[int, int]:
        """The rows of embedding and head with which special tokens start, by id: ``<eod>`` with that of the token that
        ended documents in the model's training."""
        end = vocabulary.text.end
        return {} if end is None or end >= self.vocab_size else {vocabulary.eod: end}

    def text(self, preferred: str) -> TextModel | None:
        """The folder's own tokenizer, from the file ``preferred`` if it has both of tokenizer.model and tokenizer.json;
        None if it has neither."""
        names = sorted((SENTENCEPIECE, TOKENIZER_JSON), key=lambda name: name != preferred)
        file = next((self.folder / name for name in names if (self.folder / name).is_file()), None)
        if file and file.name not in self._texts:  # a large tokenizer takes a second
            self._texts[file.name] = text_model.load(file)
        return self._texts[file.name] if file else None

    def _check_tensors(self) -> set[str]:
        """Refuse a folder whose tensors do not match its config.json. Returns the types of their elements."""
        expected = tensor_shapes(self.model, self.vocab_size)
        types = self._tensors.check(expected)
        for name in sorted(set(self._tensors) - expected.keys()):
            # A tied head may be stored; it then equals the embedding.
            if name.endswith("rotary_emb.inv_freq") or (name == LM_HEAD and self._is_embedding(name)):
                continue
            raise UserError(
                f"{self._tensors.file(name)}: has the parameter {name}, which a model of this config.json does not have"
            )
        return types

    def _is_embedding(self, name: str) -> bool:
        """Whether a table equals the embedding, compared block by block."""
        ranges = ((begin, begin + BLOCK) for begin in range(0, self.vocab_size, BLOCK))
        return all(torch.equal(self.rows(name, *rows), self.rows(EMBED_TOKENS, *rows)) for rows in ranges)


def tensor_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of each parameter of ``LlamaForCausalLM`` and its kin."""
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.head_size
    widths = {"q": model.num_attention_heads * d, "k": model.num_query_groups * d, "v": model.num_query_groups * d}
    layer = {f"self_attn.{name}_proj.weight": (rows, h) for name, rows in widths.items()}
    layer["self_attn.o_proj.weight"] = (h, widths["q"])
    if model.qkv_bias:
        layer |= {f"self_attn.{name}_proj.bias": (rows,) for name, rows in widths.items()}
    if model.qk_norm:
        layer |= {f"self_attn.{name}_norm.weight": (d,) for name in "qk"}
    layer |= {"mlp.gate_proj.weight": (f, h), "mlp.up_proj.weight": (f, h), "mlp.down_proj.weight": (h, f)}
    layer |= {"input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)}
    shapes = {EMBED_TOKENS: (vocab_size, h), "model.norm.weight": (h,)}
    if not model.tie_embeddings:
        shapes[LM_HEAD] = (vocab_size, h)
    for number in range(model.num_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes

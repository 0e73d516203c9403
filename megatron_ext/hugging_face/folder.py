"""A folder of a published model as ``save_pretrained`` writes it: config.json and safetensors, whole or in shards."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext import text_model
from megatron_ext.errors import UserError
from megatron_ext.files import read_json
from megatron_ext.hugging_face.config_json import model_config
from megatron_ext.hugging_face.weights import TABLES
from megatron_ext.model_config import ModelConfig
from megatron_ext.text_model import SENTENCEPIECE, TOKENIZER_JSON, TextModel

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
        if not self.folder.is_dir():
            raise UserError(f"{folder}: not a folder of a published model")
        file = self.folder / "config.json"
        config = read_json(file)
        self.model, self.vocab_size = model_config(config, file), config["vocab_size"]
        # Files stay open: a model has hundreds of tensors.
        self._tensors = {name: (path, opened) for path, opened in self._files() for name in list(opened.keys())}
        self._texts: dict[str, TextModel] = {}
        types = self._check_tensors()
        self.precision = "bf16" if types == {"BF16"} else "float32"

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows of a tensor, or elements of a vector."""
        return self._slice(name)[begin:end]

    def columns(self, name: str, begin: int, end: int) -> Tensor:
        """Columns of a matrix."""
        return self._slice(name)[:, begin:end]

    def text(self, preferred: str) -> TextModel | None:
        """The folder's own tokenizer, from the file ``preferred`` if it has both of tokenizer.model and tokenizer.json;
        None if it has neither."""
        names = sorted((SENTENCEPIECE, TOKENIZER_JSON), key=lambda name: name != preferred)
        file = next((self.folder / name for name in names if (self.folder / name).is_file()), None)
        if file and file.name not in self._texts:  # a large tokenizer takes a second
            self._texts[file.name] = text_model.load(file)
        return self._texts[file.name] if file else None

    def _slice(self, name: str):
        return self._tensors[name][1].get_slice(name)

    def _files(self) -> Iterator[tuple[Path, object]]:
        """Every file of tensors, opened."""
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.is_file():
            try:
                files = sorted({self.folder / name for name in read_json(index)["weight_map"].values()})
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index}: not an index of safetensors ({error!r})") from None
        elif single.is_file():
            files = [single]
        else:
            raise UserError(
                f"{self.folder}: has neither {single.name} nor {index.name}; convert other formats with "
                "from_pretrained and save_pretrained of transformers"
            )
        for path in files:
            yield path, _opened(path)

    def _check_tensors(self) -> set[str]:
        """Refuse a folder whose tensors do not match its config.json. Returns the types of their elements."""
        expected, types = tensor_shapes(self.model, self.vocab_size), set()
        for name, shape in expected.items():
            if name not in self._tensors:
                raise UserError(f"{self.folder}: lacks the parameter {name}")
            tensor = self._slice(name)
            types.add(tensor.get_dtype())
            if tuple(tensor.get_shape()) != shape:
                raise UserError(
                    f"{self._tensors[name][0]}: {name} has the shape {list(tensor.get_shape())}, by config.json it is "
                    f"{list(shape)}"
                )
        if other := types - {"BF16", "F16", "F32"}:
            raise UserError(f"{self.folder}: has parameters of the type {min(other)}, must be BF16, F16 or F32")
        for name in self._tensors.keys() - expected:
            # A tied head may be stored; it then equals the embedding.
            if name.endswith("rotary_emb.inv_freq") or (name == LM_HEAD and self._is_embedding(name)):
                continue
            raise UserError(
                f"{self._tensors[name][0]}: has the parameter {name}, which a model of this config.json does not have"
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


def _opened(path: Path):
    """A safetensors file, opened so that slices of single tensors can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}") from None

"""Hugging Face's Llama: its folder, and its weights in this model's layout."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext import config_file
from megatron_ext.config import Config, ModelConfig
from megatron_ext.errors import UserError
from megatron_ext.files import read_json
from megatron_ext.training.config_checks import validate

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"

# Keys of config.json for which this model supports a single value, which is also the default.
_SUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}
# Llama 3's scaling of rotary frequencies as Megatron-Core implements it: only its factor can be set.
_LLAMA3_ROTARY = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


class LlamaFolder(Mapping[str, Tensor]):
    """``LlamaForCausalLM`` as ``save_pretrained`` writes it: config.json and safetensors, in one file or in shards.

    A mapping from parameter names to values, each read on access.

    Attributes:
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
        file = self.folder / "config.json"
        config = read_json(file)
        self.model, self.vocab_size = model_config(config, file), config["vocab_size"]
        self._files = self._locate()
        types = self._check_tensors()
        self.precision = "bf16" if types == {"BF16"} else "float32"

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._files[name]) as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def pieces(self) -> tuple[Path, dict[int, str]] | None:
        """The folder's tokenizer file and its pieces by token id; None if there is no tokenizer."""
        file = self.folder / "tokenizer.model"
        if file.is_file():
            import sentencepiece

            try:
                text = sentencepiece.SentencePieceProcessor(model_file=str(file))
            except (RuntimeError, OSError) as error:
                raise UserError(f"{file}: not a SentencePiece model ({error})") from None
            return file, {i: text.id_to_piece(i) for i in range(text.vocab_size())}
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            return None
        tokenizer = read_json(file)
        try:
            pieces = {i: piece for piece, i in tokenizer["model"]["vocab"].items()}
            return file, pieces | {token["id"]: token["content"] for token in tokenizer.get("added_tokens", ())}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: not a tokenizer with a vocabulary ({error!r})") from None

    def _locate(self) -> dict[str, Path]:
        """The file of each tensor by name."""
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
        locations = {}
        for path in files:
            with _opened(path) as file:
                locations |= dict.fromkeys(file.keys(), path)
        return locations

    def _check_tensors(self) -> set[str]:
        """Refuse a folder whose tensors do not match its config.json. Returns the types of their elements."""
        expected, types = _shapes(self.model, self.vocab_size), set()
        for name, shape in expected.items():
            if name not in self._files:
                raise UserError(f"{self.folder}: lacks the parameter {name}")
            with _opened(self._files[name]) as file:
                tensor = file.get_slice(name)
                types.add(tensor.get_dtype())
                if tuple(tensor.get_shape()) != shape:
                    raise UserError(
                        f"{self._files[name]}: {name} has the shape {list(tensor.get_shape())}, by config.json it is "
                        f"{list(shape)}"
                    )
        if other := types - {"BF16", "F16", "F32"}:
            raise UserError(f"{self.folder}: has parameters of the type {min(other)}, must be BF16, F16 or F32")
        unknown = [n for n in self._files if n not in expected and not n.endswith("rotary_emb.inv_freq")]
        for name in unknown:
            # A tied head may be stored; it then equals the embedding.
            if not (name == "lm_head.weight" and torch.equal(self[name], self["model.embed_tokens.weight"])):
                raise UserError(
                    f"{self._files[name]}: has the parameter {name}, which a Llama of this config.json does not have"
                )
        return types


def model_config(config: dict, file: Path) -> ModelConfig:
    """The ``model`` section for a Llama's ``config.json``, from the current or an older transformers.

    Raises:
        UserError: this project's model cannot express a setting; names ``file`` and the key.
    """
    if not isinstance(config, dict) or config.get("model_type") != "llama":
        kind = config.get("model_type") if isinstance(config, dict) else config
        raise UserError(f"{file}: 'model_type' is {kind!r}, must be 'llama'")
    for key, supported in _SUPPORTED.items():
        if (config.get(key) or supported) != supported:
            raise UserError(f"{file}: '{key}' is {config[key]!r}, this model supports only {supported!r}")
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if type(config.get(key)) is not int or config[key] < 1:
            raise UserError(f"{file}: '{key}' is {config.get(key)!r}, must be a whole number, at least 1")
    heads, size = config["num_attention_heads"], config["hidden_size"]
    if (config.get("head_dim") or size // heads) * heads != size:
        raise UserError(
            f"{file}: 'head_dim' is {config.get('head_dim')}, this model supports only hidden_size / "
            f"num_attention_heads ({size} / {heads})"
        )
    base, scaling = _rotary(config, file)
    section = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": size,
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads"),
        "ffn_hidden_size": config["intermediate_size"],
        "rotary_base": base,
        "rotary_scaling_factor": scaling,
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "init_std": config.get("initializer_range") or 0.02,
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }
    try:
        model = config_file.from_tree(ModelConfig, section, "model")
        validate(Config(model=model), world_size=1)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return model


def _rotary(config: dict, file: Path) -> tuple[float, float | None]:
    """Base of the rotary frequencies, and the factor of Llama 3's scaling, if used."""
    # transformers 5 keeps the base among the rotary parameters, older versions beside them.
    rotary = {"rope_theta": config.get("rope_theta")}
    rotary |= (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    base = rotary["rope_theta"] or 10000.0
    if rotary.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{file}: 'partial_rotary_factor' is {rotary['partial_rotary_factor']}, must be 1")
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise UserError(f"{file}: 'rope_type' is {kind!r}, this model supports 'default' and 'llama3'")
    for key, value in _LLAMA3_ROTARY.items():
        if rotary.get(key) != value:
            raise UserError(f"{file}: '{key}' of 'llama3' is {rotary.get(key)}, this model supports only {value}")
    if rotary.get("factor") is None:
        raise UserError(f"{file}: 'factor' of 'llama3' is missing")
    return base, rotary["factor"]


def from_llama(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The weights of ``LlamaForCausalLM`` under this model's parameter names (local implementation, one process)."""
    return dict(named_weights(weights, model))


def named_weights(weights: Mapping[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The parameters of :func:`from_llama` one by one; ``weights`` are accessed only when needed.

    Megatron-Core stores query, key and value together per key/value group, and gate and up of the FFN in one matrix.
    """
    yield EMBEDDING, weights["model.embed_tokens.weight"]
    for layer in range(model.num_layers):
        llama, own = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        groups = [
            weights[f"{llama}self_attn.{name}_proj.weight"].view(model.num_query_groups, -1, model.hidden_size)
            for name in "qkv"
        ]
        yield f"{own}self_attention.linear_qkv.weight", torch.cat(groups, dim=1).flatten(0, 1)
        yield f"{own}self_attention.linear_proj.weight", weights[f"{llama}self_attn.o_proj.weight"]
        gate_up = [weights[f"{llama}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        yield f"{own}mlp.linear_fc1.weight", torch.cat(gate_up)
        yield f"{own}mlp.linear_fc2.weight", weights[f"{llama}mlp.down_proj.weight"]
        yield f"{own}input_layernorm.weight", weights[f"{llama}input_layernorm.weight"]
        yield f"{own}pre_mlp_layernorm.weight", weights[f"{llama}post_attention_layernorm.weight"]
    yield "decoder.final_layernorm.weight", weights["model.norm.weight"]
    if not model.tie_embeddings:
        yield HEAD, weights["lm_head.weight"]


def _shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of ``LlamaForCausalLM``."""
    h, f = model.hidden_size, model.ffn_hidden_size
    keys = h // model.num_attention_heads * model.num_query_groups
    layer = {f"self_attn.{name}_proj": (rows, h) for name, rows in (("q", h), ("k", keys), ("v", keys), ("o", h))}
    layer |= {"mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f)}
    layer |= {"input_layernorm": (h,), "post_attention_layernorm": (h,)}
    shapes = {"model.embed_tokens.weight": (vocab_size, h), "model.norm.weight": (h,)}
    if not model.tie_embeddings:
        shapes["lm_head.weight"] = (vocab_size, h)
    for number in range(model.num_layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def _opened(path: Path):
    """A safetensors file, opened so that single tensors can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}") from None

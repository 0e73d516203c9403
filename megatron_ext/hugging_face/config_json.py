"""From Hugging Face's config.json to the ``model`` section of a configuration."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.model_config import ModelConfig
from megatron_ext.transformer.config_checks import validate_model


@dataclass(frozen=True)
class _Family:
    """What a ``model_type`` fixes without a key, and its defaults of keys that config.json may lack."""

    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: dict = field(default_factory=dict)


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(defaults={"num_key_value_heads": 8}),
    "qwen2": _Family(qkv_bias=True, defaults={"num_key_value_heads": 32}),
    "qwen3": _Family(qk_norm=True, defaults={"num_key_value_heads": 32, "head_dim": 128}),
}
# Keys for which this model supports a single value, which is also the default. ``attention_bias`` adds a bias to the
# output projection, too.
_SUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_ROTARY_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def model_config(config: dict, file: Path) -> ModelConfig:
    """The ``model`` section for a ``config.json``, written by the current or an older transformers.

    Raises:
        UserError: this project's model cannot express a setting; names ``file`` and the key.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind == "vila_u_llama":
        raise UserError(f"{file}: is a VILA-U; convert it with tools/convert_hf.py --vila-u")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise UserError(f"{file}: 'model_type' is {kind!r}, must be one of {', '.join(_FAMILIES)}")
    family = _FAMILIES[kind]
    config = {key: value for key, value in (family.defaults | config).items() if value is not None}
    for key, supported in _SUPPORTED.items():
        if (config.get(key) or supported) != supported:
            raise UserError(f"{file}: '{key}' is {config[key]!r}, this model supports only {supported!r}")
    _refuse_windows(config, file)
    for key in _SIZES:
        if type(config.get(key)) is not int or config[key] < 1:
            raise UserError(f"{file}: '{key}' is {config.get(key)!r}, must be a whole number, at least 1")
    base, scaling, factor = _rotary(config, file)
    section = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config.get("num_key_value_heads"),
        "head_size": config.get("head_dim"),
        "ffn_hidden_size": config["intermediate_size"],
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "rotary_base": base,
        "rotary_scaling": scaling,
        "rotary_interpolation_factor": factor,
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "init_std": config.get("initializer_range") or 0.02,
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }
    try:
        model = config_file.from_tree(ModelConfig, section, "model")
        validate_model(Config(model=model))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return model


def _refuse_windows(config: dict, file: Path) -> None:
    """Refuse attention that does not see the whole document."""
    kinds = config.get("layer_types", [])
    other = kinds if not isinstance(kinds, list) else [kind for kind in kinds if kind != "full_attention"]
    if other:
        raise UserError(f"{file}: 'layer_types' is {kinds!r:.60}, this model supports only 'full_attention'")
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings", 0)
    if (
        window
        and config["model_type"] == "mistral"
        and not (type(window) is type(longest) is int and window >= longest)
    ):
        raise UserError(
            f"{file}: 'sliding_window' is {window!r}, below 'max_position_embeddings' ({longest}); this model's "
            "attention has no window"
        )


def _rotary(config: dict, file: Path) -> tuple[float, dict | None, float]:
    """Base of the rotary frequencies, the settings of Llama 3's scaling, if used, and the factor of linear scaling."""
    # transformers 5 keeps the base among the rotary parameters, older versions beside them.
    rotary = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        settings = config.get(key, {})
        # Settings for each kind of layer would be a dictionary of dictionaries.
        if not isinstance(settings, dict) or any(isinstance(value, dict) for value in settings.values()):
            raise UserError(f"{file}: '{key}' is {settings!r:.60}, must be the settings of all layers")
        rotary |= settings
    base = rotary["rope_theta"] or 10000.0
    if (partial := rotary.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))) != 1:
        raise UserError(f"{file}: 'partial_rotary_factor' is {partial}, must be 1")
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind == "default":
        return base, None, 1.0
    if kind not in _ROTARY_KEYS:
        raise UserError(f"{file}: 'rope_type' is {kind!r}, this model supports 'default', 'linear' and 'llama3'")
    for key in _ROTARY_KEYS[kind]:
        if not isinstance(rotary.get(key), int | float):
            raise UserError(f"{file}: '{key}' of {kind!r} is {rotary.get(key)!r}, must be a number")
    if kind == "linear":
        return base, None, float(rotary["factor"])
    return base, {key: rotary[key] for key in _ROTARY_KEYS[kind]}, 1.0

"""Checks of the model's shape and of its layout over processes, made before anything is built."""

from megatron_ext.config import Config
from megatron_ext.data.vq_metadata import MAX_CODEBOOK
from megatron_ext.errors import UserError, check_at_least_one, check_divisible
from megatron_ext.routing.pipeline_layout import even_counts, layers_of_chunks, layout_string


def validate_model(config: Config) -> None:
    """Refuse a model that has no consistent shape, or whose heads and matrices tensor parallelism cannot cut.

    Raises:
        UserError: names the key, its value and what would do.
    """
    model, tensor = config.model, config.parallel.tensor
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
    check_at_least_one("model", model, *sizes)
    check_at_least_one("parallel", config.parallel, "tensor", "context", "pipeline", "virtual_pipeline")
    heads = ("model.num_attention_heads", model.num_attention_heads)
    groups = ("model.num_query_groups", model.num_query_groups)
    if model.head_size == model.hidden_size // model.num_attention_heads:
        check_divisible("model.hidden_size", model.hidden_size, *heads)
    check_at_least_one("model", model, "head_size")
    check_divisible(*heads, *groups)
    check_divisible(*heads, "parallel.tensor", tensor)
    check_divisible(*groups, "parallel.tensor", tensor)
    check_divisible("model.ffn_hidden_size", model.ffn_hidden_size, "parallel.tensor", tensor)
    if model.max_image_tokens < 0:
        raise UserError(f"config: 'model.max_image_tokens' is {model.max_image_tokens}, must be at least 0")
    if model.head_size % 2:
        raise UserError(
            f"config: 'model.head_size' is {model.head_size} (by default model.hidden_size / "
            "model.num_attention_heads), must be even for rotary positions"
        )
    check_at_least_one("model", model, "rotary_interpolation_factor")
    if scaling := model.rotary_scaling:
        if model.rotary_interpolation_factor != 1:
            raise UserError(
                "config: 'model.rotary_scaling' and 'model.rotary_interpolation_factor' both change the rotary "
                "frequencies; give only one"
            )
        check_at_least_one("model.rotary_scaling", scaling, "factor", "original_max_position_embeddings")
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        if not 0 < low < high:
            raise UserError(
                f"config: 'model.rotary_scaling' has low_freq_factor {low} and high_freq_factor {high}, must be "
                "0 < low_freq_factor < high_freq_factor"
            )


def validate_image_codes(config: Config) -> None:
    """Refuse image tokens of several codes that do not fit the data's format, settings of theirs that would have no
    effect, and a depth head that has no consistent shape or cannot be cut by tensor parallelism.

    Raises:
        UserError: names the key, its value and what would do.
    """
    codes, tensor = config.model.image_codes, config.parallel.tensor
    section, head = "model.image_codes", codes.head
    check_at_least_one(section, codes, "depth")
    if codes.depth == 1:
        for key in ("codebook", "codebook_size", "width", "fingerprint"):
            if value := getattr(codes, key):
                raise UserError(
                    f"config: '{section}.{key}' is {value!r}, but image tokens of one code are rows of the embedding; "
                    f"set {section}.depth to the tokenizer's, or leave it out"
                )
        return
    for key in ("width", "fingerprint"):
        if not codes.codebook and (value := getattr(codes, key)) is not None:
            raise UserError(
                f"config: '{section}.{key}' is {value!r}, but {section}.codebook is empty, so that vectors are "
                f"learned; name the VQ tokenizer's folder, or leave {key} out"
            )
    if codes.width is not None:
        check_at_least_one(section, codes, "width")
    if head.chunk < 0:
        raise UserError(f"config: '{section}.head.chunk' is {head.chunk}, must be at least 0")
    check_at_least_one(f"{section}.head", head, "num_layers", "hidden_size", "num_attention_heads")
    heads = (f"{section}.head.num_attention_heads", head.num_attention_heads)
    check_divisible(f"{section}.head.hidden_size", head.hidden_size, *heads)
    check_divisible(*heads, "parallel.tensor", tensor)
    if codes.codebook_size is not None:
        check_at_least_one(section, codes, "codebook_size")
        if codes.codebook_size > MAX_CODEBOOK:
            raise UserError(
                f"config: '{section}.codebook_size' is {codes.codebook_size}, must be at most {MAX_CODEBOOK}: "
                "packed rows hold a code in 16 bits"
            )
        check_divisible(f"{section}.codebook_size", codes.codebook_size, "parallel.tensor", tensor)


def validate_implementation(config: Config) -> None:
    """Refuse kernels that cannot compute in ``training.precision``.

    Raises:
        UserError: names the key, its value and what would do.
    """
    if config.model.implementation == "transformer_engine" and config.training.precision == "float32":
        raise UserError(
            "config: 'model.implementation' is transformer_engine, whose float32 products are TF32; take "
            "training.precision=bf16, or model.implementation=local"
        )


def validate_layout(config: Config, world_size: int) -> None:
    """Refuse a layout that does not fit the layers or ``world_size`` processes.

    Raises:
        UserError: names the key, its value and what would do.
    """
    parallel = config.parallel
    _validate_stages(config)
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise UserError(
            f"config: 'parallel.virtual_pipeline' is {parallel.virtual_pipeline}, needs parallel.pipeline > 1"
        )
    processes = parallel.tensor * parallel.context * parallel.pipeline
    if world_size % processes:
        fitting = max(processes, world_size - world_size % processes)
        raise UserError(
            f"config: {world_size} processes do not make whole replicas of parallel.tensor x parallel.context x "
            f"parallel.pipeline ({processes}); start {fitting} of them, or take a smaller layout"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("config: 'parallel.sequence' is true, needs parallel.tensor > 1")


def _validate_stages(config: Config) -> None:
    """Refuse layers that do not divide by the stages, without a layout, and a layout of other stages or layers."""
    parallel, layers = config.parallel, config.model.num_layers
    stages = parallel.pipeline * parallel.virtual_pipeline
    of_key = f"parallel.pipeline x parallel.virtual_pipeline ({parallel.pipeline} x {parallel.virtual_pipeline})"
    if layers < stages:
        raise UserError(f"config: 'model.num_layers' is {layers}, fewer than {of_key}: each needs at least one layer")
    near = layout_string(even_counts(layers, stages))
    if not parallel.layout:
        if layers % stages:
            raise UserError(
                f"config: model.num_layers ({layers}) is not divisible by {of_key}; say which stage has how many, for "
                f"example parallel.layout='{near}' (tools/flops.py --balance computes a balanced one)"
            )
        return
    counts = layers_of_chunks(parallel.layout)
    if len(counts) != stages:
        raise UserError(
            f"config: 'parallel.layout' is {parallel.layout!r}, with {len(counts)} chunks for {of_key}; "
            f"leave it out, or write for example '{near}'"
        )
    if sum(counts) != layers:
        raise UserError(
            f"config: 'parallel.layout' is {parallel.layout!r}, with {sum(counts)} layers; 'model.num_layers' is "
            f"{layers}; write for example '{near}'"
        )

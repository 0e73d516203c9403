"""Checks of the data section, made before anything is built."""

from megatron_ext.config import DataConfig
from megatron_ext.errors import UserError, check_at_least_one


def validate_data(config: DataConfig) -> None:
    """Refuse settings under which no batch can be packed.

    Raises:
        UserError: names the key, its value and what would do.
    """
    check_at_least_one("data", config, "sequence_length", "prefetch")
    if not 0 <= config.caption_dropout <= 1:
        raise UserError(f"config: 'data.caption_dropout' is {config.caption_dropout}, must lie in 0 .. 1")
    if config.workers < 0:
        raise UserError(f"config: 'data.workers' is {config.workers}, must be 0 or more")
    for i, source in enumerate(config.train):
        if source.weight <= 0:
            raise UserError(f"config: 'data.train[{i}].weight' is {source.weight}, must be positive")

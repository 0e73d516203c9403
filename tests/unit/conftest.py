"""Shared by the unit tests: a world of one process."""

import pytest

from megatron_ext import config_file
from megatron_ext.config import Config


@pytest.fixture
def one_process():
    """A function that starts a world of one process for a configuration; the world ends with the test."""
    from megatron_ext import distributed
    from megatron_ext.training.validation import validate

    def start(*overrides: str) -> Config:
        config = config_file.load(Config, [], overrides)
        validate(config, world_size=1)
        distributed.initialize(config)
        return config

    yield start
    distributed.shut_down()

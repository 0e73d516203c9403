"""Fixtures that unit tests share: a world of one process, a mixture of all tasks."""

import pytest

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.data.mixture import Mixture
from support.data_sets import captions, mixture, texts


@pytest.fixture
def one_process():
    """A function that starts a world of one process for a configuration; the world ends with the test."""
    from megatron_ext import distributed
    from megatron_ext.training.config_checks import validate

    def start(*overrides: str) -> Config:
        config = config_file.load(Config, [], overrides)
        validate(config, world_size=1)
        distributed.initialize(config)
        return config

    yield start
    distributed.shut_down()


@pytest.fixture
def blend(tmp_path) -> Mixture:
    """A mixture of all three tasks, with documents longer than a row and dropped captions."""
    pairs, plain = captions(tmp_path / "pairs", 80), texts(tmp_path / "plain", 30, longest=200)
    return mixture((pairs, "generation", 1.0), (pairs, "understanding", 1.0), (plain, "text", 0.5), caption_dropout=0.1)

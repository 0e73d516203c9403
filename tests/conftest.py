"""Fixtures that unit tests and tests of many processes share."""

import pytest

from megatron_ext.vocabulary import Vocabulary
from support.vocabularies import make_vocabulary


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> Vocabulary:
    """A small vocabulary with the codes of the tiny VQ tokenizer."""
    return make_vocabulary(tmp_path_factory.mktemp("vocabulary"))

"""The keys that each query of attention sees."""

import numpy as np

from megatron_ext.routing.roles import Role


def visible_keys(role: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Keys that each token's query sees in a layer, its own included, int64 [t]; 0 for tokens without a query.

    Args:
        role: [t], role of each token.
        first: bool [t], whether a document begins at each token; it does at the first one.
    """
    is_key = (role != Role.SKIP).astype(np.int64)
    seen = is_key.cumsum()
    before_document = (seen - is_key)[first][first.cumsum() - 1]
    return (seen - before_document) * (role == Role.FULL)

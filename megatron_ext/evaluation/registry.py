"""The benchmarks by name."""

from megatron_ext.errors import UserError
from megatron_ext.evaluation.benchmark import Benchmark
from megatron_ext.evaluation.gqa import GQA
from megatron_ext.evaluation.mme import MME
from megatron_ext.evaluation.pope import POPE
from megatron_ext.evaluation.seed import SEED

BENCHMARKS = {benchmark.name: benchmark for benchmark in (GQA, MME, POPE, SEED)}
PICTURES = "mjhq"
"""The benchmark of generated pictures: :mod:`.mjhq` reads it, :mod:`.picture_scorer` scores it."""
EDITS = "edits"
"""The benchmark of edited pictures: :mod:`.edits` reads and scores it."""
DRAWN = (PICTURES, EDITS)
"""The benchmarks whose results are folders of pictures."""


def benchmark_named(name: str) -> Benchmark:
    """The benchmark with this name.

    Raises:
        UserError: there is none.
    """
    if name not in BENCHMARKS:
        raise UserError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]

"""Learning rates: those of study.yaml for each size, times what a search at another size found for each method.

The search is that of a study whose ``OUT/learning_rates.json`` is carried over: a method's factor is its best rate
over that of dense, and methods that were not searched have the factor 1.
"""

from pathlib import Path

from megatron_ext.files import read_json, write_json
from megatron_ext.study.study_file import Study

REFERENCE = "dense"
NAME = "factors.json"


def carry_over(search: Path, results: Path) -> None:
    """Write ``RESULTS/factors.json`` from the ``learning_rates.json`` of a study with one size."""
    best = {found["method"]: found["best"] for found in read_json(search)["searches"] if found["best"] is not None}
    factors = {method: rate / best[REFERENCE] for method, rate in best.items()} if REFERENCE in best else {}
    write_json(results / NAME, {"search": str(search), "factors": factors})


def factors(study: Study) -> dict[str, float]:
    """The factors by method; empty if no search was carried over."""
    file = Path(study.output) / NAME
    return read_json(file)["factors"] if file.is_file() else {}


def rates(study: Study) -> dict[tuple[str, str], float]:
    """(size, method) -> learning rate, for methods with a factor."""
    factor_of = factors(study)
    return {
        (size.name, method.name): size.settings["optimizer"]["lr"] * factor_of[method.name]
        for size in study.sizes
        for method in study.methods_of(size)
        if method.name in factor_of
    }

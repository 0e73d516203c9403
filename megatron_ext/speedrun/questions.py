"""The questions and captions of a round: those of both splits in one benchmark folder each, as evaluation reads them.

::

    OUT/validation/, OUT/test/    as megatron_ext/picture_world/benchmark_files.py writes them
    OUT/gqa/, OUT/mjhq/           both together; identifiers begin with the split
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_ext.files import read_json, write_json
from megatron_ext.picture_world.benchmark_files import write_benchmarks
from megatron_ext.preprocess.recipe import Recipe

SPLITS = {"validation": "new arrangements", "test": "held-out combinations"}
"""Split of the picture world -> what is new in it."""
TOGETHER = "together.json"


def write(out: Path, recipe: Recipe, pictures: int, seed: int) -> Path:
    """Write the questions, unless they are there. Returns ``out``.

    Args:
        pictures: of each split.

    Raises:
        UserError: the folder holds other files.
    """
    manifests = {}
    for split in SPLITS:
        config = replace(recipe.benchmark(split), pictures=pictures, seed=seed, names=("gqa", "mjhq"))
        manifests[split] = write_benchmarks(out / split, config)["fingerprint"]
    if (out / TOGETHER).is_file() and read_json(out / TOGETHER) == manifests:
        return out
    for name in ("gqa", "mjhq"):
        shutil.rmtree(out / name, ignore_errors=True)
        for split in SPLITS:
            shutil.copytree(out / split / name, out / name, dirs_exist_ok=True, copy_function=shutil.copyfile)
    _join(out, "gqa/testdev_balanced_questions.json", lambda split, id: f"{split}-{id}")
    _join(out, "mjhq/meta_data.json", lambda split, id: id)  # keys of scenes, which have the split already
    write_json(out / TOGETHER, manifests)
    return out


def split_of(id: str) -> str:
    """The split that a question or caption is from."""
    return id.partition("-")[0]


def _join(out: Path, file: str, name: Callable[[str, str], str]) -> None:
    joined = {name(split, id): entry for split in SPLITS for id, entry in read_json(out / split / file).items()}
    write_json(out / file, joined)

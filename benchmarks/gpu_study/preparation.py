"""The data of the study: made on a CPU, packed into one file that is carried to the machine with the GPU."""

import tarfile
from pathlib import Path

from megatron_ext import config_file
from megatron_ext.errors import UserError
from megatron_ext.preprocess.picture_world import prepare
from megatron_ext.preprocess.recipe import Recipe

RECIPE = Path("examples/picture_worlds/compositional.yaml")
WORLD = Path("runs/compositional")
"""Where the recipe's own command puts the data, which is used if it is there."""
TINY = {
    "scenes": {"train": 240, "validation": 12, "test": 4},
    "benchmarks": {"splits": ["validation"], "pictures": 3},
}
"""What a rehearsal changes in the recipe."""
PACKED = ("data", "vocabulary", "vq", "benchmarks")


def make_world(results: Path, rehearsal: bool) -> Path:
    """Make what is missing of the data, and pack it into ``RESULTS/world.tar.xz``, which is returned."""
    world = results / "preparation" if rehearsal else WORLD
    recipe = config_file.from_trees(Recipe, [config_file.read_yaml(RECIPE), *([TINY] if rehearsal else [])])
    prepare(recipe, world, lambda line: print(line, flush=True))
    results.mkdir(parents=True, exist_ok=True)
    packed = results / "world.tar.xz"
    unfinished = packed.with_suffix(".part")
    with tarfile.open(unfinished, "w:xz", preset=6) as archive:
        for name in PACKED:
            archive.add(world / name, name)
    return unfinished.replace(packed)


def unpack_world(results: Path) -> Path:
    """The folder of the data, unpacked unless it is there.

    Raises:
        UserError: nothing was prepared.
    """
    world, packed = results / "world", results / "world.tar.xz"
    if not world.is_dir():
        if not packed.is_file():
            raise UserError(f"{packed}: not found; run --prepare first, on any machine, and bring {results} here")
        unfinished = results / "world.part"
        with tarfile.open(packed) as archive:
            archive.extractall(unfinished, filter="data")
        unfinished.rename(world)
    return world

"""What a preparation of the picture world consists of, read from a YAML file (``examples/picture_worlds``)."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ext import config_file
from megatron_ext.errors import UserError
from megatron_ext.picture_world.benchmark_files import BenchmarkConfig
from megatron_ext.picture_world.edit_files import EditConfig
from megatron_ext.picture_world.split_files import SplitConfig
from megatron_ext.picture_world.splits import SPLITS
from megatron_ext.picture_world.world import World
from megatron_ext.vq.training_config import DictionaryConfig, VQTrainingConfig


@dataclass
class TokenizerRecipe:
    """The image tokenizer.

    Attributes:
        kind: a patch dictionary or a trained VQ network.
        grid, codebook_size: codes along a side, and in all.
        splits: whose pictures it is fitted to. A dictionary cannot show an object that none of them has: for the
            held-out combinations it needs "test" as well.
        limit: most pictures that it is fitted to.
        options: further fields of :class:`.DictionaryConfig` or :class:`.VQTrainingConfig`.
    """

    kind: Literal["dictionary", "vq"] = "dictionary"
    grid: int = 3
    codebook_size: int = 192
    splits: list[Literal[SPLITS]] = field(default_factory=lambda: ["train"])
    limit: int = 50_000
    options: dict = field(default_factory=dict)

    def config(self, size: int) -> DictionaryConfig | VQTrainingConfig:
        """The settings of its training for pictures of ``size`` x ``size`` pixels."""
        schema = DictionaryConfig if self.kind == "dictionary" else VQTrainingConfig
        tree = {"image_size": size, "grid": self.grid, "codebook_size": self.codebook_size, **self.options}
        return config_file.from_tree(schema, tree, "tokenizer.options")


@dataclass
class Recipe:
    """A preparation of the picture world.

    Attributes:
        world: the variety of scenes.
        size: pixels along a side.
        seed: of the scenes of all splits and of the benchmarks.
        scenes: number of scenes per split; further keys are fields of :class:`.SplitConfig` (questions, kinds, ...).
        split_turns: each question is a document of its own.
        question_sets: further training scenes with questions alone; each has a ``name``, a ``count`` and fields of
            SplitConfig that replace those of ``scenes``.
        edits: number of conversations that edit pictures, per split; further keys are fields of :class:`.EditConfig`.
        tokenizer: of the images.
        vocabulary_size: number of text pieces.
        benchmarks: fields of :class:`.BenchmarkConfig`; ``splits`` instead of ``split``.
        workers: processes that make scenes, and threads that decode images.
    """

    scenes: dict
    world: World = World()
    size: int = 54
    seed: int = 1234
    split_turns: bool = False
    question_sets: list[dict] = field(default_factory=list)
    edits: dict = field(default_factory=dict)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    vocabulary_size: int = 512
    benchmarks: dict = field(default_factory=dict)
    workers: int = 2

    def split(self, split: str) -> SplitConfig:
        """The settings of a split's scenes."""
        count = self.scenes[split]
        return self._split_config("scenes", split, {"count": count, "texts": count, **self._questions()})

    def question_set(self, number: int) -> tuple[str, SplitConfig]:
        """The name of a question set, and the settings of its scenes."""
        where, tree = f"question_sets[{number}]", dict(self.question_sets[number])
        if missing := {"name", "count"} - tree.keys():
            raise UserError(f"config: '{where}' needs the key {min(missing)}")
        name, own = tree.pop("name"), {"texts": 0, "forms": ["tar"]}
        return name, self._split_config(where, "train", {**own, **self._questions(), **tree})

    def edit(self, split: str) -> EditConfig:
        """The settings of a split's edits."""
        own = {key: value for key, value in self.edits.items() if key not in SPLITS}
        tree = {**self._common(), **own, "split": split, "count": self.edits.get(split, 0)}
        return config_file.from_tree(EditConfig, tree, "edits")

    def benchmark(self, split: str) -> BenchmarkConfig:
        """The settings of the benchmarks with pictures of a split."""
        tree = {key: value for key, value in self.benchmarks.items() if key != "splits"}
        return config_file.from_tree(BenchmarkConfig, {**self._common(), "split": split, **tree}, "benchmarks")

    def benchmark_splits(self) -> list[str]:
        """The splits that have benchmarks."""
        return self.benchmarks.get("splits", [])

    def _questions(self) -> dict:
        return {key: value for key, value in self.scenes.items() if key not in SPLITS}

    def _common(self) -> dict:
        return {"size": self.size, "seed": self.seed, "world": asdict(self.world)}

    def _split_config(self, where: str, split: str, tree: dict) -> SplitConfig:
        return config_file.from_tree(SplitConfig, {**self._common(), "split": split, **tree}, where)


def read_recipe(file: str | Path) -> Recipe:
    """The recipe in a YAML file, with all its settings checked.

    Raises:
        UserError: names the key that is unknown, missing or of a wrong type or value.
    """
    recipe = config_file.load(Recipe, [file])
    for split in SPLITS:
        if type(recipe.scenes.setdefault(split, 0)) is not int:
            raise UserError(f"config: 'scenes.{split}' must be int, got {recipe.scenes[split]!r}")
        if recipe.scenes[split] and "tar" not in recipe.split(split).forms:
            raise UserError("config: 'scenes.forms' must have tar, which the data sets are made from")
    if not recipe.scenes["train"]:
        raise UserError("config: 'scenes.train' is 0; a preparation needs training scenes")
    for split in SPLITS:
        recipe.edit(split)
    names = ["questions", "captions", "texts", "edits"]
    for number in range(len(recipe.question_sets)):
        name, _ = recipe.question_set(number)
        if not isinstance(name, str) or name in names:
            raise UserError(f"config: 'question_sets[{number}].name' is {name!r}, must be a name of its own")
        names.append(name)
    recipe.tokenizer.config(recipe.size)
    for split in recipe.benchmark_splits():
        if split not in SPLITS:
            raise UserError(f"config: 'benchmarks.splits' has {split!r}, must be one of {', '.join(SPLITS)}")
        recipe.benchmark(split)
    for split in recipe.tokenizer.splits:
        if not recipe.scenes[split]:
            raise UserError(f"config: 'tokenizer.splits' has {split!r}, but 'scenes.{split}' is 0")
    return recipe

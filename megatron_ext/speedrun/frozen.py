"""What is the same for all submissions of a round, read from a YAML file (``examples/speedrun/frozen.yaml``)."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.errors import UserError, check_at_least_one


@dataclass
class FrozenQuestions:
    """The questions and captions of evaluation, made from the world's recipe for each of :data:`SPLITS`."""

    pictures: int
    """Pictures with questions, and captions, of each split."""
    seed: int
    """Of their scenes; other scenes than those of the recipe's own benchmarks."""
    options: list[str] = field(default_factory=list)
    """Further arguments of tools/evaluate.py."""


@dataclass
class Rehearsal:
    """A try of the path, too short to learn anything."""

    tokens: int
    seeds: int
    pictures: int


@dataclass
class Frozen:
    """A round of the speedrun."""

    round: int
    recipe: str
    """Of the picture world (tools/prepare_picture_world.py)."""
    world: str
    """Folder in which the recipe is prepared; ``base`` names data sets in it."""
    base: list[str]
    """Configuration files, which a submission is laid over."""
    reference: str
    """The submission that all others are relative to: lossless dense."""
    tokens: int
    """Of training, with every seed."""
    questions: FrozenQuestions
    dense_step_seconds: float
    """Seconds that a training step of lossless dense takes on the core in whose hours time is counted."""
    rehearsal: Rehearsal
    settings: dict = field(default_factory=dict)
    """Merged into ``base``."""
    seeds: int = 4
    """Training runs of a submission."""
    level: float = 0.9
    """Of the one-sided bound that is the score."""
    lines: int = 20
    """Most lines of a submission."""
    flops_cap: float = 0.6
    """Most training FLOPs, relative to lossless dense on the same rows."""
    step_cap: float = 0.9
    """Most seconds of a training step, relative to those of lossless dense beside it."""
    calibration_steps: int = 25
    """Steps of each training of dense beside which training is timed."""
    verification_word: str = ""
    """Gives the seeds and questions of verification. Published when a round ends, empty until then."""
    output: str = "runs/speedrun"
    leaderboard: str = "docs/speedrun"
    """Folder of the rows; their tables are in the Markdown file of the same name."""

    @property
    def config(self) -> Config:
        """The configuration that submissions change, at its full length.

        Raises:
            UserError: a file cannot be read, or a key is wrong.
        """
        trees = [*map(config_file.read_yaml, self.base), self.settings]
        config = config_file.from_trees(Config, trees)
        step = config.training.global_batch_size * config.data.sequence_length
        config.training.iterations = max(1, round(self.tokens / step))
        return config

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with everything that is frozen."""
        frozen = config_file.to_tree(self)
        for free in ("verification_word", "rehearsal", "output", "leaderboard"):
            del frozen[free]
        frozen["recipe"] = config_file.read_yaml(self.recipe)
        frozen["base"] = [*map(config_file.read_yaml, self.base)]
        frozen["reference"] = config_file.read_yaml(self.reference)
        return digest(frozen)


def read(file: str | Path) -> Frozen:
    """The round in a YAML file.

    Raises:
        UserError: names the file and the key that is unknown, missing or wrong.
    """
    try:
        frozen = config_file.from_tree(Frozen, config_file.read_yaml(file))
        check_at_least_one("frozen", frozen, "tokens", "lines")
        if frozen.seeds < 2:
            raise UserError(f"'seeds' is {frozen.seeds}; a bound needs two")
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix('config: ')}") from None
    return frozen


def digest(value) -> str:
    """16 hexadecimal digits of plain data; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

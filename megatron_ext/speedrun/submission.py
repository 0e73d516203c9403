"""A submission: a short YAML file of the keys that are open, its digest and its seeds."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ext import config_file
from megatron_ext.config import Config, SourceConfig
from megatron_ext.errors import UserError
from megatron_ext.routing.flops import lossless_dense
from megatron_ext.routing.plan import Plan
from megatron_ext.speedrun.frozen import Frozen, digest

OPEN = (
    "plan.*",
    "optimizer.lr",
    "optimizer.min_lr",
    "optimizer.schedule",
    "optimizer.warmup_iterations",
    "optimizer.wsd_decay_iterations",
    "data.weights.*",
    "data.caption_dropout",
    "training.task_weights.*",
)
"""The keys of a submission. ``data.weights`` has the weight of each source by its :func:`source_name`; the others are
those of a configuration."""


@dataclass(frozen=True)
class Submission:
    """A submission.

    Attributes:
        name: letters, digits, ``_`` and ``-``.
        tree: what its file says.
        settings: the same as settings of a configuration.
        config: the whole configuration, at full length.
        digest: 16 hexadecimal digits that change with what is trained, not with how the file is written: a key left out
            and its default are the same, and so are plans with the same roles and weights.
    """

    name: str
    tree: dict
    settings: dict
    config: Config
    digest: str

    @property
    def is_dense(self) -> bool:
        """Whether the plan is that of lossless dense, to which the cap on FLOPs does not apply."""
        plan = Plan.from_config(self.config)
        dense = lossless_dense(plan)
        return (plan.roles, plan.projections) == (dense.roles, dense.projections)


def read(file: Path, frozen: Frozen) -> Submission:
    """The submission in a file, named after it.

    Raises:
        UserError: names the file and the key that is not open, unknown or wrong; or the file is too long.
    """
    tree = config_file.read_yaml(file)
    lines = len(file.read_text().splitlines())
    if lines > frozen.lines:
        raise UserError(f"{file}: has {lines} lines; a submission has at most {frozen.lines}")
    try:
        return of(file.stem, tree, frozen)
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix('config: ')}") from None


def of(name: str, tree: dict, frozen: Frozen) -> Submission:
    """The submission of this name that says ``tree``.

    Raises:
        UserError: as :func:`read`.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"the name {name!r} must have letters, digits, _ and - alone")
    for key in _keys(tree):
        if not any(key == allowed or key.startswith(allowed.removesuffix("*")) for allowed in OPEN):
            raise UserError(f"'{key}' is not open to submissions; open are {', '.join(OPEN)}")
    base = frozen.config
    settings = {section: dict(keys) for section, keys in tree.items()}
    weights = settings.get("data", {}).pop("weights", {})
    settings["data"] = {**settings.get("data", {}), "train": _weighted(base.data.train, weights)}
    config = config_file.from_trees(Config, [config_file.to_tree(base), settings])
    return Submission(name, tree, settings, config, digest(_canonical(config)))


def source_name(source: SourceConfig) -> str:
    """The data set and its use, such as ``captions-generation`` for ``data/captions-train``."""
    return f"{Path(source.path).name.removesuffix('-train')}-{source.task}"


def seeds(frozen: Frozen, digest: str, word: str = "") -> list[int]:
    """The seeds of a submission in a round, or of its verification by ``word``."""
    texts = (f"{frozen.round} {digest} {word} {number}" for number in range(frozen.seeds))
    return [int(hashlib.sha256(text.encode()).hexdigest()[:7], 16) for text in texts]


def _keys(tree: dict, where: str = "") -> Iterator[str]:
    """The dotted paths of a tree's values; of a section that is no mapping, its own."""
    for key, value in tree.items():
        path = f"{where}{key}"
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{path}.")
        else:
            yield path


def _weighted(sources: list[SourceConfig], weights: dict) -> list[dict]:
    """The sources, with other weights for those that ``weights`` names."""
    names = [source_name(source) for source in sources]
    for name in weights:
        if name not in names:
            raise UserError(f"'data.weights' has {name!r}; the sources are {', '.join(names)}")
    return [{**asdict(source), "weight": weights.get(name, source.weight)} for name, source in zip(names, sources)]


def _canonical(config: Config) -> dict:
    """What is trained, of all that a submission can change: only keys that have an effect."""
    plan, optimizer = Plan.from_config(config), config.optimizer
    total = sum(source.weight for source in config.data.train)
    keys = ["lr", "schedule", "warmup_iterations"]
    keys += ["min_lr"] if optimizer.schedule != "constant" else []
    keys += ["wsd_decay_iterations"] if optimizer.schedule == "wsd" else []
    return {
        "roles": plan.roles,
        "projections": plan.projections.identity,
        **{
            key: part and asdict(part)
            for key, part in (("dense_share", plan.dense_share), ("drawn", plan.drawn_tables))
        },
        "optimizer": {key: getattr(optimizer, key) for key in keys},
        "weights": [round(source.weight / total, 9) for source in config.data.train],
        "caption_dropout": config.data.caption_dropout,
        "task_weights": asdict(config.training.task_weights),
    }

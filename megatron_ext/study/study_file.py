"""The study file: what is compared, strictly checked as configurations are."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ext import config_file
from megatron_ext.analysis.results import Metric
from megatron_ext.errors import UserError

PICTURES = "mjhq"
"""The benchmark whose answers are pictures."""
Budget = Literal["tokens", "steps", "total", "flops"]


@dataclass
class Size:
    """A model size."""

    name: str
    settings: dict
    """Laid over the base configuration: ``model``, and what goes with it (``optimizer: {lr: ...}``, ``parallel``)."""
    processes: int | None = None
    """Processes of a run; None: parallel.tensor x parallel.pipeline."""
    seeds: list[int] | None = None
    """Its own, where a large one can afford fewer; None: the study's."""
    budgets: list[Budget] | None = None
    """Some of the study's, likewise; None: all."""
    methods: list[str] | None = None
    """Names of some of the study's, likewise; None: all."""


@dataclass
class Method:
    """A method, trained on one task or on both."""

    name: str
    """Names the run; unique in the study."""
    trained_on: Literal["understanding", "generation", "unified"]
    partner_group: str | list[str]
    """Which single-task methods are the partners of which unified ones: those that share one of these names."""
    settings: dict = field(default_factory=dict)
    """Laid over the base configuration and the size: ``plan``."""
    budgets: list[Budget] | None = None
    """Some of its size's; None: all."""
    label: str | None = None
    """In tables; None: its name. The reference of the synergy loss is the unified method labelled ``dense``."""

    @property
    def partner_groups(self) -> list[str]:
        """All of them."""
        return [self.partner_group] if isinstance(self.partner_group, str) else self.partner_group


@dataclass
class Benchmark:
    """A benchmark of tools/evaluate.py."""

    name: str
    data: str
    task: Literal["understanding", "generation"] | None = None
    """Models trained on this task answer it; None: generation for mjhq, understanding for the others."""
    parts: str = "all"
    options: list[str] = field(default_factory=list)
    """Further words on the command line of tools/evaluate.py."""

    def __post_init__(self):
        self.task = self.task or ("generation" if self.name == PICTURES else "understanding")

    def read(self) -> list:
        """Its questions, or its prompts.

        Raises:
            UserError: its files are missing or malformed, or have no such part.
        """
        # Imported late: a study file is read without what evaluation needs.
        from megatron_ext.evaluation import mjhq
        from megatron_ext.evaluation.registry import BENCHMARKS

        read = mjhq.read if self.name == PICTURES else BENCHMARKS[self.name].read
        return read(Path(self.data), None if self.parts == "all" else self.parts.split(","))


@dataclass
class Evaluation:
    """What is measured after training, besides the validation losses."""

    vq: str | None = None
    """Folder of the VQ tokenizer; needed where there are benchmarks."""
    benchmarks: list[Benchmark] = field(default_factory=list)
    evaluate_as: dict = field(default_factory=lambda: {"trained": []})
    """Name -> overrides (``plan.preset=dense``) of the roles that models are evaluated with; [] for those of training.
    The projections stay those that were trained."""


@dataclass
class Study:
    """The whole study."""

    name: str
    output: str
    """Folder for runs/, results.json, report.md."""
    base: list[str]
    """Configuration files, as after ``pretrain_unified.py --config``."""
    sizes: list[Size]
    methods: list[Method]
    seeds: list[int] = field(default_factory=lambda: [1])
    """Each sets training.seed and data.seed."""
    settings: dict = field(default_factory=dict)
    """Laid over the base configuration of every run."""
    budgets: list[Budget] = field(default_factory=lambda: ["tokens"])
    """The first one that a run belongs to is in its name: add further ones at the end, and what is trained is kept.
    tokens: every method sees the tokens that dense sees, and one trained on a single task those of the task, in fewer
    steps. steps: the same, and one trained on a single task takes as many steps as the unified one, of smaller batches.
    total: it takes as many steps of whole batches, and sees more of its task. flops: tokens' iterations, divided by the
    FLOPs relative to dense. The learning rate decays over all of a run's iterations, after equal steps of warm-up."""
    keep_text: bool = True
    """Plain text is in every run's data; false: in the unified ones' alone."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    metrics: dict = field(default_factory=dict)
    """Metric -> {task, higher_is_better, in_average}, where the name does not tell."""
    replicates: int = 200
    """Bootstrap replicates."""
    slurm: list[str] = field(default_factory=list)
    """Options for sbatch: ``--time=4:00:00``, ``--gpus=1``."""

    def seeds_of(self, size: Size) -> list[int]:
        """Those that a size is trained with."""
        return self.seeds if size.seeds is None else size.seeds

    def budgets_of(self, size: Size, method: Method | None = None) -> list[str]:
        """Those that a size, or a method at a size, is trained under."""
        budgets = self.budgets if size.budgets is None else size.budgets
        return [b for b in budgets if method is None or method.budgets is None or b in method.budgets]

    def methods_of(self, size: Size) -> list[Method]:
        """Those that are trained at a size."""
        return [method for method in self.methods if size.methods is None or method.name in size.methods]


def read(file: str | Path) -> Study:
    """The study in a file.

    Raises:
        UserError: it cannot be read, or names something twice or not at all.
    """
    try:
        study = config_file.from_tree(Study, config_file.read_yaml(file))
        _check(study)
    except UserError as error:
        text = str(error).removeprefix("config: ")
        raise UserError(text if text.startswith(f"{file}: ") else f"{file}: {text}") from None
    return study


def _check(study: Study) -> None:
    for kind, entries in (("sizes", study.sizes), ("methods", study.methods)):
        names = [entry.name for entry in entries]
        if not names:
            raise UserError(f"'{kind}' is empty")
        for number, name in enumerate(names):
            if name in names[:number]:
                raise UserError(f"'{kind}[{number}].name' is {name!r}, as an earlier one's is; take another name")
            if not _names_a_folder(name):
                raise UserError(f"'{kind}[{number}].name' is {name!r}; it names a folder, take letters and digits")
    lists = {key: getattr(study, key) for key in ("seeds", "budgets", "base")}
    lists |= {f"sizes[{i}].seeds": study.seeds_of(size) for i, size in enumerate(study.sizes)}
    lists |= {f"sizes[{i}].budgets": study.budgets_of(size) for i, size in enumerate(study.sizes)}
    for key, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise UserError(f"'{key}' is {values}; give at least one, each once")
    for kind, entries in (("sizes", study.sizes), ("methods", study.methods)):
        for i, entry in enumerate(entries):
            if entry.budgets == []:
                raise UserError(f"'{kind}[{i}].budgets' is []; give at least one, or leave it out for all")
            if unknown := set(entry.budgets or ()) - set(study.budgets):
                raise UserError(f"'{kind}[{i}].budgets' has {min(unknown)!r}, which is not among the study's 'budgets'")
    for i, size in enumerate(study.sizes):
        if unknown := set(size.methods or ()) - {method.name for method in study.methods}:
            raise UserError(f"'sizes[{i}].methods' has {min(unknown)!r}, which is not among the study's 'methods'")
        _check_partners(f"sizes[{i}]", study.methods_of(size))
    names = [benchmark.name for benchmark in study.evaluation.benchmarks]
    if len(set(names)) < len(names):
        raise UserError(f"'evaluation.benchmarks' names {', '.join(names)}; each once, with all its parts")
    if study.evaluation.benchmarks and not study.evaluation.vq:
        raise UserError("'evaluation.vq' is missing; name the folder of the VQ tokenizer that the data were made with")
    if [] not in study.evaluation.evaluate_as.values():
        raise UserError("'evaluation.evaluate_as' needs an entry of [], the roles of training")
    for name, overrides in study.evaluation.evaluate_as.items():
        if not _names_a_folder(name):
            raise UserError(f"'evaluation.evaluate_as' has {name!r}; it names a folder, take letters and digits")
        if not isinstance(overrides, list) or not all(isinstance(o, str) for o in overrides):
            raise UserError(f"'evaluation.evaluate_as.{name}' is {overrides!r}, must be a list of section.key=value")
    for name, fields in study.metrics.items():
        if not isinstance(fields, dict):
            raise UserError(f"'metrics.{name}' must be a mapping, got {fields!r}")
        config_file.from_tree(Metric, fields, f"metrics.{name}")


def _names_a_folder(name: str) -> bool:
    return bool(name) and "/" not in name and not name.startswith(".")


def _check_partners(where: str, methods: list[Method]) -> None:
    """Refuse what would leave open who is compared with whom."""
    labels = [(method.label or method.name, method.trained_on) for method in methods]
    for label, task in labels:
        if labels.count((label, task)) > 1:
            raise UserError(f"'{where}': two methods trained on {task} are labelled {label!r}; give each a label")
    for unified in (method for method in methods if method.trained_on == "unified"):
        for task in ("understanding", "generation"):
            partners = [
                method.name
                for method in methods
                if method.trained_on == task and set(unified.partner_groups) & set(method.partner_groups)
            ]
            if len(partners) > 1:
                raise UserError(
                    f"'{where}': {' and '.join(partners)} share a partner group with {unified.name}, which can have "
                    f"one partner for {task}; give them another partner_group"
                )

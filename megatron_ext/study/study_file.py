"""The study file: what is compared, checked as strictly as configurations."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ext import config_file
from megatron_ext.analysis.hypotheses import Hypothesis, Model
from megatron_ext.analysis.results import Metric
from megatron_ext.errors import UserError
from megatron_ext.study import claims

PICTURES = "mjhq"
"""The benchmark that is answered with generated pictures."""
Budget = Literal["tokens", "steps", "total", "flops"]


@dataclass
class Size:
    """A model size."""

    name: str
    settings: dict
    """Merged into the base configuration: ``model``, and what depends on it (``parallel``, the learning rate)."""
    processes: int | None = None
    """Processes of a run; None: parallel.tensor x parallel.pipeline."""
    seeds: list[int] | None = None
    """Seeds of this size, fewer for a large one; None: the study's."""
    budgets: list[Budget] | None = None
    """A subset of the study's budgets; None: all."""
    methods: list[str] | None = None
    """Names of a subset of the study's methods; None: all."""


@dataclass
class Method:
    """A method, trained on one task or on both."""

    name: str
    """Part of the run's name; unique in the study."""
    trained_on: Literal["understanding", "generation", "unified"]
    partner_group: str | list[str]
    """One or several names. The partner runs of a unified method, which are the reference of its gains, are the
    single-task methods that share a name with it; []: it is compared with nothing."""
    settings: dict = field(default_factory=dict)
    """Merged into the base configuration and the size's settings: ``plan``."""
    budgets: list[Budget] | None = None
    """A subset of its size's budgets; None: all."""
    seeds: list[int] | None = None
    """A subset of its size's seeds; None: all."""
    searches_rate: bool = True
    """Whether ``learning_rates`` are searched for it; otherwise it is trained at the configuration's."""
    evaluate_as: dict = field(default_factory=dict)
    """Further entries of ``evaluation.evaluate_as``, for this method alone."""
    label: str | None = None
    """Its name in tables; None: ``name``. Synergy losses are against the unified method labelled ``dense``."""

    @property
    def partner_groups(self) -> list[str]:
        """``partner_group`` as a list."""
        return [self.partner_group] if isinstance(self.partner_group, str) else self.partner_group


@dataclass
class StudyBenchmark:
    """A benchmark of tools/evaluate.py."""

    name: str
    data: str
    task: Literal["understanding", "generation"] | None = None
    """The models trained on this task are evaluated; None: generation for mjhq, understanding for the others."""
    parts: str = "all"
    options: list[str] = field(default_factory=list)
    """Further arguments of tools/evaluate.py."""

    def __post_init__(self):
        self.task = self.task or ("generation" if self.name == PICTURES else "understanding")

    def read(self) -> list:
        """The questions, or the prompts for pictures.

        Raises:
            UserError: a file is missing or malformed, or there is no such part.
        """
        # Imported late: reading a study file should not wait for evaluation.
        from megatron_ext.evaluation import mjhq
        from megatron_ext.evaluation.registry import BENCHMARKS

        read = mjhq.read if self.name == PICTURES else BENCHMARKS[self.name].read
        return read(Path(self.data), None if self.parts == "all" else self.parts.split(","))


@dataclass
class StudyEvaluation:
    """The evaluation after training, besides the validation losses."""

    vq: str | None = None
    """Folder of the VQ tokenizer; required with benchmarks."""
    benchmarks: list[StudyBenchmark] = field(default_factory=list)
    evaluate_as: dict = field(default_factory=lambda: {"trained": []})
    """Name -> overrides (``plan.preset=dense``) that set the roles in evaluation; [] keeps the roles of training. The
    projections are always those that were trained."""

    def roles_of(self, method: Method) -> dict[str, list[str]]:
        """Name -> overrides of every set of roles that a method's runs are evaluated with."""
        return self.evaluate_as | method.evaluate_as


@dataclass
class LearningRates:
    """A search for the learning rate of each method at each size, before its runs."""

    values: list[float]
    """Rates to try; ``min_lr`` keeps its ratio to ``lr``. The one with the lowest mean log of the validation losses, of
    the tasks trained on, is used."""
    seed: int
    """The seed of the search, none of the study's."""
    iterations: int | None = None
    """Iterations of dense on both tasks; the other methods' follow as in the first of their budgets. None: those of
    the study."""


@dataclass
class Study:
    """The whole study."""

    name: str
    output: str
    """Folder of runs/, results.json and report.md."""
    base: list[str]
    """Configuration files, as after ``pretrain_unified.py --config``."""
    sizes: list[Size]
    methods: list[Method]
    seeds: list[int] = field(default_factory=lambda: [1])
    """Values of training.seed and data.seed."""
    settings: dict = field(default_factory=dict)
    """Merged into the base configuration of every run."""
    budgets: list[Budget] = field(default_factory=lambda: ["tokens"])
    """tokens: every method sees the tokens that dense sees, and a single-task run sees the tokens of its task, in fewer
    steps. steps: the same tokens, but a single-task run takes as many steps as the unified one, with smaller batches.
    total: a single-task run takes as many steps of whole batches, and sees more of its task. flops: the iterations of
    tokens, divided by the FLOPs relative to dense. The learning rate decays over all iterations of a run, after equal
    steps of warm-up. The first budget of a run is in its name, so append further budgets to keep what is trained."""
    keep_text: bool = True
    """Whether single-task runs keep the plain text of the data; unified runs always do."""
    evaluation: StudyEvaluation = field(default_factory=StudyEvaluation)
    learning_rates: LearningRates | None = None
    """None: every run has the rate of its configuration."""
    gate: dict = field(default_factory=dict)
    """Metric -> the least that dense, trained on both tasks, must reach on average over the seeds; a size where it does
    not is uninformative, and decides no hypothesis."""
    hypotheses: list[Hypothesis] = field(default_factory=list)
    """Decided by the report at every size; terms name methods by their labels."""
    metrics: dict = field(default_factory=dict)
    """Metric -> {task, higher_is_better, in_average, scale}, to override what is guessed from its name."""
    slurm: list[str] = field(default_factory=list)
    """Options for sbatch: ``--time=4:00:00``, ``--gpus=1``."""

    def seeds_of(self, size: Size, method: Method | None = None) -> list[int]:
        """The seeds of a size, or of a method at a size."""
        seeds = self.seeds if size.seeds is None else size.seeds
        return [s for s in seeds if method is None or method.seeds is None or s in method.seeds]

    def budgets_of(self, size: Size, method: Method | None = None) -> list[str]:
        """The budgets of a size, or of a method at a size."""
        budgets = self.budgets if size.budgets is None else size.budgets
        return [b for b in budgets if method is None or method.budgets is None or b in method.budgets]

    def methods_of(self, size: Size) -> list[Method]:
        """The methods of a size."""
        return [method for method in self.methods if size.methods is None or method.name in size.methods]

    def models(self) -> dict[Model, list[int]]:
        """The seeds of every model; methods by their names in tables."""
        return {
            Model(size.name, method.label or method.name, method.trained_on, budget): self.seeds_of(size, method)
            for size in self.sizes
            for method in self.methods_of(size)
            for budget in self.budgets_of(size, method)
        }


def read(*files: str | Path) -> Study:
    """The study in a file, or in several that are laid over one another, as configurations are.

    Raises:
        UserError: a file cannot be read, or an entry is wrong, duplicate or missing.
    """
    trees = [config_file.read_yaml(file) for file in files]
    try:
        study = config_file.from_trees(Study, trees)
        _check(study)
    except UserError as error:
        raise UserError(f"{' + '.join(map(str, files))}: {str(error).removeprefix('config: ')}") from None
    return study


def _check(study: Study) -> None:
    _check_names(study)
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
        for method in study.methods_of(size):
            if not study.seeds_of(size, method):
                raise UserError(
                    f"'methods' gives {method.name} seeds {method.seeds}, none of which size {size.name} has"
                )
    _check_evaluation(study.evaluation)
    for i, method in enumerate(study.methods):
        _check_roles(f"methods[{i}].evaluate_as", method.evaluate_as)
        for name, overrides in method.evaluate_as.items():
            if name in study.evaluation.evaluate_as or not overrides:
                raise UserError(f"'methods[{i}].evaluate_as.{name}' must differ from all of evaluation.evaluate_as")
    _check_rates(study)
    claims.check(study.hypotheses, study.gate, _planned(study))
    for name, fields in study.metrics.items():
        if not isinstance(fields, dict):
            raise UserError(f"'metrics.{name}' must be a mapping, got {fields!r}")
        config_file.from_tree(Metric, fields, f"metrics.{name}")


def _planned(study: Study) -> claims.Planned:
    roles = {(m.label or m.name, m.trained_on): study.evaluation.roles_of(m) for m in study.methods}
    benchmarks = {benchmark.name: benchmark.task for benchmark in study.evaluation.benchmarks}
    return claims.Planned(study.models(), roles, benchmarks, study.budgets)


def _check_names(study: Study) -> None:
    for kind, entries in (("sizes", study.sizes), ("methods", study.methods)):
        names = [entry.name for entry in entries]
        if not names:
            raise UserError(f"'{kind}' is empty")
        for number, name in enumerate(names):
            if name in names[:number]:
                raise UserError(f"'{kind}[{number}].name' is {name!r}, like an earlier one; use another name")
            if not _names_a_folder(name):
                raise UserError(f"'{kind}[{number}].name' is {name!r}; it names a folder, use letters and digits")


def _check_evaluation(evaluation: StudyEvaluation) -> None:
    names = [benchmark.name for benchmark in evaluation.benchmarks]
    if len(set(names)) < len(names):
        raise UserError(f"'evaluation.benchmarks' names {', '.join(names)}; name each once, with all its parts")
    if evaluation.benchmarks and not evaluation.vq:
        raise UserError("'evaluation.vq' is missing; name the folder of the VQ tokenizer that made the data")
    if list(evaluation.evaluate_as.values()).count([]) != 1:
        raise UserError("'evaluation.evaluate_as' needs one entry of [], the roles of training")
    _check_roles("evaluation.evaluate_as", evaluation.evaluate_as)


def _check_roles(where: str, evaluate_as: dict) -> None:
    for name, overrides in evaluate_as.items():
        if not _names_a_folder(name):
            raise UserError(f"'{where}' has {name!r}; it names a folder, use letters and digits")
        if not isinstance(overrides, list) or not all(isinstance(o, str) for o in overrides):
            raise UserError(f"'{where}.{name}' is {overrides!r}, must be a list of section.key=value")


def _check_rates(study: Study) -> None:
    if (search := study.learning_rates) is None:
        return
    if not search.values or len(set(search.values)) < len(search.values) or min(search.values) <= 0:
        raise UserError(f"'learning_rates.values' is {search.values}; give at least one rate above 0, each once")
    if any(search.seed in study.seeds_of(size) for size in study.sizes):
        raise UserError(f"'learning_rates.seed' is {search.seed}, a seed of the study; give it one of its own")
    if search.iterations is not None and search.iterations < 1:
        raise UserError(f"'learning_rates.iterations' is {search.iterations}, must be at least 1")


def _names_a_folder(name: str) -> bool:
    return bool(name) and "/" not in name and not name.startswith(".")


def _check_partners(where: str, methods: list[Method]) -> None:
    """Check that every unified method has at most one partner run per task."""
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
                    f"'{where}': {' and '.join(partners)} share a partner_group with {unified.name}, which can have "
                    f"one partner run for {task}; give them another partner_group"
                )

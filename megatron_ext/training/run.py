"""The run: its parts, built from the configuration, and where it goes on."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from megatron.core import parallel_state

from megatron_ext import config_file, distributed
from megatron_ext.callbacks.benchmarks import Benchmarking
from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints.checkpointer import Checkpointer, load_weights, read_state
from megatron_ext.config import Config
from megatron_ext.data import Mixture, build_mixture
from megatron_ext.errors import UserError
from megatron_ext.routing.cost import parameter_count
from megatron_ext.routing.plan import Plan, task_and_modality
from megatron_ext.training.prepare import Preparation
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.transformer.specs import fp8_recipe, implementation, why_no_fp8
from megatron_ext.vocabulary import Vocabulary

# The embedding is padded to a multiple of this, whatever the tensor-parallel size, so that it reshards.
VOCABULARY_MULTIPLE = 128


@dataclass
class Progress:
    """How far a run is: plain data, saved in every checkpoint."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    consumed_flops: float = 0.0
    consumed_dense_flops: float = 0.0
    bad_steps: dict = field(default_factory=dict)


@dataclass
class Run:
    """Everything that a training run consists of, built by ``pretrain_unified.py``.

    Attributes:
        benchmarking: evaluates the model while it is trained; None where the configuration wants none.
        identity: what a checkpoint must agree on with the run that loads it (vocabulary, model shape, projections).
    """

    config: Config
    plan: Plan
    vocabulary: Vocabulary
    train_data: Mixture
    validation_data: Mixture | None
    chunks: list
    optimizer: object
    checkpoints: Checkpointer
    progress: Progress
    benchmarking: Benchmarking | None
    identity: dict

    def preparation(self, training: bool = True) -> Preparation:
        """What makes the inputs of its steps."""
        return Preparation.of(self.config, self.vocabulary.size, self.vocabulary.pad, training)


def build_run(config: Config) -> Run:
    """Everything that a training run needs, resumed where the output folder says.

    Raises:
        UserError: a file, key or checkpoint that does not fit, named.
    """
    if not config.data.vocabulary:
        raise UserError("config: 'data.vocabulary' is empty; name a folder made by tools/train_tokenizer.py")
    if not config.data.train:
        raise UserError("config: 'data.train' is empty; name data sets made by tools/preprocess_vq.py")
    if reason := why_no_fp8(config):
        distributed.report(f"no FP8 ({config.training.fp8}) here: {reason}; training in {config.training.precision}")
    plan = Plan.of(config.plan, config.model.num_layers)
    vocabulary = Vocabulary(config.data.vocabulary)
    train_data = build_mixture(config.data.train, config.data, vocabulary, train=True)
    validation_data = None
    if config.data.validation:
        validation_data = build_mixture(config.data.validation, config.data, vocabulary, train=False)
    chunks = build_model(config, padded_vocabulary(config, vocabulary))
    run = Run(
        config=config,
        plan=plan,
        vocabulary=vocabulary,
        train_data=train_data,
        validation_data=validation_data,
        chunks=chunks,
        optimizer=build_optimizer(config, chunks),
        checkpoints=Checkpointer(
            Path(config.output) / "checkpoints", config.checkpoint.keep, config.checkpoint.asynchronous
        ),
        progress=Progress(),
        benchmarking=Benchmarking(config, plan, vocabulary, chunks) if config.evaluation.interval else None,
        identity=identity_of(config, vocabulary),
    )
    _resume(run)
    return run


def padded_vocabulary(config: Config, vocabulary: Vocabulary) -> int:
    """Rows of the embedding."""
    return vocabulary.padded_size(math.lcm(VOCABULARY_MULTIPLE, config.parallel.tensor))


def identity_of(config: Config, vocabulary: Vocabulary) -> dict:
    """What a checkpoint must agree on with the run that loads it."""
    model = dataclasses.asdict(config.model)
    for free in ("implementation", "init_std"):
        del model[free]
    projections = Plan.of(config.plan, config.model.num_layers).projections.identity
    return {
        "model": model,
        "plan": {"projections": projections},
        "fingerprints": {"vocabulary": vocabulary.fingerprint},
    }


def _require_same_roles(run: Run, path: Path) -> None:
    """Refuse to go on with another method in the folder of the one before, where both would look like one run."""
    theirs = config_file.from_tree(Config, distributed.from_rank_zero(lambda: read_state(path))["config"])
    before = Plan.of(theirs.plan, theirs.model.num_layers)
    for layer, (old, new) in enumerate(zip(before.roles, run.plan.roles)):
        for index, (one, other) in enumerate(zip(old, new)):
            if one != other:
                task, modality = (word.name.lower() for word in task_and_modality(index))
                raise UserError(
                    f"{path}: was trained with {task} {modality} tokens {one.name} in layer {layer}, this run has them "
                    f"{other.name}; give it a folder of its own (output=...), and checkpoint.load={path} to start from "
                    "these weights"
                )


def _resume(run: Run) -> None:
    """Go on from the newest checkpoint of the output folder, or start from another run's weights."""
    wanted = run.config.checkpoint
    path = run.checkpoints.newest() if wanted.resume else None
    if path:
        _require_same_roles(run, path)
        state = run.checkpoints.load(path, run.chunks, run.optimizer, run.identity)
        run.progress = Progress(**state["progress"])
        distributed.report(f"resumed from {path}")
        if state["data"] != run.train_data.fingerprint:
            distributed.report(
                "the training data or their weights have changed since: rows follow the new mixture from here on"
            )
    elif wanted.load:
        path = checkpoint_folder.of_run(Path(wanted.load))
        load_weights(path, run.chunks, run.identity)
        run.optimizer.reload_model_params()
        distributed.report(f"weights from {path}")


def describe(run: Run) -> str:
    """One line: size, layout, kernels."""
    config, parallel = run.config, run.config.parallel
    replicas = parallel_state.get_data_parallel_world_size()
    layout = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}", f"data {replicas}"]
    if parallel.virtual_pipeline > 1:
        layout.insert(2, f"virtual pipeline {parallel.virtual_pipeline}")
    if parallel.sequence:
        layout.append("sequence parallel")
    recipe = fp8_recipe(config)
    precision = config.training.precision + (f" with FP8 GEMMs ({recipe})" if recipe != "none" else "")
    layers = {"local": "torch layers", "transformer_engine": "Transformer Engine layers"}[implementation(config)]
    parameters = parameter_count(config.model, padded_vocabulary(config, run.vocabulary), run.plan.projections)
    return (
        f"{f'{parameters / 1e6:.1f} M' if parameters > 1e6 else f'{parameters:,}'} parameters, "
        f"{precision}, {layers}; {' x '.join(layout)}; plan {run.plan.name}"
    )

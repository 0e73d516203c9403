"""A training run: its parts, built from the configuration, and the checkpoint it resumes from."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron.core import parallel_state

from megatron_ext import config_file, distributed
from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints.checkpointer import Checkpointer, load_weights, read_state
from megatron_ext.checkpoints.local import LocalPoint
from megatron_ext.config import Config, micro_batch_count
from megatron_ext.data import Mixture, build_mixture
from megatron_ext.data.composition import Composition
from megatron_ext.errors import UserError
from megatron_ext.hugging_face.folder import ModelFolder, is_model_folder
from megatron_ext.hugging_face.loading import check_published, load_published
from megatron_ext.routing.flops import parameter_count
from megatron_ext.routing.pipeline_layout import layers_of_chunks
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import task_and_modality
from megatron_ext.routing.row_costs import RowCosts
from megatron_ext.training.bad_steps import BadSteps
from megatron_ext.training.image_codes import check_images, with_tokenizer
from megatron_ext.training.prepare import Preparation
from megatron_ext.training.resuming import build_checkpointer, fetched, load_intact
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.transformer.resolved import ResolvedConfig, padded_vocab_size, resolve, vocab_size
from megatron_ext.vocabulary import Vocabulary


@dataclass
class Progress:
    """How far a run has come: plain data, saved in every checkpoint."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    consumed_flops: float = 0.0
    consumed_dense_flops: float = 0.0
    bad_steps: dict = field(default_factory=dict)

    def advance(self, samples: int, flops: float, dense_flops: float, tokens: float) -> None:
        """Count one more iteration, over a global batch of so many packed rows, FLOPs and tokens."""
        self.iteration += 1
        self.consumed_samples += samples
        self.consumed_tokens += round(tokens)
        self.consumed_flops += flops
        self.consumed_dense_flops += dense_flops


@dataclass
class Run:
    """Everything that a training run consists of; :func:`build_run` makes it.

    Attributes:
        resolved: the configuration and what follows from it.
        train_data, validation_data: mixtures; without validation data None.
        chunks: this rank's part of the model, wrapped for data parallelism.
        identity: vocabulary, model shape and projections, on which a checkpoint must agree with the run that loads it.
    """

    resolved: ResolvedConfig
    vocabulary: Vocabulary
    train_data: Mixture
    validation_data: Mixture | None
    chunks: list
    optimizer: object
    checkpoints: Checkpointer
    progress: Progress
    bad_steps: BadSteps
    identity: dict

    @property
    def config(self) -> Config:
        """The configuration as it was given, with what image tokens take from the vocabulary and the VQ tokenizer."""
        return self.resolved.config

    @property
    def plan(self) -> Plan:
        """The roles of tokens and the weights that image tokens use."""
        return self.resolved.plan

    def preparation(self, training: bool = True) -> Preparation:
        """What turns packed rows into the inputs of steps, of training or of validation."""
        size, vocabulary = vocab_size(self.config, self.vocabulary), self.vocabulary
        return Preparation.of(self.resolved, size, vocabulary.pad, training, vocabulary.image_offset)

    def composition(self, training: bool = True) -> Composition:
        """What cuts the rows of a step into those of replicas and micro-batches, in training or in validation."""
        config, costs = self.config, None
        if config.data.composition == "balanced":
            iterations = config.training.iterations if training else None
            costs = RowCosts(self.plan, config.model, vocab_size(config, self.vocabulary), iterations)
        return Composition(config.training.micro_batch_size, config.micro_batch_multiple, costs)


def build_run(config: Config) -> Run:
    """Build the run, and resume it from the newest checkpoint in its output folder.

    Raises:
        UserError: names the file, key or checkpoint that does not fit.
    """
    if not config.data.vocabulary:
        raise UserError("config: 'data.vocabulary' is empty; name a folder made by tools/train_tokenizer.py")
    if not config.data.train:
        raise UserError("config: 'data.train' is empty; name data sets made by tools/preprocess_vq.py")
    vocabulary = Vocabulary(config.data.vocabulary)
    config, code_vectors = with_tokenizer(config, vocabulary)
    resolved = resolve(config, padded_vocab_size(config, vocabulary))
    if reason := resolved.why_no_fp8:
        distributed.report(f"no FP8 ({config.training.fp8}) here: {reason}; training in {config.training.precision}")
    train_data = _mixture(config, vocabulary, "train")
    validation_data = _mixture(config, vocabulary, "validation") if config.data.validation else None
    checkpoints = build_checkpointer(config)
    newest = checkpoints.resume_point() if config.checkpoint.resume else None
    published = None if newest else _published_start(config, vocabulary)
    chunks = build_model(resolved, code_vectors)
    run = Run(
        resolved=resolved,
        vocabulary=vocabulary,
        train_data=train_data,
        validation_data=validation_data,
        chunks=chunks,
        optimizer=build_optimizer(config, chunks),
        checkpoints=checkpoints,
        progress=Progress(),
        bad_steps=BadSteps(config.bad_steps),
        identity=identity_of(resolved, vocabulary),
    )
    if newest:
        _resume(run, newest)
    elif config.checkpoint.load:
        _start(run, fetched(config.checkpoint.load, config.output), published)
    checkpoints.forget_after(run.progress.iteration)
    return run


def _mixture(config: Config, vocabulary: Vocabulary, kind: str) -> Mixture:
    """The mixture ``kind``, train or validation."""
    depth = config.model.image_codes.depth
    mixture = build_mixture(getattr(config.data, kind), config.data, vocabulary, train=kind == "train", depth=depth)
    check_images(config, mixture, f"data.{kind}")
    return mixture


def identity_of(resolved: ResolvedConfig, vocabulary: Vocabulary) -> dict:
    """What a checkpoint and the run that loads it must agree on."""
    return {
        "model": resolved.config.model.identity,
        "plan": {"projections": resolved.plan.projections.identity},
        "fingerprints": {"vocabulary": vocabulary.fingerprint},
    }


def _require_same_roles(run: Run, path: Path) -> None:
    """Refuse to resume another method's run: both would look like one."""
    config = config_file.from_tree(Config, distributed.from_rank_zero(lambda: read_state(path))["config"])
    trained = Plan.from_config(config)
    for layer, (old_roles, new_roles) in enumerate(zip(trained.roles, run.plan.roles)):
        for index, (old, new) in enumerate(zip(old_roles, new_roles)):
            if old != new:
                task, modality = (token_class.name.lower() for token_class in task_and_modality(index))
                raise UserError(
                    f"{path}: was trained with {task} {modality} tokens {old.name} in layer {layer}, this run has them "
                    f"{new.name}; give it a folder of its own (output=...), and checkpoint.load={path} to start from "
                    "these weights"
                )


def _published_start(config: Config, vocabulary: Vocabulary) -> ModelFolder | None:
    """The published model that a run starts from; None if it starts otherwise. One that does not fit is refused here,
    before a large model is built, which takes minutes."""
    load = config.checkpoint.load
    if not load or not is_model_folder(Path(load)):
        return None
    published = ModelFolder(Path(load))
    check_published(published, config.model, vocabulary)
    return published


def _resume(run: Run, path: Path | LocalPoint) -> None:
    """Resume from a checkpoint in the output folder."""

    def load(point: Path | LocalPoint) -> dict:
        if isinstance(point, Path):  # a local checkpoint of other roles does not count
            _require_same_roles(run, point)
        return run.checkpoints.load(point, run.chunks, run.optimizer, run.identity)

    path, state = load_intact(run.checkpoints, path, run.config.checkpoint.on_damage, load)
    run.progress = Progress(**state["progress"])
    if run.progress.bad_steps:
        run.bad_steps.load_state_dict(run.progress.bad_steps)
    distributed.report(f"resumed from {path}")
    if state["data"] != run.train_data.fingerprint:
        distributed.report(
            "the training data or their weights have changed since the checkpoint: rows follow the new mixture from "
            "here on"
        )


def _start(run: Run, path: Path, published: ModelFolder | None) -> None:
    """Start from the weights of a published model, or of a checkpoint or the run at ``path``."""
    if published:
        rows = load_published(published, run.chunks, run.config.model, run.vocabulary)
        distributed.report(f"{rows.published:,} tokens start as the published model's, {rows.new:,} are new")
    else:
        path = checkpoint_folder.of_run(path)
        load_weights(path, run.chunks, run.identity)
    run.optimizer.reload_model_params()
    distributed.report(f"weights from {path}")


def describe(run: Run) -> str:
    """One line: size, layout, kernels."""
    config, parallel = run.config, run.config.parallel
    replicas = parallel_state.get_data_parallel_world_size()
    layout = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}", describe_replicas(config, replicas)]
    if parallel.virtual_pipeline > 1:
        layout.insert(2, f"virtual pipeline {parallel.virtual_pipeline}")
    if parallel.layout:
        layout[1] += f" of {'+'.join(map(str, layers_of_chunks(parallel.layout)))} layers"
    if parallel.context > 1:
        layout.insert(1, f"context {parallel.context}")
    if parallel.sequence:
        layout.append("sequence parallel")
    fp8 = run.resolved.fp8
    precision = config.training.precision + (f" with FP8 GEMMs ({fp8})" if fp8 != "none" else "")
    layers = {"local": "torch layers", "transformer_engine": "Transformer Engine layers"}[run.resolved.implementation]
    parameters = parameter_count(config.model, run.resolved.padded_vocab_size, run.plan.projections)
    return (
        f"{f'{parameters / 1e6:.1f} M' if parameters > 1e6 else f'{parameters:,}'} parameters, "
        f"{precision}, {layers}; {' x '.join(layout)}; plan {run.plan.name}"
    )


def describe_replicas(config: Config, replicas: int) -> str:
    """The number of replicas, and what they lose if the rows of a step do not divide among them and their
    micro-batches."""
    rows, size = config.training.global_batch_size, config.training.micro_batch_size
    multiple, most = config.micro_batch_multiple, -(-rows // replicas)
    micro_batches = micro_batch_count(most, size, multiple)
    empty = max(0, micro_batches - most)
    notes = []
    if rows % replicas:
        notes.append(f"up to {most} of {rows} rows each")
    if empty:
        notes.append(f"{empty} of {micro_batches} micro-batches empty")
    if notes:
        notes.append(f"{100 * (1 - rows / (replicas * most) * (1 - empty / micro_batches)):.0f} % idle")
    if empty and most >= multiple:
        filling = next(b for b in range(size, most + 1) if micro_batch_count(most, b, multiple) <= most)
        notes.append(f"training.micro_batch_size={filling} fills them")
    return f"data {replicas}" + (f" ({', '.join(notes)})" if notes else "")

"""The configuration of a run: a tree of dataclasses, with every key and its default.

A run is configured by one YAML file, or several merged in order (a model size, a method, a cluster), plus overrides::

    python pretrain_unified.py --config examples/configs/tiny.yaml parallel.tensor=2 training.iterations=50

The keys of ``model`` are in :mod:`megatron_ext.model_config`, those of what happens around training in
:mod:`megatron_ext.run_config`.

The checks are beside what each section configures; :func:`megatron_ext.training.config_checks.validate` calls them
before anything is built.
"""

from dataclasses import dataclass, field
from typing import Literal

from megatron_ext.model_config import ModelConfig
from megatron_ext.run_config import BadStepConfig, CheckpointConfig, EvaluationConfig, LifecycleConfig, LoggingConfig

LayoutName = Literal["understanding", "generation", "text", "interleaved"]


@dataclass
class RoleEntry:
    """Assigns a role to classes of tokens in some layers."""

    layers: str | int
    """``all``, or layer numbers and inclusive ranges, counted from 0: ``"0,2-4,6-"``."""
    task: Literal["understanding", "generation", "text", "all"]
    modality: Literal["text", "image", "all"]
    role: Literal["full", "kv_only", "skip"]


@dataclass
class ProjectionConfig:
    """The weights of image tokens in the projections of every layer. Text tokens always use W, the base weights."""

    kind: Literal["preset", "shared", "separate", "delta"] = "preset"
    """What image tokens use. shared: W; separate: a matrix of their own; delta: W + D, with D a full matrix or, given
    ``rank``, a low-rank delta (LoRA); preset: the kind that belongs to plan.preset."""
    modules: list[Literal["qkv", "proj", "fc1", "fc2"]] = field(default_factory=lambda: ["qkv", "proj"])
    """Projections that ``kind`` applies to; the others are shared."""
    rank: int | None = None
    """Rank of D; None: a full matrix. Only with kind delta."""
    per_task: bool = False
    """Understanding and generation each have their own matrix or D."""


@dataclass
class DenseShareConfig:
    """A share of the data that is FULL in every layer, whatever the plan says (``routing/dense_share.py``)."""

    of: Literal["none", "documents", "image_tokens"] = "none"
    """What is selected: whole documents, or single image tokens."""
    start: float = 0.5
    """Share at the start of training."""
    end: float | None = None
    """Share at the end of training; None: the share at the start."""
    begin_at: float = 0.0
    """Fraction of training at which the share begins to change."""
    end_at: float = 1.0
    """Fraction of training at which the share reaches ``end``."""
    evaluation: float | None = None
    """Share in validation, evaluation and generation. None: for image tokens, the share at the end of training; for
    documents, 1 if that share is above 0.5, else 0."""


@dataclass
class RoleChoice:
    """Roles that a table may give to classes of tokens in some layers."""

    layers: str | int
    """As in :class:`RoleEntry`."""
    task: Literal["understanding", "generation", "text", "all"]
    modality: Literal["text", "image", "all"]
    roles: list[Literal["full", "kv_only", "skip"]]


@dataclass
class DrawnTablesConfig:
    """Random role tables, of which every document draws one in each step (``routing/drawn_tables.py``). Validation,
    evaluation and generation take the plan's own table."""

    count: int = 0
    """Number of tables; 0: none."""
    seed: int = 1
    """Tables are functions of it."""
    own: float = 0.125
    """Probability that a document takes the plan's own table."""
    choices: list[RoleChoice] = field(default_factory=list)
    """Roles that the tables may have beside the plan's own. Empty: understanding's image tokens kv_only or skip,
    generation's skip, and its text kv_only, the last two in all layers but the last."""


@dataclass
class PlanConfig:
    """The role of each class of tokens in each layer (``routing/plan.py``)."""

    preset: str = "dense"
    """dense, himix, hmgen, himix_hmgen_share_all, himix_hmgen_share_all_separate, himix_hmgen_share_partial."""
    himix_start: int = 0
    """HiMix: first layer in which image tokens of understanding are KV_ONLY."""
    shallow_count: int | None = None
    """HMGen: number of layers that image tokens of generation skip; None: 3 of every 16."""
    shallow_placement: Literal["centred", "evenly"] = "centred"
    """HMGen: the skipped layers are contiguous in the middle of the model, or evenly spaced."""
    shallow_layers: list[int] = field(default_factory=list)
    """HMGen: numbers of the skipped layers, from 0; replaces count and placement."""
    table: list[RoleEntry] = field(default_factory=list)
    """Changes to the preset's roles, applied in order."""
    projections: ProjectionConfig = field(default_factory=ProjectionConfig)
    dense_share: DenseShareConfig = field(default_factory=DenseShareConfig)
    drawn_tables: DrawnTablesConfig = field(default_factory=DrawnTablesConfig)


@dataclass
class ParallelConfig:
    """Sizes of the parallel groups; data parallelism takes the rest of the world size."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks per pipeline stage; more than 1: the interleaved schedule."""
    layout: str = ""
    """Layers of each pipeline stage, where they are not equal: Megatron-Core's pipeline layout, such as
    ``"Et*7|t*9|t*9|t*7L"``; entry i is chunk i div pipeline of stage i mod pipeline. Empty: even."""
    context: int = 1
    """Context parallelism: ranks that share the tokens of each row, so that rows may be longer (docs/training.md)."""
    sequence: bool = False
    """Sequence parallelism over the tensor-parallel group."""
    distributed_optimizer: bool = False
    """Shard optimizer states (and float32 master weights) over the data-parallel group."""
    overlap: bool = False
    """Overlap the data-parallel gradient reduction with the backward pass and, with the distributed optimizer, the
    all-gather of the weights with the next forward pass."""


@dataclass
class SourceConfig:
    """One data set and its use."""

    path: str
    """Prefix of a prepared data set: PATH.bin, PATH.idx, PATH.json."""
    task: LayoutName
    """What it is used for. interleaved: documents in which some images are given and others are drawn."""
    weight: float = 1.0
    """Relative number of documents sampled from this source."""


@dataclass
class DataConfig:
    vocabulary: str = ""
    """Folder of tools/train_tokenizer.py."""
    train: list[SourceConfig] = field(default_factory=list)
    validation: list[SourceConfig] = field(default_factory=list)
    sequence_length: int = 512
    """Tokens per packed row."""
    rows: Literal["mixed", "by_task"] = "mixed"
    """mixed: documents of all tasks share rows. by_task: a row holds one task, as does a micro-batch where possible, so
    that shapes repeat with training.row_multiple; costs a little more padding."""
    caption_dropout: float = 0.1
    """Probability of dropping the text of a document in which only images are learnt: the caption of a generation
    document, the instruction of an edit. For classifier-free guidance."""
    generation_text: bool = False
    """Generation documents also learn the ``<boi>``, ``<eoi>`` and ``<eod>`` around their images (VILA-U)."""
    seed: int = 1234
    loader: Literal["auto", "dali", "plain"] = "auto"
    """auto: DALI if it is installed. Both loaders give the same rows bit for bit."""
    workers: int = 1
    """Worker processes that pack rows; 0: pack in the training process."""
    prefetch: int = 4
    """Steps prepared ahead of training."""
    composition: Literal["in_order", "balanced"] = "in_order"
    """Which rows of a step share a replica and a micro-batch. in_order: neighbours; balanced: so many that replicas and
    micro-batches have equal work under the plan (with rows: by_task replicas alone). The rows of a step, and so its
    loss, are the same."""


@dataclass
class TaskWeights:
    """Weights of the tasks in the loss."""

    understanding: float = 1.0
    generation: float = 1.0
    text: float = 1.0


@dataclass
class TrainingConfig:
    iterations: int = 100
    micro_batch_size: int = 2
    """Rows per forward pass of one replica."""
    global_batch_size: int = 8
    """Rows per optimizer step over all replicas."""
    precision: Literal["float32", "bf16"] = "float32"
    fp8: Literal["none", "delayed", "current", "mxfp8"] = "none"
    """Scaling recipe of Transformer Engine's FP8 GEMMs. Without the hardware or library for it, the run says so in one
    line and computes in ``precision``. ``delayed`` needs a dense plan."""
    task_weights: TaskWeights = field(default_factory=TaskWeights)
    means: Literal["task", "modality"] = "task"
    """Over which tokens of the global batch the loss is averaged. task: the tokens of each task, weighted by
    task_weights; the loss of an image token is the mean over its codes. modality: all text tokens, and all codes of
    image tokens; the two means are added (VILA-U)."""
    z_loss: float = 0.0
    """Coefficient c of the z-loss (PaLM, arXiv 2204.02311; Chameleon's is 1e-5): a loss token adds c (log Z)^2, where Z
    is the sum of its logits' exponentials, so that logits do not drift. 0: none."""
    seed: int = 1234
    row_multiple: int = 1
    """Pad every group of tokens, the queries and keys of every layer and the logits to a multiple of this many rows, so
    that shapes repeat between micro-batches; 1: no padding."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: full recomputes whole layers, selective only the attention core. Selective saves memory
    only if attention stores its scores; the fused kernels of flash-attention, cuDNN and torch recompute them anyway."""
    deterministic: bool = False
    """Bitwise reproducible runs, on GPUs too, at some cost in speed: kernels add in a fixed order. An operation without
    a deterministic kernel raises an error when it is called."""
    validation_interval: int = 0
    """Iterations between validations; 0: never."""
    validation_batches: int = 4
    """Global batches per validation."""


@dataclass
class ParameterGroup:
    """Parameters with a learning rate of their own."""

    parameters: str
    """Pattern of parameter names (``fnmatch``), such as ``projector.*`` or ``decoder.layers.*.mlp.*``. The first group
    that matches counts."""
    lr_multiplier: float = 1.0
    """Multiplies the scheduled learning rate. 0: frozen, without gradients and optimizer state."""


@dataclass
class OptimizerConfig:
    lr: float = 3e-4
    min_lr: float = 3e-5
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_iterations: int = 10
    wsd_decay_iterations: int = 0
    """Length of the final decay of the wsd schedule (warm-up, stable, decay)."""
    weight_decay: float = 0.1
    """Applied to matrices, never to norms and biases."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    """Maximum global gradient norm; 0: no clipping."""
    groups: list[ParameterGroup] = field(default_factory=list)
    """Parameters that are frozen, or trained at another rate (docs/training.md). A parameter without a group is trained
    at ``lr``."""


@dataclass
class Config:
    """The configuration of a run."""

    output: str = "runs/unnamed"
    """Folder for config.yaml, metrics.jsonl, checkpoints/, TensorBoard files."""
    model: ModelConfig = field(default_factory=ModelConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    bad_steps: BadStepConfig = field(default_factory=BadStepConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    lifecycle: LifecycleConfig = field(default_factory=LifecycleConfig)
    callbacks: list[str] = field(default_factory=list)
    """User-defined callbacks, as module:Class (docs/training.md)."""

    def data_parallel(self, world_size: int) -> int:
        """Number of model replicas in a world of ``world_size`` processes."""
        return world_size // (self.parallel.tensor * self.parallel.context * self.parallel.pipeline)

    @property
    def micro_batch_multiple(self) -> int:
        """The number of a replica's micro-batches is a multiple of this: the interleaved schedule needs one."""
        return self.parallel.pipeline if self.parallel.virtual_pipeline > 1 else 1

    def micro_batches(self, world_size: int) -> int:
        """Number of micro-batches per optimizer step, of the replica that has most."""
        rows = -(-self.training.global_batch_size // self.data_parallel(world_size))
        return micro_batch_count(rows, self.training.micro_batch_size, self.micro_batch_multiple)


def micro_batch_count(rows: int, size: int, multiple: int = 1) -> int:
    """Number of micro-batches of at most ``size`` rows in which a replica computes ``rows`` rows: at least one, and a
    multiple of ``multiple``."""
    return -(-max(1, -(-rows // size)) // multiple) * multiple

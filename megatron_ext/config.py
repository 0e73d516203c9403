"""Everything a run can be told, as one tree of dataclasses.

A run is one YAML file, or several laid over one another (a model size, a method, a cluster), plus overrides::

    python pretrain_unified.py --config examples/configs/tiny.yaml parallel.tensor=2 training.iterations=50

:meth:`Config.validate` refuses impossible combinations before anything is built.
"""

from dataclasses import dataclass, field
from typing import Literal

TaskName = Literal["understanding", "generation", "text"]


@dataclass
class ModelConfig:
    """A decoder-only Transformer: RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_query_groups: int | None = None
    """Key/value heads; None: as many as attention heads."""
    ffn_hidden_size: int | None = None
    """Width of the gated FFN; None: 8/3 of hidden_size, rounded up to a multiple of 64."""
    rotary_base: float = 10000.0
    rotary_scaling_factor: float | None = None
    """Llama 3's long-context scaling of the rotary frequencies; None: none."""
    max_image_tokens: int = 0
    """Learned positions inside an image, as many as it has tokens, added to their embeddings: small models
    learn where things lie from fewer images than by rotary positions alone, which stay as they are. 0: none."""
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    tie_embeddings: bool = False
    implementation: Literal["auto", "local", "transformer_engine"] = "auto"
    """Which linear layers, norms and attention; auto: Transformer Engine under bf16 where it is installed and a GPU is
    there."""

    def __post_init__(self):
        self.num_query_groups = self.num_query_groups or self.num_attention_heads
        self.ffn_hidden_size = self.ffn_hidden_size or -(-self.hidden_size * 8 // 3 // 64) * 64


@dataclass
class RoleEntry:
    """A role for some classes of tokens in some layers."""

    layers: str | int
    """``all``, or numbers and ranges from 0, both ends included: ``"0,2-4,6-"``."""
    task: Literal["understanding", "generation", "text", "all"]
    modality: Literal["text", "image", "all"]
    role: Literal["full", "kv_only", "skip"]


@dataclass
class ProjectionConfig:
    """The weights that image tokens use in a layer's projections."""

    kind: Literal["preset", "shared", "separate", "delta"] = "preset"
    """shared: those of text; separate: their own; delta: text's plus a difference; preset: as the preset says."""
    modules: list[Literal["qkv", "proj", "fc1", "fc2"]] = field(default_factory=lambda: ["qkv", "proj"])
    """The projections that ``kind`` applies to; the others are shared."""
    rank: int | None = None
    """Rank of the difference of delta projections; None: a whole matrix."""
    per_task: bool = False
    """Understanding and generation have a matrix or difference each."""


@dataclass
class DenseShareConfig:
    """A share of the data that takes the dense roles instead of the plan's (``routing/dense_share.py``)."""

    of: Literal["none", "documents", "image_tokens"] = "none"
    """Whole documents, or single image tokens."""
    start: float = 0.5
    """Share at the start of training."""
    end: float | None = None
    """Share at the end; None: as at the start."""
    begin_at: float = 0.0
    """Part of training after which the share begins to change."""
    end_at: float = 1.0
    """Part of training after which it no longer changes."""
    evaluation: float | None = None
    """Share in validation, evaluation and generation. None: image tokens as at the end of training; documents as most
    of them were by then, all or none."""


@dataclass
class PlanConfig:
    """Which tokens take part in which layer (see ``routing/plan.py``)."""

    preset: str = "dense"
    """dense, himix, hmgen, himix_hmgen_share_all, himix_hmgen_share_all_separate, himix_hmgen_share_partial."""
    himix_start: int = 0
    """HiMix: first layer in which the image tokens of understanding are key and value only."""
    shallow_count: int | None = None
    """HMGen: number of layers that generated image tokens skip; None: 3 of every 16."""
    shallow_placement: Literal["centred", "evenly"] = "centred"
    shallow_layers: list[int] = field(default_factory=list)
    """HMGen: the skipped layers by number (from 0), instead of a count."""
    table: list[RoleEntry] = field(default_factory=list)
    """Changes to the preset's roles, applied in order."""
    projections: ProjectionConfig = field(default_factory=ProjectionConfig)
    dense_share: DenseShareConfig = field(default_factory=DenseShareConfig)


@dataclass
class ParallelConfig:
    """How the model is cut over processes; data parallelism takes what is left of the world size."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks per pipeline stage; more than 1 interleaves."""
    sequence: bool = False
    """Sequence parallelism over the tensor-parallel group."""
    distributed_optimizer: bool = False
    """Shard optimizer states (and float32 master weights) over the data-parallel group."""
    overlap: bool = False
    """Reduce gradients over the replicas while the backward pass goes on and, with the distributed optimizer, gather
    new weights while the next forward pass does."""


@dataclass
class SourceConfig:
    """One data set used for one task."""

    path: str
    """Prefix of a prepared data set: PATH.bin, PATH.idx, PATH.json."""
    task: TaskName
    weight: float = 1.0
    """Relative number of documents drawn from this source."""


@dataclass
class DataConfig:
    vocabulary: str = ""
    """Folder with tokenizer.model and vocabulary.json."""
    train: list[SourceConfig] = field(default_factory=list)
    validation: list[SourceConfig] = field(default_factory=list)
    sequence_length: int = 512
    """Tokens in a packed row."""
    rows: Literal["mixed", "by_task"] = "mixed"
    """Tasks that share a row: any, or one, which also makes micro-batches of one task where it can, so that with
    training.row_multiple their shapes repeat; a little more padding."""
    caption_dropout: float = 0.1
    """Probability that a generation document loses its caption (classifier-free guidance)."""
    seed: int = 1234
    loader: Literal["auto", "dali", "plain"] = "auto"
    """auto: DALI when it is installed. Both give the same rows bit for bit."""
    workers: int = 1
    """Processes that pack rows ahead of training; 0 packs in the training process."""
    prefetch: int = 4
    """Steps prepared ahead."""


@dataclass
class TaskWeights:
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
    """FP8 GEMMs by Transformer Engine: recipe for the scales. Where they cannot be had, one line says so and the run
    goes on in ``precision``. ``delayed`` is for dense plans alone."""
    task_weights: TaskWeights = field(default_factory=TaskWeights)
    seed: int = 1234
    row_multiple: int = 1
    """Dummy rows fill every group of tokens, the queries and keys of every layer and the logits up to a multiple of
    this, so that shapes repeat from one micro-batch to the next; 1: none."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: full recomputes whole layers, selective the attention core. The latter saves memory
    only where attention keeps all its scores; flash's, cuDNN's and torch's fused kernels recompute them anyway."""
    deterministic: bool = False
    """The same bits from the same run, on GPUs too, at the cost of some speed: kernels that add in a fixed order. An
    operation that has no such kernel is refused when it is called."""
    validation_interval: int = 0
    """Iterations between validations; 0: never."""
    validation_batches: int = 4
    """Global batches per validation."""


@dataclass
class OptimizerConfig:
    lr: float = 3e-4
    min_lr: float = 3e-5
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_iterations: int = 10
    wsd_decay_iterations: int = 0
    """Length of the final decay of the wsd schedule (warm-up, stable, decay)."""
    weight_decay: float = 0.1
    """Applies to matrices; norms and biases are never decayed."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""


@dataclass
class EvaluationBenchmark:
    """Questions of one benchmark."""

    name: str
    """gqa, mme, pope or seed."""
    data: str
    """Folder of the benchmark as released."""
    parts: list[str] = field(default_factory=list)
    """Its splits or subtasks; none: all."""
    limit: int = 0
    """So many questions, drawn evenly from all over the benchmark, the same ones every time; 0: all."""


@dataclass
class EvaluationConfig:
    """Benchmarks answered and pictures drawn while training goes on, into OUTPUT/evaluation/iter_NNNNNNN."""

    interval: int = 0
    """Iterations between evaluations; 0: never."""
    vq: str = ""
    """Folder of the VQ tokenizer that the training data was made with."""
    benchmarks: list[EvaluationBenchmark] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    """Captions to draw pictures for."""
    guidance: float = 3.0
    """Scale of classifier-free guidance for pictures; 1: none."""
    temperature: float = 1.0
    """For pictures; 0: the most likely token. Answers are always the most likely tokens."""
    seed: int = 0
    """Of the pictures; every evaluation draws with the same."""
    batch_size: int = 16
    """Questions or pictures that a replica decodes together."""
    max_new_tokens: int = 16
    """Most tokens of an answer."""


@dataclass
class BadStepConfig:
    """A bad step is not applied, is counted and logged; the limits stop the run.

    Bad: the loss or the gradient norm is not finite; or, once ``spike_window`` losses are known, the loss exceeds
    their mean by more than ``spike_deviations`` standard deviations and by more than ``spike_ratio`` of the mean.
    """

    max_consecutive: int = 5
    max_total: int = 50
    spike_window: int = 100
    """0: no spike rule."""
    spike_deviations: float = 8.0
    spike_ratio: float = 0.5


@dataclass
class CheckpointConfig:
    interval: int = 0
    """Iterations between checkpoints; 0: only at the end and on a signal."""
    keep: int = 2
    """Newest complete checkpoints kept; 0: all."""
    asynchronous: bool = False
    """Write in the background while training goes on."""
    resume: bool = True
    """Go on from the newest complete checkpoint in the output folder, if there is one."""
    load: str | None = None
    """A checkpoint, or a run's folder, to start from when there is nothing to resume: weights alone, step 0."""


@dataclass
class LoggingConfig:
    interval: int = 1
    """Iterations between log lines."""
    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "unified"
    profile_start: int = 0
    """First iteration of a torch profiler window (0: none); traces go to OUTPUT/profile."""
    profile_iterations: int = 3
    gradient_alignment_interval: int = 0
    """Iterations between measurements of how far the two tasks' gradients agree (``analysis/gradients.py``), each of
    which takes about as long as two steps; 0: never."""


@dataclass
class LifecycleConfig:
    time_limit_minutes: float = 0.0
    """Save and exit cleanly once this much wall-clock time is used; 0: no limit."""
    slurm_margin_minutes: float = 5.0
    """Under Slurm, save and exit cleanly this long before the job's end."""
    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer than this for a lost rank ends the run."""


@dataclass
class Config:
    """The whole run."""

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
    """Callbacks of your own, as module:Class (docs/training.md)."""

    def data_parallel(self, world_size: int) -> int:
        """Replicas of the model in a world of ``world_size`` processes."""
        return world_size // (self.parallel.tensor * self.parallel.pipeline)

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches per replica and optimizer step."""
        return self.training.global_batch_size // (self.training.micro_batch_size * self.data_parallel(world_size))

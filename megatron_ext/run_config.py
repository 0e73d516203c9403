"""The parts of a run's configuration that are about what happens around training: evaluation, bad steps, checkpoints,
logging, and when a run stops."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class EvaluationBenchmark:
    """A benchmark to answer during training."""

    name: str
    """gqa, mme, pope or seed."""
    data: str
    """Folder of the benchmark, as released."""
    parts: list[str] = field(default_factory=list)
    """Splits or subtasks; empty: all."""
    limit: int = 0
    """Number of questions, spread evenly over the benchmark and the same in every evaluation; 0: all."""


@dataclass
class EvaluationConfig:
    """Benchmark answers and generated pictures during training, written to OUTPUT/evaluation/iter_NNNNNNN."""

    interval: int = 0
    """Iterations between evaluations; 0: never."""
    vq: str = ""
    """Folder of the VQ tokenizer that encoded the training data."""
    benchmarks: list[EvaluationBenchmark] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    """Captions to generate pictures for."""
    guidance: float = 3.0
    """Scale of classifier-free guidance for pictures; 1: no guidance."""
    temperature: float = 1.0
    """Sampling temperature for pictures; 0: greedy. Answers are always greedy."""
    top_k: int = 0
    """Pictures: only the k most likely codes; 0: all."""
    top_p: float = 1.0
    """Pictures: only the most likely codes that together have this probability."""
    seed: int = 0
    """Seed of the pictures, the same in every evaluation."""
    batch_size: int = 16
    """Questions or pictures per batch of a replica."""
    max_new_tokens: int = 16
    """Maximum tokens of an answer."""


@dataclass
class BadStepConfig:
    """A bad step is counted and logged but not applied; the run stops when there are too many.

    A step is bad if the loss or the gradient norm is not finite or if the loss spikes: it exceeds the mean of the last
    ``spike_window`` good steps by more than ``spike_deviations`` standard deviations and by more than ``spike_ratio``
    of that mean.
    """

    max_consecutive: int = 5
    """Bad steps in a row that the run survives."""
    max_total: int = 50
    """Bad steps in all that the run survives, resumptions included."""
    spike_window: int = 100
    """0: no spike detection."""
    spike_deviations: float = 8.0
    spike_ratio: float = 0.5


@dataclass
class CheckpointConfig:
    interval: int = 0
    """Iterations between checkpoints; 0: only at the end of training and on a signal."""
    keep: int = 2
    """Number of complete checkpoints kept, newest first; 0: all."""
    asynchronous: bool = False
    """Write checkpoints in the background."""
    resume: bool = True
    """Resume from the newest complete checkpoint in the output folder, if there is one."""
    load: str | None = None
    """Whose weights a new run starts from, at step 0: a checkpoint, the folder of a run, the URL of a run (its newest
    checkpoint is copied into OUTPUT/start), or the folder of a published model (docs/published_models.md). Ignored when
    a run resumes."""
    on_damage: Literal["refuse", "older"] = "refuse"
    """What a run does whose newest checkpoint is damaged. refuse: stop and name the file; older: rename the checkpoint
    and resume from the one before."""
    replicate: str = ""
    """A second place for complete checkpoints: a folder, or a URL that fsspec knows (s3://bucket/run); empty: none. A
    run whose own folder has no checkpoint resumes from the newest one there."""
    local: str = ""
    """Folder on a disk of each node (or in /dev/shm) for frequent checkpoints that survive a lost process or node; may
    name environment variables ($TMPDIR); empty: none."""
    local_interval: int = 0
    """Iterations between local checkpoints; 0: never."""


@dataclass
class LoggingConfig:
    interval: int = 1
    """Iterations between log lines."""
    straggler_interval: int = 100
    """Iterations between comparisons of the ranks' speeds, which name a slow rank; 0: never."""
    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "unified"
    profile_start: int = 0
    """First iteration that torch.profiler records, into OUTPUT/profile; 0: no profile."""
    profile_iterations: int = 3
    gradient_alignment_interval: int = 0
    """Iterations between measurements of the alignment of the two tasks' gradients (``analysis/gradients.py``); each
    takes about as long as two steps. 0: never."""


LONGER = 6
"""Saves, evaluations and callbacks, and the first step, which compiles and opens data, may take this many times
``lifecycle.hang_minutes``."""


@dataclass
class LifecycleConfig:
    time_limit_minutes: float = 0.0
    """Wall-clock time after which the run saves a checkpoint and exits cleanly; 0: no limit."""
    slurm_margin_minutes: float = 5.0
    """Under Slurm, time that remains of the job when the run saves a checkpoint and exits cleanly."""
    distributed_timeout_minutes: float = 40.0
    """Timeout of a collective, the last resort: a lost rank ends the run after this time. Must be over 6 x
    ``hang_minutes``, so that the ranks that hold up a run are named before."""
    hang_minutes: float = 5.0
    """Time without progress after which a run names the ranks that hold it up, writes their stacks to OUTPUT/hang and
    exits with code 75; callbacks, saves and evaluations have six times as long. 0: never."""
    replica_check_interval: int = 0
    """Iterations between checks that all replicas have the same weights, bit for bit; 0: never."""

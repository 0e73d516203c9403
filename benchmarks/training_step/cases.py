"""The kinds of steps that are timed, each against another."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from megatron_ext import config_file, cpu
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.routing.flops import TRAINING_PER_FORWARD, count, forward_flops
from megatron_ext.routing.plan import Plan
from megatron_ext.token_classes import Modality

Build = Callable[[Config, int, Batch], Callable[[], float]]
"""Builds, from a configuration, the size of the vocabulary and a global batch on the host, a whole step that returns
the loss."""


def _ours(*arguments):
    from training_step.ours import OurStep

    return OurStep(*arguments)


def _masked(*arguments):
    from training_step.masked import MaskedStep

    return MaskedStep(*arguments)


def _stock_megatron(*arguments):
    from training_step.others import stock_megatron

    return stock_megatron(*arguments)


def _hugging_face(*arguments):
    from training_step.others import hugging_face

    return hugging_face(*arguments)


@dataclass(frozen=True)
class Case:
    """One kind of step.

    Attributes:
        rows: kind of rows, see :func:`training_step.random_rows.random_rows`.
        base: the case that this one is measured against.
        plan: settings of the plan, and of the model where it is another than the base's; its FLOPs are those of the
            case.
        limit: upper limit of the figure.
        build: builds the step.
    """

    rows: str
    base: str
    plan: tuple[str, ...] = ()
    limit: float | None = None
    build: Build = _ours
    codes: int = 1
    """D, codes of an image token."""

    def batch(self, base: Batch) -> Batch:
        """The rows of the base, with random codes for image tokens that have several."""
        if self.codes == 1:
            return base
        codes = torch.randint(CODEBOOK_SIZE, (*base.shape, self.codes), dtype=torch.int32)
        return replace(base, codes=codes * (base.modality == Modality.IMAGE)[..., None])

    @property
    def is_other_library(self) -> bool:
        """Whether it is a step of another library. Its ratio is ours over theirs."""
        return self.build in (_stock_megatron, _hugging_face)


def _of_plan(rows: str, setting: str, limit: float, build: Build = _ours) -> Case:
    return Case(rows, f"dense on {rows}", (setting,), limit, build)


CODEBOOK_SIZE = 1024
FOUR_CODES = (
    f"model.image_codes={{depth: 4, codebook: random, codebook_size: {CODEBOOK_SIZE}, width: 256, "
    "head: {num_layers: 2, hidden_size: 256, num_attention_heads: 4}}"
)
"""A depth head that costs a token a third of the 8 layers of 512, as the published head of 7B does."""


def _of_codes(*settings: str) -> Case:
    return Case("generation", "dense on generation", (FOUR_CODES, *settings), 1.15, codes=4)


CASES = {
    "dense": Case("whole", "dense"),
    "stock Megatron-Core": Case("whole", "dense", limit=1.05, build=_stock_megatron),
    "Hugging Face": Case("whole", "dense", limit=1.0, build=_hugging_face),
    "dense on understanding": Case("understanding", "dense on understanding"),
    "himix": _of_plan("understanding", "plan.preset=himix", 1.10),
    "himix by masking": _of_plan("understanding", "plan.preset=himix", None, _masked),
    "dense on generation": Case("generation", "dense on generation"),
    "hmgen": _of_plan("generation", "plan.preset=hmgen", 1.05),
    "hmgen by masking": _of_plan("generation", "plan.preset=hmgen", None, _masked),
    "4 codes": _of_codes(),
    "4 codes and hmgen": _of_codes("plan.preset=hmgen"),
    "separate": _of_plan("generation", "plan.projections.kind=separate", 1.10),
    "delta": _of_plan("generation", "plan.projections.kind=delta", 1.10),
    "dense on both": Case("both", "dense on both"),
    "himix_hmgen_share_all": _of_plan("both", "plan.preset=himix_hmgen_share_all", 1.10),
    "himix_hmgen_share_all_separate": _of_plan("both", "plan.preset=himix_hmgen_share_all_separate", 1.10),
    "himix_hmgen_share_partial": _of_plan("both", "plan.preset=himix_hmgen_share_partial", 1.10),
}


@dataclass(frozen=True)
class Size:
    """Model and step that the cases share.

    Attributes:
        settings: of the model and its precision, ``section.key=value``.
        files: configurations that the settings are laid over.
        rows: in a micro-batch.
        sequence: tokens in a row.
    """

    settings: tuple[str, ...]
    vocab_size: int
    rows: int
    sequence: int
    micro_batches: int = 1
    files: tuple[str, ...] = ()

    def of_rows(self, kind: str) -> "Size":
        """The size for rows of this kind. On a GPU the rows of understanding are one micro-batch: their steps are short
        under HiMix, and the host would take longer to queue several micro-batches than the GPU to compute them. Their
        logits are few, so one micro-batch fits.
        """
        whole = kind == "understanding" and not cpu.available()
        return replace(self, rows=self.rows * self.micro_batches, micro_batches=1) if whole else self

    def configuration(self, plan: tuple[str, ...] = ()) -> Config:
        """The size as a run's configuration, with settings of a plan."""
        step = [
            f"data.sequence_length={self.sequence}",
            f"training.micro_batch_size={self.rows}",
            f"training.global_batch_size={self.rows * self.micro_batches}",
        ]
        return config_file.load(Config, list(self.files), [*self.settings, *step, *plan])

    def flops(self, case: Case, batch: Batch) -> int:
        """FLOPs of a training step of the model under the case's plan."""
        config = self.configuration(case.plan)
        plan = Plan.from_config(config)
        return TRAINING_PER_FORWARD * forward_flops(config.model, self.vocab_size, plan, count(batch, plan))


def with_bases(names: list[str]) -> list[str]:
    """The cases ``names`` and their bases, each base right before what is measured against it."""
    bases = {CASES[name].base for name in names}
    return [name for base in CASES if base in bases for name in CASES if name == base or _against(name, base, names)]


def _against(name: str, base: str, names: list[str]) -> bool:
    return name in names and CASES[name].base == base

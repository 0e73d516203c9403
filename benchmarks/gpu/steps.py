"""The steps, most valuable first. Those that need Transformer Engine come last, because it may still be building."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from gpu.records import Context, Record


@dataclass(frozen=True)
class Figure:
    """A number that a step measures.

    Attributes:
        label: its name on the page.
        at_most, at_least: the aim, if there is one.
        everywhere: a matter of correctness, so a rehearsal must meet the aim too.
    """

    label: str
    at_most: float | None = None
    at_least: float | None = None
    everywhere: bool = False

    @property
    def aim(self) -> str:
        """The aim in words; empty if there is none."""
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return f">= {self.at_least:g}" if self.at_least is not None else ""

    def met(self, value: float) -> bool:
        """Whether ``value`` meets the aim; nan meets none."""
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)


def missed(aims: dict[str, Figure], figures: dict[str, float], everywhere: bool = False) -> list[str]:
    """The aims that ``figures`` miss, in words; with ``everywhere`` only aims that hold on any machine."""
    return [
        f"{aim.label}: {figures[name]:.3g}, not {aim.aim}"
        for name, aim in aims.items()
        if name in figures and not aim.met(figures[name]) and (aim.everywhere or not everywhere)
    ]


@dataclass(frozen=True)
class Step:
    """A part of the check.

    Attributes:
        module: its file in ``benchmarks/gpu``, with ``measure(context, record)`` and ``FIGURES``, by step.
        seconds: its time box.
    """

    name: str
    title: str
    module: str
    seconds: int
    needs_transformer_engine: bool = False

    @property
    def figures(self) -> dict[str, Figure]:
        """The figures of the step by their names in its record."""
        return self._imported.FIGURES[self.name]

    @property
    def measure(self) -> Callable[[Context, Record], None]:
        """The function that measures the figures."""
        return self._imported.measure

    @property
    def _imported(self):
        return importlib.import_module(f"gpu.{self.module}")


STEPS = (
    Step("float32", "float32 against the CPU", "float32", 60),
    # These two compile kernels, which takes longer than running them.
    Step("bf16", "bf16 against float32", "precision", 120),
    Step("table_bf16", "1B in bf16, torch's layers", "one_billion", 180),
    Step("kernels", "Kernels of a step", "kernels", 60),
    Step("layouts", "Layouts over nccl on one GPU", "layouts", 80),
    Step("resume", "Resume from an asynchronous checkpoint", "resume", 60),
    Step("dali", "Steps through DALI to the GPU", "dali_rows", 40),
    Step("fp8", "FP8 against float32", "precision", 60, needs_transformer_engine=True),
    Step("table_te_bf16", "1B in bf16, Transformer Engine's layers", "one_billion", 110, needs_transformer_engine=True),
    Step("table_te_fp8", "1B in FP8", "one_billion", 90, needs_transformer_engine=True),
    Step("implementations", "Training with both implementations", "implementations", 80, needs_transformer_engine=True),
)

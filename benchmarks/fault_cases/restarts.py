"""Ranks, agents and nodes that are lost, and runs that start again."""

from pathlib import Path

from fault_cases.harness import case, expect, losses, start, undisturbed


@case(
    1,
    "SIGKILL to a rank between two iterations",
    expected="torchrun starts all ranks again; losses are bit for bit those of an undisturbed run",
)
def killed_rank(folder: Path) -> str:
    run = start(
        folder / "run",
        "callbacks=[fault_cases.injections:Kill]",
        restarts=1,
        FAULT_RANK="1",
        FAULT_ITERATION="4",
    )
    expect(run.wait() == 0, run.tail())
    expect(losses(run.output) == undisturbed(), "the losses differ from those of an undisturbed run")
    return "started again once by torchrun, resumed from iteration 2, same losses bit for bit"

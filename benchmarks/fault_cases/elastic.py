"""Runs that lose everything and go on with another number of replicas."""

import json
from pathlib import Path

from fault_cases.harness import case, expect, losses, start

ITERATIONS = 9
COMMON = (
    f"training.iterations={ITERATIONS}",
    "checkpoint.interval=3",
    "parallel.distributed_optimizer=true",
    "callbacks=[fault_cases.injections:RowHashes]",
    "data.workers=0",
    "lifecycle.hang_minutes=0",
)
EVEN = ("training.global_batch_size=24",)
UNEVEN = (
    "training.global_batch_size=7",
    "model.num_layers=4",
    "parallel.pipeline=2",
    "parallel.virtual_pipeline=2",
    "parallel.overlap=true",
    "data.composition=balanced",
)


@case(
    13,
    "kill -9 to all processes, twice, and other replicas go on: 24 rows on 8, 3, 5; 7 rows on 2, 3, 1 of PP 2, VPP 2",
    expected="the same rows in every step; losses to 1e-6 of those of an undisturbed run",
)
def other_replicas(folder: Path) -> str:
    even = _worst(folder / "even", EVEN, (8, 3, 5))
    uneven = _worst(folder / "uneven", UNEVEN, (2, 3, 1), ranks=2)
    return (
        f"{ITERATIONS} x 24 and {ITERATIONS} x 7 rows identical, losses differ by {even:.0e} and {uneven:.0e} at most"
    )


def _worst(folder: Path, settings: tuple[str, ...], replicas: tuple[int, int, int], ranks: int = 1) -> float:
    """Train on as many replicas, of so many ranks each, and go on on others twice after SIGKILL; and undisturbed on the
    first number. Returns the largest relative difference of a loss."""
    undisturbed = start(
        folder / "undisturbed", *COMMON, *settings, processes=ranks * replicas[0], FAULT_LAUNCH="undisturbed"
    )
    expect(undisturbed.wait() == 0, undisturbed.tail())
    for launch, (count, iteration) in enumerate(zip(replicas, (4, 7, None))):
        run = start(folder / "run", *COMMON, *settings, processes=ranks * count, FAULT_LAUNCH=str(launch))
        if iteration:
            run.wait_for_iteration(iteration)
            run.kill()
    expect(run.wait() == 0, run.tail())
    expected, rows = _rows(undisturbed.output)["undisturbed"], _rows(run.output)
    for launch, steps in enumerate((range(3), range(3, 6), range(6, ITERATIONS))):
        for step in steps:
            expect(rows[str(launch)][step] == expected[step], f"other rows in iteration {step + 1}")
    pairs = zip(losses(run.output), losses(undisturbed.output), strict=True)
    worst = max(abs(loss - undisturbed_loss) / undisturbed_loss for loss, undisturbed_loss in pairs)
    expect(worst < 1e-6, f"a loss differs by {worst:.1e}")
    return worst


def _rows(output: Path) -> dict[str, dict[int, list[str]]]:
    """Hashes of the rows of each step of each launch, over all replicas, sorted."""
    found: dict[str, dict[int, list[str]]] = {}
    for line in (output / "rows.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["launch"], {}).setdefault(record["step"], []).extend(record["rows"])
    return {launch: {step: sorted(rows) for step, rows in steps.items()} for launch, steps in found.items()}

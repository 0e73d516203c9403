"""What a study says: OUT/report.md with its pictures, and OUT/analysis.json with the numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ext.analysis import fit, synergy, tables
from megatron_ext.analysis.results import Results, Row
from megatron_ext.analysis.study import collect, questions, state, steps
from megatron_ext.analysis.study.grid import Run
from megatron_ext.analysis.study.study_file import Study
from megatron_ext.analysis.synergy import REFERENCE, TASKS, Comparison
from megatron_ext.command_line import write_json, write_text

BUDGETS = {"tokens": "Equal tokens", "steps": "Equal steps", "flops": "Equal FLOPs"}
LOSSES = tuple(f"{task} loss" for task in TASKS)


def write(study: Study, runs: Sequence[Run]) -> dict:
    """Collect, compare, fit, draw and write. Returns the numbers of ``OUT/analysis.json``."""
    from megatron_ext.analysis import plots  # imported late: the tool's --help should not wait for matplotlib

    out = Path(study.output)
    results, drawn = collect.collect(study, runs), questions.bootstrap(study, runs)
    comparisons, costs = synergy.compare(results, drawn), synergy.against_dense(results, drawn)
    fits = {(budget, roles, method, what): line for budget, roles, method, what, line in _fits(comparisons)}
    parts = [f"# Study {study.name}", *_facts(study, runs, results), *_unfinished(study, runs)]
    for budget in study.budgets:
        rows = [row for row in results.rows if row.budget == budget]
        if rows:
            parts += [f"## {BUDGETS[budget]}", _trained(study, budget, rows).markdown()]
        for roles in dict.fromkeys(row.evaluated_as for row in rows):
            parts += _costs([c for c in costs if (c.budget, c.evaluated_as) == (budget, roles)], roles)
            mine = [c for c in comparisons if (c.budget, c.evaluated_as) == (budget, roles)]
            if not mine:
                continue
            heading = f", evaluated as {roles}" if roles else ""
            stem = "-".join(filter(None, ["synergy", budget, roles]))
            parts += [f"### Gains and synergy losses{heading}"]
            for size in dict.fromkeys(c.size for c in mine):
                of_size = [c for c in mine if c.size == size]
                file = out / "figures" / f"{stem}-{size}.svg"
                plots.bars(of_size, file, f"{size}, {BUDGETS[budget].lower()}{heading}")
                for table in (tables.gains(of_size), tables.losses(of_size)):
                    parts += [f"{table.title}, size {size}:", table.markdown()] if table.rows else []
                parts += [f"![gains, size {size}](figures/{file.name})"]
            lines = {(m, w): f for (b, r, m, w), f in fits.items() if (b, r) == (budget, roles)}
            for what in _scales(mine):
                drawn = {method: line for (method, w), line in lines.items() if w == what}
                file = out / "figures" / f"{stem}-{what.replace(' ', '-')}-over-size.svg"
                plots.scaling(mine, what, drawn, file)
                parts += [f"![synergy loss over size: {what}](figures/{file.name})"]
            if lines:
                parts += [_fit_table(lines).markdown()]
    if len(study.budgets) > 1:
        parts += _beside_each_other(study.budgets, comparisons)
    parts += _uncertainty(study, results)
    write_text(out / "report.md", "\n\n".join(parts) + "\n")
    numbers = {
        "study": study.name,
        "methods": tables.as_json(comparisons),
        "against_dense": tables.as_json(costs),
        "fits": [
            dict(zip(("budget", "evaluated_as", "method", "loss_of"), key)) | line.as_json()
            for key, line in fits.items()
        ],
    }
    write_json(out / "analysis.json", numbers)
    return numbers


def _facts(study: Study, runs: Sequence[Run], results: Results) -> list[str]:
    finished = [run for run in runs if state.result(run, steps.fingerprint(run, study.evaluation))]
    found = [state.result(run, steps.fingerprint(run, study.evaluation)) for run in finished]
    text = "Plain text is in every run's data." if study.keep_text else "Plain text is in the unified runs' data alone."
    lines = [
        f"- {len(finished)} of {len(runs)} runs are complete: {_sizes(study)}; budgets {', '.join(study.budgets)}.",
        f"- Trained in all: {sum(f['tokens'] for f in found) / 1e6:.3g} million tokens, "
        f"{sum(f['flops'] for f in found):.3g} FLOPs.",
        "- Equal tokens: every method takes the iterations that dense takes on the same tasks, and training on one task "
        "as many tokens of the task as the unified run sees of it. Equal steps: training on one task takes the unified "
        "run's iterations. Equal FLOPs: a method that costs r of dense takes 1/r times as many as for equal tokens. "
        "The learning rate decays over all of a run's iterations. r is counted on rows of the run's own data; the "
        f"tables show what was really done. {text}",
        "- A gain is (unified - single) / |single|, the single-task model trained with the same accelerator; the sign "
        "is turned for FID and losses. Synergy loss is dense's gain minus the method's, in percentage points.",
    ]
    return ["\n".join(lines)]


def _sizes(study: Study) -> str:
    """Sizes, and the seeds and the number of methods of each."""
    seeds = [", ".join(map(str, study.seeds_of(size))) for size in study.sizes]
    counts = [len(study.methods_of(size)) for size in study.sizes]
    if len(set(zip(seeds, counts))) == 1:
        return f"sizes {', '.join(size.name for size in study.sizes)}; {counts[0]} methods; seeds {seeds[0]}"
    return "sizes " + ", ".join(
        f"{size.name} ({count} methods; seeds {some})" for size, count, some in zip(study.sizes, counts, seeds)
    )


def _unfinished(study: Study, runs: Sequence[Run]) -> list[str]:
    states = [(run, state.of(run, steps.fingerprint(run, study.evaluation))) for run in runs]
    lines = [
        f"- {run.name}: {s.kind} at iteration {s.iteration} of {run.iterations}" + (f" ({s.note})" if s.note else "")
        for run, s in states
        if s.kind != "finished"
    ]
    return ["## Runs that are missing here", "\n".join(lines)] if lines else []


def _trained(study: Study, budget: str, rows: list[Row]) -> tables.Table:
    """A row per size and method: what it cost and what it reached, mean and standard deviation over its seeds."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    roles = len({row.evaluated_as for row in rows}) > 1
    lines = []
    for key in dict.fromkeys((row.size, row.method, row.task, row.evaluated_as) for row in rows):
        mine = [row for row in rows if (row.size, row.method, row.task, row.evaluated_as) == key]
        size, method, task, evaluated_as = key
        lines.append(
            [
                f"{method}, {task}",
                size,
                *([evaluated_as] if roles else []),
                ", ".join(str(row.seed) for row in mine),
                str(mine[0].iterations),
                f"{np.mean([row.tokens for row in mine]) / 1e6:.3g} M",
                f"{np.mean([row.flops for row in mine]):.3g}",
                f"{np.mean([row.flops_ratio for row in mine]):.3f}",
                *(_mean([row.metrics[m] for row in mine if row.metrics.get(m) is not None]) for m in metrics),
            ]
        )
    head = ["method, trained on", "size", *(["evaluated as"] if roles else []), "seeds", "iterations", "tokens"]
    return tables.Table(BUDGETS[budget], [*head, "FLOPs", "FLOPs / dense", *metrics], lines)


def _mean(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{np.mean(values):.4g}" + (f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else "")


def _costs(costs: Sequence[Comparison], roles: str | None) -> list[str]:
    """A table for each size: how much better or worse than dense on the same tasks."""
    parts = ["### Against dense, trained on the same tasks" + (f", evaluated as {roles}" if roles else "")]
    for size in dict.fromkeys(c.size for c in costs):
        parts += [f"Size {size}:", tables.gains([c for c in costs if c.size == size]).markdown()]
    return parts if len(parts) > 1 else []


def _scales(comparisons: Sequence[Comparison]) -> list[str]:
    """What is shown over size: each task's average over benchmarks, and its loss."""
    averages = [f"mean {task}" for task in TASKS if any(c.average(task) for c in comparisons)]
    return averages + [name for name in LOSSES if any(c.effect(name) for c in comparisons)]


def _fits(comparisons: Sequence[Comparison]):
    """Lines through the synergy losses over size, for everything that is shown over size and every metric."""
    for budget, roles in dict.fromkeys((c.budget, c.evaluated_as) for c in comparisons):
        mine = [c for c in comparisons if (c.budget, c.evaluated_as) == (budget, roles)]
        metrics = dict.fromkeys(e.metric for c in mine for e in c.effects)
        for method in dict.fromkeys(c.method for c in mine if c.method != REFERENCE):
            for what in dict.fromkeys((*_scales(mine), *metrics)):
                points = [
                    (c.parameters, loss) for c in mine if c.method == method and (loss := c.loss_of(what)) is not None
                ]
                if line := fit.fit([n for n, _ in points], [loss for _, loss in points]):
                    yield budget, roles, method, what, line


def _fit_table(lines: dict[tuple[str, str], fit.Fit]) -> tables.Table:
    rows = [
        [
            method,
            what,
            tables.percent(line.a, "pp"),
            tables.percent(line.b, "pp"),
            str(len(line.parameters)),
            f"{100 * line.residual:.1f} pp",
        ]
        for (method, what), line in lines.items()
    ]
    return tables.Table("", ["method", "synergy loss of", "a", "b of a + b ln N", "sizes", "rms residual"], rows)


def _beside_each_other(budgets: Sequence[str], comparisons: Sequence[Comparison]) -> list[str]:
    """Gains and synergy losses under each budget."""
    rows = []
    keys = dict.fromkeys((c.size, c.method, c.evaluated_as) for c in comparisons)
    for key in keys:
        mine = {c.budget: c for c in comparisons if (c.size, c.method, c.evaluated_as) == key}
        if len(mine) < 2:
            continue
        for what in _scales(list(mine.values())):
            found = [c.of(what) if (c := mine.get(b)) else None for b in budgets]
            gains = [tables.percent(effect and effect.gain) for effect in found]
            losses = [tables.percent(effect and effect.loss, "pp") for effect in found]
            rows.append([key[1], key[0], key[2] or "trained", what, *gains, *losses])
    if not rows:
        return []
    head = ["method", "size", "evaluated as", "metric"]
    head += [f"{what}, {BUDGETS[b].lower()}" for what in ("gain", "synergy loss") for b in budgets]
    return ["## Budgets beside each other", tables.Table("", head, rows).markdown()]


def _uncertainty(study: Study, results: Results) -> list[str]:
    seeds = min(len(study.seeds_of(size)) for size in study.sizes)
    fewest = "" if all(len(study.seeds_of(size)) == seeds for size in study.sizes) else " for some sizes"
    lines = [
        f"- Brackets are the central 95 % of {study.replicates} bootstrap replicates. Each replicate draws, with "
        "replacement, the seeds of every size (the same for all methods of the size) and the pictures of every "
        "benchmark (the same for all models, each with all its questions), and does everything again from there: "
        "gains, losses, averages, fits.",
        "- Losses and FID vary with the seeds alone: validation documents and generated pictures are not resampled.",
        f"- There {'is 1 seed' if seeds == 1 else f'are {seeds} seeds'}{fewest}"
        + (", so how their results vary with it is in no interval" if seeds == 1 else "")
        + ("." if seeds == 1 or seeds >= 5 else ": too few for their resampling to be more than a rough guide."),
    ]
    if len(study.sizes) > 1:
        lines.append(
            f"- Lines are least squares over {len(study.sizes)} sizes, N the parameters of the dense model, embeddings "
            "included; b is the change as N grows 2.72-fold."
            + (" Through two sizes they are exact, whatever the noise." if len(study.sizes) == 2 else "")
        )
    reads = "; ".join(
        f"{name} ({m.task}, {'higher' if m.higher_is_better else 'lower'} is better"
        f"{'' if m.in_average else ', not in averages'})"
        for name, m in results.metrics.items()
    )
    return ["## What the numbers rest on", "\n".join([*lines, f"- Figures: {reads}."])]

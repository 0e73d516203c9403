"""What a study says: OUT/report.md with its pictures, and OUT/analysis.json with the numbers."""

from collections.abc import Sequence
from pathlib import Path

from megatron_ext.analysis import fit, synergy, tables
from megatron_ext.analysis.bootstrap import Bootstrap
from megatron_ext.analysis.results import Results
from megatron_ext.analysis.synergy import REFERENCE, Comparison
from megatron_ext.files import write_json, write_text
from megatron_ext.study import collect, questions, report_tables, state, steps
from megatron_ext.study.grid import Run
from megatron_ext.study.study_file import Study


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
            parts += [f"## {report_tables.BUDGETS[budget]}", report_tables.trained(budget, rows).markdown()]
        for roles in dict.fromkeys(row.evaluated_as for row in rows):
            parts += report_tables.costs([c for c in costs if (c.budget, c.evaluated_as) == (budget, roles)], roles)
            mine = [c for c in comparisons if (c.budget, c.evaluated_as) == (budget, roles)]
            if not mine:
                continue
            heading = f", evaluated as {roles}" if roles else ""
            stem = "-".join(filter(None, ["synergy", budget, roles]))
            parts += [f"### Gains and synergy losses{heading}"]
            lacking = [f"- Size {c.size}: {reason}." for c in mine for reason in c.missing]
            parts += ["\n".join(dict.fromkeys(lacking))] if lacking else []
            parts += report_tables.over_sizes(mine)
            for size in dict.fromkeys(c.size for c in mine):
                of_size = [c for c in mine if c.size == size]
                file = out / "figures" / f"{stem}-{size}.svg"
                plots.bars(of_size, file, f"{size}, {report_tables.BUDGETS[budget].lower()}{heading}")
                for table in (tables.gains(of_size), tables.losses(of_size)):
                    parts += [f"{table.title}, size {size}:", table.markdown()] if table.rows else []
                parts += [f"![gains, size {size}](figures/{file.name})"]
            shown = report_tables.scales(mine)
            lines = {(m, w): f for (b, r, m, w), f in fits.items() if (b, r) == (budget, roles) and w in shown}
            for what in shown:
                through = {method: line for (method, w), line in lines.items() if w == what}
                file = out / "figures" / f"{stem}-{what.replace(' ', '-')}-over-size.svg"
                plots.scaling(mine, what, through, file)
                parts += [f"![synergy loss over size: {what}](figures/{file.name})"]
            if lines:
                parts += [report_tables.fit_table(lines).markdown()]
    if len(study.budgets) > 1:
        parts += report_tables.beside_each_other(study.budgets, comparisons)
    parts += _uncertainty(study, results, drawn)
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
    found = [one for run in runs if (one := state.result(run, steps.fingerprint(run, study.evaluation)))]
    text = "Plain text is in every run's data." if study.keep_text else "Plain text is in the unified runs' data alone."
    lines = [
        f"- {len(found)} of {len(runs)} runs are complete: {_sizes(study)}; budgets {', '.join(study.budgets)}.",
        f"- Trained in all: {sum(f['tokens'] for f in found) / 1e6:.3g} million tokens, "
        f"{sum(f['flops'] for f in found):.3g} FLOPs.",
        "- Equal tokens: every method takes the iterations that dense takes on the same tasks; training on one task "
        "takes as many tokens of it as the unified run sees, in fewer steps. Equal tokens and steps: the same, in as "
        "many steps of smaller batches. Equal tokens in all: training on one task takes the unified run's steps of "
        "whole batches, and sees more of the task. Equal FLOPs: a method that costs r of dense takes 1/r times the "
        "iterations of equal tokens. The learning rate decays over all of a run's iterations. r is counted on rows of "
        f"the run's own data; the tables show what was really done. {text}",
        "- A gain is (unified - single) / |single|, the single-task model trained in the same partner group; the "
        "sign is turned for FID and losses. Synergy loss is dense's gain minus the method's, in percentage points.",
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


def _fits(comparisons: Sequence[Comparison]):
    """Lines through the synergy losses over size, for everything that is shown over size and every metric."""
    for budget, roles in dict.fromkeys((c.budget, c.evaluated_as) for c in comparisons):
        mine = [c for c in comparisons if (c.budget, c.evaluated_as) == (budget, roles)]
        metrics = dict.fromkeys(e.metric for c in mine for e in c.effects)
        for method in dict.fromkeys(c.method for c in mine if c.method != REFERENCE):
            for what in dict.fromkeys((*report_tables.scales(mine), *metrics)):
                points = [
                    (c.parameters, loss) for c in mine if c.method == method and (loss := c.loss_of(what)) is not None
                ]
                if line := fit.fit([n for n, _ in points], [loss for _, loss in points]):
                    yield budget, roles, method, what, line


def _uncertainty(study: Study, results: Results, drawn: Bootstrap) -> list[str]:
    fixed = sorted(results.metrics.keys() - {metric for _, _, metric in drawn.questions})
    seeds = min(len(study.seeds_of(size)) for size in study.sizes)
    fewest = "" if all(len(study.seeds_of(size)) == seeds for size in study.sizes) else " for some sizes"
    lines = [
        f"- Brackets are the central 95 % of {study.replicates} bootstrap replicates. Each replicate draws, with "
        "replacement, the seeds of every size (the same for all methods of the size) and the pictures of every "
        "benchmark (the same for all models, each with all its questions), and does everything again from there: "
        "gains, losses, averages, fits.",
        "- "
        + (", ".join(fixed) or "No figure")
        + " vary with the seeds alone, here and in averages; of one seed they have no interval.",
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
    lines.append(f"- Figures: {reads}.")
    if unknown := [name for name in study.metrics if name not in results.metrics]:
        lines.append(f"- 'metrics' of the study file names {', '.join(unknown)}, which no run has.")
    return ["## What the numbers rest on", "\n".join(lines)]

"""The report of a study: OUT/report.md with its figures, and OUT/analysis.json with the numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ext.analysis import fit, synergy, tables
from megatron_ext.analysis.bootstrap import Bootstrap
from megatron_ext.analysis.results import Results
from megatron_ext.analysis.synergy import REFERENCE, Comparison
from megatron_ext.files import write_json, write_text
from megatron_ext.study import collect, questions, report_tables, state, steps
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import Study

Fits = Mapping[tuple[str | None, str | None, str, str], fit.Fit]
"""(budget, roles in evaluation, method, metric) -> the line through synergy losses over size."""


def write(study: Study, runs: Sequence[StudyRun]) -> dict:
    """Collect, compare, fit, plot and write. Returns the numbers of ``OUT/analysis.json``."""
    out = Path(study.output)
    results, bootstrap = collect.collect(study, runs), questions.bootstrap(study, runs)
    comparisons, costs = synergy.compare(results, bootstrap), synergy.against_dense(results, bootstrap)
    fits = dict(_fits(comparisons))
    parts = [f"# Study {study.name}", *_facts(study, runs, results), *_unfinished(study, runs)]
    for budget in study.budgets:
        rows = [row for row in results.rows if row.budget == budget]
        if rows:
            parts += [f"## {report_tables.BUDGETS[budget]}", report_tables.trained(rows)]
        for roles in dict.fromkeys(row.evaluated_as for row in rows):
            parts += report_tables.costs([c for c in costs if (c.budget, c.evaluated_as) == (budget, roles)], roles)
            selected = [c for c in comparisons if (c.budget, c.evaluated_as) == (budget, roles)]
            if selected:
                parts += _gains(selected, budget, roles, fits, out / "figures")
    if len(study.budgets) > 1:
        parts += report_tables.over_budgets(study.budgets, comparisons)
    parts += report_tables.beside_the_paper(results)
    parts += _uncertainty(study, results, bootstrap)
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


def _gains(comparisons: Sequence[Comparison], budget: str, roles: str | None, fits: Fits, figures: Path) -> list[str]:
    """The section on gains and synergy losses under one budget and with one set of roles in evaluation."""
    from megatron_ext.analysis import plots  # imported late: the tool's --help should not wait for matplotlib

    heading = f", evaluated as {roles}" if roles else ""
    stem = "-".join(filter(None, ["synergy", budget, roles]))
    parts = [f"### Gains and synergy losses{heading}"]
    missing = [f"- Size {c.size}: {reason}." for c in comparisons for reason in c.missing]
    parts += ["\n".join(dict.fromkeys(missing))] if missing else []
    parts += report_tables.over_sizes(comparisons)
    for size in dict.fromkeys(c.size for c in comparisons):
        of_size = [c for c in comparisons if c.size == size]
        file = figures / f"{stem}-{size}.svg"
        plots.bars(of_size, file, f"{size}, {report_tables.BUDGETS[budget].lower()}{heading}")
        for title, table in ((tables.GAINS, tables.gains(of_size)), (tables.LOSSES, tables.losses(of_size))):
            parts += [] if table.empty else [f"{title}, size {size}:", tables.markdown(table)]
        parts += [f"![gains, size {size}](figures/{file.name})"]
    lines = {key[2:]: line for key, line in fits.items() if key[:2] == (budget, roles)}
    headlines = report_tables.headline_metrics(comparisons)
    for metric in headlines:
        by_method = {method: line for (method, of_metric), line in lines.items() if of_metric == metric}
        file = figures / f"{stem}-{metric.replace(' ', '-')}-over-size.svg"
        plots.scaling(comparisons, metric, by_method, file)
        parts += [f"![synergy loss over size: {metric}](figures/{file.name})"]
    shown = {key: line for key, line in lines.items() if key[1] in headlines}
    return [*parts, report_tables.fits(shown)] if shown else parts


def _facts(study: Study, runs: Sequence[StudyRun], results: Results) -> list[str]:
    finished = [r for run in runs if (r := state.result(run, steps.fingerprint(run, study.evaluation)))]
    text = "Plain text is in every run's data." if study.keep_text else "Plain text is in the unified runs' data alone."
    lines = [
        f"- {len(finished)} of {len(runs)} runs are complete: {_sizes(study)}; budgets {', '.join(study.budgets)}.",
        f"- Training in total: {sum(f['tokens'] for f in finished) / 1e6:.3g} million tokens, "
        f"{sum(f['flops'] for f in finished):.3g} FLOPs.",
        "- Equal tokens: every method takes the iterations that dense takes on the same tasks; training on one task "
        "takes as many tokens of it as the unified run sees, in fewer steps. Equal tokens and steps: the same, in as "
        "many steps of smaller batches. Equal tokens in all: training on one task takes the unified run's steps of "
        "whole batches, and sees more of the task. Equal FLOPs: a method that costs r of dense takes 1/r times the "
        "iterations of equal tokens. The learning rate decays over all iterations of a run. r is counted on rows of "
        f"the run's own data; the tables show the FLOPs of the training itself. {text}",
        "- A gain is (unified - single) / |single|, where single is the reference run on one task, of a common "
        "partner_group; the sign is flipped for FID and losses. Synergy loss is dense's gain minus the method's, in "
        "percentage points.",
    ]
    return ["\n".join(lines)]


def _sizes(study: Study) -> str:
    """The sizes, with the seeds and the number of methods of each."""
    seeds = [", ".join(map(str, study.seeds_of(size))) for size in study.sizes]
    counts = [len(study.methods_of(size)) for size in study.sizes]
    if len(set(zip(seeds, counts))) == 1:
        return f"sizes {', '.join(size.name for size in study.sizes)}; {counts[0]} methods; seeds {seeds[0]}"
    return "sizes " + ", ".join(
        f"{size.name} ({count} methods; seeds {some})" for size, count, some in zip(study.sizes, counts, seeds)
    )


def _unfinished(study: Study, runs: Sequence[StudyRun]) -> list[str]:
    states = [(run, state.of(run, steps.fingerprint(run, study.evaluation))) for run in runs]
    lines = [
        f"- {run.name}: {s.kind} at iteration {s.iteration} of {run.iterations}" + (f" ({s.note})" if s.note else "")
        for run, s in states
        if s.kind != "finished"
    ]
    return ["## Unfinished runs", "\n".join(lines)] if lines else []


def _fits(comparisons: Sequence[Comparison]):
    """Lines through the synergy losses over size, for the headline metrics and every metric: items of ``Fits``."""
    for budget, roles in dict.fromkeys((c.budget, c.evaluated_as) for c in comparisons):
        selected = [c for c in comparisons if (c.budget, c.evaluated_as) == (budget, roles)]
        metrics = [*report_tables.headline_metrics(selected), *(e.metric for c in selected for e in c.effects)]
        for method in dict.fromkeys(c.method for c in selected if c.method != REFERENCE):
            for metric in dict.fromkeys(metrics):
                losses = [
                    (c.parameters, loss)
                    for c in selected
                    if c.method == method and (loss := c.loss_of(metric)) is not None
                ]
                if line := fit.fit([n for n, _ in losses], [loss for _, loss in losses]):
                    yield (budget, roles, method, metric), line


def _uncertainty(study: Study, results: Results, bootstrap: Bootstrap) -> list[str]:
    fixed = sorted(results.metrics.keys() - {metric for _, _, metric in bootstrap.questions})
    seeds = min(len(study.seeds_of(size)) for size in study.sizes)
    fewest = "" if all(len(study.seeds_of(size)) == seeds for size in study.sizes) else " for some sizes"
    lines = [
        f"- Brackets are the central 95 % of {study.replicates} bootstrap replicates. Each replicate samples, with "
        "replacement, the seeds of every size (the same for all methods of the size) and the pictures of every "
        "benchmark (the same for all models, each with all its questions), and repeats everything that follows: "
        "gains, losses, averages, fits.",
        "- "
        + (", ".join(fixed) or "No figure")
        + " vary with the seeds alone, here and in averages; with one seed they have no interval.",
        f"- There {'is 1 seed' if seeds == 1 else f'are {seeds} seeds'}{fewest}"
        + (", so no interval contains the variation over seeds" if seeds == 1 else "")
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
    return ["## Uncertainty", "\n".join(lines)]

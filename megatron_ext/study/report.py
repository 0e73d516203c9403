"""The report of a study: OUT/report.md with its figures, and OUT/analysis.json with the numbers."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_ext.analysis import depth, depth_report, fit, gate, hypotheses, outcomes, synergy, tables
from megatron_ext.analysis.results import Results
from megatron_ext.analysis.synergy import QUANTITIES, REFERENCE, Comparison
from megatron_ext.files import write_json, write_text
from megatron_ext.study import collect, learning_rates, report_tables, state, steps
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import Study

Fits = Mapping[tuple[str | None, str | None, str, str, str], fit.Fit]
"""(budget, roles in evaluation, method, metric, quantity) -> the line over size."""


def write(study: Study, runs: Sequence[StudyRun]) -> dict:
    """Collect, compare, test, fit, plot and write. Returns the numbers of ``OUT/analysis.json``."""
    out = Path(study.output)
    results = collect.collect(study, runs)
    comparisons = synergy.compare(results)
    gates = gate.gates(results, study.gate)
    uninformative = [decided.size for decided in gates if not decided.passed]
    decisions = hypotheses.decide(study.hypotheses, results, study.budgets[0], uninformative, study.models())
    tested = outcomes.outcomes(comparisons, uninformative, _incomplete(study, runs))
    fits = dict(_fits(comparisons))
    parts = [f"# Study {study.name}", *_facts(study, runs, results), *_unfinished(study, runs)]
    parts += learning_rates.section(study)
    parts += [*report_tables.gates(gates), *report_tables.hypotheses(decisions)]
    for budget in study.budgets:
        rows = [row for row in results.rows if row.budget == budget and not depth.is_intervention(row)]
        if rows:
            parts += [f"## {report_tables.BUDGETS[budget]}", report_tables.trained(rows)]
        for roles in dict.fromkeys(row.evaluated_as for row in rows):
            selected = [c for c in comparisons if (c.budget, c.evaluated_as) == (budget, roles) and c.effects]
            if selected:
                of_roles = [o for o in tested if (o.budget, o.evaluated_as) == (budget, roles)]
                parts += _synergy(selected, of_roles, budget, roles, fits, out / "figures")
    parts += report_tables.over_budgets(comparisons)
    parts += depth_report.sections(results, out / "figures")
    parts += report_tables.beside_the_paper(results)
    parts += _statistics(study, results)
    write_text(out / "report.md", "\n\n".join(parts) + "\n")
    numbers = {
        "study": study.name,
        "gates": [decided.as_json() for decided in gates],
        "hypotheses": [decision.as_json() for decision in decisions],
        "methods": tables.as_json(comparisons),
        "tests": [asdict(outcome) for outcome in tested],
        "depth_curves": [asdict(curve) for curve in depth.curves(results)],
        "fits": [
            dict(zip(("budget", "evaluated_as", "method", "metric", "quantity"), key)) | line.as_json()
            for key, line in fits.items()
        ],
    }
    write_json(out / "analysis.json", numbers)
    return numbers


def _synergy(
    comparisons: Sequence[Comparison],
    tested: Sequence[outcomes.Outcome],
    budget: str,
    roles: str | None,
    fits: Fits,
    figures: Path,
) -> list[str]:
    """The section on synergy and its losses under one budget and with one set of roles in evaluation."""
    from megatron_ext.analysis import plots  # imported late: the tool's --help should not wait for matplotlib

    heading = f", evaluated as {roles}" if roles else ""
    stem = "-".join(filter(None, ["synergy", budget, roles]))
    parts = [f"### Synergy, unified cost and partner advantage{heading}"]
    missing = [f"- Size {c.size}: {reason}." for c in comparisons for reason in c.missing]
    parts += ["\n".join(dict.fromkeys(missing))] if missing else []
    parts += report_tables.over_sizes(comparisons)
    headlines = report_tables.headline_metrics(comparisons)
    for size in dict.fromkeys(c.size for c in comparisons):
        of_size = [c for c in comparisons if c.size == size]
        file = figures / f"{stem}-{size}.svg"
        title = f"{size}, {report_tables.BUDGETS[budget].lower()}{heading}"
        plots.bars(of_size, file, title, [e.metric for c in of_size for e in c.effects if e.counts])
        tests = tables.tests([o for o in tested if o.size == size])
        for title, table in ((tables.PARTS, tables.parts(of_size)), (tables.TESTS, tests)):
            parts += [] if table.empty else [f"{title}, size {size}:", tables.markdown(table)]
        parts += [f"![unified cost, partner advantage and synergy loss, size {size}](figures/{file.name})"]
    if len({c.size for c in comparisons}) == 1:
        return parts
    lines = {key[2:]: line for key, line in fits.items() if key[:2] == (budget, roles)}
    for metric in headlines:
        of_metric = {(method, q): line for (method, name, q), line in lines.items() if name == metric}
        file = figures / f"{stem}-{metric.replace(' ', '-')}-over-size.svg"
        plots.scaling(comparisons, metric, of_metric, file)
        parts += [f"![parts of the synergy loss over size: {metric}](figures/{file.name})"]
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
        "- Scores are compared seed by seed, U trained on both tasks and S, its partner run, on one, of a common "
        "partner_group: synergy is U - S, unified cost U_dense - U, partner advantage S - S_dense, and their sum the "
        "synergy loss, by which the synergy is smaller than dense's. A score is 100 ln of a figure, with the sign "
        "turned for losses and FID (log points, about per cent while small), or the figure itself where it may be 0 or "
        "less (points). The gain beside is the paper's (unified - single) / |single| of means.",
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


def _incomplete(study: Study, runs: Sequence[StudyRun]) -> set[tuple[str, str]]:
    """The sizes and budgets at which a run that is compared has no result."""
    compared = [run for run in runs if run.method.partner_groups]
    unfinished = [run for run in compared if not state.result(run, steps.fingerprint(run, study.evaluation))]
    return {(run.size.name, budget) for run in unfinished for budget in run.budgets}


def _fits(comparisons: Sequence[Comparison]):
    """Lines over size through the parts of synergy losses, for the headline metrics and every metric: items of
    ``Fits``."""
    for budget, roles in dict.fromkeys((c.budget, c.evaluated_as) for c in comparisons):
        selected = [c for c in comparisons if (c.budget, c.evaluated_as) == (budget, roles)]
        metrics = [*report_tables.headline_metrics(selected), *(e.metric for c in selected for e in c.effects)]
        for method in dict.fromkeys(c.method for c in selected if c.method != REFERENCE):
            for metric, quantity in itertools.product(dict.fromkeys(metrics), list(QUANTITIES)[1:]):
                effects = [(c.parameters, e) for c in selected if c.method == method and (e := c.of(metric))]
                values = [list(getattr(effect, quantity).values()) for _, effect in effects]
                if line := fit.fit([n for n, _ in effects], values):
                    yield (budget, roles, method, metric, quantity), line


def _statistics(study: Study, results: Results) -> list[str]:
    seeds = min(len(study.seeds_of(size)) for size in study.sizes)
    fewest = "" if all(len(study.seeds_of(size)) == seeds for size in study.sizes) else " for some sizes"
    lines = [
        "- The seed is the unit: brackets are 95 % t-intervals over seeds of differences between runs of the same "
        f"seed. There {'is 1 seed' if seeds == 1 else f'are {seeds} seeds'}{fewest}"
        + (", so no interval." if seeds == 1 else "."),
        "- Primary outcomes are the validation losses. Each of their tests is adjusted by Holm's method over the "
        "methods and both outcomes, for each quantity, size and budget; methods with the same partner run count once. "
        f"A difference is equivalent to none where two one-sided tests show it to be within {outcomes.MARGIN:.2f} log "
        "points (3 %), otherwise better or worse where the t test shows it, otherwise undecided, each at 5 %; all are "
        "incomplete while a run of the size and budget is. "
        "'p, signs' is the exact p from changes of sign, a check that assumes symmetry alone; with n seeds it is at "
        "least 2^(1 - n).",
    ]
    if len(study.sizes) > 1:
        lines.append(
            "- Lines are least squares through the values of all seeds, N the parameters of the dense model with its "
            "embeddings; b is the change as N grows 2.72-fold, with the t-interval of a slope."
        )
    reads = "; ".join(
        f"{name} ({m.task}, {'higher' if m.higher_is_better else 'lower'} is better"
        f"{', in points' if m.scale == 'points' else '' if m.in_average else ', not in averages'})"
        for name, m in results.metrics.items()
    )
    lines.append(f"- Figures: {reads}.")
    claimed = [claim.metric for hypothesis in study.hypotheses for claim in hypothesis.claims]
    named = {"metrics": study.metrics, "gate": study.gate, "hypotheses": dict.fromkeys(claimed)}
    for key, names in named.items():
        if unknown := [name for name in names if name not in results.metrics]:
            lines.append(f"- '{key}' of the study file names {', '.join(unknown)}, which no run has.")
    for row in results.rows:
        if infinite := [name for name, x in row.metrics.items() if x is not None and not math.isfinite(x)]:
            roles = f" as {row.evaluated_as}" if row.evaluated_as else ""
            lines.append(f"- Not finite, so missing: {', '.join(infinite)} of {row.run}{roles} ({row.budget}).")
    return ["## Statistics", "\n".join(lines)]

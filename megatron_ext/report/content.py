"""The numbers, rows and charts that ``templates/content.j2`` shows."""

import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from megatron_ext.command_line import duration
from megatron_ext.data.vq_metadata import depth_of
from megatron_ext.evaluation.registry import benchmark_named
from megatron_ext.report import results
from megatron_ext.report.chart import Chart, Series, line_chart, number, smooth
from megatron_ext.report.gather import RunData
from megatron_ext.report.results import Meter
from megatron_ext.routing.roles import CLASSES, Role
from megatron_ext.token_classes import Task

ABILITIES = {
    "understanding": "answers questions about pictures",
    "generation": "draws pictures from captions",
    "text": "continues texts",
}
SCORE_COLOURS = ("ink", "understanding", "generation", "text", "accent")
"""The colours of a benchmark's figures."""


def content(run: RunData, others: Sequence[RunData]) -> dict:
    """The variables of the templates.

    Args:
        others: runs to compare with.
    """
    questions, pictures = (run.scores.questions, run.scores.pictures) if run.scores else (None, None)
    question_rows = results.question_meters(questions) if questions else []
    fact_rows = results.fact_meters(pictures) if pictures else []
    return {
        "run": run,
        "title": "/".join(run.folder.absolute().parts[-2:]),
        "abilities": [ABILITIES[task] for task in run.tasks],
        "headline": _headline(run, question_rows[:1], fact_rows[:1]),
        "questions": questions,
        "question_rows": question_rows[1:],
        "pictures": pictures,
        "fact_rows": fact_rows[1:],
        "role_tables": list(map(_roles, {r.plan.roles: r for r in reversed([run, *others])}.values()))[::-1],
        "costs": results.cost_table(run.costs) if run.costs else None,
        "comparison": results.comparison([run, *others]) if others else None,
        "losses": _losses(run),
        "depths": _losses_of_depths(run),
        "evaluations": _evaluations(run) if run.evaluation else None,
        "speed": _speed(run.records),
        "layout": _layout(run),
        "data": _data(run),
    }


def _headline(run: RunData, questions: Sequence[Meter], facts: Sequence[Meter]) -> list[tuple[str, str]]:
    """(value, label) of the numbers at the top: scores, or losses where there are none."""
    tiles = []
    for meters, what, baseline in (
        (questions, "answered right", "by chance"),
        (facts, "of the captions right in its pictures", "of other captions"),
    ):
        tiles += [
            (f"{m.right:.0f} %", f"of {m.total} {what}; {baseline} {m.baseline:.0f} %, difference {m.difference}")
            for m in meters
        ]
    for task in [] if tiles else run.tasks:
        if (validation := run.last(f"validation_loss_{task}")) is not None:
            tiles.append((f"{validation:.3f}", f"validation loss, {task}"))
        elif len(training := _values(run.records, f"loss_{task}")):
            tiles.append((f"{training[-20:].mean():.3f}", f"training loss, {task}"))
    last = run.records[-1]
    tiles.append((number(last["consumed_tokens"]), "tokens trained on"))
    seconds = _values(run.records, "step_seconds").mean() * last["iteration"]  # not every step need be logged
    tiles.append((duration(seconds), "of training, without validation"))
    if len(mfu := _values(run.records, "mfu")):
        tiles.append((f"{100 * np.median(mfu):.1f} %", "of the devices' peak (MFU)"))
    if last["skipped_steps"]:
        tiles.append((str(last["skipped_steps"]), "steps skipped"))
    return tiles


def _losses(run: RunData) -> dict:
    charts, rows = [], []
    for task in run.tasks:
        training, validation = _points(run.records, f"loss_{task}"), _points(run.records, f"validation_loss_{task}")
        if not len(training):
            continue
        smoothed = smooth(training)
        series = [
            Series("", task, training, "faint"),
            Series("training, smoothed", task, smoothed),
            Series("validation", "ink", validation, "dots"),
        ]
        charts.append(line_chart(f"loss-{task}", f"{task}, nats per token", series, description=f"loss of {task}"))
        final = (validation if len(validation) else smoothed)[-1, 1]
        rows.append(
            (
                task,
                f"{smoothed[0, 1]:.3f}",
                f"{smoothed[-1, 1]:.3f}",
                f"{final:.3f}" if len(validation) else "–",
                f"{math.exp(min(final, 50)):.3g}",
                _guessing(run, task),
            )
        )
    return {"charts": _drawn(charts), "rows": rows}


def _losses_of_depths(run: RunData) -> dict | None:
    """The losses of an image token's codes, one depth after the other; None if tokens have one code."""
    depths = range(1, run.config.model.image_codes.depth + 1)
    curves = [_points(run.records, f"loss_depth_{depth}") for depth in depths]
    if len(curves) == 1 or not all(map(len, curves)):
        return None
    curves = [smooth(points) for points in curves]
    series = [
        Series(f"depth {depth}", colour, points)
        for depth, colour, points in ((1, "generation", curves[0]), (len(curves), "ink", curves[-1]))
    ]
    chart = line_chart("loss-depths", "nats per code", series, description="losses of the first and of the last code")
    rows = [(f"depth {depth}", f"{points[0, 1]:.3f}", f"{points[-1, 1]:.3f}") for depth, points in zip(depths, curves)]
    totals = (sum(points[i, 1] for points in curves) for i in (0, -1))
    return {"charts": _drawn([chart]), "rows": [*rows, ("image token", *(f"{total:.3f}" for total in totals))]}


def _drawn(charts: Iterable[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart]


def _guessing(run: RunData, task: str) -> str:
    """The loss of a uniform distribution over the tokens of the task."""
    if not run.vocabulary:
        return "–"
    choices = run.vocabulary.codebook_size if task == "generation" else run.vocabulary.text_size
    return f"{math.log(choices):.3f}"


def _evaluations(run: RunData) -> dict:
    charts, rows = [], []
    for settings in run.config.evaluation.benchmarks:
        benchmark = benchmark_named(settings.name)
        curves = {figure: _points(run.records, f"{benchmark.name}_{figure}") for figure in benchmark.figures.values()}
        curves = {figure: points for figure, points in curves.items() if len(points)}
        series = [Series(figure, colour, curves[figure], "dots") for figure, colour in zip(curves, SCORE_COLOURS)]
        description = f"figures of {benchmark.title}"
        charts.append(line_chart(f"scores-{benchmark.name}", benchmark.title, series, description=description))
        for figure, points in curves.items():
            rows.append((f"{benchmark.title}, {figure}", f"{points[0, 1]:.1f}", f"{points[-1, 1]:.1f}"))
    return {"charts": _drawn(charts), "rows": rows}


def _speed(records: list[dict]) -> dict:
    step, wait = _values(records, "step_seconds"), _values(records, "data_wait_seconds")
    checkpoints = _values(records, "checkpoint_seconds")
    charts = [
        _smoothed_chart(records, "throughput", "tokens_per_second", "tokens a second, all processes", "tokens/s"),
        line_chart(
            "step-time",
            "seconds",
            [
                Series("step", "muted", _points(records, "step_seconds"), "area"),
                Series("waiting for data", "generation", _points(records, "data_wait_seconds"), "area"),
            ],
            from_zero=True,
            description="seconds of each step, and of waiting for data in it",
        ),
        line_chart(
            "learning-rate",
            "learning rate",
            [Series("learning rate", "accent", _points(records, "learning_rate"))],
            from_zero=True,
        ),
        _smoothed_chart(
            records, "gradient-norm", "grad_norm", "gradient norm, before clipping", "gradient norm", "muted"
        ),
    ]
    return {
        "charts": _drawn(charts),
        "tokens": number(np.median(_values(records, "tokens_per_second"))),
        "median": statistics.median(step),
        "slowest": np.sort(step)[min(len(step) - 1, math.ceil(0.99 * len(step)))],
        "wait": 100 * wait.sum() / step.sum(),
        "checkpoints": 100 * checkpoints.sum() / step.sum() if len(checkpoints) else None,
    }


def _smoothed_chart(
    records: list[dict], name: str, key: str, y_label: str, label: str, colour: str = "accent"
) -> Chart | None:
    points = _points(records, key)
    series = [Series("", colour, points, "faint"), Series(f"{label}, smoothed", colour, smooth(points))]
    return line_chart(name, y_label, series, from_zero=True)


def _roles(run: RunData) -> dict:
    """The name of the plan, the role of each class of token in each layer, and the roles that occur."""
    rows = []
    for task, modality in CLASSES:
        if task.name.lower() in run.tasks:
            name = "text" if task == Task.TEXT else f"{task.name}, {modality.name}".lower()
            roles = [run.plan.role(layer, task, modality).name for layer in range(run.plan.num_layers)]
            rows.append({"name": name, "task": task.name.lower(), "roles": roles})
    occurring = set().union(*(row["roles"] for row in rows))
    return {"plan": run.plan.name, "rows": rows, "used": [role.name for role in Role if role.name in occurring]}


def _layout(run: RunData) -> str:
    parallel = run.config.parallel
    parts = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}"]
    if parallel.layout:
        parts[1] += f" ({parallel.layout})"
    if parallel.virtual_pipeline > 1:
        parts.append(f"virtual pipeline {parallel.virtual_pipeline}")
    if parallel.context > 1:
        parts.append(f"context {parallel.context}")
    if parallel.sequence:
        parts.append("sequence parallel")
    if parallel.distributed_optimizer:
        parts.append("distributed optimizer")
    if processes := run.environment.get("processes"):
        parts.append(f"data {run.config.data_parallel(processes)}")
    return ", ".join(parts)


def _data(run: RunData) -> list[dict]:
    """Layouts with their share of the documents, and of their data sets."""
    total = sum(source.weight for source in run.config.data.train)
    layouts = []
    for layout in run.layouts:
        sources = [
            {"path": source.path, "share": source.weight / total, "details": _dataset_details(metadata)}
            for source, metadata in zip(run.config.data.train, run.dataset_metadata)
            if source.task == layout
        ]
        layouts.append({"name": layout, "share": sum(source["share"] for source in sources), "sources": sources})
    return layouts


def _dataset_details(metadata: dict | None) -> str:
    if metadata is None:
        return "no longer there"
    parts = [f"{metadata['documents']:,} documents", f"{metadata['tokens']:,} tokens"]
    if metadata["images"]:
        height, width = metadata["vq"]["grid"]
        depth = depth_of(metadata["vq"])
        several = "" if depth == 1 else f" of {depth} codes"
        parts.append(f"{metadata['images']:,} images of {height} × {width} tokens{several}")
    return ", ".join(parts)


def _points(records: list[dict], key: str) -> np.ndarray:
    """The finite values of a metric: (iteration, value), float [n, 2]."""
    values = np.array([(r["iteration"], r[key]) for r in records if r.get(key) is not None], dtype=float).reshape(-1, 2)
    return values[np.isfinite(values[:, 1])]


def _values(records: list[dict], key: str) -> np.ndarray:
    return np.array([r[key] for r in records if r.get(key) is not None], dtype=float)

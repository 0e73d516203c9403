"""From facts to a page: what is said, in which order."""

import math
import statistics

from megatron_ext.command_line import duration
from megatron_ext.evaluation.registry import benchmark_named
from megatron_ext.report.blocks import (
    Commands,
    Figure,
    Node,
    Page,
    Picture,
    Samples,
    Section,
    Table,
    Text,
    Tiles,
    Tree,
)
from megatron_ext.report.chart import Series, line_chart, number, smooth
from megatron_ext.report.evaluated import Question
from megatron_ext.report.gather import Facts
from megatron_ext.report.roles import picture, used_roles
from megatron_ext.routing.plan import Role
from megatron_ext.token_classes import Task

COLOURS = ("ink", "understanding", "generation", "text", "accent")
"""Of a benchmark's figures."""


def page(facts: Facts) -> Page:
    """The report on one run."""
    config, last = facts.config, facts.records[-1]
    size = f"{number(facts.parameters)}-parameter " if facts.parameters else ""
    state = "complete" if facts.finished else f"at iteration {last['iteration']:,} of {config.training.iterations:,}"
    packages = ", ".join(f"{name} {version}" for name, version in facts.environment.get("packages", {}).items())
    return Page(
        title=facts.run.name,
        subtitle=f"A {size}{config.model.num_layers}-layer unified vision-language model, plan "
        f"“{config.plan.preset}”, trained on {_and(facts.tasks)}: {state}.",
        sections=[
            Section("", [_headline(facts)]),
            Section("Loss", _loss(facts)),
            *([Section("Questions and pictures", _evaluated(facts))] if facts.evaluated else []),
            Section("Speed", _speed(facts)),
            Section("What was trained", _model(facts)),
            Section("Data", _data(facts)),
            *([Section("Image tokens", _vq(facts))] if facts.sheet else []),
            Section("Next", [_commands(facts)]),
        ],
        footer=f"{facts.run}/config.yaml holds every setting, metrics.jsonl every number. {packages}",
    )


def _headline(facts: Facts) -> Tiles:
    last, records = facts.records[-1], facts.records
    tiles = []
    for task in facts.tasks:
        for key, label in ((f"validation_loss_{task}", "validation loss"), (f"loss_{task}", "training loss")):
            if known := _values(records, key):
                value = known[-1] if key.startswith("validation") else statistics.fmean(known[-20:])
                tiles.append((f"{value:.3f}", f"{label}, {task}"))
                break
    tiles.append((number(last["consumed_tokens"]), "tokens trained on"))
    tiles.append((number(statistics.median(_values(records, "tokens_per_second"))), "tokens a second"))
    if mfu := _values(records, "mfu"):
        tiles.append((f"{100 * statistics.median(mfu):.1f} %", "of the devices' peak (MFU)"))
    if last["skipped_steps"]:
        tiles.append((str(last["skipped_steps"]), "steps skipped"))
    return Tiles(tiles)


def _loss(facts: Facts) -> list:
    records = facts.records
    figures = []
    for task in facts.tasks:
        train, held_out = _points(records, f"loss_{task}"), _points(records, f"validation_loss_{task}")
        series = [
            Series("", task, train, "faint"),
            Series("training, smoothed", task, smooth(train)),
            Series("validation", "ink", held_out, "dots"),
        ]
        chart = line_chart(series, "iteration", f"{task}, nats per token", description=f"loss of {task}")
        figures.append(Figure(f"loss-{task}", task, chart))
    table = Table(["task", "training, first", "training, last", "validation", "perplexity", "guessing"], [])
    for task in facts.tasks:
        train = [y for _, y in smooth(_points(records, f"loss_{task}"))]
        held_out = _values(records, f"validation_loss_{task}")
        final = held_out[-1] if held_out else train[-1]
        table.rows.append(
            [
                task,
                f"{train[0]:.3f}",
                f"{train[-1]:.3f}",
                f"{held_out[-1]:.3f}" if held_out else "–",
                f"{math.exp(min(final, 50)):.3g}",
                _guessing(facts, task),
            ]
        )
    return [
        *figures,
        table,
        Text(
            "Mean cross-entropy per loss token: answers for understanding, image tokens for generation. "
            "Guessing is the loss of a model that finds all VQ codes (generation) or all text pieces equally likely."
        ),
    ]


def _guessing(facts: Facts, task: str) -> str:
    if not facts.vocabulary:
        return "–"
    choices = facts.vocabulary.codebook_size if task == "generation" else facts.vocabulary.text_size
    return f"{math.log(choices):.3f}"


def _evaluated(facts: Facts) -> list:
    found, records = facts.evaluated, facts.records
    blocks, table = [], Table(["", "first", "last"], [])
    for benchmark in (benchmark_named(one.name) for one in facts.config.evaluation.benchmarks):
        curves = {name: _points(records, f"{benchmark.name}_{name}") for name in benchmark.figures.values()}
        curves = {name: points for name, points in curves.items() if points}
        series = [Series(name, colour, points, "dots") for colour, (name, points) in zip(COLOURS, curves.items())]
        chart = line_chart(series, "iteration", benchmark.title, description=f"figures of {benchmark.title}")
        blocks.append(Figure(f"scores-{benchmark.name}", benchmark.title, chart))
        for name, points in curves.items():
            values = [value for _, value in points]
            table.rows.append([f"{benchmark.title}, {name}", f"{values[0]:.1f}", f"{values[-1]:.1f}"])
    if table.rows:
        asked = "Percent, of MME points. The same questions every time; 'yes' is the share of questions answered so."
        blocks += [table, Text(asked)]
    if found.questions:
        blocks.append(Text(f"Some of the questions after iteration {found.iteration:,}, right and wrong."))
        blocks.append(Samples("question", [(q.png, "understanding", _told(q)) for q in found.questions]))
    if found.pictures:
        blocks.append(Text(f"Drawn after iteration {found.iteration:,} for these captions."))
        blocks.append(Samples("picture", [(png, "generation", caption) for png, caption in found.pictures]))
    return blocks


def _told(q: Question) -> str:
    mark = "✓" if q.right else "✗"
    return f"{q.benchmark}: {q.question}\nright: {q.answer}\n{mark} {q.given or '(nothing)'}"


def _speed(facts: Facts) -> list:
    records = facts.records
    step, wait = _values(records, "step_seconds"), _values(records, "data_wait_seconds")
    tokens = _points(records, "tokens_per_second")
    figures = [
        Figure(
            "throughput",
            "throughput",
            line_chart(
                [Series("", "accent", tokens, "faint"), Series("tokens/s, smoothed", "accent", smooth(tokens))],
                "iteration",
                "tokens a second, all processes",
                from_zero=True,
            ),
        ),
        Figure(
            "step-time",
            "step time",
            line_chart(
                [
                    Series("step", "muted", _points(records, "step_seconds"), "area"),
                    Series("of it waiting for data", "warm", _points(records, "data_wait_seconds"), "area"),
                ],
                "iteration",
                "seconds",
                from_zero=True,
            ),
        ),
        Figure(
            "learning-rate",
            "learning rate",
            line_chart(
                [Series("learning rate", "accent", _points(records, "learning_rate"))],
                "iteration",
                "learning rate",
                True,
            ),
        ),
        Figure(
            "gradient-norm",
            "gradient norm",
            line_chart(
                [
                    Series("", "muted", _points(records, "grad_norm"), "faint"),
                    Series("gradient norm, smoothed", "muted", smooth(_points(records, "grad_norm"))),
                ],
                "iteration",
                "gradient norm, before clipping",
                from_zero=True,
            ),
        ),
    ]
    environment = facts.environment
    rows = [
        ["median step", f"{statistics.median(step):.3g} s"],
        ["slowest step in a hundred", f"{sorted(step)[min(len(step) - 1, math.ceil(0.99 * len(step)))]:.3g} s"],
        ["share of the step spent waiting for data", f"{100 * sum(wait) / sum(step):.2f} %"],
        ["time in logged steps", duration(sum(step))],
    ]
    if environment:
        rows.append(["processes", f"{environment['processes']} on {environment['device']}"])
    return [*figures, Table(["", ""], rows)]


def _model(facts: Facts) -> list:
    config = facts.config
    m, p, t, o = config.model, config.parallel, config.training, config.optimizer
    tasks = {Task[name.upper()] for name in facts.tasks}
    roles = used_roles(facts.plan, tasks)
    said = (
        "Every token is computed in full in every layer."
        if roles == {Role.FULL}
        else "Each token does in each layer only what the plan gives it to do."
    )
    rows = [
        ["parameters", f"{facts.parameters:,}" if facts.parameters else "–"],
        ["layers, hidden size, FFN width", f"{m.num_layers}, {m.hidden_size:,}, {m.ffn_hidden_size:,}"],
        ["attention heads, key/value heads", f"{m.num_attention_heads}, {m.num_query_groups}"],
    ]
    if v := facts.vocabulary:
        rows.append(["text pieces + special + VQ codes", f"{v.text_size:,} + 4 + {v.codebook_size:,}"])
    shards = ", ".join(
        [f"tensor {p.tensor}", f"pipeline {p.pipeline}"]
        + ([f"virtual pipeline {p.virtual_pipeline}"] if p.virtual_pipeline > 1 else [])
        + (["sequence parallel"] if p.sequence else [])
        + (["distributed optimizer"] if p.distributed_optimizer else [])
    )
    if processes := facts.environment.get("processes"):
        shards += f", data {config.data_parallel(processes)}"
    batch = t.global_batch_size * config.data.sequence_length
    rows += [
        ["parallel layout", shards],
        ["batch", f"{t.global_batch_size:,} rows of {config.data.sequence_length:,} = {batch:,} tokens"],
        ["precision", t.precision],
        ["learning rate", f"{o.lr:g} to {o.min_lr:g}, {o.schedule}, warm-up {o.warmup_iterations:,}"],
    ]
    return [
        Figure("roles", "roles", picture(facts.plan, tasks), f"{said} Plan: {facts.plan.name}.", wide=True),
        Table(["", ""], rows, words=True),
    ]


def _data(facts: Facts) -> list:
    sources = facts.config.data.train
    total = sum(source.weight for source in sources)
    roots = []
    for task in facts.tasks:
        mine = [(s, c) for s, c in zip(sources, facts.cards) if s.task == task]
        children = [Node(s.path, _metadata_line(metadata), s.weight / total, colour=task) for s, metadata in mine]
        roots.append(Node(task, "", sum(s.weight for s, _ in mine) / total, children, task))
    blocks = [Text("Share of the documents drawn, by task and data set."), Tree(roots)]
    if facts.samples:
        blocks.append(Text("A few documents as the model meets them: pictures decoded from their image tokens."))
        blocks.append(
            Samples(
                "sample", [(s.png, s.task, "\n".join(filter(None, (s.text, f"→ {s.answer}")))) for s in facts.samples]
            )
        )
    return blocks


def _metadata_line(metadata: dict | None) -> str:
    if metadata is None:
        return "no longer there"
    parts = [f"{metadata['documents']:,} documents", f"{metadata['tokens']:,} tokens"]
    if metadata["images"]:
        height, width = metadata["vq"]["grid"]
        parts.append(f"{metadata['images']:,} images of {height} × {width} tokens")
    return ", ".join(parts)


def _vq(facts: Facts) -> list:
    codes = f" {facts.vocabulary.codebook_size:,} codes." if facts.vocabulary else ""
    return [Picture("reconstructions", facts.sheet, f"Pictures, and the same after encoding and decoding.{codes}")]


def _commands(facts: Facts) -> Commands:
    config, run = facts.config, facts.run
    launch = "python"
    if (processes := facts.environment.get("processes", 1)) > 1:
        launch = f"torchrun --nproc_per_node {processes}"
    train, iterations = f"{launch} pretrain_unified.py --config {run}/config.yaml", config.training.iterations
    commands = []
    elsewhere = f"CONFIG={run}/config.yaml OUTPUT={run}-tp2-pp2 bash examples/run_unified_tp4_pp2.sh"
    if config.evaluation.interval:  # which needs the whole model in a stage
        elsewhere += " evaluation.interval=0"
    if not facts.finished:
        commands.append(("Go on from the newest checkpoint", train))
    return Commands(
        [
            *commands,
            ("Train on, to twice as many iterations", f"{train} training.iterations={2 * iterations}"),
            (
                "The same with tensor parallelism 2 and pipeline parallelism 2 (4 processes), in a folder of its own",
                f"TP=2 PP=2 NPROC=4 {elsewhere}",
            ),
            ("Watch the curves while a run is going", f"tensorboard --logdir {run.parent}"),
            ("Write this page anew", f"python tools/report.py --run {run}"),
        ]
    )


def _points(records: list[dict], key: str) -> list[tuple[float, float | None]]:
    return [(r["iteration"], r[key]) for r in records if key in r]


def _values(records: list[dict], key: str) -> list[float]:
    return [r[key] for r in records if r.get(key) is not None]


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

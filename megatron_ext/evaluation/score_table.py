"""Scored answers files side by side: one table, and beneath it everything that was counted."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.evaluation.answers import read_answers
from megatron_ext.evaluation.benchmark import Benchmark, Item, Scores


@dataclass(frozen=True)
class Scored:
    """One answers file with its scores."""

    label: str  # whose answers they are: the row of the table
    benchmark: str  # its title
    file: str
    scores: Scores
    duplicates: int  # lines with an id already answered: the first counts
    unknown: int  # answers to questions that were not asked
    malformed: list[int]  # lines without an id and an answer
    cut_short: bool  # half a last line
    unusable: dict[str, list[str]] = field(default_factory=dict)  # of pictures: what is wrong -> all their ids


def score_file(benchmark: Benchmark, items: Sequence[Item], file: Path, label: str) -> Scored:
    """Score an answers file. Where it has likelihoods of the choices and the benchmark can rank them, the headline has
    that figure too.

    Raises:
        UserError: the file cannot be read.
    """
    read = read_answers(file)
    scores = benchmark.score(items, read.answers)
    if benchmark.score_likelihoods and read.likelihoods:
        scores = _joined(scores, benchmark.score_likelihoods(items, read.likelihoods))
    unknown = len(read.unknown(items))
    return Scored(
        label, benchmark.title, str(file), scores, len(read.duplicates), unknown, read.malformed, read.cut_short
    )


def _joined(scores: Scores, ranked: Scores) -> Scores:
    """The scores of the answers with the figures of the ranked choices beside them."""
    (column,) = ranked.headline
    note = f"{column}: {ranked.missing} questions without likelihoods, {ranked.invalid} with unusable ones"
    return replace(
        scores,
        headline=scores.headline | ranked.headline,
        details=scores.details | {f"{group} ({column})": figures for group, figures in ranked.details.items()},
        notes=(*scores.notes, note) if ranked.missing or ranked.invalid else scores.notes,
    )


def rows(scored: Sequence[Scored]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Columns, and for every label its figures by column, both in the order in which they first occur.

    Raises:
        UserError: two files would stand in the same place.
    """
    columns: dict[str, None] = {}
    table: dict[str, dict[str, float]] = {}
    for one in scored:
        row = table.setdefault(one.label, {})
        for column, figure in one.scores.headline.items():
            if column in row:
                raise UserError(f"two answers files for {one.benchmark} are called {one.label!r}: give each a label")
            row[column] = figure
            columns[column] = None
    return list(columns), table


def as_json(scored: Sequence[Scored]) -> dict:
    """The table and everything that was counted, as plain data with unrounded numbers."""
    columns, table = rows(scored)
    return {"columns": columns, "rows": table, "files": [asdict(one) for one in scored]}


def markdown(scored: Sequence[Scored]) -> str:
    """The table, what was wrong with the answers, and the figures of every split, subtask and question type."""
    columns, table = rows(scored)
    figures = [[label, *(_figure(row.get(column)) for column in columns)] for label, row in table.items()]
    counted = ["questions", "missing", "invalid", "duplicate", "unknown", "malformed lines"]
    parts = [
        _table(["answers of", *columns], figures),
        _table(["answers of", "benchmark", *counted], map(_counts, scored)),
    ]
    notes = [f"- {one.label}: {note}" for one in scored for note in _notes(one)]
    parts += ["\n".join(notes)] if notes else []
    for one in scored:
        if one.scores.details:
            parts += [f"### {one.benchmark}, {one.label}", _details(one.scores.details)]
    return "\n\n".join(parts) + "\n"


def _counts(one: Scored) -> list[str]:
    scores = one.scores
    counts = (scores.questions, scores.missing, scores.invalid, one.duplicates, one.unknown, len(one.malformed))
    return [one.label, one.benchmark, *map(str, counts)]


def _notes(one: Scored) -> list[str]:
    unusable = [f"{one.file}: {what}: {_first(ids)}" for what, ids in one.unusable.items() if ids]
    return [
        *one.scores.notes,
        *unusable,
        *([f"{one.file}: no answer in line {_first(one.malformed)}"] if one.malformed else []),
        *([f"{one.file}: the last line is cut short"] if one.cut_short else []),
    ]


def _first(values: Sequence) -> str:
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


def _details(details: dict[str, dict[str, float]]) -> str:
    columns = list(dict.fromkeys(key for figures in details.values() for key in figures))
    return _table(["", *columns], [[g, *(_figure(f.get(c)) for c in columns)] for g, f in details.items()])


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _table(head: list[str], body) -> str:
    """A Markdown table whose columns are aligned in plain text as well."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [head, *body]]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]
    align = [":" + "-" * (width - 1) if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    padded = [
        [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], align, *padded[1:]])

"""Scored answers files side by side: one table, and below it all counts and details."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.evaluation.answers import read_answers
from megatron_ext.evaluation.benchmark import Benchmark, Item, Scores


@dataclass(frozen=True)
class Scored:
    """One answers file with its scores."""

    label: str  # the model that answered: the row of the table
    benchmark: str  # title
    file: str
    scores: Scores
    duplicates: int  # further lines for an answered id; the first line counts
    unknown: int  # answers whose id belongs to no question
    malformed: list[int]  # numbers of lines without an id and an answer
    cut_short: bool  # the last line is incomplete
    unusable: dict[str, list[str]] = field(default_factory=dict)  # pictures: problem -> ids


def score_file(benchmark: Benchmark, items: Sequence[Item], file: Path, label: str) -> Scored:
    """Score an answers file; the headline includes the ranking by likelihood if the file has likelihoods and the
    benchmark ranks choices.

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
    """The scores of the answers together with those of the ranked choices."""
    (column,) = ranked.headline
    note = f"{column}: {ranked.missing} questions without likelihoods, {ranked.invalid} with unusable ones"
    return replace(
        scores,
        headline=scores.headline | ranked.headline,
        details=scores.details | {f"{group} ({column})": figures for group, figures in ranked.details.items()},
        notes=(*scores.notes, note) if ranked.missing or ranked.invalid else scores.notes,
    )


def rows(scored: Sequence[Scored]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Columns, and the figures of every label by column, both in order of first occurrence.

    Raises:
        UserError: two files have the same label and column.
    """
    columns: dict[str, None] = {}
    table: dict[str, dict[str, float]] = {}
    for entry in scored:
        row = table.setdefault(entry.label, {})
        for column, figure in entry.scores.headline.items():
            if column in row:
                raise UserError(
                    f"two answers files for {entry.benchmark} are called {entry.label!r}: give each a label"
                )
            row[column] = figure
            columns[column] = None
    return list(columns), table


def as_json(scored: Sequence[Scored]) -> dict:
    """The table and all counts and details, as plain data with unrounded numbers."""
    columns, table = rows(scored)
    return {"columns": columns, "rows": table, "files": [asdict(entry) for entry in scored]}


def markdown(scored: Sequence[Scored]) -> str:
    """The table, problems of the answers, and the figures of every split, subtask and question type."""
    columns, table = rows(scored)
    figures = [[label, *(_figure(row.get(column)) for column in columns)] for label, row in table.items()]
    counted = ["questions", "missing", "invalid", "duplicate", "unknown", "malformed lines"]
    parts = [
        _table(["answers of", *columns], figures),
        _table(["answers of", "benchmark", *counted], map(_counts, scored)),
    ]
    notes = [f"- {entry.label}: {note}" for entry in scored for note in _notes(entry)]
    parts += ["\n".join(notes)] if notes else []
    for entry in scored:
        if entry.scores.details:
            parts += [f"### {entry.benchmark}, {entry.label}", _details(entry.scores.details)]
    return "\n\n".join(parts) + "\n"


def _counts(entry: Scored) -> list[str]:
    scores = entry.scores
    counts = (scores.questions, scores.missing, scores.invalid, entry.duplicates, entry.unknown, len(entry.malformed))
    return [entry.label, entry.benchmark, *map(str, counts)]


def _notes(entry: Scored) -> list[str]:
    unusable = [f"{entry.file}: {problem}: {_first(ids)}" for problem, ids in entry.unusable.items() if ids]
    return [
        *entry.scores.notes,
        *unusable,
        *([f"{entry.file}: no answer in line {_first(entry.malformed)}"] if entry.malformed else []),
        *([f"{entry.file}: the last line is cut short"] if entry.cut_short else []),
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
    """A Markdown table with columns that are also aligned as plain text."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [head, *body]]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]
    align = [":" + "-" * (width - 1) if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    padded = [
        [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], align, *padded[1:]])

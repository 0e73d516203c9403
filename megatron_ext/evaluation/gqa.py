"""GQA, test-dev balanced: the answer is a word or phrase, compared after normalisation."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ext import files
from megatron_ext.errors import UserError
from megatron_ext.evaluation import scoring
from megatron_ext.evaluation.benchmark import Answers, Benchmark, Item, Scores
from megatron_ext.evaluation.kinds import by_kind, chance_corrected
from megatron_ext.evaluation.parsing import normalised
from megatron_ext.evaluation.released_files import checked, field, first_file, selected_parts, with_suffix

PARTS = ("testdev_balanced",)
CORRECTED = "GQA, chance-corrected"
SUFFIX = "Answer the question using a single word or phrase."


def read(folder: Path, parts: Sequence[str] | None = None) -> list[Item]:
    """The questions of ``testdev_balanced_questions.json`` (in ``folder``, ``questions1.2/`` or ``questions/``):
    ``{question id: {"question", "imageId", "answer", "types": {...}, ...}}``; images are ``images/<imageId>.jpg``."""
    items: list[Item] = []
    for part in selected_parts(parts, PARTS, "gqa"):
        name = f"{part}_questions.json"
        file = first_file([folder / name, folder / "questions1.2" / name, folder / "questions" / name])
        entries = files.read_json(file)
        if not isinstance(entries, dict):
            raise UserError(f"{file}: is not an object of question id -> question")
        items += checked(_items(entries, file, folder), file)
    return items


def _items(entries: dict, file: Path, folder: Path) -> Iterator[Item]:
    for id, entry in entries.items():
        where = f"{file}: question {id}"
        yield Item(
            id=id,
            image=folder / "images" / f"{field(entry, 'imageId', where)}.jpg",
            question=with_suffix(field(entry, "question", where), SUFFIX),
            answer=field(entry, "answer", where),
            groups=_groups(_types(entry)),
            kind=_types(entry).get("detailed") or "",
        )


def _types(entry: dict) -> dict:
    types = entry.get("types")
    return types if isinstance(types, dict) else {}


def _groups(types: dict) -> tuple[str, ...]:
    """Structural and semantic type, and open or binary, as published results report them; none without types."""
    groups = [f"{kind}: {types[kind]}" for kind in ("structural", "semantic") if types.get(kind)]
    if types.get("structural"):
        groups.append("open" if types["structural"] == "query" else "binary")
    return tuple(groups)


def score(items: Sequence[Item], answers: Answers) -> Scores:
    """Exact match in percent after :func:`~.parsing.normalised` on both sides; an answer that becomes empty is invalid.

    Questions with a kind also give the accuracy above chance, see :func:`~.kinds.chance_corrected`.

    ``details["plain string match"]`` counts like the official script on answers in lower case without the final full
    stop: the strings must be equal.
    """
    parsed = scoring.parse(items, answers, lambda item, answer: normalised(answer) or None)

    def equal(item: Item) -> bool:
        return parsed.answer[item.id] == normalised(item.answer)

    def plain(item: Item) -> bool:
        return answers.get(item.id, "").strip().rstrip(".").lower() == item.answer.lower()

    details = {"plain string match": {"accuracy": scoring.percent(map(plain, items)), "questions": len(items)}}
    details |= scoring.accuracies(items, equal)
    headline = {"GQA": scoring.percent(map(equal, items))}
    corrected = chance_corrected(by_kind(GQA, items, answers).values())
    headline |= {} if corrected is None else {CORRECTED: corrected}
    return Scores(headline, details, len(items), parsed.missing, parsed.invalid)


def right(item: Item, answer: str) -> bool:
    """Whether the answer equals the item's, both :func:`~.parsing.normalised`."""
    return normalised(answer) == normalised(item.answer)


GQA = Benchmark("gqa", "GQA", PARTS, read, score, right, {"GQA": "accuracy"})

"""SEED-Bench, its questions about images: four choices, answered by letter or ranked by likelihood."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_ext import files
from megatron_ext.errors import UserError
from megatron_ext.evaluation import scoring
from megatron_ext.evaluation.benchmark import Answers, Benchmark, Item, Scores
from megatron_ext.evaluation.parsing import LETTERS, letter
from megatron_ext.evaluation.released_files import checked, field, first_file, first_image, one_of, selected_parts

PARTS = ("image",)
SUFFIX = "Answer with the option's letter from the given choices directly."
# Released images have no suffix.
_IMAGE_PLACES = [("SEED-Bench-image", ""), ("SEED-Bench-image", ".jpg"), ("images", ""), ("images", ".jpg")]


def read(folder: Path, parts: Sequence[str] | None = None) -> list[Item]:
    """The questions of ``SEED-Bench.json`` whose ``data_type`` is image: ``{"questions": [{"question_id", "data_id",
    "data_type", "question", "choice_a".."choice_d", "answer", "question_type_id"}], "question_type": {name: id}}``.
    Images are ``SEED-Bench-image/<data_id>``."""
    selected_parts(parts, PARTS, "seed")
    file = first_file([folder / "SEED-Bench.json"])
    content = files.read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("questions"), list):
        raise UserError(f"{file}: has no list 'questions'")
    types = content.get("question_type", {})
    if not isinstance(types, dict):
        raise UserError(f"{file}: 'question_type' is not an object of name -> number")
    return checked(_items(content["questions"], {str(id): name for name, id in types.items()}, file, folder), file)


def _items(questions: list, types: dict[str, str], file: Path, folder: Path) -> Iterator[Item]:
    for number, entry in enumerate(questions, start=1):
        id = field(entry, "question_id", f"{file}: entry {number} of 'questions'")
        where = f"{file}: question {id}"
        if field(entry, "data_type", where) != "image":
            continue
        image = field(entry, "data_id", where)
        choices = tuple(field(entry, f"choice_{name.lower()}", where) for name in LETTERS)
        type_id = field(entry, "question_type_id", where)
        bare = field(entry, "question", where)
        options = [f"{name}. {choice}" for name, choice in zip(LETTERS, choices)]
        yield Item(
            id=id,
            image=first_image([folder / place / f"{image}{suffix}" for place, suffix in _IMAGE_PLACES]),
            question="\n".join([bare, *options, SUFFIX]),
            answer=one_of(field(entry, "answer", where).upper(), tuple(LETTERS), "answer", where),
            groups=(types.get(type_id, f"type {type_id}"),),
            choices=choices,
            bare=bare,
        )


def score(items: Sequence[Item], answers: Answers) -> Scores:
    """Accuracy in percent of the letters that the answers name, overall and per question type."""
    return _scores("SEED", items, scoring.parse(items, answers, lambda item, answer: letter(answer, item.choices)))


def score_likelihoods(items: Sequence[Item], likelihoods: Mapping[str, Sequence[float]]) -> Scores:
    """Accuracy of the choices with the highest log-likelihood, the first of equal ones.

    The caller decides whether log-likelihoods are summed or averaged over tokens (:mod:`.answer_generation` sums them).
    Anything but four numbers, or four times -inf, is invalid.
    """
    return _scores("SEED-likelihood", items, scoring.parse(items, likelihoods, lambda item, four: _likeliest(four)))


def _likeliest(values) -> str | None:
    numbers = isinstance(values, Sequence) and all(isinstance(v, (int, float)) and not math.isnan(v) for v in values)
    if not numbers or len(values) != len(LETTERS) or max(values) == -math.inf:
        return None
    return LETTERS[values.index(max(values))]


def _scores(column: str, items: Sequence[Item], parsed: scoring.Parsed) -> Scores:
    overall = scoring.percent(map(parsed.right, items))
    return Scores(
        {column: overall}, scoring.accuracies(items, parsed.right), len(items), parsed.missing, parsed.invalid
    )


def right(item: Item, answer: str) -> bool:
    """Whether the answer names the correct option."""
    return letter(answer, item.choices) == item.answer


SEED = Benchmark(
    "seed",
    "SEED-Bench (image)",
    PARTS,
    read,
    score,
    right,
    {"SEED": "accuracy", "SEED-likelihood": "likelihood_accuracy"},
    score_likelihoods=score_likelihoods,
)

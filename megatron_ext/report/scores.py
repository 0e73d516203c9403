"""The answers and pictures that tools/evaluate.py left in ``RUN/scores``: questions by kind, captions fact by fact.

Answers in ``RUN/scores-test``, for the benchmarks in a folder ``test`` beside the others, are those to questions about
combinations of shape and color that training never showed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoints.folder import iteration_of
from megatron_ext.errors import UserError
from megatron_ext.evaluation import mjhq, scene_check
from megatron_ext.evaluation.answers import read_answers
from megatron_ext.evaluation.benchmark import Item
from megatron_ext.evaluation.detected_files import detect_files, saved_file
from megatron_ext.evaluation.faithfulness import Faithfulness, measure
from megatron_ext.evaluation.gqa import GQA
from megatron_ext.evaluation.kinds import Accuracy, by_kind
from megatron_ext.evaluation.mjhq import Prompt
from megatron_ext.evaluation.registry import PICTURES
from megatron_ext.files import read_json
from megatron_ext.picture_world.benchmark_files import MANIFEST
from megatron_ext.picture_world.check import CheckedFact, compare
from megatron_ext.picture_world.detected import DetectedScene
from megatron_ext.report.cards import Card, question_card, read_png

FOLDER, HELD_OUT_FOLDER = "scores", "scores-test"
ANSWERS = f"{GQA.name}.jsonl"


@dataclass(frozen=True)
class Questions:
    """Answers to GQA's questions.

    Attributes:
        accuracies: by kind of question.
        held_out: the same for held-out combinations; empty without answers.
        examples: the first question of each kind.
        first: the first question in the order of the file that is not answered by yes or no, about another picture than
            that of the first caption; None without one.
        cards: a question about each of the other pictures in the order of the file, of the kind that occurred least
            often before.
    """

    accuracies: dict[str, Accuracy]
    held_out: dict[str, Accuracy]
    examples: dict[str, str]
    first: Card | None
    cards: list[Card]


@dataclass(frozen=True)
class Pictures:
    """Pictures for the captions of MJHQ's file.

    Attributes:
        cards: in the order of the file, at least one, with each fact of the caption right or wrong.
        faithfulness: None if the captions are not those of the picture world.
        examples: the first fact of each kind.
    """

    cards: list[Card]
    faithfulness: Faithfulness | None
    examples: dict[str, str]


@dataclass(frozen=True)
class Scores:
    """Scores of a run; None for what was not evaluated.

    Attributes:
        unseen: the benchmarks are those of a split of the picture world that is not for training.
        iterations: those of the checkpoints that were scored, as far as the results say.
    """

    questions: Questions | None
    pictures: Pictures | None
    unseen: bool
    iterations: list[int]


def read_scores(run: Path, benchmarks: Path, most_cards: int) -> Scores | None:
    """Read the answers and pictures in ``RUN/scores`` for the benchmarks in a folder; None: there are none.

    Args:
        benchmarks: with ``gqa/`` and ``mjhq/``.
        most_cards: cards of questions, and of pictures, beside the first of each.

    Raises:
        UserError: a benchmark's file or an answers file cannot be read.
    """
    if not benchmarks.is_dir():
        raise UserError(f"{benchmarks}: no such folder; give the one that holds gqa/ and mjhq/")
    answers, pictures = run / FOLDER / ANSWERS, run / FOLDER / PICTURES
    prompts = mjhq.read(benchmarks / PICTURES) if pictures.is_dir() else []
    scores = Scores(
        _questions(run, benchmarks, {p.id for p in prompts[:1]}, most_cards) if answers.is_file() else None,
        _pictures(prompts, pictures, most_cards) if prompts else None,
        (benchmarks / MANIFEST).is_file() and read_json(benchmarks / MANIFEST)["settings"]["split"] != "train",
        _iterations(run / FOLDER / f"{GQA.name}.manifest.json", pictures / "settings.json"),
    )
    return scores if scores.questions or scores.pictures else None


def _iterations(*manifests: Path) -> list[int]:
    names = [read_json(file)["checkpoint"].split(" ")[0] for file in manifests if file.is_file()]
    return sorted({iteration_of(Path(name)) for name in names})


def _questions(run: Path, benchmarks: Path, shown: set[str], most_cards: int) -> Questions | None:
    items, answers, accuracies = _answered(run / FOLDER, benchmarks)
    if not accuracies:
        return None

    def card(item: Item) -> Card | None:
        png = read_png(item.image)
        answer = answers.get(item.id, "")
        return png and question_card(png, item, answer, GQA.right(item, answer))

    examples = {item.kind: item.question.partition("\n")[0] for item in reversed(items) if item.kind}
    rest = [item for item in items if item.image.stem not in shown]
    first = next((item for item in rest if item.answer not in ("yes", "no") and item.image.is_file()), None)
    others = _spread([item for item in rest if first is None or item.image != first.image])[:most_cards]
    has_held_out = (run / HELD_OUT_FOLDER / ANSWERS).is_file()
    held_out = _answered(run / HELD_OUT_FOLDER, benchmarks.parent / "test")[2] if has_held_out else {}
    return Questions(accuracies, held_out, examples, first and card(first), list(filter(None, map(card, others))))


def _answered(folder: Path, benchmarks: Path) -> tuple[list[Item], dict[str, str], dict[str, Accuracy]]:
    """The questions, their answers by id, and the accuracy by kind."""
    items, read = GQA.read(benchmarks / GQA.name), read_answers(folder / ANSWERS)
    if outdated := read.outdated(items):
        raise UserError(f"{folder / ANSWERS}: question {outdated[0]} of {benchmarks} has changed since; score it again")
    return items, read.answers, by_kind(GQA, items, read.answers)


def _spread(items: Sequence[Item]) -> list[Item]:
    """The first question about each picture whose kind has occurred least often so far."""
    by_image: dict[Path, list[Item]] = {}
    for item in items:
        by_image.setdefault(item.image, []).append(item)
    selected: list[Item] = []
    for group in by_image.values():
        kinds = [item.kind for item in selected]
        selected.append(min(group, key=lambda item: kinds.count(item.kind)))
    return selected


def _pictures(prompts: Sequence[Prompt], folder: Path, most_cards: int) -> Pictures | None:
    files = {prompt.id: file for prompt in prompts if (file := mjhq.image_file(folder, prompt))}
    facts = scene_check.caption_facts(prompts)
    seen = detect_files({id: files[id] for id in facts if id in files}, saved_file(folder))
    checked = {id: compare(seen[id], facts[id]).checked for id in seen}
    cards = []
    for prompt in prompts:
        if len(cards) <= most_cards and prompt.id in files and (png := read_png(files[prompt.id])):
            marks = tuple((fact.right, fact.words) for fact in _shown(checked.get(prompt.id, ())))
            cards.append(Card(png, _description(seen.get(prompt.id)), prompt.prompt, marks))
    if not cards:
        return None
    faithfulness = measure([seen.get(id) for id in facts], list(facts.values())) if facts else None
    return Pictures(cards, faithfulness, _examples(checked.values()))


def _shown(facts: Sequence[CheckedFact]) -> list[CheckedFact]:
    """The facts without those about shapes alone if their colors are right, too: these say the same and more."""
    all_colors = all(fact.right for fact in facts if fact.kind == "color")
    return [fact for fact in facts if not (all_colors and fact.kind == "object")]


def _examples(checked: Sequence[Sequence[CheckedFact]]) -> dict[str, str]:
    examples: dict[str, str] = {}
    for facts in checked:
        for fact in facts:
            examples.setdefault(fact.kind, fact.words)
    return examples


def _description(seen: DetectedScene | None) -> str:
    """What is detected in a picture, in words."""
    if seen is None:
        return "the picture drawn for this caption"
    objects = [f"{o.color} {o.shape} at the {o.place}" for o in seen.objects]
    return f"drawn: {', '.join(objects) or 'no object'}, {seen.background} background"

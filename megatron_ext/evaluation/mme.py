"""MME: two yes/no questions about each image, 14 subtasks, each scored accuracy + accuracy+ (at most 200)."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.evaluation import released_files, scoring
from megatron_ext.evaluation.benchmark import Answers, Benchmark, Item, Scores
from megatron_ext.evaluation.parsing import yes_or_no
from megatron_ext.evaluation.released_files import checked, first_image, one_of, selected_parts, with_suffix

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PARTS = PERCEPTION + COGNITION
SUFFIX = "Please answer yes or no."
_IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG")
_ROOTS = ("", "MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark")


def read(folder: Path, parts: Sequence[str] | None = None) -> list[Item]:
    """The questions of every subtask found in ``folder`` or a folder that the release nests in it.

    A subtask is a folder with ``<image>.txt`` files of two lines ``question \\t answer``, beside the images or in
    ``questions_answers_YN/`` with the images in ``images/``. Without such a folder it is a list ``<subtask>.txt`` (also
    in ``eval_tool/Your_Results/``) of lines ``image \\t question \\t answer``. Both forms give the same ids,
    ``<subtask>/<image without suffix>/<1 or 2>``. The scores name missing subtasks.

    Raises:
        UserError: there is no subtask, a line is malformed, or an image does not have exactly two questions.
    """
    roots = [folder / root for root in _ROOTS]
    items: list[Item] = []
    for subtask in selected_parts(parts, PARTS, "mme"):
        items += _from_folder(subtask, roots) or _from_list(subtask, roots)
    return checked(items, folder)


def _from_folder(subtask: str, roots: list[Path]) -> list[Item]:
    for root in roots:
        for questions, images in (("questions_answers_YN", "images"), ("", "")):
            # Some systems leave files whose names start with a dot in archives.
            files = [f for f in sorted((root / subtask / questions).glob("*.txt")) if not f.name.startswith(".")]
            if files:
                return [item for file in files for item in _pair(subtask, file, root / subtask / images)]
    return []


def _pair(subtask: str, file: Path, images: Path) -> Iterator[Item]:
    image = first_image([images / f"{file.stem}{suffix}" for suffix in _IMAGE_SUFFIXES])
    rows = [(f"{file}: line {number}", question, answer) for number, (question, answer) in _rows(file, 2)]
    return _items(rows, subtask, image, str(file))


def _from_list(subtask: str, roots: list[Path]) -> list[Item]:
    lists = [root / place / f"{subtask}.txt" for root in roots for place in ("", "eval_tool/Your_Results")]
    file = next((file for file in lists if file.is_file()), None)
    if file is None:
        return []
    by_image: dict[str, list[tuple[str, str, str]]] = {}
    for number, (name, question, answer) in _rows(file, 3):
        by_image.setdefault(name, []).append((f"{file}: line {number}", question, answer))
    items: list[Item] = []
    for name, rows in by_image.items():
        places = [root / subtask / inner / name for root in roots for inner in ("", "images")]
        image = first_image([*places, *(root / name for root in roots)])
        items += _items(rows, subtask, image, f"{file}: image {name}")
    return items


def _rows(file: Path, columns: int) -> Iterable[tuple[int, list[str]]]:
    """The numbered lines of a file, split at tabs; empty lines are skipped."""
    for number, line in enumerate(released_files.text(file).split("\n"), start=1):
        row = [cell.strip() for cell in line.strip().split("\t")]
        if row == [""]:
            continue
        if len(row) != columns or "" in row:
            raise UserError(f"{file}: line {number}: does not have MME's {columns} columns, separated by tabs")
        yield number, row


def _items(rows: list[tuple[str, str, str]], subtask: str, image: Path, where: str) -> Iterator[Item]:
    if len(rows) != 2:
        raise UserError(f"{where}: has {len(rows)} questions; MME asks two about each image")
    for number, (line, question, answer) in enumerate(rows, start=1):
        yield Item(
            id=f"{subtask}/{image.stem}/{number}",
            image=image,
            question=with_suffix(question, SUFFIX),
            answer=one_of(answer.lower(), ("yes", "no"), "answer", line),
            groups=(subtask,),
        )


def score(items: Sequence[Item], answers: Answers) -> Scores:
    """Accuracy (over questions), accuracy+ (over images, both questions correct) and their sum for each subtask. The
    headline sums these over the subtasks of perception (at most 2000) and of cognition (at most 800). A missing subtask
    adds nothing and is noted.
    """
    parsed = scoring.parse(items, answers, lambda item, answer: yes_or_no(answer))
    details = {subtask: _figures(members, parsed) for subtask, members in scoring.by_group(items).items()}
    headline, notes = {}, []
    for column, name, subtasks in (("MME-P", "perception", PERCEPTION), ("MME-C", "cognition", COGNITION)):
        present = [subtask for subtask in subtasks if subtask in details]
        absent = [subtask for subtask in subtasks if subtask not in details]
        if present:
            headline[column] = sum(details[subtask]["score"] for subtask in present)
        if absent:
            notes.append(f"MME {name}: at most {200 * len(present)}, without {', '.join(absent)}")
    return Scores(headline, details, len(items), parsed.missing, parsed.invalid, tuple(notes))


def _figures(items: list[Item], parsed: scoring.Parsed) -> dict[str, float]:
    by_image: dict[Path, list[bool]] = {}
    for item in items:
        by_image.setdefault(item.image, []).append(parsed.right(item))
    accuracy = scoring.percent(map(parsed.right, items))
    accuracy_plus = scoring.percent(map(all, by_image.values()))
    return {
        "accuracy": accuracy,
        "accuracy_plus": accuracy_plus,
        "score": accuracy + accuracy_plus,
        "questions": len(items),
        "images": len(by_image),
    }


def right(item: Item, answer: str) -> bool:
    """Whether the answer says the correct yes or no."""
    return yes_or_no(answer) == item.answer


MME = Benchmark(
    "mme", "MME", PARTS, read, score, right, {"MME-P": "perception", "MME-C": "cognition"}, whole_images=True
)

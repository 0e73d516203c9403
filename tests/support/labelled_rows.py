"""Small packed rows whose tokens carry their class by name, and attention summed over them by plain loops."""

import math
from collections import defaultdict

import torch

from megatron_ext.data.batch import Batch
from megatron_ext.data.rendering import SpecialTokens
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task

SPECIAL = SpecialTokens(bos=1, pad=30, eod=31, boi=32, eoi=33, answer_end=31)
VOCABULARY = 64
IDS = {"bos": 1, "boi": 32, "eoi": 33, "eod": 31}

CLASSES = (
    "image",
    "given image",
    "drawn image",
    "question",
    "caption",
    "own answer",
    "answer",
    "earlier answers",
    "special",
)
Document = tuple[Task, list[str]]
"""A task, and for each token what it is: a special token, ``image``, ``text``, or ``answer1`` of the first turn."""


def understanding(image: int, *turns: tuple[int, int]) -> Document:
    """With so many image tokens, and turns of so many question and answer tokens."""
    kinds = ["bos", "boi", *["image"] * image, "eoi"]
    for number, (question, answer) in enumerate(turns, start=1):
        kinds += [*["text"] * question, *[f"answer{number}"] * answer, f"eod{number}"]
    return Task.UNDERSTANDING, kinds


def generation(caption: int, image: int) -> Document:
    return Task.GENERATION, ["bos", *["text"] * caption, "boi", *["image"] * image, "eoi", "eod"]


def text(length: int) -> Document:
    return Task.TEXT, ["bos", *["text"] * length, "eod"]


def interleaved(image: int, *turns: tuple[int, int]) -> Document:
    """An image of so many tokens is given; each turn has so many tokens of text and of an answer or, for 0, draws an
    image. Kinds: ``drawn`` is a drawn image's token, ``boi+`` the ``<boi>`` before it."""
    kinds = ["bos", "boi", *["image"] * image, "eoi"]
    for number, (question, answer) in enumerate(turns, start=1):
        end = [f"answer{number}"] * answer + [f"eod{number}"] if answer else ["boi+", *["drawn"] * image, "eoi"]
        kinds += [*["text"] * question, *end]
    return Task.UNDERSTANDING, kinds


def learnt(task: Task, kind: str) -> bool:
    """Whether a token's prediction counts."""
    if task == Task.UNDERSTANDING:
        return kind.startswith("answer") or (kind.startswith("eod") and kind != "eod") or kind in ("drawn", "boi+")
    return kind == "image" if task == Task.GENERATION else kind != "bos"


def rows_of(*rows: list[Document], length: int) -> tuple[Batch, list[str]]:
    """Rows that hold these documents, and what each of their tokens is, by flat index (``padding`` at the end)."""
    random = torch.Generator().manual_seed(0)
    batch = Batch.zeros(len(rows), length)
    batch.document[:], batch.tokens[:], batch.task[:] = PADDING_DOCUMENT, SPECIAL.pad, Task.TEXT
    batch.labels[:] = torch.randint(0, VOCABULARY, batch.shape, generator=random)
    names = []
    for row, documents in enumerate(rows):
        start = 0
        for number, (task, kinds) in enumerate(documents):
            for place, kind in enumerate(kinds):
                image = kind in ("image", "drawn")
                low, high = (40, 64) if image else (2, 30)
                token = int(torch.randint(low, high, (1,), generator=random))
                here = row, start + place
                batch.tokens[here] = IDS.get(kind.rstrip("123+"), token)
                batch.modality[here] = Modality.IMAGE if image else Modality.TEXT
                batch.positions[here], batch.document[here], batch.task[here] = place, number, task
                if kind == "drawn":
                    batch.task[here] = Task.GENERATION
                batch.loss_mask[here] = place + 1 < len(kinds) and learnt(task, kinds[place + 1])
            start += len(kinds)
            names += kinds
        names += ["padding"] * (length - start)
    return batch, names


def allocate(attention: torch.Tensor, visible: torch.Tensor, batch: Batch, names: list[str], queries: str) -> dict:
    """The figures of one layer by the definitions, one query after the other.

    Args:
        attention: [heads, t, t] of all tokens by flat index; a row without attention is no query.
        visible: bool [t, t].
        queries: the set of queries.
    """
    tasks, positions = batch.task.flatten().tolist(), batch.positions.flatten().tolist()
    mass, share, entropies, ratios, left_out = defaultdict(list), defaultdict(list), [], [], []
    for i in range(len(names)):
        if not attention[:, i].any() or not _is_query(queries, i, names, tasks, positions):
            continue
        turn = int(_next_turn(names[i : i + _left(positions[i:])]))
        keys = [j for j in visible[i].nonzero().flatten().tolist() if j != i and not _is_left_out(j, names, positions)]
        if not keys:
            continue
        left_out.append(1 - float(attention[:, i, keys].sum(-1).mean()))
        over_keys = attention[:, i, keys] / attention[:, i, keys].sum(-1, keepdim=True)
        totals, counts = defaultdict(float), defaultdict(int)
        for place, j in enumerate(keys):
            of_key = _class(queries, names[j], tasks[j], turn)
            totals[of_key] += float(over_keys[:, place].mean())
            counts[of_key] += 1
        for of_key in CLASSES:
            mass[of_key].append(totals[of_key])
            share[of_key].append(counts[of_key] / len(keys))
        entropy = -sum(p * math.log(p) for p in over_keys.flatten().tolist() if p) / len(attention)
        entropies.append(entropy)
        if len(keys) > 1:
            ratios.append(entropy / math.log(len(keys)))
    mean = {name: sum(v) / len(v) for name, v in mass.items()}
    return {
        "queries": len(entropies),
        "mass": mean,
        "over_uniform": {n: mean[n] / (sum(share[n]) / len(share[n])) if any(share[n]) else None for n in mean},
        "entropy": sum(entropies) / len(entropies) if entropies else None,
        "entropy_share": sum(ratios) / len(ratios) if ratios else None,
        "left_out": sum(left_out) / len(left_out) if left_out else None,
    }


def _is_left_out(j: int, names: list[str], positions: list[int]) -> bool:
    """Whether a key is ``<eod>``, the first token of its document, or special and only special ones are before it."""
    special = [name.rstrip("123+") in IDS for name in names[j - positions[j] : j + 1]]
    return names[j].startswith("eod") or positions[j] == 0 or all(special)


def _is_query(queries: str, i: int, names: list[str], tasks: list[int], positions: list[int]) -> bool:
    if queries == "image":
        return tasks[i] == Task.GENERATION and names[i] in ("image", "drawn")
    if tasks[i] != Task.UNDERSTANDING or names[i] == "padding":
        return False
    if queries == "answer":
        after = names[i + 1] if i + 1 < len(names) and positions[i + 1] else "padding"
        return learnt(Task.UNDERSTANDING, after) and after not in ("drawn", "boi+")
    return names[i] not in ("image", "drawn") and "image" in names[i - positions[i] : i]


def _left(positions: list[int]) -> int:
    """The number of tokens up to the end of the first one's document."""
    return next((n for n, position in enumerate(positions) if n and not position), len(positions))


def _next_turn(names: list[str]) -> str:
    """The number of the turn that the first of these tokens is in."""
    return next((name[3:] for name in names if name.startswith("eod") and name != "eod"), "0")


def _class(queries: str, name: str, task: int, turn: int) -> str:
    drawing = queries == "image"
    if name in ("image", "drawn"):
        return "image" if drawing == (task == Task.GENERATION) else "given image" if drawing else "drawn image"
    if name.startswith("answer"):
        return ("answer" if drawing else "own answer") if int(name[6:]) == turn else "earlier answers"
    if name == "text":
        return "caption" if drawing else "question"
    return "special"

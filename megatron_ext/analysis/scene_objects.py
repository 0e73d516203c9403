"""Which image tokens show which object of the picture world, and which object a question asks about.

Data sets that were made from the tars of a split (tools/make_scenes.py) have their documents in the order of the
scenes, one per caption, and one per scene or, with ``split_turns``, one per question. So the scenes in the tars tell,
for every image token, the objects that it shows a part of: those whose circumscribed circle meets the token's square of
the picture. A question asks about the objects that its words describe (``red circle``, ``circle``, ``red object``).
"""

import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.analysis.batches import plain_loader, run_mixture
from megatron_ext.analysis.token_sets import ObjectTokens
from megatron_ext.config import Config
from megatron_ext.data import step_batches
from megatron_ext.data.batch import Batch
from megatron_ext.data.composition import shares_of
from megatron_ext.data.packed_rows import PackedRows
from megatron_ext.data.packed_tokens import Unpack
from megatron_ext.data.rank_info import RankInfo
from megatron_ext.data.step_loader import StepBatches
from megatron_ext.errors import UserError
from megatron_ext.picture_world.attributes import COLORS, SHAPES
from megatron_ext.picture_world.captions import plural
from megatron_ext.picture_world.world import Scene
from megatron_ext.token_classes import Modality
from megatron_ext.vocabulary import Vocabulary

_SHAPE_OF = {form: shape for shape in SHAPES for form in (shape, plural(shape, 2))} | {"object": None, "objects": None}
_NAME = re.compile(rf"\b(?:({'|'.join(COLORS)}) )?({'|'.join(sorted(_SHAPE_OF, key=len, reverse=True))})\b")


@dataclass(frozen=True)
class DocumentObjects:
    """The objects of a document's picture, as bits of an integer (bit n: object n of the scene).

    Attributes:
        shows: int64 [image tokens], row by row of the picture.
        asked: those that the question of each turn names; empty for captions.
    """

    shows: np.ndarray
    asked: tuple[int, ...]


def shown(scene: Scene, grid: tuple[int, int]) -> np.ndarray:
    """The objects that each token of a picture shows a part of, int64 [rows * columns] of ``grid`` (rows, columns)."""
    height, width = grid
    row, column = np.divmod(np.arange(height * width), width)
    bits = np.zeros(height * width, dtype=np.int64)
    for number, item in enumerate(scene.objects):
        # The point of the token's square that is nearest to the object's center.
        x, y = np.clip(item.x, column / width, (column + 1) / width), np.clip(item.y, row / height, (row + 1) / height)
        bits[(x - item.x) ** 2 + (y - item.y) ** 2 < item.radius**2] |= 1 << number
    return bits


def asked(scene: Scene, question: str) -> int:
    """The objects of a scene that a question names by color, shape or both; choices on further lines do not count."""
    names = {(color or None, _SHAPE_OF[noun]) for color, noun in _NAME.findall(question.strip().split("\n")[0].lower())}
    return sum(
        1 << number
        for number, item in enumerate(scene.objects)
        if any(
            name != (None, None) and name[0] in (None, item.color) and name[1] in (None, item.shape) for name in names
        )
    )


def of_data_set(path: str, metadata: dict, scenes: Path) -> list[DocumentObjects] | None:
    """The objects of each document of a data set; None if it was not made from the tars in ``scenes``.

    Args:
        path, metadata: of the data set.
        scenes: a split of the picture world, such as ``runs/quickstart/scenes/validation``.

    Raises:
        UserError: samples of the tars were skipped, so that documents cannot be told apart.
    """
    settings = metadata["source"].get("settings", {})
    inputs = {Path(entry["file"]).name: entry.get("bytes") for entry in settings.get("inputs", [])}
    sizes = {file.name: file.stat().st_size for file in scenes.glob("*.tar")}
    if not inputs or not inputs.items() <= sizes.items():
        return None
    documents = []
    for record in itertools.chain.from_iterable(_records(scenes / name) for name in inputs):
        scene = Scene.from_dict(record["scene"])
        shows = shown(scene, tuple(metadata["vq"]["grid"]))
        turns = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"] if turn["from"] == "human"]
        questions = tuple(asked(scene, turn) for turn in turns)
        if settings["as"] == "caption":
            documents.append(DocumentObjects(shows, ()))
        elif settings.get("split_turns"):
            documents += [DocumentObjects(shows, (question,)) for question in questions]
        else:
            documents.append(DocumentObjects(shows, questions))
    if len(documents) != metadata["documents"]:
        raise UserError(f"{path}: has {metadata['documents']} documents, the scenes in {scenes} make {len(documents)}")
    return documents


def _records(tar: Path) -> Iterator[dict]:
    """The JSON of each sample of a tar, in order."""
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.name.endswith(".json"):
                yield json.load(archive.extractfile(member))


@dataclass(frozen=True)
class _WithObjects:
    """Makes a batch and its :class:`ObjectTokens`, as arrays, of the packed tokens of a replica's rows of a step.

    Attributes:
        rows_per_step: over all replicas.
        first: this replica's first row of a step.
        documents: by source of the mixture.
    """

    unpack: Unpack
    rows: PackedRows
    rows_per_step: int
    first: int
    documents: list[list[DocumentObjects] | None]
    answer_end: int

    def __call__(self, packed_tokens: np.ndarray, step: int) -> tuple[Batch, ObjectTokens]:
        batch = self.unpack(packed_tokens, step)
        objects = ObjectTokens(*np.zeros((2, *batch.tokens.shape), dtype=np.int64))
        for row in range(len(batch.tokens)):
            documents = self.rows.documents(step * self.rows_per_step + self.first + row)
            for number, (source, document, _) in enumerate(documents):
                if self.documents[source] is not None:
                    own = batch.document[row] == number
                    write(objects, batch, row, own, self.documents[source][document], self.answer_end)
        return batch, objects


def write(
    objects: ObjectTokens, batch: Batch, row: int, own: np.ndarray, document: DocumentObjects, answer_end: int
) -> None:
    """Write the objects of a document at its tokens.

    Args:
        objects, batch: of NumPy arrays.
        own: bool [s], the document's tokens in the row.
        answer_end: id of the token that ends an answer, and in some chat templates also the user's turn.
    """
    image = own & (batch.modality[row] == Modality.IMAGE)
    objects.shows[row, image] = document.shows
    if document.asked:
        is_target = np.roll(batch.loss_mask[row] > 0, 1) & (batch.positions[row] > 0)
        ends = own & is_target & (batch.tokens[row] == answer_end)
        turn = (ends.cumsum() - ends)[own]
        objects.about[row, own] = np.array([*document.asked, 0])[np.minimum(turn, len(document.asked))]
    else:
        predicts = np.roll(image, -1) & own
        objects.about[row, predicts] = objects.shows[row, np.roll(predicts, 1)]


def object_batches(
    config: Config, vocabulary: Vocabulary, split: str, rows: int, count: int, scenes: Path
) -> StepBatches:
    """Pairs of a batch, as :func:`~megatron_ext.analysis.batches.run_batches` gives it, and its
    :class:`~megatron_ext.analysis.token_sets.ObjectTokens`.

    Raises:
        UserError: as for ``run_batches``; or no data set was made from the tars in ``scenes``.
    """
    mixture = run_mixture(config, vocabulary, split)
    documents = [of_data_set(source.path, source.metadata, scenes) for source in mixture.sources]
    if not any(documents):
        paths = ", ".join(source.path for source in mixture.sources)
        raise UserError(f"{scenes}: has not the tars that data.{split} was made from ({paths})")
    special, rank = mixture.special, RankInfo.here()
    with_objects = _WithObjects(
        unpack=Unpack(special.pad, mixture.depth, special.image_offset),
        rows=PackedRows.of(mixture, config.data),
        rows_per_step=rows,
        first=sum(shares_of(rows, rank.replicas)[: rank.replica]),
        documents=documents,
        answer_end=special.answer_end,
    )
    return step_batches(mixture, plain_loader(config), rows, 0, num_steps=count, prepare=with_objects)

"""The whole preparation of the picture world in one process: scenes, benchmarks, tokenizer, vocabulary, data sets.

::

    OUT/scenes/{train,validation,test}/    OUT/NAME-scenes/train/       scenes; those of question set NAME
    OUT/benchmarks/{validation,test}/                                   benchmarks
    OUT/edits/{train,validation,test}/                                  edits of further scenes
    OUT/vq/  OUT/vocabulary/                                            image tokenizer, vocabulary
    OUT/data/{questions,captions,texts,edits}-{train,validation}.*      data sets
    OUT/data/NAME-train.*                                               the data set of question set NAME
    OUT/preparation.json                                                what each piece was made from, and its cost

A piece is made again if its settings, or a piece that it is made from, have changed. torch is imported by the first
piece that needs it, and not at all when everything is complete.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from megatron_ext import tokenizer
from megatron_ext.command_line import cpu_seconds, whole
from megatron_ext.errors import UserError
from megatron_ext.files import read_json, write_json
from megatron_ext.picture_world.benchmark_files import MANIFEST, write_benchmarks
from megatron_ext.picture_world.edit_files import RECORDS, write_edits
from megatron_ext.picture_world.split_files import SplitConfig, scene_workers, write_split
from megatron_ext.picture_world.splits import SPLITS
from megatron_ext.preprocess.recipe import Recipe
from megatron_ext.vocabulary import Vocabulary

RECORD = "preparation.json"


@dataclass(frozen=True)
class Piece:
    """A part of the preparation.

    Attributes:
        name: of the piece.
        key: changes with everything that the piece is made from.
        outputs: its files and folders; the first of them is written last.
        cost: estimated seconds on two free cores.
        make: makes the piece, or the rest of it, and tells what it holds.
    """

    name: str
    key: str
    outputs: list[Path]
    cost: float
    make: Callable[[], str]


def prepare(recipe: Recipe, out: Path, say: Callable[[str], None] = print) -> dict:
    """Make the pieces of a recipe that are missing in ``out``.

    Args:
        say: prints a line about a piece.

    Returns:
        Per piece: ``made`` (by this run), ``seconds``, ``cpu_seconds`` (of this process alone) and ``holds``.

    Raises:
        UserError: a piece cannot be made, or ``out`` holds data of another program.
    """
    record_file = out / RECORD
    record = read_json(record_file) if record_file.is_file() else {}
    if not record and out.is_dir() and any((out / name).exists() for name in ("scenes", "vq", "data")):
        raise UserError(f"{out}: holds data that another program made; remove it or name another folder")
    with whole().work(), ExitStack() as stack:
        pieces = list(_Preparation(recipe, out, stack).pieces())
        todo = [piece for piece in pieces if not _complete(piece, record.get(piece.name))]
        total, done = sum(piece.cost for piece in todo), 0.0
        for piece in todo:
            if piece.name in record and record[piece.name]["key"] != piece.key:
                _remove(piece)
            record[piece.name] = {"key": piece.key}
            write_json(record_file, record)
            started, cpu_started = time.perf_counter(), cpu_seconds()
            with whole().part(done / total, (done + piece.cost) / total):
                holds = piece.make()
                seconds = time.perf_counter() - started
                say(" | ".join(filter(None, [f"{piece.name}: {holds}", f"{seconds:.1f} s", whole().state(1.0)])))
            done += piece.cost
            numbers = {"seconds": seconds, "cpu_seconds": cpu_seconds() - cpu_started, "holds": holds}
            record[piece.name] = {"key": piece.key, **numbers}
            write_json(record_file, record)
    return {piece.name: {"made": piece in todo, **record[piece.name]} for piece in pieces}


def _complete(piece: Piece, recorded: dict | None) -> bool:
    return bool(recorded and recorded["key"] == piece.key and "holds" in recorded and piece.outputs[0].is_file())


def _remove(piece: Piece) -> None:
    for path in piece.outputs:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _key(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, default=asdict).encode()).hexdigest()[:16]


class _Preparation:
    """The pieces of a recipe, and what several of them need."""

    def __init__(self, recipe: Recipe, out: Path, stack: ExitStack):
        self.recipe, self.out, self._stack = recipe, out, stack

    def pieces(self) -> Iterator[Piece]:
        """All pieces, each after those that it is made from."""
        recipe = self.recipe
        scenes = {split: self._scenes(split) for split in SPLITS if recipe.scenes[split]}
        yield from scenes.values()
        yield from map(self._benchmarks, recipe.benchmark_splits())
        edits = {split: self._edits(split) for split in SPLITS if recipe.edits.get(split)}
        yield from edits.values()
        vq = self._image_tokenizer(scenes)
        vocabulary = self._text_tokenizer([pieces["train"] for pieces in (scenes, edits) if "train" in pieces], vq)
        yield from (vq, vocabulary)
        for split in ("train", "validation"):
            if split in scenes:
                config = recipe.split(split)
                for kind in ("questions", "captions", *(["texts"] if "text" in config.forms else [])):
                    yield self._data_set(f"{kind}-{split}", kind, scenes[split], config.count, vocabulary)
            if split in edits:
                yield self._data_set(f"edits-{split}", "edits", edits[split], recipe.edit(split).count, vocabulary)
        for number in range(len(recipe.question_sets)):
            name, config = recipe.question_set(number)
            more = self._scenes_of(f"scenes with {name}", self.out / f"{name}-scenes", config)
            yield more
            yield self._data_set(f"{name}-train", "questions", more, config.count, vocabulary)

    @cached_property
    def _workers(self):
        return self._stack.enter_context(scene_workers(self.recipe.workers))

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.out / "vocabulary")

    @cached_property
    def _vq(self):
        from megatron_ext import vq

        return vq.load(self.out / "vq")

    def _scenes(self, split: str) -> Piece:
        return self._scenes_of(f"scenes {split}", self.out / "scenes", self.recipe.split(split))

    def _scenes_of(self, name: str, folder: Path, config: SplitConfig) -> Piece:
        def make() -> str:
            write_split(folder, config, self._workers)
            return f"{config.count:,} pictures" + (f", {config.texts:,} texts" if "text" in config.forms else "")

        target = folder / config.split
        return Piece(name, _key(config), [target / "scenes.json", target], 1.2e-3 * config.count, make)

    def _edits(self, split: str) -> Piece:
        config = self.recipe.edit(split)

        def make() -> str:
            write_edits(self.out / "edits", config, self._workers)
            return f"{config.count:,} conversations"

        target = self.out / "edits" / split
        return Piece(f"edits {split}", _key(config), [target / "scenes.json", target], 2e-3 * config.count, make)

    def _benchmarks(self, split: str) -> Piece:
        config, folder = self.recipe.benchmark(split), self.out / "benchmarks" / split

        def make() -> str:
            items = write_benchmarks(folder, config)["items"]
            return ", ".join(f"{count} of {name}" for name, count in items.items())

        return Piece(
            f"benchmarks {split}",
            _key(config),
            [folder / MANIFEST, folder],
            6e-3 * config.pictures * len(config.names),
            make,
        )

    def _image_tokenizer(self, scenes: dict[str, Piece]) -> Piece:
        settings, folder = self.recipe.tokenizer, self.out / "vq"
        config = settings.config(self.recipe.size)

        def make() -> str:
            import torch

            from megatron_ext.vq.training_images import load_images

            each = settings.limit // len(settings.splits)
            tars = (self._tars(scenes[split]) for split in settings.splits)
            images = torch.cat([load_images(t, config.image_size, each, self.recipe.workers) for t in tars])
            if settings.kind == "dictionary":
                from megatron_ext.vq.dictionary_training import train_dictionary as train
            else:
                from megatron_ext.vq.training import train
            numbers = train(images, folder, config)
            return f"{numbers['codebook_size']} codes, PSNR {numbers['psnr']:.1f} dB on held-out pictures"

        pictures = min(settings.limit, sum(self.recipe.scenes[split] for split in settings.splits))
        cost = 2.5 + 2.5e-4 * pictures + (0.0 if settings.kind == "dictionary" else 0.05 * config.steps)
        key = _key(settings, config.settings(), [scenes[split].key for split in settings.splits])
        return Piece("image tokenizer", key, [folder / "training.json", folder], cost, make)

    def _text_tokenizer(self, train: list[Piece], vq: Piece) -> Piece:
        size, folder = self.recipe.vocabulary_size, self.out / "vocabulary"

        def make() -> str:
            texts = [file for piece in train for file in self._texts(piece)]
            tokenizer.train(texts, folder / "tokenizer.model", size)
            Vocabulary.create(folder, folder / "tokenizer.model", self._vq.codebook_size)
            return f"{size} text pieces"

        cost = 0.1 + 1.2e-4 * self.recipe.scenes["train"]
        return Piece(
            "vocabulary",
            _key(size, *(piece.key for piece in train), vq.key),
            [folder / "vocabulary.json", folder],
            cost,
            make,
        )

    def _data_set(self, name: str, kind: str, scenes: Piece, count: int, vocabulary: Piece) -> Piece:
        prefix = self.out / "data" / name
        split_turns = self.recipe.split_turns and kind == "questions"

        def make() -> str:
            from megatron_ext.preprocess.pipeline import PreprocessOptions, preprocess

            file = {"texts": "text.jsonl", "edits": RECORDS}.get(kind)
            inputs = [scenes.outputs[1] / file] if file else self._tars(scenes)
            prefer = "caption" if kind == "captions" else "conversation"
            options = PreprocessOptions(
                inputs, prefix, prefer=prefer, split_turns=split_turns, workers=self.recipe.workers
            )
            numbers = preprocess(options, self._vocabulary, None if kind == "texts" else self._vq).metadata
            return f"{numbers['documents']:,} documents, {numbers['tokens']:,} tokens"

        outputs = [Path(f"{prefix}{ending}") for ending in (".json", ".bin", ".idx", ".skipped.jsonl", ".parts")]
        cost = 0.1 + (7e-5 if kind == "texts" else 5e-4) * count
        return Piece(f"data set {name}", _key(kind, split_turns, scenes.key, vocabulary.key), outputs, cost, make)

    @classmethod
    def _texts(cls, scenes: Piece) -> list[Path]:
        folder = scenes.outputs[1]
        return [*cls._tars(scenes), *folder.glob("text.jsonl"), *folder.glob(RECORDS)]

    @staticmethod
    def _tars(scenes: Piece) -> list[Path]:
        return sorted(scenes.outputs[1].glob("*.tar"))

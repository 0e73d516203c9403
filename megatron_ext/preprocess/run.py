"""A whole preparation, or one shard of it, from options to files."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext.command_line import progress
from megatron_ext.errors import UserError
from megatron_ext.preprocess import dali_images, inputs
from megatron_ext.preprocess.encoding import Encoded, encode
from megatron_ext.preprocess.images import CROP, PillowDecoder
from megatron_ext.preprocess.inputs import Reading, Unit
from megatron_ext.preprocess.parts import Part, unit_parts
from megatron_ext.preprocess.store import Store, finished, joined, remove_parts
from megatron_ext.vocabulary import Vocabulary
from megatron_ext.vq import VQModel


@dataclass
class Options:
    """What is prepared and how.

    Attributes:
        inputs: WebDataset tars, LLaVA JSON files, JSONL files.
        out: prefix of the data set.
        images: folder of the images that JSON and JSONL files name; None for the folder of the file itself.
        prefer: "conversation" or "caption", what a sample with both becomes.
        resize: "crop" or "squash".
        batch_size: images that the VQ model encodes at once.
        part_samples: samples in a part, what a restart may have to do again.
        workers: threads that read and decode.
        strict: stop at the first sample that would be skipped.
        shard: (which, of how many), counted from 1; None prepares everything.
    """

    inputs: list[Path]
    out: Path
    images: Path | None = None
    prefer: str = "conversation"
    resize: str = CROP
    batch_size: int = 64
    part_samples: int = 1024
    workers: int = 2
    strict: bool = False
    shard: tuple[int, int] | None = None


@dataclass
class Summary:
    """Numbers of one run. ``metadata`` is that of the data set, None where a shard leaves it to be joined.

    Attributes:
        already: the data set was there before.
        images: images encoded by this run.
        seconds: time in which they were.
        skipped: samples left out by all runs so far, of this shard.
        units: (units of this shard, units of all).
    """

    images: int = 0
    seconds: float = 0.0
    skipped: int = 0
    units: tuple[int, int] = (0, 0)
    already: bool = False
    metadata: dict | None = None

    @property
    def speed(self) -> float:
        """Images per second."""
        return self.images / self.seconds if self.seconds else 0.0

    def numbers(self) -> dict:
        """For ``--json``."""
        counts = {key: self.metadata[key] for key in ("documents", "images", "tokens")} if self.metadata else None
        return {
            "images_encoded": self.images,
            "seconds": self.seconds,
            "images_per_second": self.speed,
            "skipped": self.skipped,
            "already": self.already,
            "data_set": counts,
        }


def preprocess(options: Options, vocabulary: Vocabulary, vq: VQModel | None) -> Summary:
    """Prepare the data set at ``options.out``, going on from what an earlier run has done.

    Args:
        vq: the tokenizer of the images, on the device and in the precision to use; None for plain text.

    Raises:
        UserError: an input cannot be read, the settings are not those of the earlier run, or ``strict`` and a
            sample cannot be used.
    """
    if vq is not None and vq.codebook_size != vocabulary.codebook_size:
        raise UserError(
            f"{vocabulary.folder}: made for {vocabulary.codebook_size} VQ codes, but {vq.folder} has {vq.codebook_size}"
        )
    units = inputs.plan(options.inputs, options.part_samples)
    decoder = _decoder(options, vq) if vq is not None else None
    settings = _settings(options, vocabulary, vq, decoder, len(units))
    if metadata := finished(options.out, settings):
        remove_parts(options.out)  # a join that was killed at the very end leaves some
        return Summary(metadata=metadata, already=True, skipped=metadata["source"]["skipped"])
    store = Store(options.out, settings)
    mine = _shard(len(units), options.shard)
    summary = Summary(units=(len(mine), len(units)))
    try:
        _work(options, store, {index: units[index] for index in mine}, vocabulary, vq, decoder, summary)
    finally:
        if decoder is not None:
            decoder.close()
    if options.shard is None:
        summary.metadata = store.join()
    return summary


def merge_shards(out: Path) -> Summary:
    """Join the parts that all shards have made to the data set at ``out``.

    Raises:
        UserError: a part is missing or damaged.
    """
    already = joined(out)
    if already:
        remove_parts(out)
    metadata = already or Store(out).join()
    return Summary(metadata=metadata, already=bool(already), skipped=metadata["source"].get("skipped", 0))


def _work(
    options: Options,
    store: Store,
    units: dict[int, Unit],
    vocabulary: Vocabulary,
    vq: VQModel | None,
    decoder,
    summary: Summary,
) -> None:
    todo, left = {}, 0
    for index, unit in units.items():
        cards = store.done(index)
        for metadata in cards:
            _strict(options, metadata["skipped"])
            summary.skipped += len(metadata["skipped"])
        if not cards or not cards[-1]["last"]:
            todo[index] = (unit, len(cards))
            left += unit.bytes - sum(metadata["bytes"] for metadata in cards)
    parts = _parts(todo, options, vocabulary, vq)
    started = time.perf_counter()
    bar = progress(total=left, bar_format="{desc} {percentage:3.0f}%|{bar}| ETA {remaining}", leave=False)
    with bar, closing(encode(parts, decoder, vq, options.batch_size, options.workers)) as events:
        failures = {}
        for event in events:
            _strict(options, event.part.skipped)
            _strict(options, [{"sample": i.name, "reason": why} for i, why in event.failures.items()])
            failures |= event.failures
            summary.images += event.images
            summary.seconds = time.perf_counter() - started
            if event.codes is not None:
                metadata = store.write(event.part, event.codes, failures, vocabulary.image_offset)
                summary.skipped += len(metadata["skipped"])
                failures = {}
            _show(bar, event, summary)


def _show(bar, event: Encoded, summary: Summary) -> None:
    bar.set_description(f"{summary.images:,} images, {summary.speed:,.0f} images/s", refresh=False)
    bar.update(event.part.bytes * event.share)


def _parts(todo: dict, options: Options, vocabulary: Vocabulary, vq: VQModel | None) -> Iterator[Part]:
    reading = Reading(options.images, options.prefer)
    for index, (unit, done) in todo.items():
        for part in unit_parts(index, unit, done, options.part_samples, reading, vocabulary):
            if vq is None and part.images:
                raise UserError(f"{part.images[0].name}: the input has images; give the VQ tokenizer with --vq")
            yield part


def _strict(options: Options, skipped: list[dict]) -> None:
    if options.strict and skipped:
        entry = skipped[0]
        raise UserError(f"{entry.get('image', entry['sample'])}: {entry['reason']}; without --strict it is skipped")


def _decoder(options: Options, vq: VQModel):
    device = next(vq.network.parameters()).device
    if dali_images.available():
        return dali_images.DaliDecoder(vq.image_size, options.resize, options.workers, options.batch_size, device)
    print("DALI is missing (pip install nvidia-dali-cuda130): images are decoded by Pillow, more slowly")
    return PillowDecoder(vq.image_size, options.resize, options.workers)


def _settings(options: Options, vocabulary: Vocabulary, vq: VQModel | None, decoder, units: int) -> dict:
    """Everything on which the bytes of the data set depend; runs with other values never share parts."""
    parameter = next(vq.network.parameters()) if vq is not None else torch.empty(0)
    return {
        "inputs": [{"file": str(file), "bytes": file.stat().st_size} for file in options.inputs],
        "images": str(options.images) if options.images else None,
        "as": options.prefer,
        "resize": options.resize,
        "batch_size": options.batch_size,
        "part_samples": options.part_samples,
        "units": units,
        "vocabulary": vocabulary.fingerprint,
        "vq": vq.metadata if vq is not None else None,
        "decoder": decoder.name if decoder is not None else None,
        "device": parameter.device.type,
        "precision": str(parameter.dtype).removeprefix("torch."),
    }


def _shard(units: int, shard: tuple[int, int] | None) -> range:
    """The units of a shard: a contiguous stretch, as long as the others to within one unit."""
    which, of = shard or (1, 1)
    return range(units * (which - 1) // of, units * which // of)

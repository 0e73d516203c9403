"""The whole preprocessing, or one shard of it, from options to files."""

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from megatron_ext import chat_template
from megatron_ext.command_line import progress
from megatron_ext.data.format import DRAWN
from megatron_ext.errors import UserError
from megatron_ext.preprocess import dali_decoder, units
from megatron_ext.preprocess.encoding import Encoded, encode
from megatron_ext.preprocess.parts import Part, unit_parts
from megatron_ext.preprocess.record_fields import Filter
from megatron_ext.preprocess.samples import ReadOptions, Unit
from megatron_ext.preprocess.store import Store, finished, joined, remove_parts, skipped_samples
from megatron_ext.vocabulary import Vocabulary
from megatron_ext.vq import VQModel
from megatron_ext.vq.image_decoder import CROP, PillowDecoder, Preparation


@dataclass
class PreprocessOptions:
    """Inputs, output and settings of a preprocessing.

    Attributes:
        inputs: WebDataset tars, LLaVA JSON files, JSONL files (.jsonl, .jsonl.gz, .jsonl.zip).
        out: prefix of the data set.
        images, prefer, split_turns, caption, filters, max_tokens: see :class:`.ReadOptions`; with ``caption``,
            ``prefer`` is "caption".
        chat_template: the vocabulary's chat template writes conversations; None: if it has one.
        split_part: the part of data sets in Energon's layout: train, val, test.
        resize: "crop" or "squash"; None: the tokenizer's own choice, for pictures to be drawn if captions are
            preferred, else for pictures that are asked about.
        batch_size: images that the VQ model encodes at once.
        part_samples: samples per part; a restart repeats at most one part.
        workers: threads that read and decode.
        strict: stop at the first sample that would be skipped.
        shard: (number of the shard, counted from 1, number of shards); None processes everything.
    """

    inputs: list[Path]
    out: Path
    images: Path | None = None
    prefer: str = "conversation"
    caption: tuple[str, ...] = ()
    filters: tuple[Filter, ...] = ()
    max_tokens: int | None = None
    split_turns: bool = False
    chat_template: bool | None = None
    split_part: str = "train"
    resize: str | None = None
    batch_size: int = 64
    part_samples: int = 1024
    workers: int = 2
    strict: bool = False
    shard: tuple[int, int] | None = None

    def __post_init__(self):
        if self.caption:
            self.prefer = "caption"


@dataclass
class Summary:
    """Numbers of one run.

    Attributes:
        images: images encoded by this run.
        seconds: time that encoding took.
        skipped: samples of this shard skipped by all runs so far.
        units: (units of this shard, units of all shards).
        already: the data set was complete before this run.
        metadata: of the data set; None for a shard that is not joined yet.
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


def preprocess(options: PreprocessOptions, vocabulary: Vocabulary, vq: VQModel | None) -> Summary:
    """Make the data set at ``options.out``; resumes an earlier run.

    Args:
        vq: the tokenizer of the images, on the device and in the precision to use; None for plain text.

    Raises:
        UserError: an input cannot be read, the settings differ from those of the earlier run, or with ``strict`` a
            sample cannot be used.
    """
    if options.chat_template is None:
        options = replace(options, chat_template=vocabulary.chat_template is not None)
    elif options.chat_template and vocabulary.chat_template is None:
        raise UserError(f"{vocabulary.folder}: has no chat template (tools/train_tokenizer.py --chat-template)")
    if vq is not None and vq.codebook_size != vocabulary.codebook_size:
        raise UserError(
            f"{vocabulary.folder}: made for {vocabulary.codebook_size} VQ codes, but {vq.folder} has {vq.codebook_size}"
        )
    all_units = units.plan(options.inputs, options.part_samples, options.split_part)
    decoder = _decoder(options, vq) if vq is not None else None
    settings = _settings(options, vocabulary, vq, decoder, len(all_units))
    if metadata := finished(options.out, settings):
        remove_parts(options.out)  # a join that was killed at the very end leaves some
        return Summary(metadata=metadata, already=True, skipped=metadata["source"]["skipped"])
    store = Store(options.out, settings)
    shard = _shard(len(all_units), options.shard)
    summary = Summary(units=(len(shard), len(all_units)))
    try:
        _make_parts(options, store, {index: all_units[index] for index in shard}, vocabulary, vq, decoder, summary)
    finally:
        if decoder is not None:
            decoder.close()
    if options.shard is None:
        summary.metadata = store.join()
    return summary


def merge_shards(out: Path) -> Summary:
    """Join the parts of all shards to the data set at ``out``.

    Raises:
        UserError: a part is missing or damaged.
    """
    already = joined(out)
    if already:
        remove_parts(out)
    metadata = already or Store(out).join()
    return Summary(metadata=metadata, already=bool(already), skipped=metadata["source"].get("skipped", 0))


def _make_parts(
    options: PreprocessOptions,
    store: Store,
    shard: dict[int, Unit],
    vocabulary: Vocabulary,
    vq: VQModel | None,
    decoder,
    summary: Summary,
) -> None:
    todo, bytes_left = {}, 0
    for index, unit in shard.items():
        manifests = store.done(index)
        for manifest in manifests:
            _refuse_skipped(options, manifest["skipped"])
            summary.skipped += skipped_samples(manifest["skipped"])
        if not manifests or not manifests[-1]["last"]:
            todo[index] = (unit, len(manifests))
            bytes_left += unit.bytes - sum(manifest["bytes"] for manifest in manifests)
    parts = _parts(todo, options, vocabulary, vq)
    started = time.perf_counter()
    bar = progress(total=bytes_left, bar_format="{desc} {percentage:3.0f}%|{bar}| ETA {remaining}", leave=False)
    with bar, closing(encode(parts, decoder, vq, options.batch_size, options.workers)) as batches:
        failures = {}
        for batch in batches:
            _refuse_skipped(options, batch.part.skipped)
            _refuse_skipped(options, [{"sample": i.name, "reason": why} for i, why in batch.failures.items()])
            failures |= batch.failures
            summary.images += batch.images
            summary.seconds = time.perf_counter() - started
            if batch.codes is not None:
                manifest = store.write(batch.part, batch.codes, failures, vocabulary.image_offset)
                summary.skipped += skipped_samples(manifest["skipped"])
                failures = {}
            _show(bar, batch, summary)


def _show(bar, batch: Encoded, summary: Summary) -> None:
    bar.set_description(f"{summary.images:,} images, {summary.speed:,.0f} images/s", refresh=False)
    bar.update(batch.part.bytes * batch.share)


def _parts(todo: dict, options: PreprocessOptions, vocabulary: Vocabulary, vq: VQModel | None) -> Iterator[Part]:
    shared = {field.name for field in fields(ReadOptions)} & {field.name for field in fields(options)}
    read_options = ReadOptions(
        **{name: getattr(options, name) for name in shared}, image_tokens=math.prod(vq.grid) if vq else 0
    )
    for index, (unit, done) in todo.items():
        for part in unit_parts(index, unit, done, options.part_samples, read_options, vocabulary):
            if vq is None and part.images:
                raise UserError(f"{part.images[0].name}: the input has images; give the VQ tokenizer with --vq")
            if vq is not None and not options.resize and vq.preparation.generation != vq.preparation.understanding:
                _refuse_drawn(part, vq)
            yield part


def _refuse_drawn(part: Part, vq: VQModel) -> None:
    """An image that is drawn in one document and given in another has one code, so it is made in one way."""
    documents = (document for _, documents in part.documents for document in documents)
    for image in (item for document in documents for mode, item in document if mode == DRAWN):
        raise UserError(
            f"{image.name}: an answer draws it, and {vq.folder} makes pictures to be drawn otherwise than given ones; "
            f"choose one way for both with --resize ({vq.preparation.generation} or {vq.preparation.understanding})"
        )


def _refuse_skipped(options: PreprocessOptions, skipped: list[dict]) -> None:
    """With ``strict``, raise for the first skipped sample."""
    if options.strict and skipped:
        entry = skipped[0]
        raise UserError(f"{entry.get('image', entry['sample'])}: {entry['reason']}; without --strict it is skipped")


def _decoder(options: PreprocessOptions, vq: VQModel):
    resize = _resize(options, vq)
    if vq.preparation != Preparation():  # defined by Pillow's pixels
        return PillowDecoder(vq.image_size, resize, options.workers, vq.preparation)
    if dali_decoder.available():
        return dali_decoder.DaliDecoder(vq.image_size, resize, options.workers, options.batch_size, vq.device)
    print("DALI is missing (pip install nvidia-dali-cuda130): Pillow decodes the images, more slowly")
    return PillowDecoder(vq.image_size, resize, options.workers)


def _resize(options: PreprocessOptions, vq: VQModel | None) -> str:
    if options.resize or vq is None:
        return options.resize or CROP
    return vq.preparation.generation if options.prefer == "caption" else vq.preparation.understanding


def _settings(options: PreprocessOptions, vocabulary: Vocabulary, vq: VQModel | None, decoder, unit_count: int) -> dict:
    """Everything that the bytes of the data set depend on; runs with other values never share parts."""
    device, dtype = (vq.device, vq.dtype) if vq is not None else (torch.device("cpu"), torch.float32)
    return {
        "inputs": [{"file": str(file), **units.identity(file)} for file in options.inputs],
        "images": str(options.images) if options.images else None,
        "as": options.prefer,
        # Without these options data sets stay as they are.
        **({"caption": list(options.caption)} if options.caption else {}),
        **({"filters": [_readable(one) for one in options.filters]} if options.filters else {}),
        **({"max_tokens": options.max_tokens} if options.max_tokens else {}),
        **({"split_turns": True} if options.split_turns else {}),
        **({"split_part": options.split_part} if options.split_part != "train" else {}),
        **({"chat_template": chat_template.description(vocabulary)} if options.chat_template else {}),
        "resize": _resize(options, vq),
        "batch_size": options.batch_size,
        "part_samples": options.part_samples,
        "units": unit_count,
        "vocabulary": vocabulary.fingerprint,
        "vq": vq.metadata if vq is not None else None,
        "decoder": decoder.name if decoder is not None else None,
        "device": device.type,
        "precision": str(dtype).removeprefix("torch."),
    }


def _readable(one: Filter) -> dict:
    """A filter without the bounds that it does not have, which JSON could not express."""
    return {key: value for key, value in asdict(one).items() if value not in (math.inf, -math.inf)}


def _shard(units: int, shard: tuple[int, int] | None) -> range:
    """The units of a shard: a contiguous stretch; the lengths of shards differ by at most one unit."""
    number, count = shard or (1, 1)
    return range(units * (number - 1) // count, units * number // count)

"""Turn images and text into a data set of unified tokens: images become VQ codes, text is tokenised.

Inputs, in any combination (docs/data.md has the commands for ShareGPT4V, MMC4, JourneyDB and COYO):
  FILE.tar    WebDataset: KEY.jpg (or .png, .webp) with KEY.txt (caption) and/or KEY.json (LLaVA conversations, ...)
  FOLDER      the same files, unpacked; folders in it too. With .nv-meta in it: a data set of Megatron Energon
  FILE.json   LLaVA: [{"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}]
  FILE.jsonl  (also .jsonl.gz, .jsonl.zip) a line each: {"image", "caption"}, {"text"} (plain text needs no --vq), a
              LLaVA sample, or an interleaved document of MMC4: {"text_list", "image_info"}

The same command resumes a run that was stopped. Samples with an unreadable image are skipped, counted, and listed in
PREFIX.skipped.jsonl. On several machines with a shared file system, give each its --shard I/N and run --merge after the
last one; the result equals that of a single run, byte for byte.
"""

import argparse
import os
from dataclasses import fields
from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.preprocess.record_fields import Filter
from megatron_ext.vocabulary import Vocabulary

EXAMPLE = """\
python tools/preprocess_vq.py data/train-*.tar --vq runs/vq --vocabulary runs/vocabulary --out data/train
  python tools/preprocess_vq.py llava.json --images photos --vq V --vocabulary W --out data/llava --shard 3/16
  python tools/preprocess_vq.py coyo/*.tar --min clip_similarity_vitl14=0.25 --vq V --vocabulary W --out data/coyo
  python tools/preprocess_vq.py --merge --out data/llava
  python tools/preprocess_vq.py --verify data/train --vocabulary runs/vocabulary"""


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.verify:
        numbers = _verify(arguments)
    elif not arguments.out:
        parser.error("--out PREFIX is needed")
    elif arguments.merge:
        if arguments.shard or arguments.inputs:
            parser.error("--merge takes only --out PREFIX; inputs and settings are those of the shards")
        numbers = _merge(arguments)
    elif not arguments.inputs or not arguments.vocabulary:
        parser.error("input files and --vocabulary FOLDER are needed")
    else:
        numbers = _preprocess(arguments)
    if arguments.json:
        files.write_json(arguments.json, numbers)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser(__doc__, EXAMPLE)
    parser.add_argument("inputs", type=Path, nargs="*", metavar="FILE", help="inputs of the kinds above")
    parser.add_argument("--vq", type=Path, metavar="FOLDER", help="VQ tokenizer; not needed for plain text")
    parser.add_argument("--vocabulary", type=Path, metavar="FOLDER", help="made by tools/train_tokenizer.py")
    parser.add_argument("--out", type=Path, metavar="PREFIX", help="the data set: PREFIX.bin, PREFIX.idx, PREFIX.json")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="where .json and .jsonl find images (default: beside the file). {shard} stands for the name of the input "
        "file; where FOLDER/a is not there, images a/... are looked up in FOLDER/a.tar",
    )
    parser.add_argument(
        "--split-part", default="train", metavar="NAME", help="part of Energon's data sets: train (default), val, test"
    )
    _add_forms(parser)
    parser.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="images encoded at once (64)")
    parser.add_argument(
        "--part-samples", type=_positive, default=1024, metavar="N", help="most samples that a restart repeats (1024)"
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="threads that read and decode (default: one per core, at most 8)",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first sample that would be skipped")
    parser.add_argument("--shard", type=_shard, metavar="I/N", help="do the I-th of N shares of the work (1/N to N/N)")
    parser.add_argument("--merge", action="store_true", help="join the parts of all shards of --out")
    parser.add_argument("--verify", type=Path, metavar="PREFIX", help="only check every byte of a finished data set")
    return parser


def _add_forms(parser: argparse.ArgumentParser) -> None:
    """The options on what samples become."""
    parser.add_argument(
        "--as",
        dest="prefer",
        choices=("conversation", "caption"),
        default="conversation",
        help="which one a sample with both becomes (default: conversation)",
    )
    parser.add_argument(
        "--caption",
        nargs="+",
        default=(),
        metavar="KEY",
        help="make caption pairs, with the first of these keys of a record that has text: prompt, Task2.Caption, "
        "conversations.1.value",
    )
    for option, parse, comparison in (("--min", _minimum, "less"), ("--max", _maximum, "greater")):
        parser.add_argument(
            option,
            action="append",
            default=[],
            type=parse,
            dest="filters",
            metavar="KEY=NUMBER",
            help=f"leave out records, and images of MMC4, whose KEY is {comparison} than NUMBER; may be repeated",
        )
    parser.add_argument(
        "--max-tokens",
        type=_positive,
        metavar="N",
        help="skip documents with images that rows of N tokens cannot hold; interleaved ones are cut",
    )
    parser.add_argument(
        "--split-turns",
        action="store_true",
        help="each question with its answer becomes a document of its own, after the images before it",
    )
    parser.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="write conversations as the vocabulary's chat template does (default: if it has one); captions and plain "
        "text never are",
    )
    parser.add_argument(
        "--resize",
        choices=("crop", "squash"),
        help="scale the shorter side and cut out the centre (crop), or scale both sides (squash); default: crop, for "
        "VILA-U squash unless --as caption",
    )


def _preprocess(arguments: argparse.Namespace) -> dict:
    from megatron_ext.preprocess import PreprocessOptions, preprocess

    vocabulary = Vocabulary(arguments.vocabulary)
    vq = _load(arguments.vq) if arguments.vq else None
    options = PreprocessOptions(**{field.name: getattr(arguments, field.name) for field in fields(PreprocessOptions)})
    summary = preprocess(options, vocabulary, vq)
    if summary.images:
        print(f"{summary.images:,} images encoded in {summary.seconds:.1f} s, {summary.speed:,.1f} images/s")
    if summary.metadata is None:
        number, count = arguments.shard
        print(
            f"{arguments.out}: shard {number} of {count} is done "
            f"({summary.units[0]} of {summary.units[1]} units of work, {summary.skipped} samples skipped); "
            f"after the last one run: python tools/preprocess_vq.py --merge --out {arguments.out}"
        )
        return summary.numbers()
    return _report(arguments.out, summary)


def _merge(arguments: argparse.Namespace) -> dict:
    from megatron_ext.preprocess import merge_shards

    return _report(arguments.out, merge_shards(arguments.out))


def _verify(arguments: argparse.Namespace) -> dict:
    from megatron_ext.preprocess import verify_data_set

    vocabulary = Vocabulary(arguments.vocabulary) if arguments.vocabulary else None
    metadata = verify_data_set(arguments.verify, vocabulary, _load(arguments.vq).metadata if arguments.vq else None)
    print(f"{arguments.verify}: complete and undamaged; {_counts(metadata)}")
    return metadata


def _report(out: Path, summary) -> dict:
    print(f"{out}: {'already there, ' if summary.already else ''}{_counts(summary.metadata)}")
    source = summary.metadata["source"]
    if filtered := source.get("filtered"):
        print(f"{filtered:,} samples filtered out")
    if missing := source.get("missing_images"):
        print(f"{missing:,} images are not there and were left out of interleaved documents")
    skipped = {"samples": summary.skipped, "documents of other samples": source.get("skipped_documents", 0)}
    if counts := [f"{count:,} {what}" for what, count in skipped.items() if count]:
        from megatron_ext.preprocess import skipped_file

        print(f"{' and '.join(counts)} skipped, listed in {skipped_file(out)}")
    return summary.numbers()


def _counts(metadata: dict) -> str:
    return f"{metadata['documents']:,} documents, {metadata['images']:,} images, {metadata['tokens']:,} tokens"


def _load(folder: Path):
    import torch

    from megatron_ext import vq

    if torch.cuda.is_available():
        return vq.load(folder, "cuda", torch.bfloat16)
    return vq.load(folder)


def _minimum(text: str) -> Filter:
    key, number = _key_and_number(text)
    return Filter(key, minimum=number)


def _maximum(text: str) -> Filter:
    key, number = _key_and_number(text)
    return Filter(key, maximum=number)


def _key_and_number(text: str) -> tuple[str, float]:
    key, _, number = text.rpartition("=")
    if not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=NUMBER")
    return key, float(number)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N")
    return int(number), int(count)


if __name__ == "__main__":
    command_line.run(main)

"""Merge, split, inspect and count prepared data sets (PREFIX.bin, PREFIX.idx, PREFIX.json).

The data sets that are read may lie in object stores: s3://BUCKET/PREFIX, msc://PROFILE/PREFIX.
"""

import argparse

from megatron_ext import command_line
from megatron_ext.errors import UserError
from megatron_ext.files import write_json

EXAMPLES = {
    "merge": "python tools/dataset.py merge data/coco data/sam --out data/captions",
    "split": "python tools/dataset.py split data/all --into data/train=rest data/validation=2000 data/test=1% --seed 1",
    "inspect": "python tools/dataset.py inspect data/captions --documents 0 17 --vocabulary runs/vocabulary",
    "statistics": "python tools/dataset.py statistics data/captions data/text --json statistics.json",
}


def main() -> None:
    parser, commands = command_line.commands(__doc__, "\n  ".join(EXAMPLES.values()))

    def add(name: str, function, text: str, **prefixes) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, example=EXAMPLES[name])
        command.set_defaults(function=function)
        command.add_argument("prefixes", metavar="PREFIX", help="data set, without extension", **prefixes)
        return command

    merge = add("merge", _merge, "join data sets of one vocabulary and VQ model, in this order", nargs="+")
    merge.add_argument("--out", required=True, metavar="PREFIX", help="the new data set")
    split = add("split", _split, "divide a data set at random; the same seed divides it the same way")
    split.add_argument("--into", nargs="+", required=True, type=_size, metavar="PREFIX=SIZE", help=_SIZES)
    split.add_argument("--seed", type=int, default=0, metavar="N", help="(default 0)")
    inspect = add("inspect", _inspect, "show documents as they are stored")
    inspect.add_argument("--documents", nargs="+", type=int, default=[0], metavar="N", help="numbers (default 0)")
    inspect.add_argument("--vocabulary", metavar="FOLDER", help="to show texts and codes instead of token ids")
    add("statistics", _statistics, "documents, tokens by kind, lengths and images per document", nargs="+")

    options = parser.parse_args()
    numbers = options.function(options)
    if options.json:
        write_json(options.json, numbers)


_SIZES = "new data sets; SIZE is a number of documents, a share such as 2.5%% of them, or rest"


def _merge(options: argparse.Namespace) -> dict:
    from megatron_ext.data.copying import merge

    metadata = merge(options.prefixes, options.out)
    print(f"{options.out}: {_counts(metadata)}")
    return metadata


def _split(options: argparse.Namespace) -> dict:
    from megatron_ext.data.copying import split

    sizes = dict(options.into)
    if len(sizes) < len(options.into) or list(sizes.values()).count(None) > 1:
        raise UserError("--into: names a data set, or the rest, more than once")
    metadata_of = dict(zip(sizes, split(options.prefixes, sizes, options.seed)))
    for out, metadata in metadata_of.items():
        print(f"{out}: {_counts(metadata)}")
    return metadata_of


def _inspect(options: argparse.Namespace) -> dict:
    from megatron_ext.data.format import Dataset
    from megatron_ext.data.show import describe_document
    from megatron_ext.vocabulary import Vocabulary

    dataset = Dataset(options.prefixes)
    vocabulary = Vocabulary(options.vocabulary) if options.vocabulary else None
    shown = {number: describe_document(dataset, number, vocabulary) for number in options.documents}
    for number, sequences in shown.items():
        print(f"document {number} of {len(dataset):,}: {sum(entry['tokens'] for entry in sequences)} tokens")
        for entry in sequences:
            [(_, content)] = list(entry.items())[2:]
            print(
                f"  {entry['kind']}, {entry['tokens']} tokens: {content if isinstance(content, str) else _few(content)}"
            )
    return shown


def _statistics(options: argparse.Namespace) -> dict:
    from megatron_ext.data.format import Dataset
    from megatron_ext.data.statistics import Statistics

    statistics = Statistics.of([Dataset(prefix) for prefix in options.prefixes])
    print(statistics.table())
    return statistics.numbers()


def _size(text: str) -> tuple[str, int | float | None]:
    prefix, _, size = text.rpartition("=")
    try:
        number = None if size == "rest" else float(size[:-1]) / 100 if size.endswith("%") else int(size)
    except ValueError:
        prefix = ""
    if not prefix:
        raise argparse.ArgumentTypeError(f"{text!r} is not PREFIX=SIZE, with a SIZE of 2000, 1% or rest")
    return prefix, number


def _counts(metadata: dict) -> str:
    return f"{metadata['documents']:,} documents, {metadata['images']:,} images, {metadata['tokens']:,} tokens"


def _few(ids: list[int]) -> str:
    return " ".join(map(str, ids[:16])) + (" ..." if len(ids) > 16 else "")


if __name__ == "__main__":
    command_line.run(main)

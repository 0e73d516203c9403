"""Make the picture world: procedural scenes with captions, questions and texts, in the formats of real data."""

import argparse
from multiprocessing.pool import Pool
from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.errors import UserError
from megatron_ext.picture_world.benchmark_files import NAMES, BenchmarkConfig, write_benchmarks
from megatron_ext.picture_world.contact_sheet import write_sheet
from megatron_ext.picture_world.edit_files import EditConfig, write_edits
from megatron_ext.picture_world.questions import KINDS
from megatron_ext.picture_world.split_files import FORMS, SplitConfig, scene_workers, write_split
from megatron_ext.picture_world.splits import SPLITS
from megatron_ext.picture_world.world import World


def main() -> None:
    arguments = _arguments()
    world = World(
        arguments.kinds_of_things,
        arguments.most_objects,
        arguments.variation,
        arguments.backgrounds,
        arguments.compositional,
    )
    if arguments.sheet:
        write_sheet(arguments.sheet, "train", arguments.seed, arguments.size, world)
        print(f"{arguments.sheet}: written")
    manifests = {}
    if arguments.out:
        with scene_workers(arguments.workers) as workers:
            manifests = {split: _write_split(arguments, split, world, workers) for split in SPLITS}
            for split in SPLITS if arguments.edits_per_scene else ():
                manifests[f"edits {split}"] = _write_edits(arguments, split, world, workers)
    if arguments.benchmarks:
        manifests["benchmarks"] = _write_benchmarks(arguments, world)
    if arguments.json:
        files.write_json(arguments.json, manifests)


def _arguments() -> argparse.Namespace:
    parser = command_line.parser(
        __doc__, "python tools/make_scenes.py --out data/scenes --train 20000 --validation 1000 --test 1000 --workers 8"
    )
    _add_scene_options(parser)
    _add_text_options(parser)
    _add_other_outputs(parser)
    arguments = parser.parse_args()
    if not arguments.out and not arguments.sheet and not arguments.benchmarks:
        parser.error("give at least one of --out, --sheet, --benchmarks")
    if arguments.size < 16:
        raise UserError(f"--size {arguments.size}: must be at least 16")
    for option in ("with_choices", "with_instruction"):
        if not 0 <= getattr(arguments, option) <= 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(arguments, option)}: must be from 0 to 1")
    if arguments.benchmark_pictures < 1:
        raise UserError(f"--benchmark-pictures {arguments.benchmark_pictures}: must be at least 1")
    return arguments


def _add_scene_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="gets one folder per split")
    parser.add_argument("--train", type=int, default=2000, help="scenes of the training split (default: 2000)")
    parser.add_argument("--validation", type=int, default=200, help="default: 200")
    parser.add_argument("--test", type=int, default=200, help="default: 200; all with held-out combinations")
    parser.add_argument("--size", type=int, default=64, help="pixels along a side (default: 64)")
    parser.add_argument(
        "--variation",
        type=float,
        default=1.0,
        metavar="V",
        help="0 .. 1: how much the looks of equal objects and backgrounds differ (default: 1)",
    )
    parser.add_argument(
        "--kinds-of-things", type=int, default=8, metavar="N", help="number of shapes and of colors: 8 (default) or 4"
    )
    parser.add_argument(
        "--most-objects", type=int, default=6, metavar="N", help="most objects in a scene, 2 .. 6 (default: 6)"
    )
    parser.add_argument(
        "--compositional",
        action="store_true",
        help="objects are mosaics whose tiles tell nothing alone; needs --variation 0 and --kinds-of-things 4",
    )
    parser.add_argument(
        "--backgrounds", type=int, default=5, metavar="N", help="background colors, 2 .. 5 (default: 5)"
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["tar", "text"], help="default: tar text")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=int, default=3, help="per picture (default: 3)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=[],
        metavar="KIND",
        help=f"only these kinds of questions, in GQA too: {', '.join(KINDS)}",
    )
    parser.add_argument(
        "--with-choices",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of questions with four choices (default: 0.1)",
    )
    parser.add_argument(
        "--with-instruction",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="share of the other short questions with a benchmark's instruction (default: 0.3)",
    )
    parser.add_argument("--texts-per-scene", type=float, default=1.0, help="plain texts (default: 1)")
    parser.add_argument(
        "--edits-per-scene",
        type=float,
        default=0.0,
        metavar="N",
        help="conversations in OUT/edits that edit further scenes, which are drawn again (default: 0)",
    )
    parser.add_argument("--edit-turns", type=int, default=1, metavar="N", help="most edits in each (default: 1)")


def _add_other_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also write a PNG of some scenes with their texts")
    parser.add_argument(
        "--benchmarks",
        type=Path,
        metavar="FOLDER",
        help="also write pictures of a split in the formats of POPE, MME, GQA, SEED-Bench and MJHQ-30K, and edits",
    )
    parser.add_argument(
        "--benchmark-split",
        choices=SPLITS,
        default="test",
        help="test: held-out combinations (default); validation: new arrangements of known combinations",
    )
    parser.add_argument(
        "--benchmark-pictures", type=int, default=60, metavar="N", help="per benchmark and MME subtask (default: 60)"
    )
    parser.add_argument(
        "--benchmark-names", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help="default: all"
    )


def _write_split(arguments: argparse.Namespace, split: str, world: World, workers: Pool | None) -> dict:
    count = getattr(arguments, split)
    config = SplitConfig(
        split=split,
        count=count,
        texts=round(count * arguments.texts_per_scene),
        size=arguments.size,
        world=world,
        questions=arguments.questions,
        kinds=tuple(arguments.kinds),
        with_choices=arguments.with_choices,
        with_instruction=arguments.with_instruction,
        seed=arguments.seed,
        forms=tuple(arguments.forms),
    )
    manifest = write_split(arguments.out, config, workers)
    print(f"{arguments.out / split}: {count} scenes, {config.texts} texts, {_state(manifest)}")
    return manifest


def _write_edits(arguments: argparse.Namespace, split: str, world: World, workers: Pool | None) -> dict:
    config = EditConfig(
        split=split,
        count=round(getattr(arguments, split) * arguments.edits_per_scene),
        turns=arguments.edit_turns,
        size=arguments.size,
        world=world,
        seed=arguments.seed,
    )
    manifest = write_edits(arguments.out / "edits", config, workers)
    print(f"{arguments.out / 'edits' / split}: {config.count} conversations, {_state(manifest)}")
    return manifest


def _write_benchmarks(arguments: argparse.Namespace, world: World) -> dict:
    config = BenchmarkConfig(
        arguments.benchmark_pictures,
        arguments.size,
        arguments.seed,
        arguments.benchmark_split,
        world,
        tuple(arguments.benchmark_names),
        tuple(arguments.kinds),
    )
    manifest = write_benchmarks(arguments.benchmarks, config)
    items = ", ".join(f"{count} of {name}" for name, count in manifest["items"].items())
    print(f"{arguments.benchmarks}: {items}, {_state(manifest)}")
    return manifest


def _state(manifest: dict) -> str:
    return f"{'made' if manifest['created'] else 'already complete'} ({manifest['fingerprint']})"


if __name__ == "__main__":
    command_line.run(main)

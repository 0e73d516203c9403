"""Make everything that training on the picture world needs, by a recipe: scenes, benchmarks, an image tokenizer, a
vocabulary, data sets. The same command continues a preparation that was stopped, and keeps complete pieces."""

import time
from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.preprocess.picture_world import prepare
from megatron_ext.preprocess.recipe import read_recipe


def main() -> None:
    parser = command_line.parser(
        __doc__, "python tools/prepare_picture_world.py examples/picture_worlds/quickstart.yaml --out runs/quickstart"
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="see megatron_ext/preprocess/recipe.py")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    started = time.perf_counter()
    pieces = prepare(read_recipe(arguments.recipe), arguments.out, lambda line: print(line, flush=True))
    new_pieces = [(name, piece) for name, piece in pieces.items() if piece["made"]]
    seconds, cpu_seconds = time.perf_counter() - started, command_line.cpu_seconds()
    if new_pieces:
        print(f"\n{'piece':32}{'seconds':>9}{'CPU-seconds':>13}")
        for name, piece in new_pieces:
            print(f"{name:32}{piece['seconds']:9.1f}{piece['cpu_seconds']:13.1f}")
        print(f"{'in all, with scene processes':32}{seconds:9.1f}{cpu_seconds:13.1f}")
    print(f"{arguments.out}: {len(new_pieces)} of {len(pieces)} pieces made, the others kept, in {seconds:.1f} s")
    if arguments.json:
        files.write_json(arguments.json, {"seconds": seconds, "cpu_seconds": cpu_seconds, "pieces": pieces})


if __name__ == "__main__":
    command_line.run(main)

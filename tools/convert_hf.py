"""Convert a published model in Hugging Face's format to a checkpoint to start from, and write its shape as YAML.

Llama, Mistral, Qwen2 and Qwen3 models are read. Text keeps the model's rows of embedding and head; <eod> gets the row
of the token that ended documents in its training. The other new rows (VQ codes, <pad>, <boi>, <eoi>) get this project's
initial weights, which depend on --seed, scaled to the standard deviation of the model's rows. The vocabulary must have
the model's own text tokens: create it with tools/train_tokenizer.py --from-model. Nothing is downloaded.

A run can also start from the folder itself (checkpoint.load=FOLDER), where every rank reads its own part; it needs the
model's shape, which --shape writes alone.

--vila-u reads a published folder of VILA-U instead: language model, projector and depth head become the checkpoint, its
tokenizer with the form of its documents the vocabulary OUT/vocabulary. The VQ tokenizer is FOLDER/vision_tower.
"""

import argparse
from pathlib import Path

from megatron_ext import command_line, files


def main() -> None:
    parser = command_line.parser(
        __doc__,
        "python tools/convert_hf.py --model checkpoints/Qwen3-0.6B --vocabulary runs/vocabulary --out runs/qwen3\n"
        "  python pretrain_unified.py --config my.yaml runs/qwen3/model.yaml checkpoint.load=runs/qwen3/iter_0000000\n"
        "  python tools/convert_hf.py --model checkpoints/Qwen3-0.6B --shape runs/qwen3.yaml\n"
        "  torchrun --nproc_per_node 8 pretrain_unified.py --config my.yaml runs/qwen3.yaml parallel.tensor=8 \\\n"
        "      checkpoint.load=checkpoints/Qwen3-0.6B\n"
        "  python tools/convert_hf.py --vila-u checkpoints/vila-u-7b-256 --out runs/vila-u",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="FOLDER", help="config.json and safetensors of the model")
    source.add_argument("--vila-u", type=Path, metavar="FOLDER", help="a published VILA-U; goes with --out alone")
    add("--shape", type=Path, metavar="FILE", help="write the model's shape as YAML, and nothing else")
    add("--vocabulary", type=Path, metavar="FOLDER", help="from tools/train_tokenizer.py")
    add("--out", type=Path, metavar="FOLDER", help="receives the checkpoint iter_0000000 and model.yaml")
    add("--seed", type=int, default=1234, help="seed of the rows that the model does not have (default: 1234)")
    arguments = parser.parse_args()
    if arguments.vila_u and (arguments.shape or arguments.vocabulary or not arguments.out):
        parser.error("--vila-u goes with --out, without --shape and --vocabulary")
    if arguments.shape and (arguments.vocabulary or arguments.out):
        parser.error("--shape goes without --vocabulary and --out")
    if arguments.model and not arguments.shape and not (arguments.vocabulary and arguments.out):
        parser.error("give --vocabulary and --out, or --shape")
    # Imported late: --help should not wait for Megatron-Core.
    if arguments.vila_u:
        from megatron_ext.conversion.vila_u import convert_vila_u

        numbers = convert_vila_u(arguments.vila_u, arguments.out, arguments.seed)
        _finish(arguments, numbers)
        _print_left_out(numbers)
        return
    from megatron_ext.conversion.published_model import convert_published, write_shape
    from megatron_ext.hugging_face.folder import ModelFolder
    from megatron_ext.vocabulary import Vocabulary

    if arguments.shape:
        print(write_shape(ModelFolder(arguments.model), arguments.shape))
        return
    numbers = convert_published(arguments.model, Vocabulary(arguments.vocabulary), arguments.out, arguments.seed)
    _finish(arguments, numbers)


def _finish(arguments: argparse.Namespace, numbers: dict) -> None:
    if arguments.json:
        files.write_json(arguments.json, numbers)
    rows = numbers["rows"]
    left_out = f", {rows['left_out']:,} of the model's left out" if rows["left_out"] else ""
    print(
        f"{numbers['parameters']:,} parameters in {numbers['precision']}; of {rows['published'] + rows['new']:,} "
        f"tokens {rows['published']:,} start as the model's, {rows['new']:,} are new{left_out}; train with\n"
        f"  --config my.yaml {numbers['config']} checkpoint.load={numbers['checkpoint']}"
    )


def _print_left_out(numbers: dict) -> None:
    from megatron_ext.conversion.vila_u import left_out_by_kind

    kinds = left_out_by_kind(numbers["left_out"]["tensors"])
    print(
        f"vocabulary {numbers['vocabulary']}, VQ tokenizer {numbers['vq']}; tensors used: "
        f"{', '.join(f'{count} of {folder}' for folder, count in numbers['tensors'].items())}; left out:\n"
        + "\n".join(f"  row of {row}" for row in numbers["left_out"]["rows"])
        + "".join(f"\n  {count} x {kind}" for kind, count in kinds.items())
    )


if __name__ == "__main__":
    command_line.run(main)

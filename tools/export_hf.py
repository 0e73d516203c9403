"""Export a trained checkpoint as a Hugging Face folder.

A model whose tokens are all FULL, with shared projections, becomes a stock Llama, Qwen2 or Qwen3 over text and image
tokens (--form plain). Any model can take its own code into the folder (--form own): with the VQ tokenizer, a processor
and generate() for answers and pictures. auto: plain where that is possible.

A model that started from a published VILA-U (tools/convert_hf.py --vila-u) goes back into its layout with --vila-u.
"""

import argparse
from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.errors import UserError


def main() -> None:
    parser = command_line.parser(
        __doc__,
        "python tools/export_hf.py --checkpoint runs/my --vq checkpoints/janus --out runs/my/hf\n"
        "  python tools/export_hf.py --checkpoint runs/my --vila-u checkpoints/vila-u-7b-256 --out runs/my/vila-u",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FOLDER", help="a checkpoint, or a run (its newest one)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    add(
        "--vq", type=Path, metavar="FOLDER", help="the VQ tokenizer that the model was trained with (own code needs it)"
    )
    add("--vocabulary", type=Path, metavar="FOLDER", help="the run's vocabulary, if it was moved")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--form", choices=("auto", "plain", "own"), default="auto", help="default: auto")
    form.add_argument("--vila-u", type=Path, metavar="FOLDER", help="the published VILA-U that the model started from")
    add("--dtype", choices=("trained", "float32", "bfloat16", "float16"), default="trained", help="default: trained")
    add(
        "--shard-size",
        default="5GB",
        metavar="SIZE",
        help="most bytes of a file of weights, as 5GB or 200MB (default: 5GB)",
    )
    add("overrides", nargs="*", metavar="plan.key=value", help="changes the roles of tokens")
    arguments = parser.parse_args()
    if arguments.vila_u and arguments.vq:
        parser.error("--vila-u goes without --vq: the VQ tokenizer is that of its folder")
    shard_size = _bytes(arguments.shard_size)
    # Imported late: --help should not wait for torch.
    if arguments.vila_u:
        _export_vila_u(arguments, shard_size)
        return
    from megatron_ext.export_hf.write import export

    numbers = export(
        arguments.checkpoint,
        arguments.out,
        arguments.vq,
        arguments.form,
        arguments.dtype,
        shard_size,
        arguments.vocabulary,
        arguments.overrides,
    )
    if arguments.json:
        files.write_json(arguments.json, numbers)
    print(
        f"{arguments.out}: {numbers['class']} ({numbers['form']} form), {numbers['tensors']} tensors in "
        f"{numbers['dtype']}, {numbers['bytes']:,} bytes in {numbers['files']} file{'s' * (numbers['files'] > 1)}"
    )


def _export_vila_u(arguments: argparse.Namespace, shard_size: int) -> None:
    from megatron_ext.export_hf.vila_u import export_vila_u

    numbers = export_vila_u(
        arguments.checkpoint,
        arguments.vila_u,
        arguments.out,
        arguments.dtype,
        shard_size,
        arguments.vocabulary,
        arguments.overrides,
    )
    if arguments.json:
        files.write_json(arguments.json, numbers)
    counts = [f"{folder} {part['tensors']} tensors" for folder, part in numbers.items() if folder != "dtype"]
    print(f"{arguments.out}: VILA-U's layout, {', '.join(counts)} in {numbers['dtype']}")


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    try:
        size = round(float(text[:-2]) * units[text[-2:].upper()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"--shard-size {text}: expected a number above 0 with KB, MB or GB, such as 5GB")
    return size


if __name__ == "__main__":
    command_line.run(main)

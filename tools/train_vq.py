"""Train a small VQ image tokenizer on images from WebDataset tars or folders.

With --dictionary, codes are patches of pixels chosen by k-means: seconds instead of minutes, and for pictures of few
different patches without loss. With --depth D, a position has D residual codes of one codebook.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.errors import UserError
from megatron_ext.vq.training_config import DictionaryConfig, VQTrainingConfig

EXAMPLE = """\
python tools/train_vq.py --images data/train-*.tar --out runs/vq --image-size 64 --grid 8
  python tools/train_vq.py --images data/train-*.tar --out runs/rq --depth 4 --codebook-decay 0.99 --align
  python tools/train_vq.py --dictionary --images scenes/*.tar --out runs/vq --image-size 54 --grid 3"""


def main() -> None:
    arguments = _parser().parse_args()
    config = _config(arguments)

    import torch

    from megatron_ext.vq.training_images import load_captioned

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    images, captions = load_captioned(arguments.images, config.image_size, arguments.limit, captioned=arguments.align)
    numbers = _train(arguments.out, images, config, captions if arguments.align else None)
    print(
        f"{arguments.out}: PSNR {numbers['psnr']:.2f} dB on {config.held_out} held-out images, "
        f"{100 * numbers['codebook_use']:.0f} % of {numbers['codebook_size']} codes in use "
        f"(perplexity {numbers['codebook_perplexity']:.0f}){_retrieval(numbers)}; "
        f"see {arguments.out / 'reconstructions.png'}"
    )
    if arguments.json:
        files.write_json(arguments.json, numbers)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser(__doc__, EXAMPLE)
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="SOURCE", help="tars or folders")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--limit", type=int, default=50_000, help="images kept in memory (default: 50000)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--dictionary", action="store_true", help="a dictionary of patches instead of a network")
    parser.add_argument(
        "--align", action="store_true", help="codes also learn to agree with the captions beside the images (KEY.txt)"
    )
    for setting in fields(VQTrainingConfig):
        option = f"--{setting.name.replace('_', '-')}"
        if setting.type is bool:
            parser.add_argument(
                option,
                action="store_true",
                default=argparse.SUPPRESS,
                help="each code depends on its own patch only",
            )
        else:
            parser.add_argument(
                option, type=setting.type, default=argparse.SUPPRESS, help=f"default: {setting.default}"
            )
    return parser


def _config(arguments: argparse.Namespace) -> VQTrainingConfig | DictionaryConfig:
    given = {s.name: getattr(arguments, s.name) for s in fields(VQTrainingConfig) if s.name in arguments}
    if not arguments.dictionary:
        return VQTrainingConfig(**given)
    if arguments.align:
        raise UserError("--align: a setting of networks; --dictionary has none of them")
    for name in given.keys() - {setting.name for setting in fields(DictionaryConfig)}:
        raise UserError(f"--{name.replace('_', '-')}: a setting of networks; --dictionary has none of them")
    return DictionaryConfig(**given)


def _retrieval(numbers: dict) -> str:
    if "retrieval" not in numbers:
        return ""
    return f", {numbers['retrieval']:.1f} % of captions found (by chance {numbers['retrieval_by_chance']:.1f} %)"


def _train(out: Path, images, config: VQTrainingConfig | DictionaryConfig, captions: list[str] | None) -> dict:
    if isinstance(config, DictionaryConfig):
        from megatron_ext.vq.dictionary_training import train_dictionary

        return train_dictionary(images, out, config)
    from megatron_ext.vq.training import train  # imports transformers, which takes seconds

    return train(images, out, config, captions=captions)


if __name__ == "__main__":
    command_line.run(main)

"""Train a small VQ image tokenizer on pictures from WebDataset tars or folders."""

from dataclasses import fields
from pathlib import Path

from megatron_ext import command_line, files


def main() -> None:
    parser = command_line.parser(
        __doc__, "python tools/train_vq.py --images data/train-*.tar --out runs/vq --image-size 64 --grid 8"
    )
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="SOURCE", help="tars or folders")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--limit", type=int, default=50_000, help="pictures kept in memory (default: 50000)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")

    import torch

    from megatron_ext.vq.pictures import load_pictures
    from megatron_ext.vq.train import TrainConfig, train

    for setting in fields(TrainConfig):
        name = f"--{setting.name.replace('_', '-')}"
        if setting.type is bool:
            parser.add_argument(name, action="store_true", help="a code tells of its own patch alone")
        else:
            parser.add_argument(name, type=setting.type, default=setting.default, help=f"default: {setting.default}")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = TrainConfig(**{setting.name: getattr(arguments, setting.name) for setting in fields(TrainConfig)})
    pictures = load_pictures(arguments.images, config.image_size, arguments.limit)
    numbers = train(pictures, arguments.out, config)
    print(
        f"{arguments.out}: PSNR {numbers['psnr']:.2f} dB on {config.held_out} held-out pictures, "
        f"{100 * numbers['codebook_use']:.0f} % of {config.codebook_size} codes in use "
        f"(perplexity {numbers['codebook_perplexity']:.0f}); look at {arguments.out / 'reconstructions.png'}"
    )
    if arguments.json:
        files.write_json(arguments.json, numbers)


if __name__ == "__main__":
    command_line.run(main)

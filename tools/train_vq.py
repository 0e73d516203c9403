"""Train a small VQ image tokenizer on images from WebDataset tars or folders."""

from dataclasses import fields
from pathlib import Path

from megatron_ext import command_line, files


def main() -> None:
    parser = command_line.parser(
        __doc__, "python tools/train_vq.py --images data/train-*.tar --out runs/vq --image-size 64 --grid 8"
    )
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="SOURCE", help="tars or folders")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--limit", type=int, default=50_000, help="images kept in memory (default: 50000)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")

    import torch

    from megatron_ext.vq.training import VQTrainingConfig, train
    from megatron_ext.vq.training_images import load_images

    settings = fields(VQTrainingConfig)
    for setting in settings:
        option = f"--{setting.name.replace('_', '-')}"
        if setting.type is bool:
            parser.add_argument(option, action="store_true", help="each code depends on its own patch only")
        else:
            parser.add_argument(option, type=setting.type, default=setting.default, help=f"default: {setting.default}")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = VQTrainingConfig(**{setting.name: getattr(arguments, setting.name) for setting in settings})
    images = load_images(arguments.images, config.image_size, arguments.limit)
    numbers = train(images, arguments.out, config)
    print(
        f"{arguments.out}: PSNR {numbers['psnr']:.2f} dB on {config.held_out} held-out images, "
        f"{100 * numbers['codebook_use']:.0f} % of {config.codebook_size} codes in use "
        f"(perplexity {numbers['codebook_perplexity']:.0f}); see {arguments.out / 'reconstructions.png'}"
    )
    if arguments.json:
        files.write_json(arguments.json, numbers)


if __name__ == "__main__":
    command_line.run(main)

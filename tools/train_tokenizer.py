"""Create a vocabulary from a SentencePiece model, trained now or existing, and the codes of a VQ tokenizer."""

from pathlib import Path

from megatron_ext import command_line, files, tokenizer
from megatron_ext.errors import UserError
from megatron_ext.vocabulary import Vocabulary


def main() -> None:
    parser = command_line.parser(
        __doc__,
        "python tools/train_tokenizer.py --texts data/train-*.tar --vq runs/vq --out runs/vocabulary\n"
        "  python tools/train_tokenizer.py --from-model tokenizer.model --codebook-size 16384 --out runs/vocabulary",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--texts", type=Path, nargs="+", metavar="FILE", help="WebDataset tars, LLaVA .json, .jsonl, or plain text"
    )
    source.add_argument("--from-model", type=Path, metavar="FILE", help="a SentencePiece model, for example LLaMA's")
    codes = parser.add_mutually_exclusive_group(required=True)
    codes.add_argument("--vq", type=Path, metavar="FOLDER", help="VQ tokenizer that encodes the images")
    codes.add_argument("--codebook-size", type=int, metavar="N", help="number of VQ codes, instead of --vq")
    parser.add_argument(
        "--vocab-size", type=int, default=1024, help="number of pieces of a trained model (default: 1024)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()

    codebook_size = arguments.codebook_size or _codebook_size(arguments.vq)
    model_file, count = arguments.from_model, None
    if model_file is None:
        model_file = arguments.out / "tokenizer.model"
        count = tokenizer.train(arguments.texts, model_file, arguments.vocab_size)
        print(f"{model_file}: {arguments.vocab_size} pieces from {count:,} texts")
    vocabulary = Vocabulary.create(arguments.out, model_file, codebook_size)
    print(
        f"{arguments.out}: {vocabulary.text_size} text, {vocabulary.image_offset - vocabulary.text_size} special, "
        f"{codebook_size} image tokens; fingerprint {vocabulary.fingerprint}"
    )
    if arguments.json:
        files.write_json(
            arguments.json,
            {
                "texts": count,
                "text_size": vocabulary.text_size,
                "codebook_size": codebook_size,
                "size": vocabulary.size,
                "fingerprint": vocabulary.fingerprint,
            },
        )


def _codebook_size(folder: Path) -> int:
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; train a VQ tokenizer with tools/train_vq.py")
    from megatron_ext import vq

    return vq.load(folder).codebook_size


if __name__ == "__main__":
    command_line.run(main)

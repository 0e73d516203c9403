"""Create a vocabulary from a text model, trained now or that of a language model, and the codes of a VQ tokenizer."""

import argparse
from pathlib import Path

from megatron_ext import command_line, files, text_model, tokenizer, tokenizer_files
from megatron_ext.errors import UserError
from megatron_ext.vocabulary import Vocabulary


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.texts and (arguments.bos or arguments.answer_end or arguments.chat_template):
        parser.error("--bos, --answer-end and --chat-template belong to --from-model")

    codebook_size = arguments.codebook_size or _codebook_size(arguments.vq)
    if arguments.from_model is None:
        model_file = arguments.out / text_model.SENTENCEPIECE
        count = tokenizer.train(arguments.texts, model_file, arguments.vocab_size)
        print(f"{model_file}: {arguments.vocab_size} pieces from {count:,} texts")
        vocabulary = Vocabulary.create(arguments.out, model_file, codebook_size)
    else:
        count, vocabulary = None, _from_model(arguments, codebook_size)
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
                "bos": vocabulary.bos,
                "answer_end": vocabulary.answer_end,
                "segment_prefix": vocabulary.segment_prefix,
            },
        )


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser(
        __doc__,
        "python tools/train_tokenizer.py --texts data/train-*.tar --vq runs/vq --out runs/vocabulary\n"
        "  python tools/train_tokenizer.py --from-model models/qwen3 --chat-template model --vq V --out runs/words",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--texts", type=Path, nargs="+", metavar="FILE", help="WebDataset tars, LLaVA .json, .jsonl, or plain text"
    )
    source.add_argument(
        "--from-model",
        type=Path,
        metavar="PATH",
        help="folder of a language model, or its tokenizer.json or tokenizer.model (SentencePiece)",
    )
    parser.add_argument("--bos", metavar="TOKEN", help="opens documents (default: what the model's files say)")
    parser.add_argument(
        "--answer-end", metavar="TOKEN", help="ends answers (default: the end of a turn in the chat template, or <eod>)"
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja template in which conversations and questions are written; 'model': that of --from-model",
    )
    codes = parser.add_mutually_exclusive_group(required=True)
    codes.add_argument("--vq", type=Path, metavar="FOLDER", help="VQ tokenizer that encodes the images")
    codes.add_argument("--codebook-size", type=int, metavar="N", help="number of VQ codes, instead of --vq")
    parser.add_argument(
        "--vocab-size", type=int, default=1024, help="number of pieces of a trained model (default: 1024)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    return parser


def _from_model(arguments: argparse.Namespace, codebook_size: int) -> Vocabulary:
    model = tokenizer_files.read(arguments.from_model, arguments.chat_template, arguments.bos, arguments.answer_end)
    vocabulary = Vocabulary.create(
        arguments.out,
        model.file,
        codebook_size,
        bos=model.bos,
        end=model.end,
        answer_end=model.answer_end,
        chat_template=model.chat_template,
    )
    names = {i: vocabulary.text.piece(i) for i in (vocabulary.bos, vocabulary.answer_end)} | {vocabulary.eod: "<eod>"}
    print(
        f"{model.file}: documents open with {names[vocabulary.bos]}, answers end with {names[vocabulary.answer_end]}, "
        f"{'a' if vocabulary.chat_template else 'no'} chat template; in the model's training documents ended with "
        f"{'an unknown token' if vocabulary.text.end is None else vocabulary.text.piece(vocabulary.text.end)}"
    )
    return vocabulary


def _codebook_size(folder: Path) -> int:
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; train a VQ tokenizer with tools/train_vq.py")
    from megatron_ext import vq

    return vq.load(folder).codebook_size


if __name__ == "__main__":
    command_line.run(main)

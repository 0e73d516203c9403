"""Generate pictures from captions, answers to questions about pictures, and edited pictures, with a trained
checkpoint."""

import argparse
import sys
from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.errors import UserError
from megatron_ext.generation.request import GUIDANCE


def main() -> None:
    arguments = _arguments()
    # Imported late: --help and bad usage should not wait for Megatron-Core.
    from megatron_ext.generation.checkpoint import load
    from megatron_ext.generation.session import Session

    trained = load(arguments.checkpoint, arguments.overrides, arguments.vocabulary)
    session = Session(trained, arguments.vq, arguments.batch_size)
    results = []

    def generate_pictures(captions: list[str]) -> None:
        settings = _sampling(arguments, temperature=1.0, guidance=GUIDANCE["captions"])
        results.extend(session.generate_pictures(captions, arguments.out, settings, first_number=len(results)))

    def edit(instructions: list[str]) -> None:
        settings = _sampling(arguments, temperature=1.0, guidance=GUIDANCE["edits"])
        results[:] = session.edit(arguments.edit, instructions, arguments.out, settings, earlier=results)

    def answer(questions: list[str]) -> None:
        settings = _sampling(arguments, temperature=0.0)
        results.extend(session.ask(arguments.image, questions, arguments.max_new_tokens, settings))

    try:
        if arguments.prompt:
            generate_pictures(arguments.prompt)
        if arguments.question:
            answer(arguments.question)
        if arguments.instruction:
            edit(arguments.instruction)
        respond, prompt = (answer, "question") if arguments.image else (generate_pictures, "caption")
        if arguments.edit:
            respond, prompt = edit, "instruction"
        while arguments.interactive and (line := session.read_line(prompt)):
            respond([line])
        if arguments.json and session.is_reporting_rank:
            files.write_json(arguments.json, results)
    finally:
        session.close()


def _arguments() -> argparse.Namespace:
    parser = command_line.parser(
        __doc__,
        "python tools/generate.py --checkpoint runs/quickstart/training --vq runs/quickstart/vq \\\n"
        '      --prompt "a red circle to the left of a blue square" --out runs/pictures\n'
        "  python tools/generate.py --checkpoint runs/quickstart/training --vq runs/quickstart/vq \\\n"
        '      --image picture.jpg --question "how many circles are there?"\n'
        "  python tools/generate.py --checkpoint runs/editing/training --vq runs/editing/vq \\\n"
        '      --edit picture.png --instruction "Make the circle red." --instruction "Move the circle up."',
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FOLDER", help="a checkpoint, or a run (its newest one)")
    add("--vq", type=Path, required=True, metavar="FOLDER", help="the VQ tokenizer that the model was trained with")
    add("--vocabulary", type=Path, metavar="FOLDER", help="the run's vocabulary, if it was moved")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a caption; repeatable")
    add("--prompts", type=Path, metavar="FILE", help="captions, one a line")
    add("--image", type=Path, metavar="FILE", help="a picture to ask about")
    add("--question", action="append", default=[], metavar="TEXT", help="about the picture; repeatable")
    add("--edit", type=Path, metavar="FILE", help="a picture to edit")
    add(
        "--instruction",
        action="append",
        default=[],
        metavar="TEXT",
        help="how to edit it; repeatable: each applies to the picture drawn last",
    )
    add(
        "--interactive",
        action="store_true",
        help="read captions (with --image: questions, with --edit: instructions) until the end of input",
    )
    add("--out", type=Path, default=Path("runs/pictures"), metavar="FOLDER", help="folder for pictures")
    add("--temperature", type=float, help="0: the most likely token (default: 1 for pictures, 0 for answers)")
    add("--top-k", type=int, default=0, help="only the k most likely tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="only the most likely tokens with this total probability")
    add(
        "--guidance",
        type=float,
        help="scale of classifier-free guidance for pictures; 1: none (default: {captions} for captions, {edits} for "
        "edits)".format(**GUIDANCE),
    )
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=16, help="documents that are decoded together")
    add("--max-new-tokens", type=int, default=32, help="maximum length of an answer")
    add("overrides", nargs="*", metavar="section.key=value", help="plan.* changes the roles of tokens")
    arguments = parser.parse_args()
    arguments.prompt += _lines(arguments.prompts)
    if not (arguments.prompt or arguments.question or arguments.instruction or arguments.interactive):
        needed = "--prompt, --prompts, --image with --question, --edit with --instruction, or --interactive"
        parser.error(f"nothing to do: give {needed}")
    if arguments.question and not arguments.image:
        parser.error("--question needs --image")
    if arguments.instruction and not arguments.edit:
        parser.error("--instruction needs --edit")
    if arguments.edit and (arguments.prompt or arguments.image):
        parser.error("--edit goes without --prompt, --prompts and --image")
    return arguments


def _sampling(arguments: argparse.Namespace, temperature: float, guidance: float = 1.0) -> dict:
    """Settings of sampling; ``temperature`` and ``guidance`` are the defaults. Answers have no guidance."""
    if arguments.temperature is not None:
        temperature = arguments.temperature
    if arguments.guidance is not None and guidance != 1:
        guidance = arguments.guidance
    settings = {"temperature": temperature, "top_k": arguments.top_k, "top_p": arguments.top_p, "seed": arguments.seed}
    return settings | {"guidance": guidance}


def _lines(file: Path | None) -> list[str]:
    try:
        return [line.strip() for line in file.read_text().splitlines() if line.strip()] if file else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}") from None


if __name__ == "__main__":
    sys.exit(command_line.run(main))

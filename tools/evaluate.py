"""Benchmarks: generate and score a checkpoint's answers and pictures for the released questions and prompts; or only
score saved ones."""

import argparse
from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.errors import UserError
from megatron_ext.evaluation import score_table as table
from megatron_ext.evaluation.registry import BENCHMARKS, DRAWN, EDITS, PICTURES, benchmark_named
from megatron_ext.generation.request import GUIDANCE


def main() -> None:
    arguments = _arguments()
    if arguments.checkpoint and not _generate(arguments):
        return
    # Scoring is as long a part of the whole as one benchmark.
    with command_line.whole().part(_share(arguments, len(arguments.benchmark)) if arguments.checkpoint else 0.0, 1.0):
        scored = _scored(arguments)
    text = table.markdown(scored)
    if arguments.json:
        files.write_json(arguments.json, table.as_json(scored))
    if arguments.markdown:
        files.write_text(arguments.markdown, text)
    print(text, end="")


def _arguments() -> argparse.Namespace:
    """The parsed arguments, with one of ``data``, ``score``, ``parts`` and ``label`` per benchmark."""
    parser = command_line.parser(
        "Answer GQA, MME, POPE and SEED-Bench (image) with a checkpoint, generate pictures for MJHQ-30K, and edit\n"
        "pictures of the picture world; or only score existing answers (files with a JSON object {id, answer} per\n"
        "line) and folders of pictures.\n"
        "--benchmark, --data and --score are given once per benchmark, in the same order. A stopped run resumes; all\n"
        "processes of torchrun share the work. docs/evaluation.md explains the scores.",
        "python tools/evaluate.py --checkpoint runs/my --vq checkpoints/janus --benchmark pope --data data/pope \\\n"
        "      --benchmark mjhq --data data/mjhq --inception inception-2015-12-05.pt --out runs/my/answers\n"
        "  "
        "python tools/evaluate.py --benchmark pope --data data/pope --score runs/my/answers/pope.jsonl \\\n"
        "      --benchmark mjhq --data data/mjhq --score runs/my/answers/mjhq --markdown scores.md",
    )
    add = parser.add_argument
    add("--benchmark", action="append", required=True, choices=[*BENCHMARKS, *DRAWN], help="name")
    add("--data", action="append", required=True, type=Path, metavar="FOLDER", help="the benchmark as released")
    add("--score", action="append", type=Path, metavar="PATH", help="the answers file, or folder of pictures, to score")
    add(
        "--checkpoint", type=Path, metavar="FOLDER", help="first generate with this checkpoint (or the newest of a run)"
    )
    add("--vq", type=Path, metavar="FOLDER", help="the VQ tokenizer that the checkpoint was trained with")
    add("--vocabulary", type=Path, metavar="FOLDER", help="the run's vocabulary, if it was moved")
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="answers go to FOLDER/<benchmark>.jsonl, pictures to FOLDER/mjhq and FOLDER/edits",
    )
    add(
        "--set-aside",
        action="store_true",
        help="move results of another model or of other questions in --out to NAME.before-N instead of refusing",
    )
    add("--tensor", type=int, default=1, help="tensor-parallel size; further processes are replicas")
    add("--batch-size", type=int, default=16, help="questions, or pictures, per batch")
    add("--max-new-tokens", type=int, default=16, help="most tokens of an answer")
    add("--parts", action="append", metavar="A,B", help="only these splits, subtasks or categories, or 'all'")
    add("--label", action="append", metavar="NAME", help="label of the answers (default: the file's folder)")
    add("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    add("overrides", nargs="*", metavar="section.key=value", help="plan.* changes the roles that the model uses")
    _add_picture_options(parser)
    arguments = parser.parse_args()
    if arguments.checkpoint:
        if arguments.score or not (arguments.vq and arguments.out):
            parser.error("--checkpoint needs --vq and --out, and goes without --score")
        names = [name if name in DRAWN else f"{name}.jsonl" for name in arguments.benchmark]
        arguments.score = [arguments.out / name for name in names]
    elif not arguments.score:
        parser.error("give --score, or --checkpoint with --vq and --out")
    if PICTURES not in arguments.benchmark and (arguments.inception or arguments.clip):
        parser.error(f"--inception and --clip are for --benchmark {PICTURES}")
    for name in ("data", "score", "parts", "label"):
        setattr(arguments, name, _each(parser, arguments, name))
    arguments.parts = [None if parts in (None, "all") else parts.split(",") for parts in arguments.parts]
    return arguments


def _add_picture_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pictures (mjhq, edits)").add_argument
    add("--temperature", type=float, default=1.0, help="0: the most likely token (default: %(default)s)")
    add("--top-k", type=int, default=0, help="only the k most likely tokens; 0: all (default)")
    add("--top-p", type=float, default=1.0, help="only the most likely tokens of this total probability")
    add(
        "--guidance",
        type=float,
        help="scale of classifier-free guidance; 1: none (default: {captions} for mjhq, {edits} for edits)".format(
            **GUIDANCE
        ),
    )
    add("--seed", type=int, default=0, help="seed of the pictures (together with the prompt's number)")
    add("--inception", type=Path, metavar="FILE", help="inception-2015-12-05.pt, for FID (default: built-in features)")
    add("--clip", type=Path, metavar="FOLDER", help="a CLIP model as transformers saves it, for the CLIP score")


def _each(parser: argparse.ArgumentParser, arguments: argparse.Namespace, name: str) -> list:
    """The values of an option that is given once per benchmark, or never if it is optional."""
    values = getattr(arguments, name)
    if values is None:
        return [None] * len(arguments.benchmark)
    if len(values) != len(arguments.benchmark):
        parser.error(f"--{name} is given {len(values)} times for {len(arguments.benchmark)} times --benchmark")
    return values


def _generate(arguments: argparse.Namespace) -> bool:
    """Generate all answers and pictures. Returns whether this process scores them."""
    # Imported late: --help and scoring alone should not wait for Megatron-Core.
    import torch.distributed as dist

    from megatron_ext.checkpoints import folder as checkpoint_folder
    from megatron_ext.evaluation import answer_generation, edits, mjhq, picture_generation
    from megatron_ext.generation.checkpoint import load
    from megatron_ext.generation.sampling import Sampling
    from megatron_ext.generation.session import Session

    # Checked before hours of generating rather than after.
    if missing := [path for path in (arguments.inception, arguments.clip) if path and not path.exists()]:
        raise UserError(f"{missing[0]}: no such file or folder")
    drawn = {
        PICTURES: (mjhq, picture_generation.picture_request, GUIDANCE["captions"]),
        EDITS: (edits, picture_generation.edit_request, GUIDANCE["edits"]),
    }
    items_of_each = [
        (drawn[name][0] if name in DRAWN else benchmark_named(name)).read(data, parts)
        for name, data, parts in zip(arguments.benchmark, arguments.data, arguments.parts)
    ]
    checkpoint = checkpoint_folder.of_run(arguments.checkpoint)
    trained = load(checkpoint, arguments.overrides, arguments.vocabulary, arguments.tensor)
    session = Session(trained, arguments.vq, arguments.batch_size)
    try:
        jobs = list(zip(arguments.benchmark, arguments.data, items_of_each, arguments.score))
        for number, (name, data, items, out) in enumerate(jobs):
            with command_line.whole().part(_share(arguments, number), _share(arguments, number + 1)):
                if name in DRAWN:
                    reader, request, guidance = drawn[name]
                    guidance = guidance if arguments.guidance is None else arguments.guidance
                    sampling = Sampling(
                        arguments.temperature, arguments.top_k, arguments.top_p, guidance, arguments.seed
                    )
                    settings = picture_generation.picture_settings(
                        session, checkpoint, reader.fingerprint(data), sampling
                    )
                    picture_generation.generate(session, items, out, sampling, settings, arguments.set_aside, request)
                    continue
                answer_generation.claim(session, checkpoint, items, out, arguments.max_new_tokens, arguments.set_aside)
                if unanswered := answer_generation.answer(session, items, out, arguments.max_new_tokens):
                    print(f"{out}: {unanswered} questions stay unanswered", flush=True)
        return dist.get_rank() == 0
    finally:
        session.close()


def _share(arguments: argparse.Namespace, benchmarks: int) -> float:
    """The share of the whole that so many benchmarks are, before scoring."""
    return benchmarks / (len(arguments.benchmark) + 1)


def _scored(arguments: argparse.Namespace) -> list[table.Scored]:
    scored, scorer = [], None
    for name, data, file, parts, label in zip(
        arguments.benchmark, arguments.data, arguments.score, arguments.parts, arguments.label
    ):
        label = label or str(file.parent)
        if name == PICTURES:
            # Imported late: answers are scored without torch.
            from megatron_ext.evaluation.picture_scorer import PictureScorer

            scorer = scorer or PictureScorer(arguments.inception, arguments.clip, arguments.vq)
            scored += scorer.score(data, parts, file, label)
        elif name == EDITS:
            from megatron_ext.evaluation.edits import score_folder

            scored.append(score_folder(data, parts, file, label))
        else:
            benchmark = benchmark_named(name)
            scored.append(table.score_file(benchmark, benchmark.read(data, parts), file, label))
    return scored


if __name__ == "__main__":
    command_line.run(main)

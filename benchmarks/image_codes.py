"""Image tokens of several codes beside image tokens of one code on the picture world: the same pictures, as many
positions, codebooks of the same size.

Reads answers and pictures that tools/evaluate.py made with --benchmark gqa and mjhq, and the tokenizers' training.json.
The control checks pictures against the captions of other pictures. Intervals are 95 %, by resampling questions or
captions; both sides of a difference are resampled together.
"""

from pathlib import Path

import numpy as np

from editing import compare, markdown, questions, seen_pictures
from megatron_ext import command_line
from megatron_ext.evaluation import mjhq
from megatron_ext.evaluation.detected_files import detect_all
from megatron_ext.evaluation.faithfulness import ALL, ROWS, WHOLE, count_facts
from megatron_ext.evaluation.scene_check import caption_facts, reconstructions
from megatron_ext.files import read_json, write_json
from megatron_ext.vq import VQModel, load

NAMES = ["facts of captions", "whole pictures"]
_ROWS = [ROWS.index(ALL), ROWS.index(WHOLE)]


def drawn(data: Path, scores: Path) -> tuple[np.ndarray, np.ndarray]:
    """Right facts and all facts of generated pictures, [captions, 2, 2] (single facts, whole pictures): of their own
    captions, and of those of other pictures."""
    prompts = mjhq.read(data / "mjhq")
    seen, facts = seen_pictures(prompts, scores / "mjhq"), caption_facts(prompts)
    own, others = count_facts([seen.get(id) for id in facts], list(facts.values()))
    return own[:, _ROWS], others[:, _ROWS]


def at_best(data: Path, vq: VQModel) -> np.ndarray:
    """The same, of the captions' own pictures as a tokenizer reconstructs them."""
    prompts = mjhq.read(data / "mjhq")
    facts = caption_facts(prompts)
    files = [(prompt.id, mjhq.image_file(data / "mjhq", prompt)) for prompt in prompts if prompt.id in facts]
    seen = detect_all(reconstructions(vq, files), len(files))
    return count_facts([seen.get(id) for id in facts], list(facts.values()), control=False)[0][:, _ROWS]


def main() -> None:
    parser = command_line.parser(
        __doc__,
        "python benchmarks/image_codes.py --one runs/one/training/scores --several runs/several/training/scores \\\n"
        "      --vq runs/one/vq runs/several/vq --data runs/one/benchmarks/validation",
    )
    for name in ("one", "several"):
        help = f"scores of the run with {name} code{'s' * (name != 'one')} a token"
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FOLDER", help=help)
    parser.add_argument("--vq", type=Path, nargs=2, required=True, metavar="FOLDER", help="the two tokenizers")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with gqa/ and mjhq/")
    arguments = parser.parse_args()
    psnr = [read_json(folder / "training.json")["psnr"] for folder in arguments.vq]
    tokenizers = [load(folder) for folder in arguments.vq]
    codes = [f"{vq.depth} code{'s' * (vq.depth > 1)}" for vq in tokenizers]
    (one, one_others), (several, several_others) = (
        drawn(arguments.data, run) for run in (arguments.one, arguments.several)
    )
    results = {
        "reconstructed pictures": compare(NAMES, *(at_best(arguments.data, vq) for vq in tokenizers)),
        "drawn pictures": compare(NAMES, one, several),
        f"{codes[0]}, against others' captions": compare(NAMES, one_others, one),
        f"{codes[1]}, against others' captions": compare(NAMES, several_others, several),
        "questions": compare(
            ["answers"], *(questions(arguments.data, run) for run in (arguments.one, arguments.several))
        ),
    }
    print(", ".join(f"{name}: {value:.2f} dB" for name, value in zip(codes, psnr)))
    heads = {part: ("others'", "own") if "others" in part else tuple(codes) for part in results}
    print("\n" + markdown(results, heads))
    if arguments.json:
        write_json(arguments.json, {**results, "psnr": psnr})


if __name__ == "__main__":
    command_line.run(main)

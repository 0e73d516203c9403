"""Decoding with a cache: tokens per second against Hugging Face and against no cache, and plans against their FLOPs.

    python benchmarks/decode.py
    python benchmarks/decode.py --rows 16 --only picture --rounds 3

Batches of two kinds of documents are continued greedily: ``picture``, a caption of 24 tokens, with 256 image tokens;
``answer``, a picture of 256 tokens and a question of 24, with 64 text tokens. Hugging Face's
``generate`` has the same weights, prompts and allowed tokens, and must choose the same tokens, or there is no result.
So must decoding without a cache, a forward pass over the whole row for each token, which is measured for some tokens.
One more side draws pictures of as many image tokens of several codes (``--depth``), with a depth head whose share of
the FLOPs is that of VILA-U's 7B model.

The sides take turns; a ratio is the median of the rounds' ratios. ``first token`` is the time to read the prompts,
``tokens/s`` counts what follows. On CPUs every side has one thread and CPU time is measured, which other processes
disturb less. On GPUs it is wall time.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from decoding.documents import KINDS, TokenIds, document_rows, requests
from decoding.sides import (
    Continued,
    build_generator,
    build_hugging_face,
    build_several_codes,
    decode_cached,
    decode_hugging_face,
    decode_uncached,
)
from megatron_ext import command_line, config_file, files
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.generation.generator import Generator
from megatron_ext.routing.flops import count, forward_flops
from megatron_ext.routing.plan import PRESETS, Plan
from megatron_ext.training.config_checks import validate

UNCACHED_TOKENS = 8
SEVERAL_CODES = "several codes"


def configuration(layers: int, hidden_size: int, preset: str, depth: int = 1) -> Config:
    """The model under test as a run's configuration; with several codes an image token (``depth``) it has a depth head
    of half its width and a quarter of its layers."""
    shape = {"num_layers": layers, "hidden_size": hidden_size, "num_attention_heads": max(1, hidden_size // 64)}
    if depth > 1:
        width = hidden_size // 2
        head = {"num_layers": max(1, layers // 4), "hidden_size": width, "num_attention_heads": max(1, width // 64)}
        codes = {"depth": depth, "codebook_size": TokenIds.size - TokenIds.image_offset, "width": width, "head": head}
        shape["image_codes"] = json.dumps(codes | {"codebook": "random"})
    return config_file.load(Config, [], [*(f"model.{k}={v}" for k, v in shape.items()), f"plan.preset={preset}"])


def flops(config: Config, kind: str, new: int) -> tuple[int, int]:
    """FLOPs per row up to the first token, and those of the ``new - 1`` tokens after it."""
    (request,) = requests(kind, 1)
    follows = [TokenIds.image_offset if kind == "picture" else TokenIds.eod] * (new - 1)
    plan, depth = Plan.from_config(config), config.model.image_codes.depth
    vocab_size = TokenIds.size if depth == 1 else TokenIds.image_offset

    def forward(tokens: Sequence[int], asked: int) -> int:
        batch = document_rows(kind, [tokens], asked)
        if depth > 1:
            batch.codes = torch.zeros(*batch.shape, depth, dtype=torch.int32)
        return forward_flops(config.model, vocab_size, plan, count(batch, plan))

    prompt = forward(request.tokens, 1)
    return prompt, forward([*request.tokens, *follows], new) - prompt


def measure(sides: dict[str, Callable[[], Continued]], rounds: int) -> dict[str, list[Continued]]:
    """How each side continued in each round. The sides take turns; the first round does not count."""
    rounds_of = {name: [] for name in sides}
    for number in command_line.progress(range(rounds + 1), desc="rounds"):
        for name, side in sides.items():
            continued = side()
            if number:
                rounds_of[name].append(continued)
    return rounds_of


def ratio(side: Sequence[Continued], base: Sequence[Continued], figure: str) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(getattr(a, figure) / getattr(b, figure) for a, b in zip(side, base))


def against_others(kind: str, rounds: dict[str, list[Continued]], generator: Generator, tokens: int) -> dict:
    """The dense plan against Hugging Face and against no cache.

    Raises:
        UserError: they do not choose the same tokens.
    """
    dense, hugging_face = rounds["dense"], rounds["Hugging Face"]
    rows = len(dense[0].tokens)
    if any(a.tokens != b.tokens for a, b in zip(dense, hugging_face)):
        raise UserError(f"{kind}, {rows} rows: Hugging Face chooses other tokens")
    rate, different = decode_uncached(generator, kind, dense[0].tokens, tokens)
    if different:
        raise UserError(f"{kind}, {rows} rows: decoding without a cache chooses {different} other tokens")
    return {
        "tokens_per_second": statistics.median(c.rate for c in dense),
        "first_token_seconds": statistics.median(c.first for c in dense),
        "hugging_face_tokens_per_second": statistics.median(c.rate for c in hugging_face),
        "over_hugging_face": ratio(dense, hugging_face, "rate"),
        "first_token_over_hugging_face": ratio(dense, hugging_face, "first"),
        "over_uncached": statistics.median(c.rate for c in dense) / rate,
        "distinct_tokens": len({token for row in dense[0].tokens for token in row}),
    }


def plans(kind: str, rounds: dict[str, list[Continued]], configs: dict[str, Config]) -> dict:
    """Every plan against the dense one: seconds to the first token and per token, and FLOPs."""
    new = len(rounds["dense"][0].tokens[0])
    dense = flops(configs["dense"], kind, new)
    results = {}
    for preset, config in configs.items():
        first, following = flops(config, kind, new)
        results[preset] = {
            "first_token": ratio(rounds[preset], rounds["dense"], "first"),
            "first_token_flops": first / dense[0],
            "per_token": ratio(rounds["dense"], rounds[preset], "rate"),
            "per_token_flops": following / dense[1],
        }
    return results


def several_codes(rounds: dict[str, list[Continued]], config: Config, dense: Config) -> dict:
    """Image tokens of several codes against those of one: seconds per token, and FLOPs."""
    new = len(rounds["dense"][0].tokens[0])
    return {
        "depth": config.model.image_codes.depth,
        "per_token": ratio(rounds["dense"], rounds[SEVERAL_CODES], "rate"),
        "per_token_flops": flops(config, "picture", new)[1] / flops(dense, "picture", new)[1],
    }


def table(results: dict[str, dict]) -> str:
    """The results as Markdown tables."""
    lines = [
        "| decoding | tokens/s | tokens/s / Hugging Face | / no cache | first token / Hugging Face |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, r in results.items():
        figures = [f"{r[key]:.2f}" for key in ("over_hugging_face", "over_uncached", "first_token_over_hugging_face")]
        lines.append(f"| {name} | {r['tokens_per_second']:.0f} | {' | '.join(figures)} |")
    lines += [
        "",
        "| decoding | plan | first token / dense | FLOPs | a token / dense | FLOPs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in results.items():
        for preset, plan in r["plans"].items():
            lines.append(f"| {name} | {preset} | {' | '.join(f'{value:.2f}' for value in plan.values())} |")
        if codes := r.get("several_codes"):
            figures = f"{codes['per_token']:.2f} | {codes['per_token_flops']:.2f}"
            lines.append(f"| {name} | dense, {codes['depth']} codes an image token | | | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "python benchmarks/decode.py --rounds 5")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--only", default=",".join(KINDS), help="comma-separated kinds of documents")
    parser.add_argument("--rows", default="1,16", help="comma-separated numbers of documents at once")
    parser.add_argument("--presets", default=",".join(PRESETS), help="comma-separated; dense comes along")
    parser.add_argument("--depth", type=int, default=4, help="codes of an image token of one more side; 1: without it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to FILE")
    arguments = parser.parse_args()

    from megatron_ext import distributed

    torch.set_num_threads(1)
    presets = list(dict.fromkeys(["dense", *arguments.presets.split(",")]))
    configs = {preset: configuration(arguments.layers, arguments.hidden_size, preset) for preset in presets}
    for config in configs.values():
        validate(config, world_size=1)
    distributed.initialize(configs["dense"])
    llama = build_hugging_face(configs["dense"])
    generators = {preset: build_generator(config, llama) for preset, config in configs.items()}
    codes = configuration(arguments.layers, arguments.hidden_size, "dense", arguments.depth)
    codes_generator = build_several_codes(codes) if arguments.depth > 1 else None
    results = {}
    for kind in arguments.only.split(","):
        for rows in map(int, arguments.rows.split(",")):
            sides = {preset: partial(decode_cached, generator, kind, rows) for preset, generator in generators.items()}
            # Next to the dense plan, so that both meet the same load of the machine.
            sides = {"Hugging Face": partial(decode_hugging_face, llama, kind, rows), **sides}
            if kind == "picture" and codes_generator:
                sides[SEVERAL_CODES] = partial(decode_cached, codes_generator, kind, rows)
            continued = measure(sides, arguments.rounds)
            result = against_others(kind, continued, generators["dense"], UNCACHED_TOKENS)
            result["plans"] = plans(kind, continued, configs)
            if SEVERAL_CODES in continued:
                result["several_codes"] = several_codes(continued, codes, configs["dense"])
            results[f"{kind}, {rows} at once"] = result
    print(table(results))
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "markdown")}
        files.write_json(arguments.json, {"arguments": settings} | results)
    if arguments.markdown:
        arguments.markdown.write_text(table(results) + "\n")
    distributed.shut_down()


if __name__ == "__main__":
    command_line.run(main)

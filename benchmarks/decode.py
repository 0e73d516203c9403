"""Decoding with a cache: tokens per second against Hugging Face and against no cache, and plans against their FLOPs.

    python benchmarks/decode.py
    python benchmarks/decode.py --rows 16 --only picture --rounds 3

Two kinds of documents are continued greedily, some at once: ``picture``, a caption of 24 tokens and 256 image tokens
to be drawn; ``answer``, a picture of 256 tokens with a question of 24 and 64 text tokens to be written. Hugging Face's
``generate`` has the same weights, prompts and allowed tokens, and must choose the same tokens, or there is no result.
So must decoding without a cache, a forward pass over the whole row for each token, of which some tokens are measured.

The sides take turns; a ratio is the median of the rounds' ratios. ``first token`` is the time to read the prompts,
``tokens/s`` counts what follows. On CPUs every side has one thread, and its CPU time counts: what others do on the
machine disturbs that less. On GPUs it is the time of day.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext import command_line, config_file, cpu, files
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError
from megatron_ext.generation.generator import Generator, Request
from megatron_ext.generation.sampling import Sampling
from megatron_ext.routing.cost import count, forward_flops
from megatron_ext.routing.plan import PRESETS, Plan
from megatron_ext.routing.route import Route
from megatron_ext.token_classes import Modality, Task
from megatron_ext.training.validation import validate

GRID = (16, 16)
IMAGE, TEXT, ANSWER = GRID[0] * GRID[1], 24, 64
KINDS = {"picture": Task.GENERATION, "answer": Task.UNDERSTANDING}
UNCACHED_TOKENS = 8
GREEDY = Sampling(temperature=0)


class Words:
    """The token ids of a vocabulary as large as that of ``benchmarks/step_time.py``, without any words."""

    text_size, image_offset, size = 2044, 2048, 4096
    bos, pad, eod, boi, eoi = 1, 2044, 2045, 2046, 2047

    @classmethod
    def is_image(cls, ids):
        return ids >= cls.image_offset


def clock() -> float:
    """Seconds."""
    torch.cuda.synchronize()
    return time.process_time() if cpu.available() else time.perf_counter()


@dataclass
class Continued:
    """What one side made of the prompts.

    Attributes:
        tokens: of each row.
        first: seconds to the first token of all rows.
        rate: tokens per second of all rows together, after the first.
    """

    tokens: list[list[int]]
    first: float
    rate: float

    @classmethod
    def timed(cls, run: Callable[[Callable[[], None]], list[list[int]]]) -> "Continued":
        """``run`` calls what it is given whenever each row has one more token."""
        started, ticks = clock(), []

        tokens = run(lambda *unused: ticks.append(clock()))
        n = len(tokens[0])
        return cls(tokens, ticks[0] - started, len(tokens) * (n - 1) / (ticks[n - 1] - ticks[0]))


def configuration(layers: int, hidden_size: int, preset: str) -> Config:
    """The model under test as a run's configuration."""
    shape = {"num_layers": layers, "hidden_size": hidden_size, "num_attention_heads": max(1, hidden_size // 64)}
    return config_file.load(Config, [], [*(f"model.{k}={v}" for k, v in shape.items()), f"plan.preset={preset}"])


def requests(kind: str, rows: int) -> list[Request]:
    """Documents of random tokens to go on with."""
    random = torch.Generator().manual_seed(rows)
    text = torch.randint(3, Words.text_size, (rows, TEXT - 2), generator=random).tolist()
    image = torch.randint(Words.image_offset, Words.size, (rows, IMAGE), generator=random).tolist()
    if kind == "picture":
        return [Request([Words.bos, *t, Words.boi], Task.GENERATION, images=1) for t in text]
    prompts = ([Words.bos, Words.boi, *i, Words.eoi, *t[1:]] for t, i in zip(text, image))
    return [Request(prompt, Task.UNDERSTANDING, text_tokens=ANSWER) for prompt in prompts]


def allowed(kind: str) -> Tensor:
    """Tokens that may be chosen, bool [vocabulary]."""
    ids = torch.arange(Words.size)
    if kind == "picture":
        return Words.is_image(ids)
    return (ids < Words.text_size) & (ids != Words.bos) | (ids == Words.eod)


def build_hugging_face(config: Config):
    """Hugging Face's Llama with random weights, under which nothing ends early."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config.model
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=Words.size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            rms_norm_eps=model.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            bos_token_id=Words.bos,
            eos_token_id=Words.eod,
            pad_token_id=Words.pad,
        )
    )
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.dim() == 2:  # larger than at the start of a training, so that the tokens are not always the same
                weight.normal_(std=0.05, generator=random)
        theirs.lm_head.weight[Words.eod] = 0
    return theirs.cuda().eval()


def build_ours(config: Config, theirs) -> Generator:
    """Our model under a plan, with the same weights."""
    from megatron_ext.conversion.hugging_face import from_llama
    from megatron_ext.transformer.model import build_chunks

    (model,) = build_chunks(config, Words.size)
    model.load_state_dict(from_llama(theirs.state_dict(), config.model), strict=False)
    return Generator(model.eval(), Plan.of(config.plan, config.model.num_layers), Words, GRID)


def ours(generator: Generator, kind: str, rows: int) -> Continued:
    """Cached decoding."""
    new = IMAGE if kind == "picture" else ANSWER  # a picture's <eoi> is not chosen
    return Continued.timed(lambda tick: [made[:new] for made in generator(requests(kind, rows), GREEDY, tick)])


def hugging_face(model, kind: str, rows: int) -> Continued:
    """``generate`` with its default cache."""
    from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

    prompts = torch.tensor([request.tokens for request in requests(kind, rows)], device=model.device)
    refused = ~allowed(kind).to(model.device)

    class Tick(StoppingCriteria):
        def __init__(self, tick: Callable[[], None]):
            self.tick = tick

        def __call__(self, ids: Tensor, scores, **unused) -> Tensor:
            self.tick()
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    def run(tick: Callable[[], None]) -> list[list[int]]:
        made = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=IMAGE if kind == "picture" else ANSWER,
            logits_processor=LogitsProcessorList([lambda ids, scores: scores.masked_fill(refused, -torch.inf)]),
            stopping_criteria=StoppingCriteriaList([Tick(tick)]),
        )
        return made[:, prompts.shape[1] :].tolist()

    return Continued.timed(run)


def document_rows(kind: str, tokens: Sequence[Sequence[int]], asked: int) -> Batch:
    """Rows of equally long documents in which the logits of the last ``asked`` tokens are wanted."""
    ids = torch.tensor(tokens)
    batch = Batch.zeros(*ids.shape)
    batch.tokens[:], batch.positions[:] = ids, torch.arange(ids.shape[1])
    batch.modality[:] = Words.is_image(ids) * Modality.IMAGE
    batch.task[:] = KINDS[kind]
    batch.loss_mask[:, ids.shape[1] - asked :] = 1
    return batch


def uncached(generator: Generator, kind: str, made: Sequence[Sequence[int]], tokens: int) -> tuple[float, int]:
    """Tokens per second of a full forward pass for each token, over ``tokens`` tokens of the continuations ``made``,
    evenly spread, and how many of the tokens it chooses otherwise."""
    prompts = [list(request.tokens) for request in requests(kind, len(made))]
    refused, device = ~allowed(kind), next(generator.model.parameters()).device
    step, seconds, wrong = len(made[0]) // tokens, 0.0, 0
    for i in range(step - 1, len(made[0]), step):
        batch = document_rows(kind, [prompt + row[:i] for prompt, row in zip(prompts, made)], asked=1)
        started = clock()
        with torch.no_grad():
            logits = generator.model(Route.of(batch, generator.plan).to(device)).squeeze(1)
        chosen = logits.masked_fill(refused.to(device), -torch.inf).argmax(-1).tolist()
        seconds += clock() - started
        wrong += sum(a != row[i] for a, row in zip(chosen, made))
    return tokens * len(made) / seconds, wrong


def flops(config: Config, kind: str, new: int) -> tuple[int, int]:
    """FLOPs per row: of the prompt up to the first token, and of what follows for ``new - 1`` more."""
    (request,) = requests(kind, 1)
    follows = [Words.image_offset if kind == "picture" else Words.eod] * (new - 1)
    plan = Plan.of(config.plan, config.model.num_layers)

    def of(tokens: Sequence[int], asked: int) -> int:
        return forward_flops(config.model, Words.size, plan, count(document_rows(kind, [tokens], asked), plan))

    prompt = of(request.tokens, 1)
    return prompt, of([*request.tokens, *follows], new) - prompt


def measure(sides: dict[str, Callable[[], Continued]], rounds: int) -> dict[str, list[Continued]]:
    """What each side did in each round; they take turns, after a round that does not count."""
    made = {name: [] for name in sides}
    for number in command_line.progress(range(rounds + 1), desc="rounds"):
        for name, side in sides.items():
            continued = side()
            if number:
                made[name].append(continued)
    return made


def ratio(of: Sequence[Continued], over: Sequence[Continued], figure: str) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(getattr(a, figure) / getattr(b, figure) for a, b in zip(of, over))


def against_others(kind: str, made: dict[str, list[Continued]], generator: Generator, tokens: int) -> dict:
    """The dense plan against Hugging Face and against no cache.

    Raises:
        UserError: they do not choose the same tokens.
    """
    dense, theirs = made["dense"], made["Hugging Face"]
    rows = len(dense[0].tokens)
    if any(a.tokens != b.tokens for a, b in zip(dense, theirs)):
        raise UserError(f"{kind}, {rows} rows: Hugging Face chooses other tokens")
    rate, wrong = uncached(generator, kind, dense[0].tokens, tokens)
    if wrong:
        raise UserError(f"{kind}, {rows} rows: decoding without a cache chooses {wrong} other tokens")
    return {
        "tokens_per_second": statistics.median(c.rate for c in dense),
        "first_token_seconds": statistics.median(c.first for c in dense),
        "hugging_face_tokens_per_second": statistics.median(c.rate for c in theirs),
        "over_hugging_face": ratio(dense, theirs, "rate"),
        "first_token_over_hugging_face": ratio(dense, theirs, "first"),
        "over_uncached": statistics.median(c.rate for c in dense) / rate,
        "distinct_tokens": len({token for row in dense[0].tokens for token in row}),
    }


def plans(kind: str, made: dict[str, list[Continued]], configs: dict[str, Config]) -> dict:
    """Every plan against the dense one: seconds to the first token and per token, and FLOPs."""
    new = len(made["dense"][0].tokens[0])
    dense = flops(configs["dense"], kind, new)
    results = {}
    for preset, config in configs.items():
        first, following = flops(config, kind, new)
        results[preset] = {
            "first_token": ratio(made[preset], made["dense"], "first"),
            "first_token_flops": first / dense[0],
            "per_token": ratio(made["dense"], made[preset], "rate"),
            "per_token_flops": following / dense[1],
        }
    return results


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
    return "\n".join(lines)


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "python benchmarks/decode.py --rounds 5")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--only", default=",".join(KINDS), help="comma-separated kinds of documents")
    parser.add_argument("--rows", default="1,16", help="comma-separated numbers of documents at once")
    parser.add_argument("--presets", default=",".join(PRESETS), help="comma-separated; dense comes along")
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
    theirs = build_hugging_face(configs["dense"])
    generators = {preset: build_ours(config, theirs) for preset, config in configs.items()}
    results = {}
    for kind in arguments.only.split(","):
        for rows in map(int, arguments.rows.split(",")):
            sides = {preset: partial(ours, generator, kind, rows) for preset, generator in generators.items()}
            # Next to the dense plan, so that they meet the same machine.
            sides = {"Hugging Face": partial(hugging_face, theirs, kind, rows), **sides}
            made = measure(sides, arguments.rounds)
            result = against_others(kind, made, generators["dense"], UNCACHED_TOKENS)
            results[f"{kind}, {rows} at once"] = result | {"plans": plans(kind, made, configs)}
    print(table(results))
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "markdown")}
        files.write_json(arguments.json, {"arguments": settings} | results)
    if arguments.markdown:
        arguments.markdown.write_text(table(results) + "\n")
    distributed.shut_down()


if __name__ == "__main__":
    command_line.run(main)

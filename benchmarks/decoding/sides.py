"""The sides that are compared: cached decoding, Hugging Face's ``generate``, and decoding without a cache."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding import documents
from decoding.documents import TokenIds, allowed, document_rows, new_tokens, requests
from megatron_ext import cpu
from megatron_ext.config import Config
from megatron_ext.generation.generator import Generator
from megatron_ext.generation.pipelined_model import PipelinedModel
from megatron_ext.generation.sampling import Sampling
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.route import Route
from megatron_ext.transformer.resolved import resolve

GREEDY = Sampling(temperature=0)


def clock() -> float:
    """Seconds."""
    torch.cuda.synchronize()
    return time.process_time() if cpu.available() else time.perf_counter()


@dataclass
class Continued:
    """How one side continued the prompts.

    Attributes:
        tokens: the new tokens of each row.
        first: seconds to the first token of all rows.
        rate: tokens per second of all rows together, after the first.
    """

    tokens: list[list[int]]
    first: float
    rate: float

    @classmethod
    def timed(cls, run: Callable[[Callable[[], None]], list[list[int]]]) -> "Continued":
        """Time ``run``, which calls its argument whenever each row has one more token, and returns the new tokens."""
        started, ticks = clock(), []
        tokens = run(lambda *unused: ticks.append(clock()))
        n = len(tokens[0])
        return cls(tokens, ticks[0] - started, len(tokens) * (n - 1) / (ticks[n - 1] - ticks[0]))


def build_hugging_face(config: Config):
    """Hugging Face's Llama with random weights that never choose <eod>."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config.model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TokenIds.size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            rms_norm_eps=model.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            bos_token_id=TokenIds.bos,
            eos_token_id=TokenIds.eod,
            pad_token_id=TokenIds.pad,
        )
    )
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in llama.parameters():
            if weight.dim() == 2:  # larger than initial weights, so that different tokens are chosen
                weight.normal_(std=0.05, generator=random)
        llama.lm_head.weight[TokenIds.eod] = 0
    return llama.cuda().eval()


def build_generator(config: Config, llama) -> Generator:
    """Our model under a plan, with the weights of ``llama``."""
    from megatron_ext.hugging_face.weights import StateDict, parameters_of
    from megatron_ext.transformer.model import build_chunks

    (model,) = build_chunks(resolve(config, TokenIds.size))
    model.load_state_dict(parameters_of(StateDict(llama.state_dict(), config.model)), strict=False)
    return Generator(PipelinedModel([model.eval()]), Plan.from_config(config), TokenIds, documents.GRID)


def build_several_codes(config: Config) -> Generator:
    """Our model with several codes an image token, with random weights."""
    from megatron_ext.transformer.model import build_chunks

    (model,) = build_chunks(resolve(config, TokenIds.image_offset))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in [*model.parameters(), model.code_vectors.weight]:
            if weight.dim() == 2:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=random))
    return Generator(PipelinedModel([model.eval()]), Plan.from_config(config), TokenIds, documents.GRID)


def decode_cached(generator: Generator, kind: str, rows: int) -> Continued:
    """Cached decoding; of several codes an image token the tokens are the first ones."""
    new, step = new_tokens(kind), generator.depth
    return Continued.timed(
        lambda tick: [row[: new * step : step] for row in generator(requests(kind, rows), GREEDY, tick)]
    )


def decode_hugging_face(model, kind: str, rows: int) -> Continued:
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
        rows_of_tokens = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=new_tokens(kind),
            logits_processor=LogitsProcessorList([lambda ids, scores: scores.masked_fill(refused, -torch.inf)]),
            stopping_criteria=StoppingCriteriaList([Tick(tick)]),
        )
        return rows_of_tokens[:, prompts.shape[1] :].tolist()

    return Continued.timed(run)


def decode_uncached(
    generator: Generator, kind: str, continuations: Sequence[Sequence[int]], tokens: int
) -> tuple[float, int]:
    """Tokens per second of a full forward pass for each token, and how many of the tokens differ.

    Args:
        continuations: the tokens that each row should be continued by.
        tokens: how many of them are measured, evenly spread.
    """
    prompts = [list(request.tokens) for request in requests(kind, len(continuations))]
    refused, device = ~allowed(kind), generator.model.device
    step, seconds, different = len(continuations[0]) // tokens, 0.0, 0
    for i in range(step - 1, len(continuations[0]), step):
        batch = document_rows(kind, [prompt + row[:i] for prompt, row in zip(prompts, continuations)], asked=1)
        started = clock()
        with torch.no_grad():
            logits = generator.model(Route.of(batch, generator.plan).to(device)).squeeze(1)
        chosen = logits.masked_fill(refused.to(device), -torch.inf).argmax(-1).tolist()
        seconds += clock() - started
        different += sum(a != row[i] for a, row in zip(chosen, continuations))
    return tokens * len(continuations) / seconds, different

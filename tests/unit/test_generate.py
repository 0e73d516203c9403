"""Continuations: greedy ones equal decoding without a cache, sampled ones repeat, and both stay in their modality."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_decoder import CODES, DEPTH, FOUR_CODES, PLANS, SHAPE, build, full_logits, full_outputs

from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.generation.continuation import Continuation
from megatron_ext.generation.document_batch import split_codes
from megatron_ext.generation.generator import Generator
from megatron_ext.generation.likelihood import log_likelihoods
from megatron_ext.generation.pipelined_model import PipelinedModel
from megatron_ext.generation.request import Request
from megatron_ext.generation.sampling import Sampling, next_tokens
from megatron_ext.generation.session import Session
from megatron_ext.model_config import ImageCodesConfig
from megatron_ext.routing.plan import PRESETS
from megatron_ext.token_classes import Task
from megatron_ext.training import watch
from support.generation import EDITS, NULL, PICTURE, REQUESTS, TokenIds, with_codes
from support.vila_u import write_vision_tower

GREEDY = Sampling(temperature=0)


def tasks_of(request: Request, tokens: list[int]) -> list[Task]:
    """The task of each token of a request's prompt and its continuation."""
    tasks, image = [], -1
    for place, token in enumerate(tokens):
        image += token == TokenIds.boi
        drawn = TokenIds.is_image(token) and (place >= len(request.tokens) or image in request.drawn)
        tasks.append(Task.GENERATION if drawn else request.task)
    return tasks


def generator_of(settings: list[str]) -> Generator:
    model, plan = build(settings)
    return Generator(PipelinedModel([model]), plan, TokenIds, grid=(2, 3))


def assert_greedy(generator: Generator, request: Request, continuation: list[int]) -> None:
    """Check every token of a greedy continuation against the full forward pass over what stands before it."""
    left = generator.picture_tokens if request.tokens[-1] == TokenIds.boi else 0
    for i, token in enumerate(continuation):
        tokens = [*request.tokens, *continuation[:i]]
        (logits,) = full_logits(generator.model, generator.plan, [tokens], [tasks_of(request, tokens)])
        logits = logits[-1, : TokenIds.size]
        if left:
            expected = 40 + int(logits[40:60].argmax())
            left -= 1
        elif TokenIds.is_image(tokens[-1]):
            expected = TokenIds.eoi
        else:
            if token == TokenIds.boi:
                left = generator.picture_tokens
                continue
            allowed = [t for t in range(30) if t != TokenIds.bos] + [TokenIds.eod]
            allowed += [TokenIds.boi] if request.images else []
            expected = max(allowed, key=lambda t: float(logits[t]))
        assert token == expected


@pytest.mark.parametrize("plan", PLANS)
def test_greedy_tokens_are_those_of_the_full_forward_pass(one_process, plan):
    one_process(*SHAPE)
    generator = generator_of(PLANS[plan])
    requests = [*REQUESTS, *EDITS]
    for request, continuation in zip(requests, generator(requests, GREEDY), strict=True):
        assert continuation
        assert_greedy(generator, request, continuation)


@pytest.mark.parametrize("plan", ["dense", "himix_hmgen_share_partial"])
def test_log_likelihoods_are_sums_over_the_full_forward_pass(one_process, plan):
    one_process(*SHAPE)
    generator, continuations = generator_of(PLANS[plan]), [[4, 5, TokenIds.eod], [9], [], [3, 3, 3, 3]]
    requests = [*REQUESTS, EDITS[1]]
    continuations.append([41, 42, 43, 44, 45, 46])
    expected = []
    for request, continuation in zip(requests, continuations):
        tokens = [*request.tokens, *continuation]
        (logits,) = full_logits(generator.model, generator.plan, [tokens], [tasks_of(request, tokens)])
        log_probabilities = logits.double().log_softmax(-1)[len(request.tokens) - 1 :]
        expected.append(sum(float(log_probabilities[i, token]) for i, token in enumerate(continuation)))
    assert log_likelihoods(generator, requests, continuations) == pytest.approx(expected, abs=1e-4)


def test_every_token_and_every_likelihood_is_progress_to_the_watch_in_the_phase_it_is_in(one_process, monkeypatch):
    places = []
    monkeypatch.setattr(watch, "_place", (5, "evaluate", 0))
    monkeypatch.setattr(watch, "at", lambda *place: places.append(place))
    one_process(*SHAPE)
    generator = generator_of(PLANS["dense"])
    (continuation,) = generator(REQUESTS[:1], GREEDY)
    decoded = len(places)
    assert decoded >= len(continuation) - 1 > 0  # the end of a picture is not decoded
    log_likelihoods(generator, REQUESTS[:1], [[4, 5]])
    assert len(places) > decoded and {place[:2] for place in places} == {(5, "evaluate")}


def test_pictures_are_whole_and_text_is_text(one_process):
    one_process(*SHAPE)
    first, second, answer, both = generator_of(PLANS["himix_hmgen_share_partial"])(REQUESTS, Sampling(seed=3))
    for picture in (first, second):
        assert len(picture) == 7 and picture[-1] == TokenIds.eoi
        assert all(TokenIds.is_image(token) for token in picture[:-1])
    assert len(answer) <= 7 and not any(map(TokenIds.is_image, answer))
    assert TokenIds.eod not in answer[:-1] and TokenIds.bos not in answer + both
    assert both.count(TokenIds.boi) == both.count(TokenIds.eoi) and sum(map(TokenIds.is_image, both)) == 6 * both.count(
        TokenIds.boi
    )


@pytest.mark.parametrize("end", TokenIds.ends)
def test_an_answer_ends_at_any_end_or_at_its_greatest_length(end):
    row = Continuation(REQUESTS[2], TokenIds, picture_tokens=6)
    assert [row.append(token) for token in (5, 6)] == [[5], [6]] and not row.done
    assert row.append(end) == [] and row.done and row.tokens == [5, 6, end]
    cut = Continuation(REQUESTS[2], TokenIds, picture_tokens=6)
    for _ in range(7):
        assert not cut.done
        cut.append(5)
    assert cut.done


def test_sampled_tokens_depend_on_the_seed_and_the_number_alone(one_process):
    one_process(*SHAPE)
    generator = generator_of(PLANS["hmgen"])
    together = generator(REQUESTS, Sampling(temperature=0.8, seed=5))
    assert together == generator(REQUESTS, Sampling(temperature=0.8, seed=5))
    assert together == [generator([request], Sampling(temperature=0.8, seed=5))[0] for request in REQUESTS]
    assert together != generator(REQUESTS, Sampling(temperature=0.8, seed=6))


def test_guidance_moves_the_logits_away_from_those_without_a_condition(one_process):
    one_process(*SHAPE)
    generator = generator_of(PLANS["dense"])
    (continuation,) = generator([REQUESTS[0]], Sampling(temperature=0, guidance=3.0))
    for i in range(generator.picture_tokens):
        conditional, unconditional = (
            full_logits(generator.model, generator.plan, [tokens], [[Task.GENERATION] * len(tokens)])[0][-1, 40:60]
            for tokens in ([*prompt, *continuation[:i]] for prompt in (PICTURE, NULL))
        )
        assert continuation[i] == 40 + int((unconditional + 3 * (conditional - unconditional)).argmax())
    with pytest.raises(UserError, match="guidance 3 needs a prompt without its condition"):
        generator([Request(PICTURE, Task.GENERATION, images=1)], Sampling(guidance=3.0))


def test_guidance_of_an_edit_drops_the_instruction_and_keeps_the_pictures(one_process):
    one_process(*SHAPE)
    generator, scale = generator_of(PLANS["himix_hmgen_share_partial"]), 2.5
    for request in EDITS[:2]:
        (continuation,) = generator([request], Sampling(temperature=0, guidance=scale))
        for i in range(generator.picture_tokens):
            conditional, unconditional = (
                full_logits(
                    generator.model,
                    generator.plan,
                    [[*prompt, *continuation[:i]]],
                    [tasks_of(replace(request, tokens=prompt), [*prompt, *continuation[:i]])],
                )[0][-1, 40:60]
                for prompt in (request.tokens, request.unconditional)
            )
            assert continuation[i] == 40 + int((unconditional + scale * (conditional - unconditional)).argmax())


def test_memory_is_computed_before_it_is_allocated(one_process):
    one_process(*SHAPE)
    generator = generator_of(["plan.preset=hmgen", "plan.shallow_layers=[1, 2]"])
    # 5 layers, 2 groups of 8; 4 + 6 + 2 + 0 tokens, of which 6 are image tokens that skip two layers.
    assert generator.memory([REQUESTS[0]], GREEDY) == 2 * 2 * 8 * 4 * (3 * 12 + 2 * 6)
    # An edit: 7 text and 6 given image tokens in all layers, 6 drawn ones in three.
    assert generator.memory([EDITS[0]], GREEDY) == 2 * 2 * 8 * 4 * (3 * 20 + 2 * 14)
    assert generator.memory([REQUESTS[0]], Sampling(guidance=2.0)) == 2 * generator.memory([REQUESTS[0]], GREEDY)


def test_top_k_and_top_p_leave_the_likely_tokens():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 9.0]]).repeat(400, 1)
    allowed = torch.tensor([True, True, True, True, False]).expand(400, -1)
    numbers = list(range(400))

    def sampled(**settings) -> set[int]:
        sampling = Sampling(**settings)
        return set(next_tokens(logits, allowed, sampling, sampling.generators(numbers)))

    assert sampled() == {0, 1, 2, 3}
    assert sampled(top_k=2) == {0, 1}
    assert sampled(top_p=0.6) == {0}
    assert sampled(top_p=0.7) == {0, 1}
    assert sampled(temperature=0) == {0}
    sampling = Sampling()
    tokens = next_tokens(logits, allowed, sampling, sampling.generators(numbers))
    assert tokens.count(0) / 400 == pytest.approx(float(logits[0, :4].softmax(-1)[0]), abs=0.08)


@pytest.mark.parametrize("plan", PRESETS)
def test_every_code_is_that_of_the_guided_logits_of_the_full_forward_pass(one_process, plan):
    """At every depth of every image token drawn, given the codes before; the text around the pictures is greedy too."""
    one_process(*SHAPE)
    generator, scale = generator_of(PLANS[plan] + FOUR_CODES), 2.5
    requests = [with_codes(request) for request in (REQUESTS[0], *EDITS[:2])]
    continuations = generator(requests, Sampling(temperature=0, guidance=scale))
    for request, continuation in zip(requests, continuations, strict=True):
        assert len(continuation) == generator.picture_tokens * DEPTH + 1 and continuation[-1] == TokenIds.eoi
        of_prompts = []
        for prompt in (request.tokens, request.unconditional):
            tokens, codes = split_codes(TokenIds, [*prompt, *continuation], DEPTH)
            first = len(split_codes(TokenIds, prompt, DEPTH)[0])
            tasks = tasks_of(replace(request, tokens=tokens[:first]), tokens)
            ((_, of_codes),) = full_outputs(generator.model.last, generator.plan, [tokens], [tasks], [codes])
            of_prompts.append([of_codes[place] for place in range(first - 1, len(tokens) - 2)])
        drawn = codes[-generator.picture_tokens :]
        assert len({tuple(of_token) for of_token in drawn}) > 1, "a picture in which a stale code would not show"
        for conditional, unconditional, of_token in zip(*of_prompts, drawn, strict=True):
            assert (unconditional + scale * (conditional - unconditional)).argmax(-1).tolist() == of_token


def test_pictures_of_four_codes_depend_on_the_seed_and_the_number_alone(one_process):
    one_process(*SHAPE)
    generator = generator_of(PLANS["himix_hmgen_share_partial"] + FOUR_CODES)
    requests = [with_codes(request) for request in (*REQUESTS, *EDITS)]
    sampling = Sampling(temperature=0.8, top_k=12, top_p=0.9, seed=5)
    together = generator(requests, sampling)
    assert together == [generator([request], sampling)[0] for request in requests]
    assert together != generator(requests, replace(sampling, seed=6))
    both = together[3]  # text and pictures
    assert sum(map(TokenIds.is_image, both)) == 6 * DEPTH * both.count(TokenIds.boi) > 0
    assert not any(map(TokenIds.is_image, together[2]))
    # Where nothing is dropped from the prompt, guidance changes nothing.
    picture = replace(requests[0], unconditional=requests[0].tokens)
    assert generator([picture], replace(sampling, guidance=3.0)) == together[:1]


def test_log_likelihood_of_an_image_is_summed_over_its_codes(one_process):
    one_process(*SHAPE)
    generator = generator_of(PLANS["himix_hmgen_share_all"] + FOUR_CODES)
    request, answer = with_codes(EDITS[1]), with_codes(REQUESTS[2])
    picture = torch.randint(40, 40 + CODES, (6 * DEPTH,), generator=torch.Generator().manual_seed(1)).tolist()
    measured = log_likelihoods(generator, [request, answer], [[*picture, TokenIds.eoi, 5], [4, TokenIds.eod]])
    tokens, codes = split_codes(TokenIds, [*request.tokens, *picture, TokenIds.eoi, 5], DEPTH)
    first = len(tokens) - 8
    tasks = tasks_of(replace(request, tokens=tokens[:first]), tokens)
    ((of_text, of_codes),) = full_outputs(generator.model.last, generator.plan, [tokens], [tasks], [codes])
    expected = sum(
        float(of_codes[first - 1 + i].log_softmax(-1)[torch.arange(DEPTH), torch.tensor(codes[i - 6])].sum())
        for i in range(6)
    ) + sum(float(of_text[first + i - 1].log_softmax(-1)[tokens[first + i]]) for i in (6, 7))
    assert measured[0] == pytest.approx(expected, abs=1e-3) and measured[1] < 0


def test_sampled_codes_have_the_frequencies_of_the_kept_softmax():
    """Top-k, then top-p of what it leaves; 1e5 draws. A chi-squared test, whose statistic is below 30 at 6 degrees of
    freedom in all but 4 cases of 100 000."""
    logits, draws = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.2, 0.1, 0.0, -0.1, -0.5, -1.0]), 100_000
    generator = torch.Generator().manual_seed(3)
    sampling = Sampling(temperature=0.9, top_k=8, top_p=0.93)
    tokens = next_tokens(logits.expand(draws, -1), None, sampling, [generator] * draws)
    kept = (logits[:8] / 0.9).softmax(-1)
    kept = kept[: int((kept.cumsum(0) < 0.93).sum()) + 1]  # with the one that crosses 0.93
    expected = kept / kept.sum() * draws
    counts = torch.bincount(torch.tensor(tokens), minlength=10).double()
    assert len(kept) == 7 and not counts[7:].any()
    assert float(((counts[:7] - expected) ** 2 / expected).sum()) < 30


def test_a_tokenizer_that_the_model_was_not_trained_with_is_refused(tmp_path):
    write_vision_tower(tmp_path / "tower", depth=4, codebook_size=24)

    def session(**image_codes) -> Session:
        config = Config()
        config.model.image_codes = ImageCodesConfig(**image_codes)
        vocabulary = SimpleNamespace(folder="v", codebook_size=24)
        trained = SimpleNamespace(config=config, vocabulary=vocabulary, chunks=[torch.nn.Linear(1, 1)])
        return Session(trained, tmp_path / "tower", batch_size=1)

    with pytest.raises(UserError, match=r"tower: makes 4 codes of an image token, the model .* has 1$"):
        session()
    with pytest.raises(UserError, match=r"tower: its fingerprint is .*, the model was trained with the codes of other"):
        session(depth=4, fingerprint="other")

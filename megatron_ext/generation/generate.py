"""Whole continuations: answers, pictures, or both in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.generation.cache import Cache, cache_bytes, layer_capacities
from megatron_ext.generation.decoder import Decoder, tokens_by_class
from megatron_ext.generation.sampling import Sampling, next_tokens
from megatron_ext.routing.plan import Plan
from megatron_ext.token_classes import Task
from megatron_ext.transformer.model import UnifiedModel
from megatron_ext.vocabulary import Vocabulary


@dataclass(frozen=True)
class Request:
    """A document to go on with.

    Attributes:
        tokens: the prompt, ``bos`` included; texts and images in any order. A picture follows one that ends in
            ``<boi>``.
        task: what the document is for; its tokens are routed by that.
        text_tokens: most text tokens to generate; generation also ends at ``<eod>``.
        images: pictures to generate at most; after the last one generation ends.
        null: the prompt without its condition, for classifier-free guidance.
        number: with the seed it decides what is drawn.
    """

    tokens: Sequence[int]
    task: Task
    text_tokens: int = 0
    images: int = 0
    null: Sequence[int] | None = None
    number: int = 0


class Generator:
    """Continues requests with a model.

    Args:
        model: the whole model in evaluation mode; on every tensor-parallel rank.
        grid: rows and columns of image tokens in a picture.
    """

    def __init__(self, model: UnifiedModel, plan: Plan, vocabulary: Vocabulary, grid: tuple[int, int]):
        self.model, self.plan, self.vocabulary = model, plan, vocabulary
        self.picture = grid[0] * grid[1]
        size = parallel_state.get_tensor_model_parallel_world_size()
        self._groups = model.config.num_query_groups // size
        parameter = next(model.parameters())
        self._dtype, self._device = parameter.dtype, parameter.device
        ids = torch.arange(vocabulary.size, device=self._device)
        self._image = vocabulary.is_image(ids)
        self._text = (ids < vocabulary.text_size) & (ids != vocabulary.bos) | (ids == vocabulary.eod)

    def memory(self, requests: Sequence[Request], sampling: Sampling) -> int:
        """Bytes on each rank of the cache for these requests together."""
        rows = len(self._prompts(requests, sampling))
        capacities = self._capacities(requests, sampling)
        return cache_bytes(capacities, rows, self._groups, self.model.config.kv_channels, self._dtype.itemsize)

    def __call__(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[list[int]]:
        """The tokens that follow each prompt, ``<eod>`` and ``<eoi>`` included; the same on every rank.

        Args:
            progress: told how many tokens have been generated since it was last called.
        """
        guided = sampling.guidance != 1
        prompts, capacities = self._prompts(requests, sampling), self._capacities(requests, sampling)
        config, n = self.model.config, len(requests)
        cache = Cache(self.plan, capacities, len(prompts), self._groups, config.kv_channels, self._dtype, self._device)
        tasks = [request.task for request in requests] * (2 if guided else 1)
        decoder = Decoder(self.model, self.plan, self.vocabulary, tasks, cache)
        rows = [_Row(self, request) for request in requests]
        generators = sampling.generators([request.number for request in requests])
        logits = decoder.advance(prompts)
        while any(not row.done for row in rows):
            active = [i for i, row in enumerate(rows) if not row.done]
            drawn = [i for i in active if rows[i].forced is None]
            if drawn:
                chosen = self._logits(logits, drawn, n, sampling)
                allowed = torch.stack([rows[i].allowed for i in drawn])
                picked = next_tokens(chosen, allowed, sampling, [generators[i] for i in drawn])
                for i, token in zip(drawn, picked):
                    rows[i].take(token)
            for i in active:
                if rows[i].forced is not None and i not in drawn:
                    rows[i].take(rows[i].forced)
            progress(len(active))
            # What ended a document is not read any more.
            fed = [[row.made[-1]] if i in active and not row.done else [] for i, row in enumerate(rows)]
            if any(fed):
                logits = decoder.advance(fed + fed if guided else fed)
        return [row.made for row in rows]

    def _logits(self, logits: Tensor, rows: Sequence[int], n: int, sampling: Sampling) -> Tensor:
        """[rows, vocabulary], whole and guided."""
        if sampling.guidance != 1:
            null = self._whole(logits[[n + i for i in rows]])
            return null + sampling.guidance * (self._whole(logits[rows]) - null)
        return self._whole(logits[rows])

    def _whole(self, logits: Tensor) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() > 1:
            parts = [torch.empty_like(logits) for _ in range(group.size())]
            dist.all_gather(parts, logits.contiguous(), group=group)
            logits = torch.cat(parts, -1)
        return logits[:, : self.vocabulary.size].float()

    def _prompts(self, requests: Sequence[Request], sampling: Sampling) -> list[Sequence[int]]:
        prompts = [request.tokens for request in requests]
        if sampling.guidance == 1:
            return prompts
        if any(request.null is None for request in requests):
            raise UserError(f"guidance {sampling.guidance:g} needs a prompt without its condition")
        return prompts + [request.null for request in requests]

    def _capacities(self, requests: Sequence[Request], sampling: Sampling) -> list[int]:
        """Keys per row that each layer may come to hold."""
        of_rows = []
        for request in requests:
            images = [self.vocabulary.image_offset] * self.picture * request.images
            texts = [self.vocabulary.eod] * (request.text_tokens + 2 * request.images)
            prompts = [request.tokens] if sampling.guidance == 1 else [request.tokens, request.null]
            for prompt in prompts:
                counts = tokens_by_class(self.vocabulary, request.task, [*prompt, *images, *texts])
                of_rows.append(layer_capacities(self.plan, counts))
        return [max(layer) for layer in zip(*of_rows)]


class _Row:
    """One document while it grows: what may come next, and when it ends."""

    def __init__(self, of: Generator, request: Request):
        self._of, self._request = of, request
        self.made: list[int] = []
        self.forced: int | None = None
        self.done = False
        self._images, self._texts = 0, 0
        self._left = of.picture if request.tokens[-1] == of.vocabulary.boi else 0
        if self._left and not request.images:
            raise UserError("a prompt ends in <boi>, but no picture is wanted after it")
        self._open_text()

    @property
    def allowed(self) -> Tensor:
        """Tokens that may come next, bool [vocabulary]."""
        if self._left:
            return self._of._image
        if self._images < self._request.images:
            allowed = self._of._text.clone()
            allowed[self._of.vocabulary.boi] = True
            return allowed
        return self._of._text

    def take(self, token: int) -> None:
        vocabulary = self._of.vocabulary
        self.made.append(token)
        self.forced = None
        if self._left:
            self._left -= 1
            if not self._left:
                self.forced = vocabulary.eoi
        elif token == vocabulary.eoi:
            self._images += 1
            self._open_text()
        elif token == vocabulary.boi:
            self._left = self._of.picture
        elif token == vocabulary.eod:
            self.done = True
        else:
            self._texts += 1
            self._open_text()

    def _open_text(self) -> None:
        """Outside of a picture: go on with text, with a picture, or end."""
        if self._left:
            return
        if self._images >= self._request.images > 0 or self._texts >= self._request.text_tokens:
            more_images = self._images < self._request.images
            self.forced = self._of.vocabulary.boi if more_images else None
            self.done = not more_images

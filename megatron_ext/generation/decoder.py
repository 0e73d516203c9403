"""The model over rows that grow: pieces of documents go in, the logits of the next tokens come out."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_ext.data.batch import Batch
from megatron_ext.generation.cache import Cache
from megatron_ext.generation.prompt_batch import alignment, rows_of
from megatron_ext.routing.groups import token_classes
from megatron_ext.routing.plan import Plan, class_index
from megatron_ext.routing.route import Route, image_places
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from megatron_ext.transformer.model import UnifiedModel
from megatron_ext.vocabulary import Vocabulary

PREFILL_CHUNK = 512
"""Tokens of a row that go through the model at once: longer prompts are read piece by piece."""


class Decoder:
    """Some documents that grow together.

    Every token takes part in every layer as the plan says, and costs what it costs in training; tokens of earlier calls
    are seen through the cache alone.
    """

    def __init__(self, model: UnifiedModel, plan: Plan, vocabulary: Vocabulary, tasks: Sequence[Task], cache: Cache):
        """
        Args:
            model: the whole model (one pipeline stage), in evaluation mode; any tensor-parallel size.
            tasks: of each document.
            cache: empty, with a row for each document and enough room.
        """
        self._alignment = alignment(model)
        self._model, self._plan, self._vocabulary, self._cache = model, plan, vocabulary, cache
        self._tasks = torch.tensor([int(task) for task in tasks], dtype=torch.int8)
        self._positions = torch.zeros(len(tasks), dtype=torch.int64)
        self._images = np.zeros(len(tasks), dtype=np.int64)  # image tokens that each document ends with so far
        self._steps: dict[bytes, Route] = {}

    @torch.no_grad()
    def advance(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Read the next tokens of each document; none at all is fine.

        Returns:
            Logits [documents, vocabulary / tensor-parallel size] after the last token of each; zeros where none came.
        """
        rows, longest = len(tokens), max(map(len, tokens))
        if longest <= PREFILL_CHUNK and all(tokens):
            return self._advance(tokens, torch.ones(rows, dtype=torch.bool))
        logits = None
        for start in range(0, longest, PREFILL_CHUNK):
            piece = [row[start : start + PREFILL_CHUNK] for row in tokens]
            last = [len(row) <= start + PREFILL_CHUNK and len(part) > 0 for row, part in zip(tokens, piece)]
            made = self._advance(piece, torch.tensor(last))
            if logits is None:
                logits = made.new_zeros(rows, made.shape[-1])
            logits[torch.tensor(last, device=logits.device)] = made
        return logits

    def _advance(self, tokens: Sequence[Sequence[int]], last: Tensor) -> Tensor:
        """Logits [documents that are at their last token, vocabulary / tensor-parallel size]."""
        route = self._route(tokens, last)
        for layer in route.layers:
            layer.cache = self._cache
        self._cache.begin(route.layers)
        self._positions += torch.tensor([len(row) for row in tokens])
        return self._model(route).squeeze(1)

    def _route(self, tokens: Sequence[Sequence[int]], last: Tensor) -> Route:
        batch = rows_of(self._vocabulary, tokens, self._tasks, self._positions).arrays()
        real = batch.document != PADDING_DOCUMENT
        lengths = np.array([len(row) for row in tokens])
        places = image_places(batch, self._images)
        self._images = np.where(lengths > 0, places[np.arange(len(tokens)), lengths - 1], self._images)
        single = batch.shape[1] == 1
        key = np.where(real, token_classes(batch, self._plan, None), -1).tobytes() if single else b""
        if single and key in self._steps:
            return self._again(self._steps[key], batch, places)
        wanted = last.numpy()[:, None] & (np.arange(batch.shape[1]) == lengths[:, None] - 1)
        route = Route.of(batch, self._plan, *self._alignment, wanted=wanted, cached=True, places=places)
        route = route.to(next(self._model.parameters()).device)
        if single:
            self._steps[key] = route
        return route

    def _again(self, route: Route, batch: Batch, places: np.ndarray) -> Route:
        """The route of an earlier step, whose tokens were of the same classes, for these."""
        device, positions = route.tokens.device, torch.as_tensor(batch.positions.ravel().astype(np.int32))
        for layer in {id(layer): layer for layer in route.layers}.values():
            of_queries, of_keys = layer.places.query_rows, layer.places.key_rows
            layer.query_positions = layer.key_positions = positions[of_keys].to(device)
            if of_queries.numel() < of_keys.numel():
                layer.query_positions = positions[of_queries].to(device)
            layer.rotary = None
        route.longest_document = int(positions.max()) + 1
        route.tokens = torch.as_tensor(batch.tokens.ravel()).to(device)[route.order].unsqueeze(0)
        route.image_places = torch.as_tensor(places.ravel()).to(device)[route.order]
        route.longest_image = int(places.max())
        return route


def tokens_by_class(vocabulary: Vocabulary, task: Task, tokens: Sequence[int]) -> list[int]:
    """How many of ``tokens`` of a document are in each class (by ``class_index``)."""
    counts = [0] * (len(Task) * len(Modality))
    images = sum(1 for token in tokens if vocabulary.is_image(token))
    counts[class_index(task, Modality.IMAGE)] = images
    counts[class_index(task, Modality.TEXT)] = len(tokens) - images
    return counts

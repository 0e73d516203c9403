"""The model over documents that grow: chunks of tokens go in, the logits of the next tokens come out."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron_ext.data.batch import Batch
from megatron_ext.generation.cache import Cache
from megatron_ext.generation.document_batch import document_batch, row_alignment_of
from megatron_ext.routing.groups import token_classes
from megatron_ext.routing.layer_route import CachedLayerRoute
from megatron_ext.routing.plan import Plan, class_index
from megatron_ext.routing.route import Route, image_places
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from megatron_ext.transformer.model import UnifiedModel
from megatron_ext.vocabulary import Vocabulary

PREFILL_CHUNK = 512
"""Tokens of a row in one forward pass: longer prompts are read in chunks."""


class Decoder:
    """Documents that grow together.

    Every token takes part in every layer as the plan says, at the cost it has in training. Tokens of earlier calls are
    visible through the cache only.
    """

    def __init__(self, model: UnifiedModel, plan: Plan, vocabulary: Vocabulary, rows: int, cache: Cache):
        """
        Args:
            model: the whole model (one pipeline stage), in evaluation mode; any tensor-parallel size.
            rows: number of documents.
            cache: empty, with a row for each document and enough room.
        """
        self._alignment = row_alignment_of(model)
        self._model, self._plan, self._vocabulary, self._cache = model, plan, vocabulary, cache
        self._positions = torch.zeros(rows, dtype=torch.int64)
        self._images = np.zeros(rows, dtype=np.int64)  # image tokens at the end of each document
        self._single_token_routes: dict[bytes, Route] = {}  # by the tokens' classes

    @torch.no_grad()
    def advance(self, tokens: Sequence[Sequence[int]], tasks: Sequence[Sequence[Task]]) -> Tensor:
        """Read the next tokens of each document; a document may have none.

        Args:
            tasks: of each token.

        Returns:
            Logits [documents, vocabulary / tensor-parallel size] after the last token of each; zeros for documents
            without tokens.
        """
        rows, longest = len(tokens), max(map(len, tokens))
        if longest <= PREFILL_CHUNK and all(tokens):
            return self._advance(tokens, tasks, torch.ones(rows, dtype=torch.bool))
        logits = None
        for start in range(0, longest, PREFILL_CHUNK):
            chunk, chunk_tasks = (
                [row[start : start + PREFILL_CHUNK] for row in rows_of] for rows_of in (tokens, tasks)
            )
            last = [len(row) <= start + PREFILL_CHUNK and len(part) > 0 for row, part in zip(tokens, chunk)]
            chunk_logits = self._advance(chunk, chunk_tasks, torch.tensor(last))
            if logits is None:
                logits = chunk_logits.new_zeros(rows, chunk_logits.shape[-1])
            logits[torch.tensor(last, device=logits.device)] = chunk_logits
        return logits

    def _advance(self, tokens: Sequence[Sequence[int]], tasks: Sequence[Sequence[Task]], last: Tensor) -> Tensor:
        """Logits [documents that are at their last token, vocabulary / tensor-parallel size]."""
        route = self._route(tokens, tasks, last)
        self._cache.begin_chunk(route.layers)
        self._positions += torch.tensor([len(row) for row in tokens])
        return self._model(route, attend=self._cache.attend).squeeze(1)

    def _route(self, tokens: Sequence[Sequence[int]], tasks: Sequence[Sequence[Task]], last: Tensor) -> Route:
        batch = document_batch(self._vocabulary, tokens, tasks, self._positions).arrays()
        real = batch.document != PADDING_DOCUMENT
        lengths = np.array([len(row) for row in tokens])
        places = image_places(batch, self._images)
        self._images = np.where(lengths > 0, places[np.arange(len(tokens)), lengths - 1], self._images)
        single = batch.shape[1] == 1
        key = np.where(real, token_classes(batch, self._plan, None), -1).tobytes() if single else b""
        if single and key in self._single_token_routes:
            return _with_tokens(self._single_token_routes[key], batch, places)
        targets = last.numpy()[:, None] & (np.arange(batch.shape[1]) == lengths[:, None] - 1)
        route = Route.of(batch, self._plan, *self._alignment, logit_mask=targets, cached=True, places=places)
        route = route.to(next(self._model.parameters()).device)
        if single:
            self._single_token_routes[key] = route
        return route


def _with_tokens(route: Route, batch: Batch, places: np.ndarray) -> Route:
    """The route of an earlier step for a batch [rows, 1] of tokens of the same classes."""
    device, positions = route.tokens.device, torch.as_tensor(batch.positions.ravel().astype(np.int32))

    def moved(layer: CachedLayerRoute) -> CachedLayerRoute:
        query_rows, key_rows = layer.places.query_rows, layer.places.key_rows
        query_positions = key_positions = positions[key_rows].to(device)
        if query_rows.numel() < key_rows.numel():
            query_positions = positions[query_rows].to(device)
        return replace(layer, query_positions=query_positions, key_positions=key_positions)

    distinct = {id(layer): layer for layer in route.layers}
    layers = {key: moved(layer) for key, layer in distinct.items()}
    return replace(
        route,
        layers=[layers[id(layer)] for layer in route.layers],
        longest_document=int(positions.max()) + 1,
        tokens=torch.as_tensor(batch.tokens.ravel()).to(device)[route.order].unsqueeze(0),
        image_places=torch.as_tensor(places.ravel()).to(device)[route.order],
        longest_image=int(places.max()),
    )


def tokens_by_class(vocabulary: Vocabulary, tokens: Sequence[int], tasks: Sequence[Task]) -> list[int]:
    """The number of a document's ``tokens`` in each class (by ``class_index``)."""
    counts = [0] * (len(Task) * len(Modality))
    for token, task in zip(tokens, tasks, strict=True):
        counts[class_index(task, Modality.IMAGE if vocabulary.is_image(token) else Modality.TEXT)] += 1
    return counts
